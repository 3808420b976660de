"""Of a run on several modalities the encoder of one is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmssl
from mmssl.build import build_encoders
from mmssl.cli import app
from mmssl.convert.folder import convert
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")

IMAGE: dict[str, Any] = {
    "frontend": {"name": "patches", "size": [4, 4], "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3},
    "positions": {"name": "sincos"},
    "encoder": {"prefix": 1},
    "augment_eval": [{"name": "center_crop", "size": [16, 16]}],
}
VIDEO: dict[str, Any] = {
    "frontend": {"name": "tubes", "size": [2, 4, 4], "channels": 3},
    "positions": {"name": "flat_sincos", "grid": [2, 4, 4]},
    "encoder": {},
    "augment_eval": [{"name": "center_span", "frames": 4}, {"name": "center_crop", "size": [16, 16]}],
}


def run_of(folder: Path, backbone: Any) -> Path:
    config = {
        "format": 1,
        "modality": {"image": IMAGE, "video": VIDEO},
        "backbone": backbone,
        "transformer": {"dim": 24, "depth": 2, "heads": 3},
        "objective": None,
        "classes": None,
        "vocabulary": None,
    }
    if backbone == "separate":
        trunk = config.pop("transformer")
        config["modality"] = {"image": {**IMAGE, "transformer": trunk}, "video": {**VIDEO, "transformer": trunk}}
    torch.manual_seed(0)
    export_encoder(folder, build_encoders(config), config)
    return folder


@pytest.mark.parametrize("backbone", ["separate", "shared", {"name": "shared", "own_blocks": 1, "own_norms": True}])
def test_one_encoder_of_several_is_written_as_its_family(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backbone: Any
) -> None:
    run = run_of(tmp_path / "run", backbone)
    assert convert(run, tmp_path / "image", modality="image").startswith("transformers.ViTModel.")
    assert "the encoder of image alone is written" in caplog.text
    assert convert(run, tmp_path / "video", modality="video").startswith("transformers.VideoMAEModel.")
    clip = np.random.default_rng(0).random((3, 16, 16)).astype(np.float32)
    mine = mmssl.load(run, device="cpu").of("image").embed([clip]).tokens[0]
    model = transformers.AutoModel.from_pretrained(tmp_path / "image").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(clip)[None]).last_hidden_state[0, 1:]
    assert torch.allclose(mine, theirs, atol=1e-5)
    # and as a run of its own
    convert(run, tmp_path / "ours", to="mmssl", modality="image")
    alone = mmssl.load(tmp_path / "ours", device="cpu")
    assert alone.modalities == ["image"]
    assert torch.equal(alone.embed([clip]).tokens[0], mine)


def test_without_a_modality_those_that_there_are_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", "shared")
    with pytest.raises(SystemExit):
        app(["convert", str(run), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said == (
        "mmssl: no layout of transformers that mmssl writes is of image and video with the objective None; say whose "
        "encoder to write alone, by modality (--modality)\n"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds an encoder of image and video, and none of speech"):
        convert(run, tmp_path / "out", modality="speech")
    # all of it, as it is
    convert(run, tmp_path / "ours", to="mmssl")
    assert set(json.loads((tmp_path / "ours" / "config.json").read_text())["modality"]) == {"image", "video"}
