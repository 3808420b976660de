"""WavLM, BEiT and Data2VecVision, whose attention has a bias of relative positions: as in transformers, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmssl
from mmssl.build import build_encoder
from mmssl.convert import LAYOUTS
from mmssl.convert.folder import convert, open_encoder, read_weights
from mmssl.nn.bias import DistanceBuckets
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")

_TRUNK: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
# of 45 tokens: ranges of distances of all widths, and some beyond the last
_SPEECH = _TRUNK | {
    "conv_dim": [12, 12, 12],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 16,
    "max_bucket_distance": 30,
    "vocab_size": 6,
}
_LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
_IMAGE = _TRUNK | {"image_size": 16, "patch_size": 4}
_OWN, _ONE = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
_PLAIN = {"use_absolute_position_embeddings": True, "use_mean_pooling": False, "use_mask_token": True}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wavlm base": ("WavLM", _SPEECH),
    "wavlm large": ("WavLM", _SPEECH | _LARGE),
    "beit, one table": ("Beit", _IMAGE | _ONE),
    "beit, a table each": ("Beit", _IMAGE | _OWN | {"use_mean_pooling": False, "use_mask_token": True}),
    "beit, both positions, no layer scale": ("Beit", _IMAGE | _OWN | _PLAIN | {"layer_scale_init_value": 0.0}),
    "beit, no bias": ("Beit", _IMAGE | _PLAIN),
    "data2vec vision, one table": ("Data2VecVision", _IMAGE | _ONE),
    "data2vec vision, a table each": ("Data2VecVision", _IMAGE | _OWN | {"use_mean_pooling": False}),
}
SPEECH = [name for name in MODELS if "wavlm" in name]
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "speech": {"do_normalize": True, "sampling_rate": 16_000},
    "image": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": False},
}


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def modality(name: str) -> str:
    return "speech" if name in SPEECH else "image"


def away_from_a_fresh_one(model: Any) -> Any:
    """A model without zeros and ones, behind which a forgotten table or gate could hide."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += (1.0 if "table" in key or "gru" in key or "rel_attn" in key else 0.1) * torch.randn_like(
                parameter
            )
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model by its name, and the folder that it saved itself in."""
    made: dict[str, tuple[Any, Path]] = {}

    def save(name: str) -> tuple[Any, Path]:
        if name not in made:
            kind, settings = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**settings)
            model = away_from_a_fresh_one(getattr(transformers, f"{kind}Model")(config))
            folder = tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            write(folder / "preprocessor_config.json", PREPROCESSORS[modality(name)])
            made[name] = model, folder
        return made[name]

    return save


def clips_of(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if modality(name) == "speech":
        return [rng.standard_normal(n).astype(np.float32) / 50 for n in (900, 613)]
    return [rng.random((3, 16, 16)).astype(np.float32) for _ in range(2)]


def given(clip: np.ndarray, kind: str) -> Tensor:
    """What their preprocessor makes of a clip."""
    x, settings = torch.from_numpy(clip)[None], PREPROCESSORS[kind]
    if kind == "speech":
        return (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    mean, std = (torch.tensor(settings[f"image_{key}"])[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def run(model: Any, clip: np.ndarray, kind: str) -> list[Tensor]:
    """What transformers computes of one clip: (N, D) after each layer, and the output at the end."""
    with torch.no_grad():
        out = model(given(clip, kind), output_hidden_states=True)
    return [layer[0] for layer in (*out.hidden_states[: model.config.num_hidden_layers], out.last_hidden_state)]


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_that_of_transformers(saved: Any, name: str) -> None:
    model, folder = saved(name)
    clips, kind = clips_of(name), modality(name)
    embedder = mmssl.load(folder, device="cpu")
    ours = [*range(embedder.depth), -1]
    found = embedder.embed(clips, layer=ours, pool="mean")
    prefix = embedder.encoder.n_prefix
    for row, clip in enumerate(clips):
        for mine, layer in zip(found, run(model, clip, kind), strict=True):
            tokens = mine.tokens[row][mine.valid[row]]
            assert torch.allclose(tokens, layer[prefix:], atol=1e-5), (tokens - layer[prefix:]).abs().max()
            assert tokens.std() > 0.05
        if prefix:
            first = embedder.embed([clip], pool="class").scene[0]
            assert torch.allclose(first, run(model, clip, kind)[-1][0], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "no bias" not in name])
def test_the_bias_is_no_small_thing_in_these_models(saved: Any, name: str) -> None:
    # so that a wrong one could not hide within the tolerance
    _, folder = saved(name)
    clips = clips_of(name)
    embedder = mmssl.load(folder, device="cpu")
    before = embedder.embed(clips).scene
    with torch.no_grad():
        embedder.encoder.transformer.bias.table.copy_(embedder.encoder.transformer.bias.table.flip(-1))
    assert (embedder.embed(clips).scene - before).abs().max() > 1e-2


# torch's, of what transformers gives to its attention
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_a_padded_batch_is_theirs_where_they_are_right(saved: Any) -> None:
    # with a norm of each frame; a group norm of theirs hears the padding
    model, folder = saved("wavlm large")
    clips = clips_of("wavlm large")
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    batch = extract(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).last_hidden_state
    found = mmssl.load(folder, device="cpu").embed(clips)
    for row in range(2):
        real = found.valid[row]
        assert torch.allclose(found.tokens[row][real], theirs[row, : int(real.sum())], atol=1e-5)


def test_every_distance_lies_in_the_range_that_it_lies_in_there() -> None:
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    for buckets, furthest in ((320, 800), (16, 30)):
        theirs = WavLMAttention(8, 2, num_buckets=buckets, max_distance=furthest)
        ahead = torch.arange(-2_000, 2_000)
        mine = DistanceBuckets(2, 1, buckets=buckets, furthest=furthest)._bucket(ahead)
        assert torch.equal(mine, theirs._relative_positions_bucket(ahead))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_opens_in_transformers_and_is_the_same_to_the_bit(
    saved: Any, name: str, tmp_path: Path
) -> None:
    model, folder = saved(name)
    kind = type(model).__name__
    assert convert(folder, tmp_path / "back").startswith(f"transformers.{kind}.from_pretrained")
    back, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for clip in clips_of(name):
        for before, after in zip(run(model, clip, modality(name)), run(back.eval(), clip, modality(name)), strict=True):
            assert torch.equal(before, after)
    first, second = open_encoder(folder), open_encoder(tmp_path / "back")
    assert first.config == second.config
    assert first.encoder.keys() == second.encoder.keys()
    for key, tensor in first.encoder.items():
        assert torch.equal(tensor, second.encoder[key]), key


@pytest.mark.parametrize("name", [name for name in MODELS if "beit, both" not in name and "no bias" not in name])
def test_there_and_back_gives_the_same_tensors_under_the_same_names(saved: Any, name: str, tmp_path: Path) -> None:
    # where the class token has no position of its own, which is added to it once and for all
    _, folder = saved(name)
    convert(folder, tmp_path / "back")
    after = read_weights(tmp_path / "back")
    before = {key: tensor for key, tensor in read_weights(folder).items() if not key.startswith("pooler.")}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", ["beit, one table", "data2vec vision, a table each"])
def test_a_larger_picture_stretches_the_table_as_theirs(saved: Any, name: str) -> None:
    model, folder = saved(name)
    clip = np.random.default_rng(0).random((3, 24, 24)).astype(np.float32)
    embedder = mmssl.load(folder, device="cpu")
    found = embedder.embed([clip], layer=[*range(embedder.depth), -1])
    for mine, layer in zip(found, run(model, clip, "image"), strict=True):
        assert mine.tokens.shape == (1, 36, 24)
        assert torch.allclose(mine.tokens[0], layer[1:], atol=1e-5)


def test_the_mean_over_patches_is_what_their_pooler_norms(saved: Any) -> None:
    model, folder = saved("beit, one table")
    clip = clips_of("beit, one table")[0]
    mean = mmssl.load(folder, device="cpu").embed([clip], pool="mean").scene
    with torch.no_grad():
        assert torch.allclose(model.pooler.layernorm(mean), model(given(clip, "image")).pooler_output, atol=1e-5)


HEADS = [
    ("wavlm base", "WavLMForCTC", "lm_head"),
    ("wavlm large", "WavLMForSequenceClassification", "classifier, projector"),
    ("wavlm large", "WavLMForXVector", "classifier, feature_extractor, objective, projector, tdnn"),
    ("beit, one table", "BeitForImageClassification", "classifier, pooler"),
    ("beit, one table", "BeitForMaskedImageModeling", "layernorm, lm_head"),
    ("data2vec vision, one table", "Data2VecVisionForImageClassification", "classifier, pooler"),
]


@pytest.mark.parametrize(("name", "kind", "beside"), HEADS, ids=[kind for _, kind, _ in HEADS])
def test_the_encoder_of_a_model_with_a_head_is_the_same(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str, beside: str
) -> None:
    body, folder = saved(name)
    model = getattr(transformers, kind)(body.config)
    model.base_model.load_state_dict(body.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    write(tmp_path / "preprocessor_config.json", PREPROCESSORS[modality(name)])
    with caplog.at_level(logging.WARNING):
        found = open_encoder(tmp_path)
    expected = open_encoder(folder)
    assert found.config == expected.config
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(tensor, expected.encoder[key]) for key, tensor in found.encoder.items())
    said = [message for message in caplog.messages if str(tmp_path) in message]
    assert len(said) == 1
    assert said[0].endswith(f"left out: {beside}")


def test_indices_of_old_files_are_no_weights(saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = saved("data2vec vision, one table")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.relative_position_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with caplog.at_level(logging.WARNING):
        found = open_encoder(tmp_path)
    assert not caplog.messages
    assert found.encoder.keys() == open_encoder(folder).encoder.keys()


def test_two_tables_at_once_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("beit, one table")
    write(tmp_path / "config.json", json.loads((folder / "config.json").read_text()) | _OWN)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="our blocks have tables of their own or share one"):
        open_encoder(tmp_path)


OWN: dict[str, Any] = {
    "format": 1,
    "modality": "image",
    "frontend": {"name": "patches", "size": [4, 4], "channels": 1, "mean": [0.5], "std": [0.25]},
    "positions": {"name": "sincos"},
    "transformer": {"dim": 24, "depth": 2, "heads": 3, "bias": {"name": "grid", "grid": [4, 4]}},
    "encoder": {"prefix": 1},
    "augment_eval": [],
    "objective": None,
    "classes": None,
    "vocabulary": None,
}


def exported(folder: Path, **transformer: Any) -> Path:
    config = OWN | {"transformer": OWN["transformer"] | transformer}
    torch.manual_seed(0)
    encoder = build_encoder(config)
    torch.nn.init.normal_(encoder.transformer.bias.table)
    export_encoder(folder, encoder, config)
    return folder


def test_what_was_trained_here_opens_in_transformers(tmp_path: Path) -> None:
    run_folder = exported(tmp_path / "run")
    assert convert(run_folder, tmp_path / "theirs").startswith("transformers.BeitModel.")
    model = transformers.AutoModel.from_pretrained(tmp_path / "theirs").eval()
    clip = np.random.default_rng(0).random((1, 16, 16)).astype(np.float32)
    with torch.no_grad():
        theirs = model((torch.from_numpy(clip)[None] - 0.5) / 0.25).last_hidden_state[0]
    mine = mmssl.load(run_folder, device="cpu").embed([clip]).tokens[0]
    assert torch.allclose(mine, theirs[1:], atol=1e-5)
    assert mine.std() > 0.1
    with pytest.raises(ValueError, match=r"layout vit has transformer.bias=None, and this encoder \{'name': 'grid'"):
        convert(run_folder, tmp_path / "vit", to="vit")


def test_a_table_that_transformers_would_misread_is_not_written(tmp_path: Path) -> None:
    folder = exported(tmp_path / "run", bias={"name": "grid", "grid": [4, 6]})
    with pytest.raises(ValueError, match=r"a grid of \[4, 6\] is not square, and transformers takes the axes"):
        convert(folder, tmp_path / "theirs", to="beit")


def test_the_layouts_are_registered_by_their_own_names() -> None:
    assert {"wavlm", "beit", "data2vec-vision"} <= LAYOUTS.keys()
