"""WavLM, BEiT and Data2VecVision, whose attention has a bias of relative positions: as in transformers, and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from theirs import LAYOUTS_OF, OWN_TABLES, PREPROCESSORS, RELATIVE, clips_of, given, run, write_json

import mmssl
from mmssl.build import build_encoder
from mmssl.convert import LAYOUTS
from mmssl.convert.folder import convert, open_encoder
from mmssl.nn.bias import DistanceBuckets
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", [name for name in RELATIVE if "no bias" not in name])
def test_the_bias_is_no_small_thing_in_these_models(saved: Any, name: str) -> None:
    # so that a wrong one could not hide within the tolerance
    _, folder = saved(name)
    clips = clips_of(name)
    embedder = mmssl.load(folder, device="cpu")
    before = embedder.embed(clips).scene
    with torch.no_grad():
        embedder.encoder.transformer.bias.table.copy_(embedder.encoder.transformer.bias.table.flip(-1))
    assert (embedder.embed(clips).scene - before).abs().max() > 1e-2


def test_every_distance_lies_in_the_range_that_it_lies_in_there() -> None:
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    for buckets, furthest in ((320, 800), (16, 30)):
        theirs = WavLMAttention(8, 2, num_buckets=buckets, max_distance=furthest)
        ahead = torch.arange(-2_000, 2_000)
        mine = DistanceBuckets(2, 1, buckets=buckets, furthest=furthest)._bucket(ahead)
        assert torch.equal(mine, theirs._relative_positions_bucket(ahead))


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
    ("wavlm large", "WavLMForXVector", "classifier, feature_extractor, objective, projector, tdnn"),
    ("beit, one table", "BeitForMaskedImageModeling", "layernorm, lm_head"),
]


@pytest.mark.parametrize(("name", "kind", "beside"), HEADS, ids=[kind for _, kind, _ in HEADS])
def test_the_encoder_of_a_model_with_a_head_is_the_same(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str, beside: str
) -> None:
    body, folder = saved(name)
    model = getattr(transformers, kind)(body.config)
    model.base_model.load_state_dict(body.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
    with caplog.at_level(logging.WARNING):
        found = open_encoder(tmp_path)
    expected = open_encoder(folder)
    assert found.config == expected.config
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(tensor, expected.encoder[key]) for key, tensor in found.encoder.items())
    said = [message for message in caplog.messages if str(tmp_path) in message]
    assert len(said) == 1
    assert f"left out: {beside}" in said[0]


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
    write_json(tmp_path / "config.json", json.loads((folder / "config.json").read_text()) | OWN_TABLES)
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


@pytest.mark.parametrize(("size", "said"), [(16, 0), ([16, 24], 1)])
def test_a_table_that_transformers_misreads_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: Any, said: int
) -> None:
    kind, config, settings = RELATIVE["beit, one table"]
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings | {"image_size": size}))
    model.save_pretrained(tmp_path)
    mmssl.load(tmp_path, device="cpu")
    told = "image_size=[16, 24]: of pictures that are not square transformers takes the axes of the bias for each other"
    found = [record.getMessage() for record in caplog.records if "square" in record.getMessage()]
    assert [message.startswith(told) for message in found] == [True] * said


def test_the_layouts_are_registered_by_their_own_names() -> None:
    assert {"wavlm", "beit", "data2vec-vision"} <= LAYOUTS.keys()
