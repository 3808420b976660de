"""A run of several modalities without pairs, from the recipe to the encoder of one of them."""

import json
import re
from pathlib import Path

import pytest
import torch

import mmssl
from mmssl.assemble import export_config, train
from mmssl.build import build_encoders
from mmssl.cli import _done
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.encoder import Encoder
from mmssl.objectives.omni import Omni
from mmssl.recipe import RecipeError, apart, load
from mmssl.resolve import resolve
from mmssl.tasks.crossmodal import retrieval
from mmssl.training.checkpoint import read_encoder, read_tensors

RECIPE = """# toy
modality:
  image:
    frontend: {name: patches, size: [4, 4], channels: 1, mean: [0.5], std: [0.5]}
    positions: {name: sincos}
    augment: {train: [{name: flip}]}
  audio:
    frontend: {name: spectrogram, size: [8, 8], bands: 16, rate: 8000}
    positions: {name: sincos}
  speech:
    frontend: {name: logmel, bands: 8, rate: 8000}
    positions: {name: sincos}
    encoder: {mask_token: true}
backbone: shared
transformer: {dim: 16, depth: 2, heads: 2, dropout: 0.1}
objective:
  name: omni
  of:
    name: mae
    target: {image: normalized_pixels, audio: normalized_spectrogram, speech: normalized_log_mel}
    mask_ratio: {speech: 0.5}
    decoder_dim: 16
    decoder_depth: 1
    decoder_heads: 2
data: {batch_size: {image: 5, audio: 2, speech: 2}}
optimizer: {lr: 0.003}
schedule: {name: constant}
trainer: {steps: 9, log_every: 3, device: cpu, threads: 1}
"""
DATA2VEC2 = (
    "objective={name: omni, of: {name: data2vec2, mask: blocks, mask_size: 2, clones: 2, decoder_dim: 8, "
    "decoder_depth: 1, decoder_groups: 2, top_k: 2}}"
)


@pytest.fixture
def settings(seen: dict[str, Path], heard: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(RECIPE, encoding="utf-8")
    sources = {"image": seen, "audio": heard, "speech": heard}
    return [f"data.train.{name}={source['train']}" for name, source in sources.items()]


def weights(run: Path, step: int) -> torch.Tensor:
    tensors = {}
    for part in ("model", "optimizer"):
        tensors |= read_tensors(run / "checkpoints" / f"step_{step}" / f"{part}.safetensors")
    return torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])


def test_a_resolved_recipe_has_the_objective_of_each_modality_and_is_resolved_to_itself(settings: list) -> None:
    first = resolve(load("toy.yaml", settings))
    of = first.values["objective"]["of"]
    assert [own["target"] for own in of.values()] == [
        "normalized_pixels",
        "normalized_spectrogram",
        "normalized_log_mel",
    ]
    assert [own["mask_ratio"] for own in of.values()] == [0.75, 0.75, 0.5]
    assert first.values["data"]["batch_size"] == {"image": 5, "audio": 2, "speech": 2}
    assert first.values["data"]["workers"] == 0
    Path("again.yaml").write_text(first.dump(), encoding="utf-8")
    assert resolve(load("again.yaml")).values == first.values
    alone = apart(first)
    assert alone["speech"].values["data"]["batch_size"] == 2
    assert alone["speech"].values["modality"] == "speech"
    # one whose settings are written out may have another objective
    mixed = resolve(
        load(
            "toy.yaml",
            [
                *settings,
                "objective.of={image: {name: cpc}, speech: {name: best_rq, target: log_mel}, audio: {name: jepa}}",
            ],
        )
    )
    assert [own["name"] for own in mixed.values["objective"]["of"].values()] == ["cpc", "jepa", "best_rq"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("objective.of=null", "'objective.of' should be the section of an objective for image .got None."),
        ("objective.of={speech: {name: jepa}}", "'objective.of' should be the section of an objective for image"),
        ("objective.of={name: ctc}", "objective.of.name: ctc learns from labels; choose"),
        ("objective.of={name: clip}", "objective.of.name: clip is itself one of several modalities; choose"),
        ("objective.of.name=maee", "unknown objective.of.name 'maee'. Did you mean 'mae'"),
        (
            "objective.of.decoder_dims=3",
            "unknown key 'objective.of.decoder_dims'. Did you mean 'objective.of.decoder_d",
        ),
        ("objective.of.target.audio=hog", "unknown objective.of.target 'hog'"),
        ("objective.of.mask_ratio.speech=a", "objective.of.mask_ratio"),
        ("objective.weights={image: 1}", "objective.weights={'image': 1}: give a number above 0 for each modality"),
        ("objective.weight={image: 1}", "unknown key 'objective.weight'. Did you mean 'objective.weights'"),
        ("data.train={image: a.jsonl}", "data.train: there is none of audio; write it as data.train.audio=FILE"),
        ("data.batch_size.image=0", "data.batch_size=0: must be at least 1"),
        ("data.batch_size.imagee=3", "data.batch_size: 'imagee' is none of this recipe's modalities image, audio"),
        ("data.train.vidoe=v.jsonl", "data.train: 'vidoe' is none of this recipe's modalities"),
        ("modality={image: {}}", "modality: needs two or more"),
        ("modality=image", "omni brings several modalities together; write them as modality: {image"),
        ("optimizer.layer_decay=0.5", "goes by the depth of one encoder"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(settings: list, setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        train("toy.yaml", "run", [*settings, setting])


def test_text_is_no_masked_autoencoders(settings: list) -> None:
    text = "modality.text={frontend: {name: tokens, context: 8}, positions: {name: sincos}}"
    with pytest.raises(RecipeError, match="objective mae is not for text"):
        resolve(load("toy.yaml", [*settings, text, "data.train.text=a.jsonl", "tokenizer={name: byte_bpe}"]))


def test_captions_learn_beside_what_has_other_captions(settings: list, heard: dict[str, Path]) -> None:
    text = "modality={image: {frontend: {name: patches, size: [4, 4]}, positions: {name: sincos}}, "
    text += "text: {frontend: {name: tokens, context: 3}, positions: {name: sincos}}}"
    rows = ["data.batch_size=4", f"data.train.text={heard['train']}", "trainer.steps=3"]
    tokenizer = "tokenizer={name: byte_bpe, entries: 258}"
    run = train("toy.yaml", "run", [settings[0], DATA2VEC2, text, tokenizer, *rows])
    assert (run / "tokenizer.json").is_file()
    notes = [line for line in (run / "log.jsonl").read_text().splitlines() if "longer than frontend.context=3" in line]
    # those of the pictures are read by nobody
    assert notes
    assert all(f"{heard['train']}: 12 of 12 captions" in note for note in notes)
    assert not any(settings[0].partition("=")[2] in note for note in notes)
    assert mmssl.load(run, device="cpu").embed("high", modality="text").scene.shape == (1, 16)


@pytest.mark.parametrize("objective", [[], [DATA2VEC2]])
def test_a_run_that_was_cut_off_goes_on_to_the_bit(settings: list, objective: list, monkeypatch) -> None:
    settings = [*settings, *objective, "trainer.accumulate=2", "trainer.save_every=4"]
    unbroken = train("toy.yaml", "unbroken", settings)
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    learned = {name.partition("/")[0] for line in lines for name in line.get("metrics", {})}
    assert learned == {"image", "audio", "speech"}

    class Killed(BaseException):
        pass

    def kill(self, step: int) -> None:
        if step == 7:  # nothing is saved on the way out
            raise Killed
        moved(self, step)

    moved = Omni.after_step
    monkeypatch.setattr(Omni, "after_step", kill)
    with pytest.raises(Killed):
        train("toy.yaml", "broken", settings)
    monkeypatch.setattr(Omni, "after_step", moved)
    assert not Path("broken/checkpoints/step_9").exists()
    broken = train("toy.yaml", "broken", settings)
    assert torch.equal(weights(broken, 9), weights(unbroken, 9))
    again = json.loads((broken / "log.jsonl").read_text().splitlines()[-1])["metrics"]
    assert {name: again[name] for name in again if "loss" in name} == {
        name: value for name, value in lines[-1]["metrics"].items() if "loss" in name
    }


def test_a_run_that_goes_on_with_other_clips_says_of_which_modality(settings: list, heard: dict[str, Path]) -> None:
    rows = list(Manifest(heard["train"]))
    settings = [*settings, "data.train.speech=own.jsonl", "trainer.steps=1"]
    for count in (12, 12, 11):
        write_manifest("own.jsonl", rows[:count])
        run = train("toy.yaml", "run", settings)
    notes = [json.loads(line).get("note", "") for line in (run / "log.jsonl").read_text().splitlines()]
    [said] = [note.partition(" because of ")[2] for note in notes if "not to the bit" in note]
    assert re.fullmatch(r"data\.train\.speech 12 rows \(\w{16}\) -> 11 rows \(\w{16}\)", said)


def test_one_line_gives_each_modality_a_transformer_of_its_own(settings: list) -> None:
    sizes = {}
    for backbone in ("shared", "separate"):
        recipe = resolve(load("toy.yaml", [*settings, f"backbone={backbone}"]))
        manifest = Manifest(apart(recipe)["image"].values["data"]["train"])
        encoders = build_encoders(export_config(recipe, manifest))
        assert not isinstance(encoders, Encoder)
        sizes[backbone] = sum(p.numel() for p in encoders.parameters())
        trunk = sum(p.numel() for p in encoders["speech"].transformer.parameters())
    assert sizes["separate"] - sizes["shared"] == 2 * trunk


def test_a_run_gives_the_encoder_of_each_modality(
    settings: list, seen: dict[str, Path], heard: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *settings,
        "backbone={name: shared, own_blocks: 1, own_norms: true}",
        f"data.valid.image={seen['test']}",
        f"data.valid.speech={heard['test']}",
        "trainer.eval_every=9",
    ]
    run = train("toy.yaml", "run", settings)
    said = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    [scores] = [line["evaluation"] for line in said if "evaluation" in line]
    assert {"loss", "image/loss", "speech/loss"} <= set(scores)
    assert "audio/loss" not in scores
    encoder = mmssl.load(run, device="cpu")
    out = encoder.embed(seen["test"], modality="image")
    assert out.scene.shape == (4, 16)
    assert not torch.allclose(out.scene.norm(dim=1), torch.ones(4), atol=1e-2)
    with pytest.raises(ValueError, match="say which, by modality"):
        encoder.embed(seen["test"])
    with pytest.raises(ValueError, match="the modalities of run share no space"):
        retrieval(encoder, Manifest(seen["test"]))
    # what it is validated on may change, and the run goes on
    assert train("toy.yaml", "run", [one for one in settings if "valid.speech" not in one]) == run
    with pytest.raises(RecipeError, match="holds another run, in which data.batch_size.audio is 2 and not 3"):
        train("toy.yaml", "run", [*settings, "data.batch_size.audio=3"])
    capsys.readouterr()
    _done(run)
    told = capsys.readouterr().out
    assert f"mmssl embed run {seen['test']} --modality image" in told
    assert "mmssl embed run HELD_OUT.jsonl --modality audio" in told
    assert "retrieval" not in told
    # and one of them is fine-tuned, from the same vectors
    rest = RECIPE[RECIPE.index("optimizer:") :]
    Path("tune.yaml").write_text(
        f"modality: image\nobjective: {{name: classify}}\ndata: {{batch_size: 4}}\n{rest}", encoding="utf-8"
    )
    tuned = train(
        "tune.yaml",
        "tuned",
        [f"init={run}", f"data.train={seen['train']}", "optimizer.lr=1e-12", "optimizer.weight_decay=0"],
    )
    assert torch.allclose(mmssl.load(tuned, device="cpu").embed(seen["test"]).scene, out.scene, atol=1e-4)
    # and another run of several begins with it, while the rest is new
    still = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.steps=1", "trainer.eval_every=0"]
    again = train("toy.yaml", "again", [*settings, *still, "backbone=separate", f"init.speech={run}"])
    before, after = read_encoder(run)[1], read_encoder(again)[1]
    own = [key for key in before if key.startswith("speech.")]
    assert own
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in own)
    assert not torch.equal(before["image.transformer.norm.weight"], after["image.transformer.norm.weight"])
