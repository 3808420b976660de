"""Pairs from the row to the joint space: what a recipe of several modalities says, reads, trains and embeds."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmssl
from mmssl import distributed
from mmssl.assemble import export_config, learn_tokenizer, train
from mmssl.build import build_encoders
from mmssl.cli import app
from mmssl.data.batching import collate_samples
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.encoder import Encoder
from mmssl.loading import build_dataset, build_plan
from mmssl.modalities.text.tokenizer import Tokenizer
from mmssl.recipe import RecipeError, load, members
from mmssl.resolve import resolve
from mmssl.training.checkpoint import read_encoder
from mmssl.types import BadClip, Batch, Raw

RECIPE = """# toy
modality:
  image:
    frontend: {name: patches, size: [4, 4], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
    positions: {name: sincos}
    encoder: {prefix: 1}
    augment: {train: [{name: flip}]}
  text:
    frontend: {name: tokens, context: 12}
    positions: {name: learned, grid: [12]}
backbone: separate
tokenizer: {name: byte_bpe, entries: 300}
transformer: {dim: 16, depth: 2, heads: 2}
objective: {name: clip, dim: 8, pool: {image: class, text: last}}
data: {train: train.jsonl, batch_size: 4}
optimizer: {lr: 0.003}
schedule: {name: constant}
trainer: {steps: 3, log_every: 1, device: cpu, threads: 1}
"""
SPEECH = """  speech:
    frontend: {name: logmel, bands: 8, rate: 8000}
    positions: {name: sincos}
backbone"""
SOME_SHARED = "backbone={name: shared, own_blocks: 1, own_norms: true}"
WORDS = ["red heart", "blue box", "green tree", "white moon", "black cat", "red box"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for n in range(len(WORDS)):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    Path("toy.yaml").write_text(RECIPE, encoding="utf-8")
    write_manifest("train.jsonl", [{"image": f"{n}.png", "text": f"a {text}"} for n, text in enumerate(WORDS)])
    return tmp_path


def dataset(settings=(), side="train"):
    recipe = resolve(load("toy.yaml", settings))
    manifest = Manifest(recipe.values["data"]["train"])
    config = export_config(recipe, manifest)
    return build_dataset(recipe, config, build_encoders(config), manifest, side=side), recipe, manifest


def exported(name: str, sections: str, settings: list[str]) -> Path:
    """The folder of an encoder of one modality, of another size than the recipe's."""
    rest = "data:" + RECIPE.partition("data:")[2]
    text = f"{sections}transformer: {{dim: 24, depth: 3, heads: 2}}\n{rest}"
    Path(f"{name}.yaml").write_text(f"{text}objective: {{name: data2vec, top_k: 1}}\n", encoding="utf-8")
    return train(f"{name}.yaml", name, ["trainer.steps=1", *settings])


@pytest.fixture
def begun(folder: Path) -> dict[str, Path]:
    picture = """modality: image
frontend: {name: patches, size: [2, 2], mean: [0.4, 0.5, 0.6], std: [0.5, 0.5, 0.5]}
positions: {name: sincos}
encoder: {prefix: 1, mask_token: true}
"""
    words = """modality: text
frontend: {name: tokens, context: 9}
positions: {name: learned, grid: [9]}
tokenizer: {name: byte_bpe, entries: 290}
encoder: {mask_token: true}
"""
    return {"image": exported("pictures", picture, []), "text": exported("words", words, [])}


def encoders_of(run: Path) -> dict[str, torch.Tensor]:
    return read_encoder(run)[1]


# what a recipe says


def test_a_resolved_recipe_is_resolved_to_itself(folder: Path) -> None:
    for settings in (
        [],
        ["backbone=shared"],
        [SOME_SHARED],
        ["modality.text.transformer={dim: 8, depth: 1, heads: 1}"],
    ):
        first = resolve(load("toy.yaml", settings))
        (folder / "again.yaml").write_text(first.dump(), encoding="utf-8")
        assert resolve(load("again.yaml")).values == first.values


def test_captions_that_give_no_tokenizer_are_told_to_all_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, told = resolve(load("toy.yaml")), []
    monkeypatch.setattr(distributed, "broadcast_text", lambda text: told.append(text) or text)
    with pytest.raises(RecipeError) as main:
        learn_tokenizer(recipe, [{"id": "without a caption"}])
    # another process, which does not read captions, and gets what the main one sent
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_text", lambda text: told[0])
    with pytest.raises(RecipeError) as other:
        learn_tokenizer(recipe, [])
    assert str(other.value) == str(main.value)


STILL = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.steps=1"]


def test_each_side_begins_with_the_weights_that_init_names(folder: Path, begun: dict[str, Path]) -> None:
    settings = [f"init.{name}={run}" for name, run in begun.items()]
    run = train("toy.yaml", "run", [*STILL, *settings, "transformer.dropout=0.1", "modality.image.encoder.prefix=1"])
    found, config = encoders_of(run), read_encoder(run)[0]
    for name, source in begun.items():
        before = encoders_of(source)
        own = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        assert own.keys() == before.keys()
        assert all(torch.allclose(own[key], before[key], atol=1e-9) for key in own)
        # sizes are those of the weights, rates the recipe's
        transformer = config["modality"][name]["transformer"]
        assert (transformer["dim"], transformer["depth"], transformer["dropout"]) == (24, 3, 0.1)
    assert config["modality"]["image"]["frontend"]["mean"] == [0.4, 0.5, 0.6]
    assert (run / "tokenizer.json").read_text() == (begun["text"] / "tokenizer.json").read_text()
    # a resolved recipe is resolved to itself, so the run goes on
    assert train(load(run / "recipe.yaml"), run) == run


def test_a_side_that_init_does_not_name_is_new(folder: Path, begun: dict[str, Path]) -> None:
    fresh = encoders_of(train("toy.yaml", "fresh", STILL))
    found = encoders_of(train("toy.yaml", "run", [*STILL, f"init.image={begun['image']}"]))
    assert found["image.prefix"].shape == (1, 24)
    assert {key: value.shape for key, value in found.items() if key.startswith("text.")} == {
        key: value.shape for key, value in fresh.items() if key.startswith("text.")
    }
    # of a run on several modalities it is the encoder of this one
    again = encoders_of(train("toy.yaml", "again", [*STILL, "init.image=run", "trainer.seed=3"]))
    assert torch.allclose(again["image.prefix"], found["image.prefix"], atol=1e-9)
    assert not torch.equal(again["text.positions.table"], found["text.positions.table"])


@pytest.mark.parametrize("backbone", ["shared", "{name: shared, own_blocks: 1, own_norms: true}"])
def test_a_shared_trunk_begins_with_the_weights_of_one(folder: Path, begun: dict[str, Path], backbone: str) -> None:
    run = train("toy.yaml", "run", [*STILL, f"backbone={backbone}", f"init.image={begun['image']}"])
    recipe = load(run / "recipe.yaml")
    assert recipe.get("transformer.depth") == 3
    encoders = build_encoders(export_config(resolve(recipe), Manifest("train.jsonl"), run))
    encoders.load_state_dict(encoders_of(run))
    before = encoders_of(begun["image"])
    for name in ("image", "text"):  # what text has of its own in the trunk begins so too
        own = encoders[name].state_dict()
        trunk = [key for key in before if key.startswith("transformer.")]
        assert trunk
        assert all(torch.allclose(own[key], before[key], atol=1e-9) for key in trunk)
    assert encoders["text"].frontend.dim == 24


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["init.text=pictures"], "pictures holds an encoder of image, and init.text is for text"),
        (
            ["init.image=pictures", "modality.image.frontend.channels=1"],
            r"the encoder comes from init.image=pictures, where frontend.channels is 3; only dropout, .* may be set",
        ),
        (
            ["init.image=pictures", "backbone=shared", "transformer.depth=2"],
            "the encoder comes from init.image=pictures, where transformer.depth is 3; only",
        ),
        (["init.image=pictures", "modality.image.encoder.pre=1"], "unknown key 'modality.image.encoder.pre'. Did you"),
    ],
)
def test_an_encoder_that_is_of_something_else_is_refused(
    folder: Path, begun: dict[str, Path], settings: list[str], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve(load("toy.yaml", settings))
    with pytest.raises(RecipeError, match=r"init: names modalities, and this recipe is for image; write init=RUN"):
        resolve(load("pictures.yaml", ["init.image=words"]))


def test_one_line_shares_the_trunk(folder: Path) -> None:
    counts = {}
    for backbone in ("separate", "shared"):
        recipe = resolve(load("toy.yaml", [f"backbone={backbone}"]))
        encoders = build_encoders(export_config(recipe, Manifest("train.jsonl")))
        assert not isinstance(encoders, Encoder)
        assert encoders.shared == (backbone == "shared")
        counts[backbone] = sum(p.numel() for p in encoders.parameters())
        trunk = sum(p.numel() for p in encoders["image"].transformer.parameters())
    assert counts["separate"] - counts["shared"] == trunk


def test_a_trunk_may_be_shared_in_part(folder: Path) -> None:
    # of two blocks of width 16 the first, and of the second and the end the norms
    block, norm = 12 * 16**2 + 9 * 16, 2 * 16
    sizes = {}
    for backbone in ("shared", "{name: shared, own_blocks: 1}", "{name: shared, own_blocks: 1, own_norms: true}"):
        recipe = resolve(load("toy.yaml", [f"backbone={backbone}"]))
        encoders = build_encoders(export_config(recipe, Manifest("train.jsonl")))
        assert not isinstance(encoders, Encoder)
        sizes[encoders.own_blocks, encoders.own_norms] = sum(p.numel() for p in encoders.parameters())
        assert encoders.shared
        above = encoders.joint()
        assert (
            above.blocks[-1].mlp
            is encoders["image"].transformer.blocks[-1].mlp
            is encoders["text"].transformer.blocks[-1].mlp
        )
        assert (above.norm is encoders["image"].transformer.norm) == (not encoders.own_norms)
    assert sizes[1, False] - sizes[0, False] == block + 2 * norm
    assert sizes[1, True] - sizes[1, False] == 3 * norm
    with pytest.raises(RecipeError, match=r"backbone.own_blocks=2: must be from 0 to 1"):
        train("toy.yaml", "run", ["backbone={name: shared, own_blocks: 2}"])
    apart = build_encoders(export_config(resolve(load("toy.yaml")), Manifest("train.jsonl")))
    assert not isinstance(apart, Encoder)
    assert (apart.shared, apart.own_blocks, apart.own_norms) == (False, 2, True)
    with pytest.raises(ValueError, match="backbone=separate: no block sees several modalities"):
        apart.joint()


def test_a_modality_takes_the_recipes_transformer_where_it_writes_none(folder: Path) -> None:
    recipe = resolve(load("toy.yaml", ["modality.text.transformer={dim: 8, depth: 1, heads: 1, causal: true}"]))
    own = members(recipe.values)
    assert own["image"]["transformer"]["dim"] == 16
    assert own["text"]["transformer"]["causal"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["modality.image.frontend.sze=3"], "unknown key 'modality.image.frontend.sze'. Did you mean .*size"),
        (["modality.image.init=x"], "unknown key 'modality.image.init'"),
        (["modality.pictures={}"], "unknown key 'modality.pictures'"),
        (["modality.text=null"], "'modality.text' should be a mapping of frontend, positions, transformer, encoder"),
        (["modality.text={}"], "'modality.text.frontend.name' is missing; one of: tokens"),
        (["augment={}"], "'augment' stands below each modality here, as modality.image.augment"),
        (["init=runs/mae"], "init: holds one encoder, and these are image and text; say whose .* init.image=runs/mae"),
        (["init.speech=runs/mae"], "unknown key 'init.speech'.* Keys here: image, text"),
        (["init.image=runs/mae"], "init.image=runs/mae: no such folder; give the folder of a run"),
        (
            ["init={image: a, text: b}", "backbone=shared"],
            "init: image and text share blocks, which can begin with the weights of one of them alone; leave out the",
        ),
        (["backbone=joined"], "backbone: should be 'separate', 'shared' or .* .got 'joined'."),
        (["backbone={name: shared, own: 1}"], "unknown key 'backbone.own'. Did you mean 'backbone.own_"),
        (["backbone=shared", "modality.text.transformer={dim: 8}"], "is shared; write it once, as 'transformer'"),
        (
            ["objective={name: classify}"],
            "classify learns from one modality, and these are image and text; choose clip",
        ),
        (
            ["objective={name: classify}", "modality={image: {}}"],
            "classify learns from image alone; write modality: image, and its sections at the top",
        ),
        (
            ["trainer.accumulate=2"],
            "trainer.accumulate=2: clip tells the pairs .* or higher with objective.chunk, or use",
        ),
        (["optimizer.layer_decay=0.5"], "goes by the depth of one encoder"),
        (["modality=image"], "clip brings several modalities together; write them as modality: {image: {...}"),
        (["objective.pool={image: max, text: last}"], "objective.pool: .*'mean', 'class' or 'last'"),
        (["tokenizer=null"], "'tokenizer.name' is missing"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(folder: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve(load("toy.yaml", settings))


@pytest.mark.parametrize(
    ("recipe", "setting", "sentence"),
    [
        ("small/clip_digits", "trainer.sharding=full", "leave it out for three or more modalities"),
        ("small/clip_emoji", "trainer.best=wer", "trainer.best=wer: evaluations of clip give none; choose loss"),
        (
            "small/classify_image",
            "trainer.best=map",
            "trainer.best=map: evaluations of classify give none; choose loss",
        ),
        ("small/mae_image", "trainer.best=cer", "trainer.best=cer: evaluations of mae give none; choose loss"),
    ],
)
def test_what_a_run_would_find_out_too_late_is_said_before(recipe: str, setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve(load(recipe, ["data.train=rows.jsonl", setting]))


def test_two_modalities_that_read_the_same_key_are_no_pair(folder: Path) -> None:
    text = RECIPE.replace("  text:\n", "  audio:\n").replace("  image:\n", "  speech:\n")
    Path("toy.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="modality: needs two or more that read different keys"):
        resolve(load("toy.yaml"))


# what it reads


@pytest.mark.parametrize("cache", ["false", "true"])
def test_of_several_captions_training_draws_one_an_epoch_and_evaluation_takes_the_first(
    folder: Path, cache: str
) -> None:
    several = [f"a {text}" for text in WORDS[:3]]
    write_manifest("train.jsonl", [{"id": "0", "image": "0.png", "text": several}, {"image": "1.png", "text": "one"}])
    seen, *_ = dataset([f"data.cache={cache}"])
    tokenizer = Tokenizer(learn_tokenizer(resolve(load("toy.yaml")), Manifest("train.jsonl")), 12)
    drawn = [tokenizer.decode(seen.read(0, epoch).inputs["text"].tolist()) for epoch in range(40)]
    assert set(drawn) == set(several)
    assert min(map(drawn.count, several)) > 4
    again, *_ = dataset([f"data.cache={cache}"])
    assert [tokenizer.decode(again.read(0, epoch).inputs["text"].tolist()) for epoch in (3, 1)] == [drawn[3], drawn[1]]
    assert {tokenizer.decode(seen.read(1, epoch).inputs["text"].tolist()) for epoch in range(4)} == {"one"}
    held_out, *_ = dataset(side="eval")
    assert {tokenizer.decode(held_out.read(0, epoch).inputs["text"].tolist()) for epoch in range(9)} == {several[0]}
    run = train("toy.yaml", "run")
    embedder = mmssl.load(run, device="cpu")
    [first, _] = embedder.embed("train.jsonl", modality="text").scene
    assert torch.allclose(embedder.embed([several[0]], modality="text").scene[0], first, atol=1e-6)


def test_what_pairs_agree_in_must_stand_in_the_rows(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"objective.same=name: .*train.jsonl:1 has no 'name', only id, image, text; name"
    ):
        train("toy.yaml", "run", ["objective.same=name"])


def test_an_empty_one_of_several_captions_is_never_read(folder: Path) -> None:
    write_manifest("train.jsonl", [{"image": "0.png", "text": ["", "one", " "]}, {"image": "1.png", "text": "two"}])
    seen, *_ = dataset()
    assert len({tuple(seen.read(0, epoch).inputs["text"].tolist()) for epoch in range(9)}) == 1


def test_an_empty_list_of_captions_is_a_bad_clip(folder: Path) -> None:
    write_manifest("train.jsonl", [{"image": "0.png", "text": []}, {"image": "1.png", "text": "one"}])
    with pytest.raises(BadClip, match=r"the caption \[\] is no text"):
        dataset()[0].read(0, 0)


def test_a_batch_of_pairs_is_one_dictionary(folder: Path) -> None:
    clips, recipe, manifest = dataset()
    plan = build_plan(recipe, manifest, side="eval")
    batch = collate_samples([clips.read(int(i), 0) for i in plan.batch(0, 0)])
    assert list(batch.inputs) == ["image", "text"]
    assert batch.inputs["image"].data.shape == (4, 3, 8, 8)
    assert batch.inputs["text"].data.dtype == torch.int64
    assert batch.inputs["text"].ids == batch.inputs["image"].ids == batch.ids
    assert not batch.rows
    assert torch.equal(batch.of("text").seeds, batch.seeds)
    with pytest.raises(ValueError, match=r"expected one modality, got \['image', 'text'\]"):
        _ = batch.raw


def test_of_two_modalities_a_row_has_both(folder: Path) -> None:
    write_manifest("train.jsonl", [{"image": "0.png", "text": "a"}, {"image": "1.png"}])
    with pytest.raises(ValueError, match=r"train.jsonl:2: no 'text', which text reads; the row has id, image"):
        dataset()


def test_of_three_modalities_a_row_may_lack_one(folder: Path) -> None:
    import soundfile

    soundfile.write("a.wav", np.random.default_rng(0).normal(0, 0.1, 4000), 8000)
    Path("toy.yaml").write_text(
        RECIPE.replace("backbone", SPEECH, 1).replace("text: last}", "text: last, speech: mean}")
    )
    rows = [
        {"image": "0.png", "text": "a"},
        {"audio": "a.wav", "seconds": 0.5, "text": "b"},
        {"audio": "a.wav", "seconds": 0.5, "image": "2.png", "text": "c"},
        {"audio": "a.wav", "seconds": 0.5, "image": "2.png", "id": "last"},
    ]
    write_manifest("train.jsonl", rows)
    clips, recipe, manifest = dataset()
    # what has no sound lies beside the shortest that have
    assert build_plan(recipe, manifest, side="train").lengths.tolist() == [0.5] * 4
    batch = collate_samples([clips.read(i, 0) for i in range(4)])
    assert {name: rows.tolist() for name, rows in batch.rows.items()} == {
        "image": [0, 2, 3],
        "text": [0, 1, 2],
        "speech": [1, 2, 3],
    }
    assert batch.ids == ["0.png", "a.wav", "a.wav", "last"]
    assert torch.equal(batch.of("speech").seeds, batch.seeds[1:])
    assert len(batch.inputs["speech"]) == 3
    run = train("toy.yaml", "run")
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    write_manifest("train.jsonl", [*rows, {"audio": "a.wav", "text": "of unknown length"}])
    with pytest.raises(ValueError, match="train.jsonl:5: the row has no 'seconds', which batches by length need"):
        train("toy.yaml", "other")
    write_manifest("train.jsonl", [*rows, {"text": "alone"}])
    with pytest.raises(
        ValueError, match="train.jsonl:5: a row needs at least two of 'image', 'text', 'audio' to learn"
    ):
        dataset()


def test_pairs_with_equal_captions_are_the_same_whichever_of_several_is_read(folder: Path) -> None:
    rows = [
        {"image": "0.png", "text": "one"},
        {"image": "1.png", "text": ["one", "two"]},
        {"image": "2.png", "text": ["two", "three"]},
    ]
    write_manifest("train.jsonl", rows)
    seen, *_ = dataset(["objective.same=text"])
    for epoch in range(12):
        samples = [seen.read(row, epoch) for row in range(3)]
        texts = [sample.inputs["text"].tolist() for sample in samples]
        for one, other in combinations(range(3), 2):
            assert (samples[one].label == samples[other].label) == (texts[one] == texts[other])


def test_a_broken_half_follows_the_policy(folder: Path) -> None:
    Path("5.png").write_bytes(b"no picture")
    with pytest.raises(BadClip, match=r"not a picture that Pillow can read \(at .*train.jsonl:6\)"):
        train("toy.yaml", "one")
    run = train("toy.yaml", "two", ["data.on_bad_clip=skip", "data.max_bad_share=0.5"])
    [bad] = (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(bad)["path"].endswith("5.png")


def test_an_empty_caption_follows_the_policy(folder: Path) -> None:
    rows = [{"image": f"{n}.png", "text": text} for n, text in enumerate([*WORDS[:5], "  "])]
    write_manifest("train.jsonl", rows)
    with pytest.raises(BadClip, match=r"5.png: the caption '  ' is empty \(at .*train.jsonl:6\)"):
        train("toy.yaml", "one")
    run = train("toy.yaml", "two", ["data.on_bad_clip=skip", "data.max_bad_share=0.5"])
    [bad] = (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(bad)["reason"].startswith("the caption '  ' is empty")


def test_a_broken_half_of_three_follows_the_policy(folder: Path) -> None:
    """A row that may lack its sound is not without it because that cannot be read."""
    Path("a.wav").write_bytes(b"no sound")
    Path("toy.yaml").write_text(
        RECIPE.replace("backbone", SPEECH, 1).replace("text: last}", "text: last, speech: mean}")
    )
    rows = [{"image": f"{n}.png", "text": text, "seconds": 0.5} for n, text in enumerate(WORDS)]
    write_manifest("train.jsonl", [*rows[:5], {**rows[5], "audio": "a.wav"}])
    with pytest.raises(BadClip, match=r"a.wav: .*\(at .*train.jsonl:6\)"):
        train("toy.yaml", "one", ["data.bucket=false"])
    run = train("toy.yaml", "two", ["data.bucket=false", "data.on_bad_clip=skip", "data.max_bad_share=0.5"])
    [bad] = (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(bad)["path"].endswith("a.wav")


def test_captions_longer_than_the_context_are_cut_counted_and_said_once(folder: Path) -> None:
    rows = [{"image": f"{n}.png", "text": text} for n, text in enumerate([*"abcde", " ".join(WORDS)])]
    write_manifest("train.jsonl", rows)
    clips, *_ = dataset(["tokenizer.entries=258"])
    [*others, cut] = (len(clips.read(i, 0).inputs["text"]) for i in range(6))
    assert cut == 12
    assert max(others) < 12
    run = train("toy.yaml", "run", ["tokenizer.entries=258"])
    notes = [json.loads(line).get("note", "") for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    [said] = [note for note in notes if "are cut" in note]
    assert "1 of 6 captions are longer than frontend.context=12, and are cut" in said


def test_pairs_that_agree_in_a_key_are_known_in_the_batch(folder: Path) -> None:
    rows = [{"image": f"{n}.png", "text": WORDS[n], "name": name} for n, name in enumerate(["x", "y", "x", [1], [1]])]
    write_manifest("train.jsonl", rows)
    clips, *_ = dataset(["objective.same=name"])
    labels = collate_samples([clips.read(i, 0) for i in range(5)]).labels
    assert labels is not None
    assert (labels[:, None] == labels).int().tolist() == [
        [1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    write_manifest("train.jsonl", [rows[0] | {"concept": "box"}, *rows[1:]])
    with pytest.raises(BadClip, match="the row has no 'concept'"):
        dataset(["objective.same=concept"])[0].read(1, 0)


def test_the_ids_of_a_batch_are_put_together_from_what_each_modality_has() -> None:
    def some(*ids: str) -> Raw:
        return Raw(torch.zeros(len(ids), 1), torch.ones(len(ids), dtype=torch.int64), list(ids))

    rows = {"image": torch.tensor([0, 2]), "text": torch.tensor([1, 2])}
    batch = Batch({"image": some("a", "c"), "text": some("b", "c")}, torch.tensor([7, 8, 9]), rows=rows)
    assert batch.ids == ["a", "b", "c"]
    assert batch.of("text").seeds is not None
    assert batch.of("text").seeds.tolist() == [8, 9]
    assert batch.to("cpu").rows is rows


# what it gives


@pytest.mark.parametrize("backbone", ["separate", "shared", SOME_SHARED.removeprefix("backbone=")])
def test_a_run_embeds_both_sides_into_one_space(folder: Path, backbone: str) -> None:
    run = train("toy.yaml", "run", [f"backbone={backbone}", "data.valid=train.jsonl", "trainer.eval_every=3"])
    assert train("toy.yaml", "run", [f"backbone={backbone}", "data.valid=train.jsonl", "trainer.eval_every=3"]) == run
    encoder = mmssl.load(run, device="cpu")
    assert encoder.modalities == ["image", "text"]
    pictures = encoder.embed(["0.png", "1.png"], modality="image")
    captions = encoder.embed(["a red heart", "a blue box"], modality="text")
    for out in (pictures, captions):
        assert out.scene.shape == (2, 8)
        assert torch.allclose(out.scene.norm(dim=1), torch.ones(2), atol=1e-6)
    # a manifest of pairs is read by either side
    again = encoder.embed("train.jsonl", modality="text")
    assert torch.allclose(again.scene[:2], captions.scene, atol=1e-5)
    one = encoder.of("image")
    assert one.depth == 2
    assert one.embed("0.png", pool="mean").scene.shape == (1, 16)
    assert len(one.embed("0.png", layer="all")) == 3
    with pytest.raises(ValueError, match="has encoders of image and text; say which, by modality"):
        encoder.embed("0.png")
    with pytest.raises(ValueError, match="modality='video': run has an encoder of image and text"):
        encoder.embed("0.png", modality="video")
    with pytest.raises(ValueError, match=r"only the output \(layer -1\) is brought into the space"):
        encoder.embed("0.png", modality="image", layer=1, pool="joint")
    rounded = mmssl.load(run, device="cpu", precision="bfloat16")
    half = rounded.embed(["0.png", "1.png"], modality="image")
    assert torch.allclose(half.scene, pictures.scene, atol=0.05)
    # one of several encoders is that very one: its weights were rounded already, and are in memory once
    assert rounded.of("image").encoder is rounded.encoder["image"]


def test_a_run_goes_on_with_smaller_chunks(folder: Path) -> None:
    train("toy.yaml", "run", ["trainer.steps=2", "schedule={name: constant}"])
    (folder / "more.yaml").write_text(RECIPE.replace("steps: 3", "steps: 2"), encoding="utf-8")
    assert train("more.yaml", "run", ["objective.chunk=1"]) == Path("run")
    with pytest.raises(RecipeError, match="objective.dim is 8 and not 4"):
        train("more.yaml", "run", ["objective.dim=4"])


SLIP = "{name: slip, dim: 8, pool: {image: class, text: last}, self_supervised: {image: distortions}, ssl_hidden: 8}"


@pytest.mark.parametrize(
    "settings", [["objective.name=siglip", "objective.chunk=3"], ["objective.name=clip_lite"], [f"objective={SLIP}"]]
)
def test_every_objective_of_pairs_gives_such_a_space(folder: Path, settings: list[str]) -> None:
    first = resolve(load("toy.yaml", settings))
    (folder / "again.yaml").write_text(first.dump(), encoding="utf-8")
    assert resolve(load("again.yaml")).values == first.values
    encoder = mmssl.load(train("toy.yaml", "run", settings), device="cpu")
    pictures = encoder.embed(["0.png", "1.png"], modality="image").scene
    words = encoder.embed(["a red heart"], modality="text").scene
    assert pictures.shape == (2, 8)
    assert words.norm().item() == pytest.approx(1, abs=1e-6)
    losses = [json.loads(line).get("loss") for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        ("{video: frames}", "self_supervised: video: frames: the recipe is of image and text; name one of these"),
        ("{text: crops}", "self_supervised: text: crops: text has no views, so name another modality"),
        ("{image: halves}", "self_supervised: image: halves: image has crops or distortions"),
    ],
)
def test_views_that_there_are_not_are_one_sentence(folder: Path, views: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        train("toy.yaml", "run", [f"objective={SLIP}", f"objective.self_supervised={views}"])


def test_the_command_embeds_one_side(folder: Path) -> None:
    train("toy.yaml", "run")
    done = CliRunner().invoke(app, ["embed", "run", "a red heart", "--modality", "text", "--out", "a.npz"])
    assert done.exit_code == 0, done.output
    assert "1 clips, width 8" in done.output
    done = CliRunner().invoke(app, ["embed", "run", "0.png"])
    assert done.exit_code == 2


@pytest.mark.parametrize("settings", [[], [SOME_SHARED]])
def test_one_side_of_a_run_is_fine_tuned(folder: Path, settings: list[str]) -> None:
    run = train("toy.yaml", "run", settings)
    rows = [{"image": f"{n}.png", "label": str(n % 2)} for n in range(4)]
    write_manifest("labels.jsonl", rows)
    text = RECIPE.partition("modality:")[0] + RECIPE.partition("data:")[1] + RECIPE.partition("data:")[2]
    Path("tune.yaml").write_text(f"{text}modality: image\nobjective: {{name: classify}}\n", encoding="utf-8")
    settings = [f"init={run}", "data.train=labels.jsonl", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    tuned = mmssl.load(train("tune.yaml", "tuned", settings), device="cpu")
    before = mmssl.load(run, device="cpu").embed("0.png", modality="image", pool="mean").scene
    assert torch.allclose(tuned.embed("0.png").scene, before, atol=1e-4)
    assert tuned.predict(["0.png"])[0] in ("0", "1")
