"""The files of a model of transformers: where its weights and settings may lie, and what cannot be read."""

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
from theirs import AST_BANDS, AST_FRAMES, SPEECH, write_json
from torch import Tensor

import mmssl
from mmssl.convert.folder import convert, find, open_encoder
from mmssl.convert.pictures import steps_of
from mmssl.modalities.image.augment import resize_extent

transformers = pytest.importorskip("transformers")


def copied(saved: Any, name: str, folder: Path) -> Path:
    """The folder of a model, to be changed."""
    shutil.copytree(saved(name)[1], folder)
    return folder


def with_settings(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | settings)
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
        write_json(folder / "model.safetensors.index.json", {"weight_map": index})
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
        ("vit", say(hidden_size="24"), "config.json says hidden_size='24', and that must be a number"),
        ("vit", say(hidden_size=None), "config.json says hidden_size=None, and that must be a number"),
        ("vit", say(qkv_bias="yes"), "config.json says qkv_bias='yes', and that must be true or false"),
        ("vit", say(hidden_act=3), "config.json says hidden_act=3, and that must be a name"),
        ("wav2vec2 base", say(conv_dim=12), "config.json says conv_dim=12, and that must be a list of numbers"),
        ("wav2vec2 base", say(conv_dim=[12, 12]), "unequal number, 2 in conv_dim, 3 in conv_kernel, 3 in conv_stride"),
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
    paths = ["nowhere", "runs/vit", "models/vit", "./someone/vit", "../someone/vit", "/someone/vit", "~/vit", "a/b/c"]
    for source in (*paths, "someone/vit/", "someone/vit.pt", "someone/model.safetensors", "someone/v1.5/encoder.h5"):
        with pytest.raises(ValueError, match="no such folder; give the folder"):
            find(source)
    assert asked == []
    assert find("someone/vit") == saved("vit")[1]
    both = (
        r"someone/other: as a path, there is no folder someone here, and as a name of the hub .*such model\); correct"
    )
    with pytest.raises(ValueError, match=both):
        find("someone/other")
    with pytest.raises(ValueError, match="as a name of the hub"):
        find("someone/other-1.5")
    assert asked[-2:] == ["someone/other", "someone/other-1.5"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"there is no such folder, and if it is meant as a name of the hub, .*\[hub\]"
    ):
        find("someone/other")


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
    for wrong, message in (
        ({"resample": 1}, "resample=1"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.00784"),
        ({"do_rescale": False}, "do_rescale=False, and here it is always True"),
        ({"do_pad": True}, "do_pad=True, and here it is always False"),
    ):
        with pytest.raises(ValueError, match=message):
            steps_of({"resample": 3, "size": 8, **wrong})


@pytest.mark.parametrize("size", [(31, 50), (50, 31), (48, 64), (33, 33)])
def test_a_shorter_side_leaves_as_many_pixels_as_theirs(saved: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    folder = copied(saved, "clip", tmp_path / "clip")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    processor.save_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    assert resize_extent(np.array([size]), size=16)[0].tolist() == list(theirs.shape[1:])


@pytest.mark.parametrize(
    "said", [{"size": {"longest_edge": 16}}, {"size": "16"}, {"size": {"max_height": 8}}, {"image_mean": "a"}]
)
def test_a_preprocessor_that_says_something_else_is_one_sentence(
    saved: Any, tmp_path: Path, said: dict[str, Any]
) -> None:
    folder = copied(saved, "vit", tmp_path / "vit")
    write_json(folder / "preprocessor_config.json", {"do_resize": True, "size": 16, "resample": 3, **said})
    with pytest.raises(ValueError, match=r"preprocessor_config.json: (a size|image_mean)") as raised:
        mmssl.load(folder)
    assert "\n" not in str(raised.value)


def test_what_a_preprocessor_leaves_empty_is_as_if_it_said_nothing(saved: Any, tmp_path: Path) -> None:
    folder = copied(saved, "vit", tmp_path / "vit")
    empty = dict.fromkeys(("size", "crop_size", "rescale_factor", "image_mean", "image_std", "resample"))
    write_json(folder / "preprocessor_config.json", empty)
    whole = copied(saved, "vit", tmp_path / "whole")
    write_json(whole / "preprocessor_config.json", {})
    assert open_encoder(folder).config == open_encoder(whole).config


def test_frames_and_rate_are_those_of_the_files(saved: Any) -> None:
    videomae = open_encoder(saved("videomae")[1]).config
    assert videomae["augment_eval"][0] == {"name": "center_span", "frames": 4}
    ast = open_encoder(saved("ast")[1]).config["frontend"]
    assert (ast["mean"], ast["std"], ast["frames"], ast["bands"]) == (-6.0, 3.0, AST_FRAMES, AST_BANDS)


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
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SPEECH)).save_pretrained(tmp_path / "spells")
    write_json(tmp_path / "spells" / "vocab.json", {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5})
    convert(tmp_path / "spells", tmp_path / "back")
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "back")
    # the blank first, the boundary second, "a" last
    assert processor.decode([5, 5, 0, 5, 1, 5]) == "aa a"
