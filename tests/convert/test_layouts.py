"""What every layout computes is computed here, and back: layer by layer, and by transformers from what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from theirs import AST_BANDS, LAYOUTS_OF, MODELS, RELATIVE, clips_of, run
from torch import Tensor, nn

import mmssl
from mmssl.build import build_encoder
from mmssl.convert import LAYOUTS
from mmssl.convert.folder import convert, open_encoder, read_weights
from mmssl.convert.translate import layouts_for
from mmssl.data.manifest import write_manifest
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")


SPEAKING = [name for name, (kind, _, _) in MODELS.items() if "Wav2Vec2" in kind or "Hubert" in kind or "Audio" in kind]


def time_first(x: Tensor) -> Tensor:
    """Tokens of AST, over frequency first, in our order, over time first."""
    bands = (AST_BANDS - 16) // 10 + 1
    return torch.cat([x[:2], x[2:].view(bands, -1, x.shape[1]).transpose(0, 1).flatten(0, 1)])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_that_of_transformers(saved: Any, name: str) -> None:
    model, folder = saved(name)
    clips, modality = clips_of(name), LAYOUTS_OF[name].modality
    embedder = mmssl.load(folder, device="cpu")
    assert embedder.modality == modality
    depth = embedder.depth
    # the last layer before the final norm has no counterpart but CLIP's
    ours = [*range(depth + 1), -1] if name == "clip" else [*range(depth), -1]
    found = embedder.embed(clips, layer=ours, pool="mean")
    prefix = embedder.encoder.n_prefix
    for row, clip in enumerate(clips):
        theirs = run(model, clip, modality)
        assert len(theirs) == len(ours)
        for mine, layer in zip(found, theirs, strict=True):
            layer = time_first(layer) if modality == "audio" else layer
            tokens = mine.tokens[row][mine.valid[row]]
            assert torch.allclose(tokens, layer[prefix:], atol=1e-5), (tokens - layer[prefix:]).abs().max()
            assert tokens.std() > 0.05
        # the class token, of which only some layouts have one
        if prefix:
            first = embedder.embed([clip], pool="class").scene[0]
            assert torch.allclose(first, theirs[-1][0], atol=1e-5)


# torch's, of what transformers gives to the attention of WavLM
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", ["wav2vec2 large", "hubert large", "wavlm large"])
def test_a_padded_batch_is_theirs_where_they_are_right(saved: Any, name: str) -> None:
    # with a norm of each frame; a group norm of theirs, and stacked convolutions, hear the padding
    model, folder = saved(name)
    clips = clips_of(name)
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    batch = extract(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).last_hidden_state
    found = mmssl.load(folder, device="cpu").embed(clips)
    for row in range(2):
        real = found.valid[row]
        assert torch.allclose(found.tokens[row][real], theirs[row, : int(real.sum())], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_opens_in_transformers_and_is_the_same_to_the_bit(
    saved: Any, name: str, tmp_path: Path
) -> None:
    model, folder = saved(name)
    layout = LAYOUTS_OF[name]
    said = convert(folder, tmp_path / "back")
    assert said.startswith(f"transformers.{layout.architecture}.from_pretrained")
    back, report = getattr(transformers, layout.architecture).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    # their pooler is no part of an encoder
    assert not {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for clip in clips_of(name):
        pairs = zip(*(run(one.eval(), clip, layout.modality) for one in (model, back)), strict=True)
        for before, after in pairs:
            assert torch.equal(before, after)
    # and read again it is the same here, settings and tensors
    first, second = open_encoder(folder), open_encoder(tmp_path / "back")
    assert first.config == second.config
    assert first.encoder.keys() == second.encoder.keys()
    for key, tensor in first.encoder.items():
        assert torch.equal(tensor, second.encoder[key]), key


NAMESAKES = [name for name in [*SPEAKING, *RELATIVE] if not any(part in name for part in ("head", "both", "no bias"))]


@pytest.mark.parametrize("name", [*NAMESAKES, "siglip", "videomae"])
def test_there_and_back_gives_the_same_tensors_under_the_same_names(saved: Any, name: str, tmp_path: Path) -> None:
    # where there is no class token with a position, which is added to it once and for all
    _, folder = saved(name)
    convert(folder, tmp_path / "back")
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    before = {key: tensor for key, tensor in before.items() if not key.startswith("pooler.")}
    # which older versions need, and newer ones leave out
    older = "vision_model." if name == "siglip" else ""
    assert {older + key for key in before} == set(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[older + key]), key


OWN: dict[str, dict[str, Any]] = {
    "image": {
        "format": 1,
        "modality": "image",
        "frontend": {"name": "patches", "size": [4, 4], "channels": 1, "mean": [0.5], "std": [0.25]},
        "positions": {"name": "sincos"},
        "transformer": {"dim": 24, "depth": 2, "heads": 3},
        "encoder": {"prefix": 1},
        "augment_eval": [{"name": "resize", "size": 20}, {"name": "center_crop", "size": [16, 24]}],
    },
    "speech": {
        "format": 1,
        "modality": "speech",
        "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4]], "norm": "group", "normalize": False},
        "positions": {"name": "conv", "kernel": 8, "groups": 4},
        "transformer": {"dim": 16, "depth": 2, "heads": 2, "norm": "post", "eps": 1e-5},
        "encoder": {"mask_token": True},
        "augment_eval": [],
    },
}


def exported(folder: Path, config: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    more = {"objective": None, "classes": None, "vocabulary": None}
    encoder = build_encoder(config)
    for part in encoder.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(part.bias)
    export_encoder(folder, encoder, more | config)
    return folder


@pytest.mark.parametrize(("modality", "kind"), [("image", "ViTModel"), ("speech", "Wav2Vec2Model")])
def test_what_was_trained_here_opens_in_transformers(tmp_path: Path, modality: str, kind: str) -> None:
    run_folder = exported(tmp_path / "run", OWN[modality])
    assert convert(run_folder, tmp_path / "theirs").startswith(f"transformers.{kind}.")
    # the whole class by its config.json, as a user opens it
    model = transformers.AutoModel.from_pretrained(tmp_path / "theirs").eval()
    assert type(model).__name__ == kind
    rng = np.random.default_rng(0)
    if modality == "speech":
        clip = rng.standard_normal(700).astype(np.float32)
        given = torch.from_numpy(clip)[None]
    else:
        clip = rng.random((1, 16, 24)).astype(np.float32)
        given = (torch.from_numpy(clip)[None] - 0.5) / 0.25
    config = json.loads((run_folder / "config.json").read_text()) | {"augment_eval": []}
    (run_folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        theirs = model(given).last_hidden_state[0]
    mine = mmssl.load(run_folder, device="cpu").embed([clip]).tokens[0]
    assert torch.allclose(mine, theirs[-len(mine) :], atol=1e-5)
    assert mine.std() > 0.1


def test_layer_scale_is_written_where_a_layout_has_it_and_refused_elsewhere(tmp_path: Path) -> None:
    plain = OWN["image"]
    scaled = plain | {"transformer": plain["transformer"] | {"layer_scale": 0.5}}
    run_folder = exported(tmp_path / "run", scaled)
    assert convert(run_folder, tmp_path / "theirs").startswith("transformers.Dinov2Model.")
    back = open_encoder(tmp_path / "theirs").encoder
    for name, tensor in open_encoder(run_folder).encoder.items():
        assert torch.equal(back[name], tensor)
    for to in ("vit", "vit_mae", "siglip_vision_model"):
        with pytest.raises(ValueError, match=f"layout {to} has transformer.layer_scale=None, and this encoder 0.5"):
            convert(run_folder, tmp_path / "other", to=to)
    with pytest.raises(ValueError, match=r"layout dinov2 has transformer.layer_scale=1.0, and this encoder None"):
        convert(exported(tmp_path / "plain", plain), tmp_path / "other", to="dinov2")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("section", "settings", "to", "message"),
    [
        ("transformer", {"eps": 1e-6}, "wav2vec2", "layout wav2vec2 has transformer.eps=1e-05, and this encoder 1e-06"),
        ("positions", {"name": "sincos"}, "hubert", "has positions.name='conv', and this encoder 'sincos'"),
        ("frontend", {"name": "logmel"}, "wav2vec2", "has frontend.name='waveform', and this encoder 'logmel'"),
        (
            "encoder",
            {"prefix": 2},
            "transformers",
            "no layout of transformers can say what this encoder is: lay",
        ),
        ("encoder", {}, "bert", "layout 'bert': choose one of wav2vec2"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_by_the_setting(
    tmp_path: Path, section: str, settings: dict[str, Any], to: str, message: str
) -> None:
    config = json.loads(json.dumps(OWN["speech"]))
    changed = settings if "name" in settings else config[section] | settings
    config[section] = changed
    run_folder = exported(tmp_path / "run", config)
    with pytest.raises(ValueError, match=message):
        convert(run_folder, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("modality", ["codes", "text"])
def test_a_modality_without_a_layout_is_refused_by_its_name(modality: str) -> None:
    with pytest.raises(ValueError, match=f"writes is of {modality}; they are of speech, .*image"):
        layouts_for({"modality": modality}, None)


def test_converted_to_mmssl_it_is_a_run_that_loads(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("hubert large")
    assert convert(folder, tmp_path / "ours", to="mmssl") == f'mmssl.load("{tmp_path / "ours"}") opens it'
    clips = clips_of("hubert large")
    before, after = (mmssl.load(path, device="cpu").embed(clips).tokens for path in (folder, tmp_path / "ours"))
    assert torch.equal(before, after)
    # and it remembers what it was
    assert convert(tmp_path / "ours", tmp_path / "again").startswith("transformers.HubertModel")
    with pytest.raises(ValueError, match="is there already"):
        convert(folder, tmp_path / "ours")


def test_a_published_encoder_is_trained_further(saved: Any, sounds: Path, tmp_path: Path) -> None:
    _, folder = saved("wav2vec2 base")
    assert write_manifest(tmp_path / "train.jsonl", rows_of(sounds)[:4]) == 4
    overrides = [
        f"init={folder}",
        f"data.train={tmp_path / 'train.jsonl'}",
        "data.workers=0",
        "trainer.steps=1",
        "schedule.warmup=1",
        "trainer.accumulate=1",
        "trainer.precision=float32",
        "trainer.device=cpu",
    ]
    objective = ["objective.codes=4", "objective.dim=8", "objective.negatives=5", "objective.mask_span=2"]
    mmssl.train("speech/wav2vec2_base", tmp_path / "run", [*overrides, *objective])
    before, after = open_encoder(folder), open_encoder(tmp_path / "run")
    assert after.config["positions"] == before.config["positions"]
    # rates of dropout are the recipe's own
    assert after.config["transformer"] == before.config["transformer"] | {"activation_dropout": 0.0, "layer_drop": 0.05}
    floats = {key: tensor for key, tensor in before.encoder.items() if tensor.is_floating_point()}
    moved = {key for key, tensor in floats.items() if not torch.equal(tensor, after.encoder[key])}
    assert {"mask_token", "frontend.weights.0", "positions.weight_v"} <= moved
    # the first update of Adam moves a weight by its rate, and the decay by a hundredth of that share of it
    largest = max(float((after.encoder[key] - before.encoder[key]).abs().max()) for key in moved)
    assert 0 < largest < 6e-4
    assert convert(tmp_path / "run", tmp_path / "theirs").startswith("transformers.Wav2Vec2Model")
    with pytest.raises(ValueError, match=r"init=.*holds an encoder of speech, and this recipe is for image"):
        mmssl.train("image/mae_base", tmp_path / "other", overrides)


def test_a_published_encoder_of_pictures_is_brought_together_with_captions(
    saved: Any, pictures: Path, tmp_path: Path
) -> None:
    _, folder = saved("vit")
    files = sorted((pictures / "train").rglob("*.png"))[:4]
    rows = [{"image": str(file), "text": file.stem, "name": file.stem} for file in files]
    write_manifest(tmp_path / "train.jsonl", rows)
    height, width = open_encoder(folder).config["positions"]["grid"]
    down, along = open_encoder(folder).config["frontend"]["size"]
    size = f"[{{name: resize, size: [{height * down}, {width * along}]}}]"
    overrides = [
        f"data.train={tmp_path / 'train.jsonl'}",
        f"init.image={folder}",
        f"modality.image.augment={{train: {size}, eval: {size}}}",
        "modality.text.transformer={dim: 16, depth: 1, heads: 2}",
        "tokenizer.entries=260",
        "objective.dim=8",
        "trainer={steps: 1, device: cpu}",
        "schedule.warmup=1",
        "optimizer={lr: 1e-12, weight_decay: 0}",
    ]
    run = mmssl.train("small/clip_emoji", tmp_path / "run", overrides)
    before, after = open_encoder(folder).encoder, open_encoder(run).encoder
    assert all(torch.allclose(tensor, after[f"image.{key}"], atol=1e-9) for key, tensor in before.items())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {"id": path.stem, "audio": str(path), "duration": 0.4 + 0.02 * int(path.stem)}
        for path in sorted(folder.glob("train/*/*.wav"))
    ]


@pytest.mark.parametrize("name", ["dinov2", "dinov2 with registers"])
@pytest.mark.parametrize("size", [(24, 32), (8, 8), (12, 20)])
def test_a_picture_of_another_size_stretches_the_positions_as_theirs(
    saved: Any, name: str, size: tuple[int, int]
) -> None:
    model, folder = saved(name)
    clip = np.random.default_rng(0).random((3, *size)).astype(np.float32)
    embedder = mmssl.load(folder, device="cpu")
    mine = embedder.embed([clip]).tokens[0]
    assert mine.shape == (size[0] * size[1] // 16, 24)
    assert torch.allclose(mine, run(model, clip, "image")[-1][embedder.encoder.n_prefix :], atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_settings_that_a_config_leaves_out_are_as_there(name: str) -> None:
    layout = LAYOUTS[name]
    theirs = getattr(transformers, layout.architecture).config_class()
    assert theirs.model_type == name
    for key, value in (layout.defaults | layout.fixed).items():
        given = getattr(theirs, key, value)
        assert (list(given) if isinstance(given, tuple) else given) == value, key
    # those that only a relative of the model has are not asked of it
    own = layout.defaults.keys() - {"feat_extract_norm", "do_stable_layer_norm"}
    assert {key for key in own if not hasattr(theirs, key)} == set()
