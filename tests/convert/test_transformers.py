"""Models of transformers, tiny and with random weights: what they compute is computed here, and back.

Every layout is saved by transformers itself, loaded here and compared layer by layer, written here, opened by
transformers and compared with itself.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmssl
from mmssl.assemble import build_encoder
from mmssl.cli import app
from mmssl.convert import LAYOUTS
from mmssl.convert.folder import convert, find, open_encoder, read_weights
from mmssl.convert.pictures import steps_of
from mmssl.data.manifest import write_manifest
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")

_TRUNK: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
_SPEECH = _TRUNK | {
    "conv_dim": [12, 12, 12],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 6,
}
_LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
_IMAGE = _TRUNK | {"image_size": 16, "patch_size": 4}
_DINO = {name: value for name, value in _IMAGE.items() if name != "intermediate_size"}
_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}
_VIDEO = _IMAGE | _DECODER | {"num_frames": 4, "tubelet_size": 2}
# frames that the strides do not come out even with
AST_FRAMES, AST_BANDS = 59, 36
_AUDIO = _TRUNK | {"patch_size": 16, "max_length": AST_FRAMES, "num_mel_bins": AST_BANDS}

# name -> class of the model, of its config, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH),
    "wav2vec2 large": ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH | _LARGE),
    "wav2vec2 with its pretraining head": ("Wav2Vec2ForPreTraining", "Wav2Vec2Config", _SPEECH),
    "hubert base": ("HubertModel", "HubertConfig", _SPEECH),
    "hubert large": ("HubertModel", "HubertConfig", _SPEECH | _LARGE),
    "data2vec audio": ("Data2VecAudioModel", "Data2VecAudioConfig", _SPEECH | {"num_conv_pos_embeddings": 3}),
    "vit": ("ViTModel", "ViTConfig", _IMAGE),
    "vit not square, no biases": ("ViTModel", "ViTConfig", _IMAGE | {"image_size": [16, 24], "qkv_bias": False}),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", _IMAGE | _DECODER | {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", _DINO | {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE | {"vision_use_head": False}),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", _VIDEO | {"use_mean_pooling": False}),
    "videomae for its mean": ("VideoMAEModel", "VideoMAEConfig", _VIDEO),
    "ast": ("ASTModel", "ASTConfig", _AUDIO),
}
SPEECH = [name for name, (kind, _, _) in MODELS.items() if "Wav2Vec2" in kind or "Hubert" in kind or "Audio" in kind]


def build(name: str) -> Any:
    """A model away from the zeros and ones of a fresh one, behind which a forgotten bias or norm could hide."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    if kind == "ViTMAEModel":  # whose table is zero in a fresh model, and not in a fresh part of it
        fresh = type(model.embeddings)(model.config)
        fresh.initialize_weights()
        model.embeddings.position_embeddings.data = fresh.position_embeddings.data
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model by its name, and the folder that it saved itself in."""
    made: dict[str, tuple[Any, Path]] = {}

    def save(name: str) -> tuple[Any, Path]:
        if name not in made:
            model, folder = build(name), tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            _write(folder / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
            made[name] = model, folder
        return made[name]

    return save


# as published: mean and deviation of each channel, and nothing is resized, so that tiny pictures stay as they are
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "speech": {"do_normalize": True, "sampling_rate": 16_000},
    "image": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": False, "do_center_crop": False},
    "video": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": False, "do_center_crop": False},
    "audio": {"mean": -6.0, "std": 3.0, "do_normalize": True, "sampling_rate": 16_000},
}
LAYOUTS_OF = {
    name: next(layout for layout in LAYOUTS.values() if layout.architecture == kind.replace("ForPreTraining", "Model"))
    for name, (kind, _, _) in MODELS.items()
}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def clips_of(name: str) -> list[np.ndarray]:
    """Two clips; of speech and audio one is shorter, one of audio longer than a model reads."""
    rng = np.random.default_rng(0)
    modality = LAYOUTS_OF[name].modality
    if modality == "speech":
        return [rng.standard_normal(n).astype(np.float32) / 50 for n in (900, 613)]
    if modality == "audio":
        return [rng.standard_normal(n).astype(np.float32) / 10 for n in (4_000, 16_000)]
    size = [16, 24] if "not square" in name else [16, 16]
    return [rng.random((3, *([4] if modality == "video" else []), *size)).astype(np.float32) for _ in range(2)]


def run(model: Any, clip: np.ndarray, modality: str) -> list[Tensor]:
    """What transformers computes of one clip: (N, D) after each layer, and the output at the end."""
    settings = PREPROCESSORS[modality]
    model, more = getattr(model, "wav2vec2", model), {}
    if modality == "speech":
        extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
    elif modality == "audio":
        extract = transformers.ASTFeatureExtractor(
            num_mel_bins=AST_BANDS, max_length=AST_FRAMES, mean=settings["mean"], std=settings["std"]
        )
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
    else:
        mean, std = (torch.tensor(settings[f"image_{key}"]) for key in ("mean", "std"))
        given = ((torch.from_numpy(clip).movedim(0, -1) - mean) / std).movedim(-1, -3)[None]
    if model.config.model_type == "vit_mae":  # which shuffles patches by this, also where it hides none
        more["noise"] = torch.arange(given.shape[-2] * given.shape[-1] // 16)[None].float()
    with torch.no_grad():
        out = model(given, output_hidden_states=True, **more)
        layers = [*out.hidden_states[: model.config.num_hidden_layers], out.last_hidden_state]
        if model.config.model_type == "clip_vision_model":
            # their norm at the end is for the class token alone
            layers.append(model.post_layernorm(out.last_hidden_state))
    return [layer[0] for layer in layers]


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


@pytest.mark.parametrize("name", ["wav2vec2 large", "hubert large"])
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


@pytest.mark.parametrize("name", [*(name for name in SPEECH if "head" not in name), "siglip", "videomae"])
def test_there_and_back_gives_the_same_tensors_under_the_same_names(saved: Any, name: str, tmp_path: Path) -> None:
    # where there is no class token, whose position is added to it once and for all
    _, folder = saved(name)
    convert(folder, tmp_path / "back")
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    # which older versions need, and newer ones leave out
    older = "vision_model." if name == "siglip" else ""
    assert {older + key for key in before} == set(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[older + key]), key


def copied(saved: Any, name: str, folder: Path) -> Path:
    """The folder of a model, to be changed."""
    shutil.copytree(saved(name)[1], folder)
    return folder


def with_settings(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    _write(path, json.loads(path.read_text(encoding="utf-8")) | settings)
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_both_names_of_weight_norm_are_read(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("wav2vec2 base")
    older = copied(saved, "wav2vec2 base", tmp_path / "older")
    there = "encoder.pos_conv_embed.conv"

    def rename(tensors: dict[str, Tensor]) -> None:
        for i, letter in enumerate("gv"):
            tensors[f"{there}.weight_{letter}"] = tensors.pop(f"{there}.parametrizations.weight.original{i}")

    with_tensors(older, rename)
    before, after = open_encoder(folder).encoder, open_encoder(older).encoder
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("form", ["shards", "bin", "half"])
def test_weights_in_other_files_are_the_same(saved: Any, tmp_path: Path, form: str) -> None:
    _, source = saved("vit")
    folder = copied(saved, "vit", tmp_path / form)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "shards":
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
        for file, own in parts.items():
            save_file({name: tensors[name] for name in own}, folder / file)
        index = {name: file for file, own in parts.items() for name in own}
        _write(folder / "model.safetensors.index.json", {"weight_map": index})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    before, after = open_encoder(source).encoder, open_encoder(folder).encoder
    for key, tensor in before.items():
        assert torch.allclose(tensor, after[key], atol=2e-3 if form == "half" else 0.0)
        assert after[key].dtype == tensor.dtype


class Harm:
    """What a pickle that runs code is made of."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("harm",)


def test_a_file_from_a_stranger_runs_no_code(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(saved, "vit", tmp_path / "bad")
    (folder / "model.safetensors").unlink()
    torch.save({"harm": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        mmssl.load(folder)
    assert "harm" not in capsys.readouterr().out


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: with_tensors(folder, lambda tensors: tensors.pop(name))


def put(name: str, *shape: int) -> Callable[[Path], Any]:
    return lambda folder: with_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def say(**settings: Any) -> Callable[[Path], Any]:
    return lambda folder: with_settings(folder, **settings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", drop("layernorm.weight"), "the weights lack 'layernorm.weight', which a vit has"),
        ("vit", put("encoder.layer.2.norm.weight", 24), "hold 'encoder.layer.2.norm.weight', which has no place"),
        ("vit", say(image_size=32), r"'positions.table' is \(16, 24\), and config.json makes it \(64, 24\)"),
        ("vit", say(hidden_act="relu"), "hidden_act='relu': our Transformer has gelu"),
        ("vit", say(model_type="swin"), "layout 'swin': mmssl reads wav2vec2, hubert"),
        ("vit", cut, "not a whole safetensors file"),
        ("vit", lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model"),
        ("vit", lambda folder: (folder / "config.json").write_text("{"), "this is not JSON"),
        ("vit_mae", lambda folder: zero_table(folder), "not the sines and cosines of a ViTMAE"),
        ("wav2vec2 base", say(add_adapter=True), "says add_adapter=True, and our encoder has only False"),
        ("wav2vec2 base", say(feat_extract_activation="relu"), "says feat_extract_activation='relu'"),
        ("wav2vec2 base", say(model_type="wavlm"), "lack 'encoder.layers.0.attention.gru_rel_pos_linear.weight'"),
        ("wav2vec2 base", say(model_type="hubert", conv_pos_batch_norm=True), "says conv_pos_batch_norm=True"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    saved: Any, tmp_path: Path, name: str, change: Callable[[Path], Any], message: str
) -> None:
    folder = copied(saved, name, tmp_path / "changed")
    change(folder)
    with pytest.raises(ValueError, match=message) as raised:
        mmssl.load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def zero_table(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors["embeddings.position_embeddings"].zero_())


def test_what_is_no_part_of_the_encoder_is_named(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = saved("wav2vec2 with its pretraining head")
    with caplog.at_level(logging.WARNING):
        open_encoder(folder)
    [said] = caplog.messages
    assert "7 tensors beside it are left out: project_hid, project_q, quantizer" in said


def test_a_mask_token_that_was_not_published_is_drawn_and_said(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(saved, "wav2vec2 base", tmp_path / "without")
    drop("masked_spec_embed")(folder)
    with caplog.at_level(logging.WARNING):
        first, second = open_encoder(folder), open_encoder(folder)
    assert "the weights lack 'masked_spec_embed', which training alone uses" in caplog.messages[0]
    assert torch.equal(first.encoder["mask_token"], second.encoder["mask_token"])


def test_the_network_is_touched_for_a_name_of_the_hub_alone(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.append(name)
        if name != "someone/vit":
            raise OSError("there is no such model\nand more lines")
        return str(saved("vit")[1])

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for source in ("nowhere", "runs/vit", "models/vit", "./someone/vit", "/someone/vit", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder; give the folder"):
            find(source)
    assert asked == []
    assert find("someone/vit") == saved("vit")[1]
    with pytest.raises(ValueError, match=r"someone/other: no such folder, and it could not be had .*such model\)$"):
        find("someone/other")


def test_a_head_that_spells_goes_both_ways(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(**_SPEECH, **_LARGE, pad_token_id=3)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    model.lm_head.weight.data *= 20  # so that it spells more than one character
    model.save_pretrained(tmp_path / "theirs")
    vocabulary = {"<s>": 0, "b": 1, "|": 2, "<pad>": 3, "a": 4, "<unk>": 5}
    _write(tmp_path / "theirs" / "vocab.json", vocabulary)
    _write(tmp_path / "theirs" / "preprocessor_config.json", PREPROCESSORS["speech"])
    clips = clips_of("wav2vec2 large")
    embedder = mmssl.load(tmp_path / "theirs", device="cpu")
    # blank and boundary first, the others in their order; tokens of several characters as private ones
    order = [3, 2, 0, 1, 4, 5]
    assert embedder.config["vocabulary"] == ["<blank>", "|", "\ue000", "b", "a", "\ue002"]
    head = open_encoder(tmp_path / "theirs").objective
    assert torch.equal(head["head.weight"], model.lm_head.weight[order])
    said = embedder.predict(clips)
    convert(tmp_path / "theirs", tmp_path / "back")
    back = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "back").eval()
    names = {number: token for token, number in json.loads((tmp_path / "back" / "vocab.json").read_text()).items()}
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    for clip, text in zip(clips, said, strict=True):
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            before, after = model(given).logits[0], back(given).logits[0]
        assert torch.allclose(after, before[:, order], atol=1e-5)
        assert [names[i] for i in range(6)] == ["<pad>", "|", "<s>", "b", "a", "<unk>"]
        best = torch.unique_consecutive(before.argmax(-1)).tolist()
        spelled = "".join({0: "\ue000", 1: "b", 2: " ", 3: "", 4: "a", 5: "\ue002"}[i] for i in best)
        assert text == " ".join(spelled.split())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["pad_token_id"] == 0


def test_a_vocabulary_of_words_is_refused(tmp_path: Path) -> None:
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**_SPEECH)).save_pretrained(tmp_path)
    _write(tmp_path / "vocab.json", {"<pad>": 0, "|": 1, "<s>": 2, "</s>": 3, "<unk>": 4, "ng": 5})
    with pytest.raises(ValueError, match="the token 'ng' is no single character"):
        mmssl.load(tmp_path)
    _write(tmp_path / "vocab.json", {"<pad>": 0, "|": 1})
    with pytest.raises(ValueError, match="names 2 tokens for the 6 rows of lm_head"):
        mmssl.load(tmp_path)


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


def test_pictures_are_prepared_as_their_processor_does(saved: Any, tmp_path: Path) -> None:
    folder = copied(saved, "vit", tmp_path / "vit")
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    embedder = mmssl.load(folder, device="cpu")
    [step] = embedder.config["augment_eval"]
    assert step == {"name": "resize", "size": [16, 16], "interpolation": "bilinear"}
    x = torch.from_numpy(picture).movedim(-1, 0) / 255
    mine = torch.nn.functional.interpolate(x[None], size=(16, 16), mode="bilinear", antialias=True)[0]
    frontend = embedder.encoder.frontend
    # theirs are rounded to 256 values in between, of which a deviation of .2 makes 1 / 51 at most
    assert ((mine - frontend.mean) / frontend.std - theirs).abs().max() < 0.02
    assert (theirs - theirs.mean()).abs().max() > 0.5


def test_every_way_of_saying_a_size_is_read() -> None:
    square = {"name": "resize", "size": [8, 8], "interpolation": "bicubic"}
    shorter = {"name": "resize", "size": 8, "interpolation": "bicubic"}
    edge, cropped = {"shortest_edge": 8}, {"height": 6, "width": 6}
    crop = {"name": "center_crop", "size": [6, 6]}
    for said, steps in (
        ({"size": 8}, [square]),
        ({"size": {"height": 8, "width": 8}}, [square]),
        ({"size": 8, "do_center_crop": True, "crop_size": 6}, [shorter, crop]),
        ({"size": edge, "do_center_crop": True, "crop_size": cropped}, [shorter, crop]),
        ({"size": edge, "do_resize": False, "do_center_crop": True, "crop_size": 6}, [crop]),
    ):
        assert steps_of({"resample": 3, **said}) == steps
    for wrong, message in (({"resample": 1}, "resample=1"), ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.00784")):
        with pytest.raises(ValueError, match=message):
            steps_of({"resample": 3, "size": 8, **wrong})


def test_frames_and_rate_are_those_of_the_files(saved: Any) -> None:
    videomae = open_encoder(saved("videomae")[1]).config
    assert videomae["augment_eval"][0] == {"name": "center_span", "frames": 4}
    ast = open_encoder(saved("ast")[1]).config["frontend"]
    assert (ast["mean"], ast["std"], ast["frames"], ast["bands"]) == (-6.0, 3.0, AST_FRAMES, AST_BANDS)


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


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {"id": path.stem, "audio": str(path), "duration": 0.4 + 0.02 * int(path.stem)}
        for path in sorted(folder.glob("train/*/*.wav"))
    ]


def test_the_command_converts_and_says_what_opens_it(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = saved("vit_mae")
    arguments = [str(folder), str(tmp_path / "vit"), "--to", "vit"]
    with pytest.raises(SystemExit) as ended:
        app(["convert", *arguments])
    assert ended.value.code == 0
    out = tmp_path / "vit"
    assert capsys.readouterr().out == f'{out}: transformers.ViTModel.from_pretrained("{out}") opens it\n'
    with pytest.raises(SystemExit) as ended:
        app(["convert", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mmssl: {out}: is there already; give a new folder\n"


HEADS = [
    ("wav2vec2 base", "Wav2Vec2ForCTC", "lm_head"),
    ("hubert large", "HubertForCTC", "lm_head"),
    ("data2vec audio", "Data2VecAudioForCTC", "lm_head"),
    ("wav2vec2 large", "Wav2Vec2ForSequenceClassification", "classifier, projector"),
    ("vit", "ViTForImageClassification", "classifier"),
    ("vit_mae", "ViTMAEForPreTraining", "decoder"),
    ("dinov2", "Dinov2ForImageClassification", "classifier"),
    ("videomae", "VideoMAEForPreTraining", "decoder, encoder_to_decoder, mask_token"),
    ("videomae for its mean", "VideoMAEForVideoClassification", "classifier, fc_norm"),
    ("ast", "ASTForAudioClassification", "classifier"),
    ("clip", "CLIPModel", "logit_scale, text_model, text_projection, visual_projection"),
    ("siglip", "SiglipModel", "logit_bias, logit_scale, text_model"),
]


@pytest.mark.parametrize(("name", "kind", "beside"), HEADS, ids=[kind for _, kind, _ in HEADS])
def test_the_encoder_of_a_model_with_a_head_is_the_same(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str, beside: str
) -> None:
    body, folder = saved(name)
    theirs = getattr(transformers, kind)
    config = body.config
    if kind in ("CLIPModel", "SiglipModel"):
        text = {**_TRUNK, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = theirs.config_class(vision_config=config.to_dict(), text_config=text, projection_dim=8)
    model = theirs(config)
    inner = model.vision_model if "vision_model" in dict(model.named_children()) else model.base_model
    assert not inner.load_state_dict(body.state_dict(), strict=False).missing_keys
    model.save_pretrained(tmp_path)
    _write(tmp_path / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
    with caplog.at_level(logging.WARNING):
        found = open_encoder(tmp_path)
    expected = open_encoder(folder)
    assert found.config == expected.config
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(tensor, expected.encoder[key]) for key, tensor in found.encoder.items())
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("mmssl")][:1]
    assert said.endswith(f"left out: {beside}")


def test_a_larger_picture_stretches_the_positions_as_theirs(saved: Any) -> None:
    model, folder = saved("dinov2")
    clip = np.random.default_rng(0).random((3, 24, 32)).astype(np.float32)
    mine = mmssl.load(folder, device="cpu").embed([clip]).tokens[0]
    assert mine.shape == (48, 24)
    assert torch.allclose(mine, run(model, clip, "image")[-1][1:], atol=1e-5)


def test_what_is_written_beside_the_weights_opens_too(saved: Any, tmp_path: Path) -> None:
    for name, kind in (("vit", "ViTImageProcessorPil"), ("clip", "CLIPImageProcessorPil")):
        convert(saved(name)[1], tmp_path / name)
        processor = getattr(transformers, kind).from_pretrained(tmp_path / name)
        assert list(processor.image_mean) == [0.4, 0.5, 0.6]
        assert not processor.do_resize
        assert not processor.do_center_crop
    for name in ("wav2vec2 large", "ast"):
        convert(saved(name)[1], tmp_path / name)
        extract = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / name)
        assert extract.do_normalize
        assert extract.sampling_rate == 16_000
    assert extract.max_length == AST_FRAMES
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**_SPEECH)).save_pretrained(tmp_path / "spells")
    _write(tmp_path / "spells" / "vocab.json", {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5})
    convert(tmp_path / "spells", tmp_path / "back")
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "back")
    # the blank first, the boundary second, "a" last
    assert processor.decode([5, 5, 0, 5, 1, 5]) == "aa a"


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


def test_the_help_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["convert", "--help"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert {name for name in LAYOUTS if name not in said} == set()
