"""Embeddings of files and arrays: the same vectors whatever else is embedded, and one sentence where it fails."""

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mmssl import clips
from mmssl.build import build_encoder, build_objective
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.scan import scan
from mmssl.embed import Embedder, load
from mmssl.encoder import Encoder
from mmssl.modalities import MODALITIES
from mmssl.training.checkpoint import export_encoder
from mmssl.types import BadClip, Batch, Raw

SPEECH: dict[str, Any] = {
    "format": 1,
    "modality": "speech",
    "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4], [8, 4, 4]], "rate": 8000, "norm": "group"},
    "positions": {"name": "conv", "kernel": 8, "groups": 2},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {"mask_token": True},
    "augment_eval": [],
    "objective": {"name": "ctc", "freeze_updates": 0},
    "classes": None,
    "vocabulary": ["<blank>", "|", "a", "b"],
}
IMAGE: dict[str, Any] = {
    "format": 1,
    "modality": "image",
    "frontend": {"name": "patches", "size": [4, 4], "channels": 1, "mean": [0.5], "std": [0.5]},
    "positions": {"name": "sincos"},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {"prefix": 2},
    "augment_eval": [{"name": "resize", "size": 8}, {"name": "center_crop", "size": 8}],
    "objective": {"name": "classify"},
    "classes": ["checks", "stripes"],
    "vocabulary": None,
}


def exported(folder: Path, config: dict[str, Any], *, tuned: bool = False) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(config)
    export_encoder(folder, encoder, config, objective=build_objective(config, encoder) if tuned else None)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return load(exported(tmp_path_factory.mktemp("speech"), SPEECH, tuned=True))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return load(exported(tmp_path_factory.mktemp("image"), IMAGE, tuned=True))


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    config = IMAGE | {"objective": {"name": "mae", "target": "pixels", **decoder}, "classes": None}
    return load(exported(tmp_path_factory.mktemp("painter"), config, tuned=True))


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(n).astype(np.float32) / 4 for n in (1600, 300, 2300, 900, 4000, 301, 120)]


def alone(embedder: Embedder, clip: np.ndarray, layer: int | None = None) -> Tensor:
    """The real tokens of one clip, straight from the encoder."""
    raw = Raw(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), ["alone"], 8000.0)
    with torch.no_grad():
        encoded = embedder.encoder(embedder.encoder.tokens(raw), layers=[] if layer is None else [layer])
    return (encoded.x if layer is None else encoded.layers[layer])[0]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"batch_seconds": 0.1}, {}])
def test_clips_come_in_their_order_and_as_they_are_alone(
    speech: Embedder, waves: list[np.ndarray], settings: dict[str, Any]
) -> None:
    found = speech.embed(waves, **settings)
    for row, wave in enumerate(waves):
        expected = alone(speech, wave)
        assert int(found.valid[row].sum()) == len(expected)
        assert found.tokens[row, : len(expected)].numpy() == pytest.approx(expected.numpy(), abs=1e-5)
        assert not found.tokens[row, len(expected) :].any()
        assert found.scene[row].numpy() == pytest.approx(expected.mean(0).numpy(), abs=1e-5)


def test_another_call_order_or_number_of_threads_gives_the_same_vectors(
    speech: Embedder, waves: list[np.ndarray]
) -> None:
    forth, again, back = speech.embed(waves), speech.embed(waves), speech.embed(waves[::-1])
    assert torch.equal(again.tokens, forth.tokens)
    assert back.scene.flip(0).numpy() == pytest.approx(forth.scene.numpy(), abs=1e-5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        more = speech.embed(waves, batch_size=2)
    finally:
        torch.set_num_threads(threads)
    assert more.tokens.numpy() == pytest.approx(forth.tokens.numpy(), abs=1e-5)


def test_a_stream_is_the_same_embeddings_a_few_at_a_time(speech: Embedder, waves: list[np.ndarray]) -> None:
    whole = speech.embed([*waves, "missing.wav"], on_bad_clip="skip")
    parts = [one for [one] in speech.stream([*waves, "missing.wav"], tokens=True, batch_size=2, on_bad_clip="skip")]
    assert [len(one.ids) for one in parts] == [2, 2, 4]
    assert [name for one in parts for name in one.ids] == whole.ids
    assert torch.cat([one.scene for one in parts]).numpy() == pytest.approx(whole.scene.numpy(), abs=1e-5, nan_ok=True)
    assert parts[2].bad == whole.bad
    [[middle]] = speech.stream(waves, places=range(2, 4))
    assert middle.scene.numpy() == pytest.approx(whole.scene[2:4].numpy(), abs=1e-5)
    [[none]] = speech.stream("missing.wav", on_bad_clip="skip")
    assert none.scene.shape == (1, 0)
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        next(speech.stream(waves, layers=[3]))


def test_layers_are_counted_from_the_input_of_the_first_block(speech: Embedder, waves: list[np.ndarray]) -> None:
    by_layer = speech.embed(waves[:2], layer="all")
    assert len(by_layer) == 3
    for layer, found in enumerate(by_layer):
        assert found.tokens[0].numpy() == pytest.approx(alone(speech, waves[0], layer).numpy(), abs=1e-5)
    first, output = speech.embed(waves[:2], layer=[0, -1])
    assert torch.equal(first.scene, by_layer[0].scene)
    # the output is the last layer after the final norm
    norm = torch.nn.functional.layer_norm(by_layer[2].tokens[0], (16,), eps=1e-6)
    assert output.tokens[0].numpy() == pytest.approx(norm.numpy(), abs=1e-4)
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        speech.embed(waves[:1], layer=3)
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        speech.embed(waves[:1], layer=-2)


def test_time_is_the_middle_of_what_a_token_sees(speech: Embedder, waves: list[np.ndarray]) -> None:
    found = speech.embed(waves[:2])
    # a token sees ((4 - 1) * 4 + 4 - 1) * 5 + 10 = 85 samples, and the next starts 80 further on, at 8 samples a ms
    assert found.time_ms is not None
    assert found.time_ms[0, :3].tolist() == pytest.approx([85 / 16, 85 / 16 + 10, 85 / 16 + 20])
    assert int(found.valid[1].sum()) == 3
    assert not found.time_ms[1, 3:].any()


def test_scenes_alone_are_the_same_without_tokens(speech: Embedder, waves: list[np.ndarray]) -> None:
    both, scenes = (speech.embed(waves, pool="slices:3+std", tokens=kept) for kept in (True, False))
    assert torch.equal(both.scene, scenes.scene)
    assert both.scene.shape == (7, 16 * 3 * 2)
    assert scenes.tokens.shape[1] == scenes.valid.shape[1] == 0
    # a slice is of the clip's own length
    tokens = alone(speech, waves[0])
    assert both.scene[0, :16].numpy() == pytest.approx(tokens[: -(-len(tokens) // 3)].mean(0).numpy(), abs=1e-5)


def test_every_kind_of_input_gives_the_same_vector(speech: Embedder, tmp_path: Path) -> None:
    wave = (np.sin(np.arange(800) / 9) * 8000).astype(np.int16)
    path = tmp_path / "clips" / "a.wav"
    path.parent.mkdir()
    soundfile.write(path, wave, 8000)
    (path.parent / "notes.txt").write_text("no clip")
    write_manifest(tmp_path / "m.jsonl", [{"id": "first", "audio": str(path), "seconds": 0.1}])
    whole: list[Any] = [str(path), path, str(tmp_path / "clips" / "*.wav"), tmp_path / "clips", tmp_path / "m.jsonl"]
    whole += [Manifest(tmp_path / "m.jsonl"), io.BytesIO(path.read_bytes()), wave, torch.from_numpy(wave)]
    whole += [wave.astype(np.float64) / 32768]
    found = speech.embed(whole)
    assert found.ids == [*[str(path)] * 4, "first", "first", "input 6", "input 7", "input 8", "input 9"]
    assert found.scene.numpy() == pytest.approx(found.scene[:1].expand(10, -1).numpy(), abs=1e-5)
    for one in whole:
        if isinstance(one, io.BytesIO):
            one.seek(0)
        assert speech.embed(one).scene.numpy() == pytest.approx(found.scene[:1].numpy(), abs=1e-5)
    assert speech.embed(np.stack([wave, wave])).ids == ["input 0.0", "input 0.1"]


def test_an_array_at_another_rate_is_resampled(speech: Embedder) -> None:
    time = np.arange(3200) / 16000
    twice, once = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 440 * time[::2])
    found = speech.embed(twice, rate=16000)
    assert int(found.valid.sum()) == int(speech.embed(once).valid.sum())
    # the ends of a resampled clip differ
    assert found.tokens[0, 5:-5].numpy() == pytest.approx(speech.embed(once).tokens[0, 5:-5].numpy(), abs=0.05)


def test_a_span_of_an_array_of_sound_is_that_of_its_file(tmp_path: Path) -> None:
    span = {"name": "center_span", "seconds": 0.2}
    whole = load(exported(tmp_path / "whole", SPEECH))
    middle, end = (
        load(exported(tmp_path / str(at), {**SPEECH, "augment_eval": [{**span, "at": at}]})) for at in (0.5, 1.0)
    )
    long, short = (np.random.default_rng(n).standard_normal(n).astype(np.float32) / 4 for n in (7002, 1501))
    assert torch.equal(middle.embed(long).tokens, whole.embed(long[2701:4301]).tokens)
    assert torch.equal(end.embed(long).tokens, whole.embed(long[-1600:]).tokens)
    # cut before it is resampled, as a file is
    assert torch.equal(middle.embed(long, rate=16000).tokens, whole.embed(long[1901:5101], rate=16000).tokens)
    assert torch.equal(middle.embed(short).tokens, whole.embed(short).tokens)
    for rate in (8000, 16000):
        for n, wave in enumerate((long, short)):
            soundfile.write(tmp_path / f"{n}.wav", wave, rate, subtype="FLOAT")
        files, arrays = middle.embed([tmp_path / "0.wav", tmp_path / "1.wav"]), middle.embed([long, short], rate=rate)
        assert torch.equal(arrays.tokens, files.tokens)
    # what is not read may be NaN
    spoiled = [np.concatenate([wave[:-1], [np.float32("nan")]]) for wave in (long, short)]
    assert list(middle.embed(spoiled, on_bad_clip="skip").bad) == ["input 1"]
    assert middle.embed([np.zeros(0, np.float32), long], on_bad_clip="skip").bad == {"input 0": "holds no samples"}


# the middle 6 of 16 frames begin with the sixth, and 7 of them at half a frame; 40 are more than there are
@pytest.mark.parametrize(("frames", "part"), [(6, slice(5, 11)), (7, slice(5, 12)), (40, slice(16))])
def test_a_span_of_an_array_of_video_is_that_of_its_file(
    frames: int, part: slice, videos: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        **IMAGE,
        "modality": "video",
        "frontend": {**IMAGE["frontend"], "name": "tubes", "size": [1, 16, 16], "rate": 8},
        "augment_eval": [],
    }
    cut = {**config, "augment_eval": [{"name": "center_span", "frames": frames}]}
    slow = {**cut, "frontend": {**cut["frontend"], "rate": 4}}
    file = videos / "train" / "up" / "0.mp4"
    film = MODALITIES["video"].read(file, rate=8, channels=1)
    assert film.shape[1] == 16
    own = load(exported(tmp_path / "cut", cut))
    found = own.embed(film).tokens
    assert torch.equal(found, own.embed(file).tokens)
    assert torch.equal(found, load(exported(tmp_path / "whole", config)).embed(film[:, part]).tokens)
    # frames at another rate are taken by their time
    other = load(exported(tmp_path / "slow", slow))
    assert torch.equal(other.embed(film, rate=8).tokens, other.embed(file).tokens)
    assert other.embed([film[:, :0], film], on_bad_clip="skip").bad.keys() == {"input 0"}


def test_pictures_of_all_sizes_are_brought_to_the_runs_size(image: Embedder, pictures: Path) -> None:
    folder = image.embed(pictures / "train" / "checks")
    assert folder.tokens.shape == (6, 4, 16)
    assert folder.ids == sorted(folder.ids)
    assert folder.time_ms is None
    mixed = image.embed([torch.rand(1, 8, 12), torch.rand(1, 16, 8), (torch.rand(1, 8, 8) * 255).byte()])
    assert mixed.scene.shape == (3, 16)
    regions, first = image.embed(folder.ids, pool="grid:2x2"), image.embed(folder.ids, pool="class")
    assert regions.scene.numpy() == pytest.approx(folder.tokens.flatten(1).numpy(), abs=1e-5)
    assert not torch.allclose(first.scene, folder.scene, atol=1e-2)


def test_pictures_of_several_sizes_are_embedded_as_they_are_alone(tmp_path: Path) -> None:
    embedder = load(exported(tmp_path / "run", {**IMAGE, "augment_eval": []}))
    clips = [torch.rand(1, 8, 4 * (1 + n % 3)) for n in range(7)]
    found = embedder.embed(clips, batch_size=2)
    for row, clip in enumerate(clips):
        assert found.scene[row].numpy() == pytest.approx(embedder.embed(clip).scene[0].numpy(), abs=1e-5)


def test_a_bad_clip_is_named_and_gets_an_empty_row(speech: Embedder, tmp_path: Path, waves: list[np.ndarray]) -> None:
    (tmp_path / "empty.wav").touch()
    missing, empty = str(tmp_path / "missing.wav"), str(tmp_path / "empty.wav")
    clips = [waves[0], missing, np.full(900, np.nan), waves[1], empty, waves[1][:84]]
    with pytest.raises(BadClip, match=r"missing\.wav: no such file"):
        speech.embed(clips)
    found = speech.embed(clips, on_bad_clip="skip", batch_size=2)
    good = speech.embed([waves[0], waves[1]])
    assert found.scene[[0, 3]].numpy() == pytest.approx(good.scene.numpy(), abs=1e-5)
    assert found.scene[[1, 2, 4, 5]].isnan().all()
    assert not found.valid[[1, 2, 4, 5]].any()
    assert list(found.bad) == [missing, "input 2", empty, "input 5"]
    assert "shorter than one token" in found.bad["input 5"]
    with pytest.raises(ValueError, match="none of the 2 clips can be read; the first is"):
        speech.embed([missing, empty], on_bad_clip="skip")


def test_a_picture_that_does_not_fit_is_a_bad_clip(tmp_path: Path) -> None:
    embedder = load(exported(tmp_path / "run", {**IMAGE, "augment_eval": []}))
    found = embedder.embed([torch.rand(1, 8, 8), torch.rand(1, 7, 8), torch.rand(8, 8, 1)], on_bad_clip="skip")
    assert found.bad["input 1"].startswith("7 x 8 pixels are not a whole number")
    assert "must be (channels, height, width)" in found.bad["input 2"]
    with pytest.raises(BadClip, match="from 0 to 1"):
        embedder.embed(torch.rand(1, 8, 8) * 255)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "nothing to embed"),
        ([3.5], "float is none of path"),
        ("nothing/*.wav", "no file matches"),
        (torch.zeros(2, 3, 4), "a clip is \\(samples,\\)"),
        (torch.tensor(1.0), "a clip is \\(samples,\\)"),
        (np.array(["a.wav", "b.wav"]), "an array of <U5 holds no numbers; give paths as a list"),
        (None, "NoneType is none of path"),
        ([None], "input 0: NoneType is none of path"),
        (7, "int is none of path"),
        (torch.zeros(900, 2), "900 clips of 2 samples, .* samples by channels, give the mean over axis 1"),
        (torch.full((900,), torch.nan), "input 0: samples are NaN or infinite"),
        (torch.zeros(0), "input 0: holds no samples"),
    ],
)
def test_inputs_that_are_none_are_refused(speech: Embedder, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        speech.embed(given)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0}, "rate=0: must be above 0"),
        ({"rate": float("nan")}, "rate=nan: must be above 0"),
        ({"pool": "median"}, "pool='median': choose mean"),
        ({"pool": "attention"}, "pool='attention': .* learned none; `mmssl finetune` it"),
        ({"layer": "last"}, "layer='last': give a number"),
        ({"layer": None}, "layer=None: give a number"),
        ({"layer": []}, "name at least one"),
        ({"batch_size": 0}, "must be above 0"),
        ({"on_bad_clip": "ignore"}, "choose raise or skip"),
    ],
)
def test_settings_that_are_none_are_refused(speech: Embedder, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        speech.embed(torch.zeros(900), **settings)
    assert "\n" not in str(error.value)


def test_a_bad_row_is_named_with_its_line_and_the_way_out(speech: Embedder, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"rubbish")
    write_manifest(tmp_path / "m.jsonl", [{"audio": str(tmp_path / "a.wav")}])
    with pytest.raises(
        BadClip, match=r"a.wav: not a sound .* \(at .*m.jsonl:1\); on_bad_clip=skip \(--on-bad-clip skip"
    ):
        speech.embed(tmp_path / "m.jsonl")
    with pytest.raises(BadClip) as error:
        speech.embed(torch.zeros(10))
    assert "data.on_bad_clip" not in str(error.value)


def test_a_folder_that_is_called_like_a_clip_is_no_clip(speech: Embedder, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(900), 8000)
    (tmp_path / "b.wav").mkdir()
    assert speech.embed(tmp_path).ids == [str(tmp_path / "a.wav")]


def test_a_folder_has_the_clips_that_a_manifest_of_it_has(speech: Embedder, tmp_path: Path) -> None:
    files = ["b.wav", ".hidden.wav", "._b.WAV", "x/a.WAV", "x/notes.txt", ".trash/c.wav", "x/.trash/c.wav"]
    for name in ["in/" + file for file in files] + ["elsewhere/d.wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.ones(300) / 4, 8000, format="WAV")
    with tarfile.open(tmp_path / "in" / "shard.TAR", "w") as shard:
        shard.add(tmp_path / "elsewhere" / "d.wav", "e.wav")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "f.wav").symlink_to(tmp_path / "elsewhere" / "d.wav")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "lost.wav").symlink_to(tmp_path / "nowhere.wav")
    found = speech.embed(tmp_path / "in", on_bad_clip="skip")
    names = [str(Path(name).relative_to(tmp_path / "in")) for name in found.ids]
    assert names == ["b.wav", "f.wav", "linked/d.wav", "lost.wav", "shard.TAR#e.wav", "x/a.WAV"]
    assert found.bad == {str(tmp_path / "in" / "lost.wav"): "no such file or directory"}
    kind = MODALITIES["speech"]
    assert kind.probe is not None
    listed = scan(tmp_path / "in", media="audio", probe=kind.probe, suffixes=kind.suffixes, progress=False)
    assert {row["id"] for row in listed.rows} == {*names, "e.wav"} - {"shard.TAR#e.wav", "lost.wav"}
    assert [path for path, _ in listed.bad] == list(found.bad)


def test_a_pipe_is_a_bad_clip_however_it_is_given(speech: Embedder, tmp_path: Path, waves: list[np.ndarray]) -> None:
    soundfile.write(tmp_path / "a.wav", waves[0], 8000)
    pipe = tmp_path / "b.wav"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # so that this fails, and does not wait, where the pipe is opened all the same
    try:
        for given in (tmp_path, str(tmp_path / "*.wav"), [tmp_path / "a.wav", pipe]):
            found = speech.embed(given, on_bad_clip="skip")
            assert found.ids == [str(tmp_path / "a.wav"), str(pipe)]
            assert "is no file but a pipe" in found.bad[str(pipe)]
    finally:
        os.close(held)


def test_a_folder_that_cannot_be_read_is_a_bad_clip(
    speech: Embedder, tmp_path: Path, waves: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    soundfile.write(tmp_path / "a.wav", waves[0], 8000)
    scandir = os.scandir

    def denied(path: str) -> Any:
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = speech.embed(tmp_path, on_bad_clip="skip")
    assert found.bad == {str(closed): "the folder cannot be read (permission denied)"}
    assert len(found.ids) == 2
    with pytest.raises(BadClip, match=r"closed: the folder cannot be read \(permission denied\); on_bad_clip=skip"):
        speech.embed(tmp_path)
    with pytest.raises(BadClip, match=r"closed: the folder cannot be read \(permission denied\)$"):
        speech.embed(closed)


def test_a_folder_without_clips_is_refused(speech: Embedder, pictures: Path) -> None:
    with pytest.raises(
        ValueError, match=r'no speech file in this folder .*; a pattern, ".*/\*", takes files of any name'
    ):
        speech.embed(pictures)


def test_a_tar_without_clips_is_named(speech: Embedder, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "films.tar", "w") as shard:
        shard.addfile(tarfile.TarInfo("one.mp4"))
    for given in (tmp_path / "films.tar", tmp_path):
        with pytest.raises(ValueError, match=r"films\.tar: no speech file in this tar \(\.aac "):
            speech.embed(given)


def test_clips_of_similar_length_go_together_within_the_bounds(
    speech: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[int]] = []
    tokens = speech.encoder.tokens

    def computing(raw: Raw) -> Any:
        groups.append(raw.lengths.tolist())
        return tokens(raw)

    monkeypatch.setattr(speech.encoder, "tokens", computing)
    lengths = np.random.default_rng(0).permutation(np.arange(100, 900, 50))
    speech.embed([np.zeros(n, np.float32) for n in lengths], batch_size=16, batch_seconds=0.2)
    # number x longest is at most 1,600 samples, and one more clip would exceed it
    assert groups[:3] == [[100, 150, 200, 250, 300], [350, 400, 450], [500, 550]]
    assert groups[3:] == [[600, 650], [700, 750], [800], [850]]


def test_clips_are_read_ahead_and_never_all_at_once(speech: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "WINDOW_GROUPS", 2)
    read, ahead = [0], []
    lengths, tokens = speech.encoder.frontend.lengths, speech.encoder.tokens

    def reading(raw: Raw) -> Tensor:
        read[0] += len(raw) == 1
        return lengths(raw)

    def computing(raw: Raw) -> Any:
        ahead.append(read[0])
        return tokens(raw)

    monkeypatch.setattr(speech.encoder.frontend, "lengths", reading)
    monkeypatch.setattr(speech.encoder, "tokens", computing)
    speech.embed(np.random.default_rng(0).standard_normal((60, 100)), batch_size=2)
    # windows of 2, 4, 4 ... clips: while one is computed, one waits, and one is being read
    done = 2 * np.arange(len(ahead))
    assert max(np.array(ahead) - done) <= 3 * 4
    assert len(ahead) == 30


def test_a_mistake_while_reading_reaches_the_caller(speech: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(raw: Raw) -> Tensor:
        raise RuntimeError("not a clip's fault")

    monkeypatch.setattr(speech.encoder.frontend, "lengths", broken)
    with pytest.raises(RuntimeError, match="not a clip's fault"):
        speech.embed(np.zeros(900, np.float32), on_bad_clip="skip")


def test_bfloat16_is_near_float32_and_comes_as_float32(speech: Embedder, waves: list[np.ndarray]) -> None:
    half = Embedder(speech.encoder, SPEECH, precision="bfloat16")
    coarse, fine = half.embed(waves), speech.embed(waves)
    assert coarse.tokens.dtype == coarse.scene.dtype == torch.float32
    assert not torch.equal(coarse.scene, fine.scene)
    assert coarse.scene.numpy() == pytest.approx(fine.scene.numpy(), abs=0.05)
    # weights are halved once, and not those of the encoder that was given
    assert half.encoder.transformer.blocks[0].attention.qkv.weight.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in speech.encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(speech, waves[0])
    assert torch.equal(coarse.tokens[0, : len(expected)], expected.float())


def test_predictions_are_classes_or_transcripts(
    speech: Embedder, image: Embedder, waves: list[np.ndarray], pictures: Path
) -> None:
    said = speech.predict(waves, batch_size=2)
    assert said == [speech.predict(wave)[0] for wave in waves]
    assert set("".join(text or "" for text in said)) <= set("ab ")
    assert len(speech.predict(waves, beam=4)) == len(waves)
    assert set(image.predict(pictures / "train")) <= {"checks", "stripes"}
    assert speech.predict([waves[0], "missing.wav"], on_bad_clip="skip")[1] is None
    with pytest.raises(ValueError, match="only transcripts"):
        image.predict(pictures / "train", beam=4)


def test_a_head_on_weighted_layers_spells_as_its_objective_does(tmp_path: Path, waves: list[np.ndarray]) -> None:
    config = {**SPEECH, "objective": {"name": "ctc", "weighted_layers": True, "unfreeze_every": 5}}
    torch.manual_seed(0)
    encoder = build_encoder(config)
    objective: Any = build_objective(config, encoder)
    objective.layer_weights.scores.data = torch.tensor([3.0, 0.0, -3.0])
    export_encoder(tmp_path, encoder, config, objective=objective)
    embedder = load(tmp_path)
    symbols = {1: " ", 2: "a", 3: "b"}
    for wave in waves:
        raw = Raw(torch.from_numpy(wave)[None], torch.tensor([len(wave)]), ["alone"], 8000.0)
        [ids] = objective.eval().predict(Batch({"speech": raw}, torch.tensor([0])))
        spelled = "".join(symbols[i] for i in ids)
        assert embedder.predict(wave) == [" ".join(spelled.split())]
    expected = objective.log_probs(raw)[0]
    assert torch.allclose(embedder.objective.log_probs(raw)[0], expected, atol=1e-5)
    objective.layer_weights.scores.data.zero_()
    assert not torch.allclose(objective.log_probs(raw)[0], expected, atol=1e-3)


def test_classes_of_a_clip_are_those_above_the_threshold_the_likeliest_first(tmp_path: Path) -> None:
    config = {**IMAGE, "objective": {"name": "classify", "multi_label": True}, "classes": ["cat", "dog", "tree"]}
    torch.manual_seed(0)
    encoder = build_encoder(config)
    objective: Any = build_objective(config, encoder)
    torch.nn.init.zeros_(objective.head.linear.weight)
    objective.head.linear.bias.data = torch.tensor([1 / 9, 3.0, 1.0]).log()  # odds of .1, .75 and .5
    export_encoder(tmp_path, encoder, config, objective=objective)
    embedder, pictures = load(tmp_path), torch.rand(2, 1, 8, 8)
    assert embedder.probabilities(pictures)[0].tolist() == pytest.approx([0.1, 0.75, 0.5])
    assert embedder.predict(pictures) == [["dog"], ["dog"]]  # .5 is not above .5
    assert embedder.predict(pictures, threshold=0.4)[0] == ["dog", "tree"]
    assert embedder.predict(pictures, threshold=0.05)[0] == ["dog", "tree", "cat"]
    assert embedder.predict(pictures, threshold=0.8)[0] == []
    assert embedder.predict(["missing.png", pictures[0]], on_bad_clip="skip") == [None, ["dog"]]
    with pytest.raises(ValueError, match="threshold=1: must be a probability, from 0 to below 1"):
        embedder.predict(pictures, threshold=1)


def test_the_pooling_that_a_classifier_learned_gives_what_its_head_sees(tmp_path: Path) -> None:
    settings = {"name": "classify", "pooling": "attention", "pool_heads": 2}
    config = {**IMAGE, "augment_eval": [], "objective": settings}
    embedder = load(exported(tmp_path / "run", config, tuned=True))
    pictures = [torch.rand(1, 8, 8), torch.rand(1, 8, 16), torch.rand(1, 12, 8)]
    scenes = torch.as_tensor(embedder.embed(pictures, pool="attention").scene)
    with torch.no_grad():
        assert torch.equal(embedder.objective.head(scenes).softmax(1), embedder.probabilities(pictures))
    for alone, scene in zip(pictures, scenes, strict=True):
        assert torch.allclose(torch.as_tensor(embedder.embed(alone, pool="attention").scene)[0], scene, atol=1e-6)
    with pytest.raises(ValueError, match="was learned on the output alone; take layer=-1"):
        embedder.embed(pictures, pool="attention", layer=1)
    weighted = {**config, "objective": settings | {"weighted_layers": True}}
    with pytest.raises(ValueError, match="weighted learned it on all layers by their weights"):
        load(exported(tmp_path / "weighted", weighted, tuned=True)).embed(pictures, pool="attention")


def test_a_threshold_is_for_several_classes_a_clip_only(speech: Embedder, image: Embedder, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"threshold=0.5: .* tells one class of each clip; leave threshold out"):
        image.predict(pictures / "train", threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold=0.5: .* writes transcripts; leave threshold out"):
        speech.predict(np.zeros(900, np.float32), threshold=0.5)


def test_an_encoder_that_was_not_fine_tuned_predicts_nothing(tmp_path: Path, waves: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="not fine-tuned"):
        load(exported(tmp_path / "run", SPEECH)).predict(waves)


def spoil_key(run: Path) -> None:
    _export_with(run, lambda encoder: encoder.transformer.blocks[1].register_module("mlp", torch.nn.Identity()))


def spoil_shape(run: Path) -> None:
    _export_with(run, lambda encoder: setattr(encoder, "mask_token", torch.nn.Parameter(torch.zeros(8))))


def _export_with(run: Path, change: Callable[[Encoder], object]) -> None:
    encoder = build_encoder(SPEECH)
    change(encoder)
    export_encoder(run, encoder, SPEECH)


def cut_off(run: Path) -> None:
    file = run / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_weights(run: Path) -> None:
    (run / "encoder.safetensors").unlink()


def no_config(run: Path) -> None:
    (run / "config.json").unlink()


def no_end(run: Path) -> None:
    no_config(run)
    (run / "recipe.yaml").write_text("objective: mae")


def only_pictures(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / "0.png").write_bytes(b"a picture")


def no_json(run: Path) -> None:
    (run / "config.json").write_text("{")


def other_format(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({**SPEECH, "format": 99}))


def no_section(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({key: SPEECH[key] for key in SPEECH if key != "transformer"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_key, r"'transformer\.blocks\.1\.mlp\..*' is missing"),
        (spoil_shape, r"'mask_token' is \(8,\), and config\.json makes it \(16,\)"),
        (cut_off, "not a whole safetensors file"),
        (no_weights, "no encoder.safetensors"),
        (no_config, "no config.json"),
        (no_end, "no config.json here; a run writes it when it ends, so let this one go on"),
        (only_pictures, "no config.json here, so it holds no encoder; give the folder of a run, of an exported"),
        (no_json, "this is not JSON"),
        (other_format, "format 99"),
        (no_section, "no encoder can be built"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, spoil: Callable[[Path], object], words: str) -> None:
    run = exported(tmp_path / "run", SPEECH)
    spoil(run)
    with pytest.raises(ValueError, match=words) as error:
        load(run)
    assert "\n" not in str(error.value)


def test_a_device_or_precision_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = exported(tmp_path / "run", SPEECH)
    with pytest.raises(ValueError, match="device='cude'"):
        load(run, device="cude")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        load(run, precision="float16")  # type: ignore[arg-type]


def test_a_picture_is_reconstructed_where_the_user_hides_it(painter: Embedder) -> None:
    pictures = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    hidden = np.array([[True, False], [False, False]])
    first, second = painter.reconstruct(pictures, masked=hidden)
    assert first is not None
    assert second is not None
    assert first["input"].numpy() == pytest.approx(pictures[0], abs=1e-6)
    changed = (first["reconstruction"] != first["input"])[0]
    assert changed[:4, :4].all()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()
    # what is hidden is not seen: other pixels there change nothing of what is made of them
    other = pictures[0].copy()
    other[:, :4, :4] = 0.5
    (again,) = painter.reconstruct([other], masked=hidden.flatten())
    assert again is not None
    assert torch.allclose(again["reconstruction"], first["reconstruction"], atol=1e-6)
    ((of_second, own),) = [painter.reconstruct(pictures, masked=[~hidden, hidden])]
    assert own is not None
    assert of_second is not None
    assert torch.equal(own["reconstruction"], second["reconstruction"])
    assert (of_second["reconstruction"] != of_second["input"])[0, 4:].all()


def test_without_a_mask_one_is_drawn_and_always_the_same(painter: Embedder) -> None:
    pictures = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    one, two = painter.reconstruct(pictures), painter.reconstruct(pictures)
    for first, again in zip(one, two, strict=True):
        assert first is not None
        assert again is not None
        assert torch.equal(first["masked"], again["masked"])
        assert (first["masked"] == 0.5).reshape(2, 4, 2, 4).all(dim=3).all(dim=1).sum() == 3


def test_a_run_of_denoise_shows_its_noise_which_is_always_the_same(tmp_path: Path) -> None:
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    config = IMAGE | {"objective": {"name": "denoise", "target": "pixels", **decoder}, "classes": None}
    embedder = load(exported(tmp_path, config, tuned=True))
    pictures = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    one, two = embedder.reconstruct(pictures), embedder.reconstruct(pictures)
    for clip, first, again in zip(pictures, one, two, strict=True):
        assert first is not None
        assert again is not None
        assert list(first) == ["input", "noisy", "reconstruction", "note"]
        assert first["input"].numpy() == pytest.approx(clip, abs=1e-6)
        assert not torch.equal(first["noisy"], first["input"])
        assert torch.equal(first["noisy"], again["noisy"])


def test_a_mask_that_fits_no_clip_is_refused(painter: Embedder, image: Embedder) -> None:
    pictures = np.zeros((2, 1, 8, 8), np.float32)
    with pytest.raises(ValueError, match=r"masked is \(1, 9\) bool, but these clips have \(1, 4\) tokens"):
        painter.reconstruct(pictures, masked=np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="masked hides all tokens of clip 0"):
        painter.reconstruct(pictures, masked=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="masked: 1 masks for 2 clips"):
        painter.reconstruct(pictures, masked=[np.ones((2, 2), bool)])
    with pytest.raises(ValueError, match="was trained to reconstruct nothing"):
        image.reconstruct(pictures)
