"""What `mmssl evaluate` measures, on clips whose answer is known."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmssl.build import build_encoder, build_objective
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.text import Classes
from mmssl.embed import load, read_weighting
from mmssl.evaluation import attentive, superb
from mmssl.evaluation.geometry import rank_me, spread
from mmssl.evaluation.score import average_precisions
from mmssl.modalities import MODALITIES
from mmssl.store import write_embeddings
from mmssl.tasks.evaluate import LogMel, as_baseline, evaluate, labelled
from mmssl.training.checkpoint import export_encoder
from mmssl.types import Raw

IMAGE: dict[str, Any] = {
    "format": 1,
    "modality": "image",
    "frontend": {"name": "patches", "size": [8, 8], "channels": 1, "mean": [0.5], "std": [0.5]},
    "positions": {"name": "sincos"},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {},
    "augment_eval": [],
    "objective": {"name": "classify"},
    "classes": ["checks", "stripes"],
    "vocabulary": None,
}
SPEECH: dict[str, Any] = {
    **IMAGE,
    "modality": "speech",
    "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4], [8, 4, 4]], "rate": 8000},
    "positions": {"name": "conv", "kernel": 8, "groups": 2},
    "encoder": {"mask_token": True},
    "objective": {"name": "ctc"},
    "classes": None,
    "vocabulary": ["<blank>", "|", "g", "h", "i", "l", "o", "w"],
}

AUDIO: dict[str, Any] = {
    **SPEECH,
    "modality": "audio",
    "frontend": {"name": "spectrogram", "size": [8, 16], "bands": 32, "rate": 8000},
    "positions": {"name": "sincos"},
    "encoder": {"prefix": 1},
    "objective": {"name": "classify", "multi_label": True},
    "classes": ["high", "long", "low"],
    "vocabulary": None,
}

VIDEO: dict[str, Any] = {
    **IMAGE,
    "modality": "video",
    "frontend": {"name": "tubes", "size": [2, 8, 8], "rate": 8, "channels": 1, "mean": [0.5], "std": [0.5]},
}


def exported(folder: Path, config: dict[str, Any], *, tuned: bool = False) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(config)
    export_encoder(folder, encoder, config, objective=build_objective(config, encoder) if tuned else None)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("image"), IMAGE, tuned=True)


def test_log_mel_tells_low_from_high_by_both_protocols(heard: dict[str, Path], tmp_path: Path) -> None:
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {"train": heard["train"], "test": heard["test"], "baseline": "logmel"}
    for task, more in (("linear", {}), ("knn", {"k": 3})):
        score = evaluate(run, task=task, pool="slices:2+std", **more, **given)["accuracy"]
        assert (score.value, score.n) == (1.0, 4)
        assert "log-mel energies, pool slices:2+std" in score.protocol
        assert json.loads(score.to_json())["details"]["pool"] == "slices:2+std"


def test_layer_and_strength_are_chosen_on_clips_set_aside_and_the_protocol_says_so(
    image: Path, seen: dict[str, Path]
) -> None:
    score = evaluate(image, train=seen["train"], test=seen["test"])["accuracy"]
    assert "validation is a fifth of the training clips" in score.protocol
    assert "fitted on train+valid" in score.protocol
    assert set(score.details["valid"]) == {-1, 0, 1, 2}
    best = max(score.details["valid"].values())
    assert score.details["valid"][score.details["layer"]] == best


def test_a_class_without_a_training_clip_that_can_be_read_is_named(
    image: Path, seen: dict[str, Path], tmp_path: Path
) -> None:
    rows = list(Manifest(seen["train"]))
    gone = [{**row, "image": str(tmp_path / "none.png")} if row["label"] == "checks" else row for row in rows]
    write_manifest(tmp_path / "train.jsonl", gone)
    given: dict[str, Any] = {"train": tmp_path / "train.jsonl", "test": seen["test"], "task": "knn", "k": 1}
    with pytest.raises(ValueError, match="training has no clip that could be read: 'checks'; give it some"):
        evaluate(image, layer=0, on_bad_clip="skip", **given)


def test_what_is_to_be_chosen_is_chosen_by_leaving_out_groups(heard: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "speaker": f"speaker {n % 3}"} for n, row in enumerate(Manifest(heard["train"]))]
    write_manifest(tmp_path / "train.jsonl", rows)
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {"train": tmp_path / "train.jsonl", "test": heard["test"], "baseline": "logmel"}
    score = evaluate(run, by="speaker", **given)["accuracy"]
    assert "leaving out each of 3 groups in turn" in score.protocol
    assert "groups are speaker" in score.protocol
    assert score.details["n_train"] == 12
    with pytest.raises(ValueError, match="leave valid out"):
        evaluate(run, by="speaker", valid=heard["test"], **given)


def test_a_fixed_strength_needs_no_validation(image: Path, seen: dict[str, Path]) -> None:
    score = evaluate(image, train=seen["train"], test=seen["test"], layer=-1, strength=0.5)["accuracy"]
    assert (score.details["C"], score.details["n_train"]) == (0.5, 12)
    assert "validation" not in score.protocol


def test_few_labels_stay_few(image: Path, seen: dict[str, Path]) -> None:
    score = evaluate(image, train=seen["train"], test=seen["test"], layer=0, labels_per_class=2, draws=3)["accuracy"]
    assert [draw["n_train"] for draw in score.details["draws"]] == [4, 4, 4]
    assert [draw["refit"] for draw in score.details["draws"]] == ["train"] * 3
    assert score.deviation is not None


def test_a_share_of_the_labels_is_of_every_class(image: Path, seen: dict[str, Path]) -> None:
    given: dict[str, Any] = {"train": seen["train"], "test": seen["test"], "layer": 0, "task": "knn", "k": 1}
    score = evaluate(image, label_share=0.01, draws=4, **given)["accuracy"]
    # a hundredth of 6 is none, so it is one of each of 2 classes
    assert [draw["n_train"] for draw in score.details["draws"]] == [2] * 4
    assert "1 % of the labels, 4 draws" in score.protocol


def test_frozen_features_are_measured_as_they_are(heard: dict[str, Path], tmp_path: Path) -> None:
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {"test": heard["train"], "baseline": "logmel", "pool": "slices:2+std"}
    features = as_baseline(load(run), "logmel").embed(heard["train"], pool="slices:2+std").scene
    clusters = evaluate(run, task="cluster", **given)
    assert clusters["nmi"].value == clusters["ari"].value == pytest.approx(1.0)
    assert "log-mel energies, layer -1, pool slices:2+std" in clusters["nmi"].protocol
    found = evaluate(run, task="retrieval", **given)
    assert list(found) == ["map", "at_1", "at_5", "at_10"]
    assert found["map"].value == found["at_1"].value == pytest.approx(1.0)
    searched = evaluate(run, task="retrieval", train=heard["test"], **given)
    assert "among 4 clips of train" in searched["at_1"].protocol
    rank = evaluate(run, task="rank", **given)
    assert (rank["rank_me"].value, rank["spread"].value) == (rank_me(features), spread(features))
    words = evaluate(run, task="verify", **given)
    assert words["eer"].value == 0.0
    assert "all pairs: 30 of one class, 36 of two" in words["eer"].protocol
    assert json.loads(words["min_dcf_0.01"].to_json())["details"]["layer"] == -1


def test_an_attentive_probe_looks_at_all_tokens_of_the_output(
    heard: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentive, "LEAST_UPDATES", 40)
    given: dict[str, Any] = {"train": heard["train"], "test": heard["test"], "task": "attentive"}
    run = exported(tmp_path / "run", SPEECH)
    score = evaluate(run, baseline="logmel", **given)["accuracy"]
    assert score.value == 1.0
    assert (score.details["layer"], score.details["pool"]) == (-1, "attention")
    assert "validation is a fifth of the training clips" in score.protocol
    with pytest.raises(ValueError, match="attentive pools by attention; leave pool out"):
        evaluate(run, pool="class", **given)


def test_errors_on_spoiled_clips_are_those_of_a_probe_of_clean_ones(
    heard: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = MODALITIES["speech"].corruptions
    for name in [name for name in kinds if name != "quiet"]:
        monkeypatch.delitem(kinds, name)
    monkeypatch.setitem(kinds, "silence", lambda x, rng, *, severity: x * (severity < 4))
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {"train": heard["train"], "test": heard["test"], "strength": 1.0, "baseline": "logmel"}
    scores = evaluate(run, task="corruption", **given)
    assert scores["clean"].value == 0.0
    errors = scores["mce"].details["errors"]
    # clips that are all silent are all told as the same one of two words: half of them wrongly
    assert errors["silence"] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert scores["mce"].value == pytest.approx((sum(errors["quiet"]) / 5 + 0.2) / 2)
    # 6 decibels move every log energy by the same: standardized on the quiet clips none is told wrongly
    assert scores["mce_adapted"].details["errors"]["quiet"][0] == 0.0
    assert (scores["mce"].details["clean"], scores["mce"].details["clean_adapted"]) == (0.0, 0.0)
    assert "re-estimated on each kind and severity of test clips, without labels" in scores["mce_adapted"].protocol
    assert "re-estimated" not in scores["mce"].protocol
    again = evaluate(run, task="corruption", batch_size=1, **given)
    assert again["mce"].details["errors"] == errors
    plain = {"mce": {"details": {"errors": {"quiet": [0.5] * 5, "silence": [0.25] * 5}}}}
    (tmp_path / "other.json").write_text(json.dumps(plain))
    relative = evaluate(run, task="corruption", against=tmp_path / "other.json", **given)["mce"]
    assert relative.value == pytest.approx((sum(errors["quiet"]) / 2.5 + 1 / 1.25) / 2)
    assert "relative to those of other.json" in relative.protocol
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: holds no scores of --task corruption"):
        evaluate(run, task="corruption", against=tmp_path / "bad.json", **given)


def test_superb_weighs_layers_and_its_weights_are_a_layer_to_embed(
    heard: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superb, "LEAST_UPDATES", 60)
    monkeypatch.setattr(superb, "EPOCHS", 1)
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {"train": heard["train"], "valid": heard["train"], "test": heard["test"]}
    score = evaluate(run, task="superb", **given)["accuracy"]
    assert "learned weights of 3 layers" in score.protocol
    assert sum(score.details["weights"].values()) == pytest.approx(1.0)
    (tmp_path / "scores.json").write_text(json.dumps({"accuracy": asdict(score)}))
    weights = read_weighting(tmp_path / "scores.json")
    embedder = load(run)
    every = embedder.embed(heard["test"], layer="all")
    one = embedder.embed(heard["test"], layer=weights)
    expected = sum(weights[i] * layer.scene for i, layer in enumerate(every))
    torch.testing.assert_close(one.scene, expected)
    torch.testing.assert_close(one.tokens, sum(weights[i] * layer.tokens for i, layer in enumerate(every)))
    assert (
        "layer sum of 3 by weights" in evaluate(run, task="verify", test=heard["train"], layer=weights)["eer"].protocol
    )
    settings: dict[str, Any] = {"train": heard["train"], "test": heard["test"], "layer": weights, "strength": 1.0}
    probed = evaluate(run, **settings)["accuracy"]
    assert probed.n == 4
    assert list(json.loads(json.dumps(asdict(probed)))["details"]["valid"]) == ["weighted"]
    assert evaluate(run, task="corruption", **settings)["clean"].n == 4
    for _ in range(2):  # and once more where nothing is left to do
        write_embeddings(embedder, [str(heard["test"])], tmp_path / "w.npz", layers=[tuple(weights.items())])
        assert np.load(tmp_path / "w.npz")["scene"] == pytest.approx(one.scene.numpy(), abs=1e-5)
    words = evaluate(run, task="superb-verify", **given)
    assert "0 of 2 classes are not among those of train" in words["eer"].protocol
    assert words["eer"].task == "superb-verify"
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json: holds no weights of layers"):
        read_weighting(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="layer=7: .* has layers 0 to 2"):
        embedder.embed(heard["test"], layer={7: 1.0})
    with pytest.raises(ValueError, match="superb weights all layers and takes means; leave both out"):
        evaluate(run, task="superb", layer=1, **given)


def test_superb_spells_from_frozen_layers(
    heard: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superb, "LEAST_UPDATES", 4)
    monkeypatch.setattr(superb, "EPOCHS", 1)
    monkeypatch.setattr(superb, "HIDDEN", 8)
    run = exported(tmp_path / "run", SPEECH)
    scores = evaluate(run, task="superb-ctc", train=heard["train"], test=heard["test"])
    assert list(scores) == ["wer", "cer"]
    assert "validation is a fifth of the training clips" in scores["cer"].protocol
    assert list(scores["cer"].details["weights"]) == ["0", "1", "2"]


def test_each_layer_is_compared_with_what_was_measured_and_with_the_classes(
    heard: dict[str, Path], tmp_path: Path
) -> None:
    run = exported(tmp_path / "run", SPEECH)
    scores = evaluate(run, task="layers", test=heard["train"], train=heard["train"], plot=tmp_path / "layers.svg")
    assert list(scores) == ["input", "labels", "information", "probe"]
    for score in scores.values():
        assert list(score.details["layers"]) == ["-1", "0", "1", "2"]
        assert score.n == 12
    assert "log-mel energies" in scores["input"].protocol
    assert "validation is a fifth of the training clips" in scores["probe"].protocol
    assert (tmp_path / "layers.svg").read_text().startswith("<svg")
    # as a probe of that layer alone says
    alone = evaluate(run, task="linear", test=heard["train"], train=heard["train"], layer=1)["accuracy"]
    assert scores["probe"].details["layers"]["1"]["value"] == alone.value
    again = evaluate(run, task="layers", test=heard["train"], batch_size=1)["input"]
    assert again.value == pytest.approx(scores["input"].value, abs=1e-5)


def test_pixels_are_told_from_the_layer_that_is_a_linear_map_of_them(tmp_path: Path) -> None:
    from PIL import Image

    # patches of three directions, which a random map to 16 dimensions keeps apart
    rng = np.random.default_rng(0)
    patterns, rows = rng.uniform(0, 80, (3, 8, 8)), []
    for n in range(20):
        Image.fromarray(np.tensordot(rng.uniform(size=3), patterns, 1).astype(np.uint8)).save(tmp_path / f"{n}.png")
        rows.append({"image": str(tmp_path / f"{n}.png")})
    write_manifest(tmp_path / "m.jsonl", rows)
    run = exported(tmp_path / "run", {**IMAGE, "positions": {"name": "none"}})
    score = evaluate(run, task="layers", test=tmp_path / "m.jsonl")
    assert list(score) == ["input"]  # no row has a label
    assert score["input"].details["layers"]["0"]["value"] == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="probes need a 'label'"):
        evaluate(run, task="layers", test=tmp_path / "m.jsonl", train=tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="has no layers to compare"):
        evaluate(run, task="layers", test=tmp_path / "m.jsonl", baseline="pixels")


def test_listed_trials_leave_out_clips_that_cannot_be_read(heard: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "id": f"{row['label']}/{n}"} for n, row in enumerate(Manifest(heard["train"]))]
    write_manifest(tmp_path / "m.jsonl", [*rows, {"audio": "missing.wav", "id": "low/missing"}])
    names = [row["id"] for row in rows]
    lines = [f"{int(a[0] == b[0])} {a} {b}" for a, b in [(names[0], names[n]) for n in range(1, 12)]]
    (tmp_path / "trials.txt").write_text("\n".join([*lines, f"1 {names[0]} low/missing"]))
    given: dict[str, Any] = {"test": tmp_path / "m.jsonl", "baseline": "logmel", "on_bad_clip": "skip"}
    run = exported(tmp_path / "run", SPEECH)
    score = evaluate(run, task="verify", trials=tmp_path / "trials.txt", train=heard["test"], **given)["eer"]
    assert "listed: 5 of one class, 6 of two" in score.protocol
    assert "centered on the training clips" in score.protocol
    assert "1 clips could not be read" in score.protocol
    assert score.n == 12


def test_clips_of_another_kind_are_told_by_their_distance(heard: dict[str, Path], tmp_path: Path) -> None:
    rows = {split: list(Manifest(heard[split])) for split in heard}
    for name, kept in (("train", "low"), ("test", "low"), ("ood", "high")):
        manifest = rows["train" if name == "train" else "test"]
        write_manifest(tmp_path / f"{name}.jsonl", [row for row in manifest if row["label"] == kept])
    run = exported(tmp_path / "run", SPEECH)
    given: dict[str, Any] = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test", "ood")}
    score = evaluate(run, task="ood", k=2, baseline="logmel", **given)["auroc"]
    assert (score.value, score.n) == (1.0, 4)
    with pytest.raises(ValueError, match="the distance to one neighbor in train, got train=None"):
        evaluate(run, task="ood", **{**given, "train": None})


def test_random_weights_are_the_same_network_with_others(image: Path, seen: dict[str, Path]) -> None:
    trained = load(image)
    with torch.no_grad():
        for parameter in trained.encoder.parameters():
            parameter.mul_(3)
    clips = Manifest(seen["test"])
    state = torch.random.get_rng_state()
    first, again, other = (as_baseline(trained, "random", seed=seed).embed(clips).scene for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.shape == other.shape == trained.embed(clips).scene.shape
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, trained.embed(clips).scene)


def test_raw_pixels_are_the_picture_itself(image: Path) -> None:
    clips = torch.rand(3, 1, 16, 8)
    assert torch.equal(as_baseline(load(image), "pixels").embed(clips).scene, clips.flatten(1))


def test_log_mel_frames_are_every_10_ms_and_the_same_alone(tmp_path: Path) -> None:
    logmel = as_baseline(load(exported(tmp_path / "run", SPEECH)), "logmel")
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(n).astype(np.float32) for n in (1000, 200, 90, 500)]
    found = logmel.embed(waves)
    # windows of 200 samples every 80: (1000 - 200) / 80 + 1 whole ones, and one of what is shorter
    assert found.valid.sum(1).tolist() == [11, 1, 1, 4]
    assert found.time_ms is not None
    assert found.time_ms[0, :2].tolist() == pytest.approx([12.5, 22.5])
    for row, wave in enumerate(waves):
        assert found.scene[row].numpy() == pytest.approx(logmel.embed(wave).scene[0].numpy(), abs=1e-5)


def test_a_short_clip_has_one_window() -> None:
    raw = Raw(torch.rand(1, 90), torch.tensor([90]), ["short"], 8000.0)
    assert LogMel({"rate": 8000}).tokens(raw).x.shape == (1, 1, 40)


def test_a_fine_tuned_run_is_measured_on_its_own_classes(image: Path, seen: dict[str, Path]) -> None:
    said = load(image).predict(seen["test"])
    truth = list(Manifest(seen["test"]).values("label"))
    score = evaluate(image, task="classify", test=seen["test"])["accuracy"]
    assert score.value == sum(map(str.__eq__, said, truth)) / 4
    with pytest.raises(ValueError, match="has no vocabulary"):
        evaluate(image, task="ctc", test=seen["test"])


def test_a_fine_tuned_run_is_measured_on_what_it_writes(heard: dict[str, Path], tmp_path: Path) -> None:
    run = exported(tmp_path / "run", SPEECH, tuned=True)
    scores = evaluate(run, task="ctc", test=heard["test"], beam=2)
    assert set(scores) == {"wer", "cer"}
    assert scores["wer"].n == 4
    assert "prefix beam of 2" in scores["wer"].protocol


def test_a_run_may_write_the_words_of_a_language_model(image: Path, heard: dict[str, Path], tmp_path: Path) -> None:
    run = exported(tmp_path / "run", SPEECH, tuned=True)
    words = ["<unk>", "<s>", "</s>", "low", "high"]
    unigrams = "".join(f"-0.7\t{word}\t0\n" for word in words)
    counts = "\\data\\\nngram 1=5\nngram 2=1\n\n"
    ngrams = f"\\1-grams:\n{unigrams}\n\\2-grams:\n-0.7\tlow high\n\n\\end\\\n"
    (tmp_path / "lm.arpa").write_text(counts + ngrams)
    pytest.importorskip("flashlight.lib.text")
    given: dict[str, Any] = {"lm": tmp_path / "lm.arpa", "beam": 20, "word_score": 40.0}
    said = load(run).predict(heard["test"], **given)
    # so high a price of silence makes any run speak, and in whole words
    assert {word for text in said for word in (text or "").split()} <= {"low", "high"}
    assert all(said)
    scores = evaluate(run, task="ctc", test=heard["test"], **given)
    assert "beam of 20 over the words of lm.arpa, weight 2, 40 a word" in scores["wer"].protocol
    with pytest.raises(ValueError, match="tells classes, and only transcripts are searched for"):
        load(image).predict(torch.rand(1, 8, 8), lm=tmp_path / "lm.arpa")


def test_clips_that_cannot_be_read_are_counted_and_not_measured(
    image: Path, seen: dict[str, Path], tmp_path: Path
) -> None:
    rows = [*Manifest(seen["test"]), {"image": "missing.png", "label": "checks"}]
    write_manifest(tmp_path / "bad.jsonl", rows)
    given: dict[str, Any] = {"train": seen["train"], "test": tmp_path / "bad.jsonl", "layer": 0, "task": "knn", "k": 1}
    score = evaluate(image, on_bad_clip="skip", **given)["accuracy"]
    assert score.n == 4
    assert "1 clips could not be read" in score.protocol
    with pytest.raises(ValueError, match=r"missing\.png"):
        evaluate(image, **given)


def test_a_label_that_training_has_not_is_named_with_its_line(image: Path, seen: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl:7: the label 'stripes' is not among the 1 classes"):
        labelled(load(image), Manifest(seen["train"]), classes=Classes(["checks"]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "linear", "train": None}, "give their manifest as train"),
        (
            {"task": "regress"},
            "choose linear, knn, attentive, superb, .*, ood, corruption, classify, ctc, retrieval or zero-shot",
        ),
        (
            {"task": "cluster", "train": None, "layer": [0, 1]},
            "task cluster measures one layer, and chooses none; name one",
        ),
        ({"task": "knn", "trials": "t.txt"}, "is for task verify only; leave trials out"),
        ({"task": "linear", "beam": 5}, "is for task ctc only; leave beam out"),
        ({"task": "classify", "train": None, "lm": "words.arpa"}, "is for task ctc only; leave lm out"),
        ({"task": "knn", "classes": "names.yaml"}, "is for task zero-shot only; leave classes out"),
        ({"task": "zero-shot", "train": None, "same": "text"}, "is for task retrieval only; leave same out"),
        ({"task": "rank", "train": None, "ood": "noise.jsonl"}, "is for task ood only; leave ood out"),
        ({"task": "knn", "plot": "layers.svg"}, "is for task layers only; leave plot out"),
        ({"task": "linear", "against": "other.json"}, "is for task corruption only; leave against out"),
        ({"task": "corruption", "label_share": 0.1}, "corruption takes no few labels"),
        ({"task": "cluster"}, "train=.*: is for task linear, .* verify or ood only; leave train out"),
        ({"task": "verify", "by": "speaker"}, "by=speaker: is for task linear, .* only; leave by out"),
        ({"task": "ood", "valid": "v.jsonl"}, "valid=v.jsonl: is for task linear, .* only; leave valid out"),
        ({"task": "knn", "strength": 1.0}, "strength=1.0: is for task linear, layers or corruption only"),
        ({"task": "linear", "k": 3}, "k=3: is for task knn or ood only; leave k out"),
        ({"task": "corruption", "draws": 3}, "draws=3: is for task linear, .* only; leave draws out"),
        ({"task": "ood", "label": "speaker"}, "label=speaker: is for task linear, .* only; leave label out"),
        ({"task": "knn", "lm_weight": 1.0}, "lm_weight=1.0: is for task ctc only"),
        ({"task": "ctc", "train": None, "word_score": 1.0, "label": "word"}, "label=word: is for task linear, "),
        ({"task": "classify", "train": None, "layer": 1}, "layer=1: is for task linear, .* only; leave layer out"),
        ({"task": "classify", "train": None, "seed": 1}, "seed=1: is for task linear, .* only; leave seed out"),
        (
            {"task": "retrieval", "same": "label"},
            "same=label: is for retrieval between modalities; in one, label names",
        ),
        ({"task": "retrieval", "layer": [0, 1]}, "task retrieval measures one layer, and chooses none; name one"),
        ({"task": "retrieval", "valid": "v.jsonl"}, "valid=v.jsonl: is for task linear, .* only; leave valid out"),
        ({"task": "zero-shot", "train": None, "layer": [1, 2]}, "is for task linear, .* only; leave layer out"),
        ({"task": "layers", "layer": 1}, "measures all of them; leave layer out"),
        ({"task": "layers", "train": None, "label_share": 0.1}, "are of probes, which take train; give it"),
        ({"task": "superb", "baseline": "pixels"}, "has no layers to weight; leave the baseline out"),
        ({"task": "superb-verify", "labels_per_class": 1}, "superb-verify takes no few labels"),
        ({"task": "layers"}, "5 folds take at least 10 clips, got 4"),
        ({"task": "ood"}, "give their manifest as ood"),
        ({"task": "rank", "train": None}, "leaves out each of 10 groups of clips for its interval, got 4 clips"),
        ({"baseline": "logmel"}, "choose random, or pixels"),
        ({"task": "classify", "train": None, "baseline": "pixels"}, "leave the baseline out"),
        ({"task": "knn", "spans": 3}, "for task classify only"),
        ({"task": "classify", "train": None, "spans": 3}, "spans=3: image has no time to choose from; leave spans out"),
        (
            {"task": "classify", "train": None, "crops": 3},
            "no step that reads a part of each clip, such as center_crop; leave crops",
        ),
        ({"task": "classify", "train": None, "crops": 0}, "crops=0: must be at least 1"),
        ({"task": "linear", "crops": 3}, "for task classify only; leave crops out"),
        ({"task": "classify", "train": None, "spans": 0}, "spans=0: must be at least 1"),
        ({"label": "speaker"}, "no 'speaker'"),
        ({"layer": 5}, "has layers 0 to 2"),
        ({"pool": "slices:2"}, "needs tokens along t"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    image: Path, seen: dict[str, Path], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(image, **{"train": seen["train"], "test": seen["test"], **given})


def test_clips_of_several_classes_are_measured_by_mean_average_precision(
    heard: dict[str, Path], tmp_path: Path
) -> None:
    run = exported(tmp_path / "run", AUDIO, tuned=True)
    names = [["low", "long"], "high", [], ["high", "long"]]
    rows = [{**row, "label": label} for row, label in zip(Manifest(heard["test"]), names, strict=True)]
    write_manifest(tmp_path / "test.jsonl", rows)
    found = load(run).probabilities(tmp_path / "test.jsonl")
    truth = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=bool)
    score = evaluate(run, task="classify", test=tmp_path / "test.jsonl")["map"]
    assert score.value == pytest.approx(average_precisions(found.numpy(), truth).mean())
    assert (score.metric, score.n) == ("mAP", 4)
    assert "3 of 3 classes" in score.protocol
    write_manifest(tmp_path / "bad.jsonl", [{**rows[0], "label": ["loud"]}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: the label 'loud' is not among the 3 classes"):
        evaluate(run, task="classify", test=tmp_path / "bad.jsonl")


def test_spans_are_read_from_the_beginning_to_the_end_and_averaged(heard: dict[str, Path], tmp_path: Path) -> None:
    whole = load(exported(tmp_path / "whole", AUDIO, tuned=True))
    config = {**AUDIO, "augment_eval": [{"name": "center_crop", "seconds": 0.2}], "objective": {"name": "classify"}}
    run = exported(tmp_path / "run", config, tuned=True)
    embedder = load(run)
    waves = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    found = embedder.probabilities(waves, spans=3)
    # 1,600 of 4,000 samples, from 0, 1,200 and 2,400 on
    parts = [embedder.probabilities(waves[:, start : start + 1600]) for start in (0, 1200, 2400)]
    torch.testing.assert_close(found, torch.stack(parts).mean(0))
    torch.testing.assert_close(embedder.probabilities(waves), parts[1])
    score = evaluate(run, task="classify", test=labels_of(heard["test"], tmp_path, AUDIO["classes"]), spans=3)
    said = embedder.probabilities(tmp_path / "test.jsonl", spans=3).argmax(1).tolist()
    truth = [AUDIO["classes"].index(name) for name in Manifest(tmp_path / "test.jsonl").values("label")]
    assert score["accuracy"].value == sum(map(int.__eq__, said, truth)) / 4
    assert "mean over 3 spans of each clip" in score["accuracy"].protocol
    with pytest.raises(
        ValueError, match="no step that reads a part of each clip, such as center_crop or center_span; leave"
    ):
        whole.probabilities(waves, spans=2)
    with pytest.raises(ValueError, match="crops=3: audio has no frame to crop; leave crops out"):
        embedder.probabilities(waves, crops=3)


def test_spans_times_crops_are_the_mean_over_each_part_by_itself(tmp_path: Path) -> None:
    steps = [{"name": "center_span", "frames": 8}, {"name": "center_crop", "size": [16, 16]}]
    run = exported(tmp_path / "run", {**VIDEO, "augment_eval": steps}, tuned=True)
    embedder, whole = load(run), load(exported(tmp_path / "whole", VIDEO, tuned=True))
    files = [filmed(tmp_path / f"{tall}x{wide}.mp4", tall, wide) for tall, wide in ((24, 40), (40, 24), (32, 32))]
    found = embedder.probabilities(files, spans=2, crops=3)
    # 8 of 24 frames, and 16 of 24 and 40 pixels: 16 frames, 8 and 24 pixels are left beside them
    wide, tall, square = (MODALITIES["video"].read(path, rate=8, channels=1) for path in files)
    places = [(start, place) for start in (0, 16) for place in (0, 12, 24)]
    parts = [wide[:, start : start + 8, 4:20, place : place + 16] for start, place in places]
    torch.testing.assert_close(found[0], whole.probabilities(parts).mean(0))
    parts = [tall[:, start : start + 8, place : place + 16, 4:20] for start, place in places]
    torch.testing.assert_close(found[1], whole.probabilities(parts).mean(0))
    # all three of a square are its middle
    parts = [square[:, start : start + 8, 8:24, 8:24] for start in (0, 16)]
    torch.testing.assert_close(found[2], whole.probabilities(parts).mean(0))
    assert torch.equal(found[2], embedder.probabilities(files, spans=2)[2])
    assert not torch.allclose(found[:2], embedder.probabilities(files, spans=2)[:2], atol=1e-5)


def test_crops_of_pictures_are_averaged_and_the_score_says_so(seen: dict[str, Path], tmp_path: Path) -> None:
    run = exported(tmp_path, {**IMAGE, "augment_eval": [{"name": "center_crop", "size": 8}]}, tuned=True)
    embedder = load(run)
    picture = torch.rand(1, 8, 24, generator=torch.Generator().manual_seed(0))
    parts = [embedder.probabilities(picture[..., left : left + 8]) for left in (0, 8, 16)]
    torch.testing.assert_close(embedder.probabilities(picture, crops=3), torch.stack(parts).mean(0))
    score = evaluate(run, task="classify", test=seen["test"], crops=3)["accuracy"]
    assert "mean over 3 crops of each clip" in score.protocol
    # square pictures: the three are one
    assert score.value == evaluate(run, task="classify", test=seen["test"])["accuracy"].value


def filmed(path: Path, tall: int, wide: int) -> Path:
    """24 frames of noise at 8 a second."""
    import av

    frames = np.random.default_rng(tall).integers(0, 256, (24, tall, wide), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = wide, tall, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


def labels_of(manifest: Path, folder: Path, names: list[str]) -> Path:
    rows = [{**row, "label": names[n % 2]} for n, row in enumerate(Manifest(manifest))]
    write_manifest(folder / "test.jsonl", rows)
    return folder / "test.jsonl"


def test_probabilities_of_one_class_a_clip_add_up_to_one(image: Path, seen: dict[str, Path]) -> None:
    found = load(image).probabilities(seen["test"])
    assert torch.allclose(found.sum(1), torch.ones(4))
    assert [IMAGE["classes"][i] for i in found.argmax(1)] == load(image).predict(seen["test"])


@pytest.mark.parametrize("baseline", [None, "random", "logmel"])
def test_an_audio_encoder_and_its_baselines_are_probed(heard: dict[str, Path], tmp_path: Path, baseline: Any) -> None:
    run = exported(tmp_path / "run", AUDIO)
    score = evaluate(run, train=heard["train"], test=heard["test"], baseline=baseline, strength=1.0, layer=-1)
    assert score["accuracy"].value == 1.0  # low from high is easy, for random weights too
