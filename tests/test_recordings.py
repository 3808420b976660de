"""Long recordings in windows: as if they had been encoded at once, as far as an encoder looks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmssl import hear
from mmssl.build import build_encoder, build_encoders
from mmssl.data.manifest import write_manifest
from mmssl.embed import Embedder
from mmssl.training.checkpoint import export_encoder
from mmssl.types import Embeddings

# one token every 80 samples, 10 ms, of 85; positions by a convolution that sees 8 tokens; nothing measured over a clip
SPEECH: dict[str, Any] = {
    "format": 1,
    "modality": "speech",
    "frontend": {
        "name": "waveform",
        "layers": [[8, 10, 5], [8, 4, 4], [8, 4, 4]],
        "rate": 8000,
        "norm": "layer",
        "normalize": False,
    },
    "positions": {"name": "conv", "kernel": 8, "groups": 2},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {},
    "augment_eval": [],
}
AUDIO: dict[str, Any] = {
    **SPEECH,
    "modality": "audio",
    "frontend": {"name": "spectrogram", "size": [8, 16], "bands": 32, "rate": 8000},
    "positions": {"name": "none"},
    "encoder": {"prefix": 1},
}
VIDEO: dict[str, Any] = {
    **AUDIO,
    "modality": "video",
    "frontend": {"name": "tubes", "size": [2, 4, 4], "channels": 1, "rate": 8.0, "mean": [0.5], "std": [0.5]},
}


def embedder(config: dict[str, Any]) -> Embedder:
    torch.manual_seed(0)
    return Embedder(build_encoder(config), config)


def clip(config: dict[str, Any], seconds: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if config["modality"] == "video":
        return torch.rand(1, int(8 * seconds), 8, 12, generator=generator)
    return torch.randn(int(8000 * seconds), generator=generator) / 4


def same(found: Embeddings, whole: Embeddings, margin: float = 1e-5) -> None:
    assert found.valid.sum(1).tolist() == whole.valid.sum(1).tolist()
    assert found.tokens.numpy() == pytest.approx(whole.tokens.numpy(), abs=margin)
    assert found.scene.numpy() == pytest.approx(whole.scene.numpy(), abs=margin)
    assert found.time_ms is not None
    assert whole.time_ms is not None
    assert found.time_ms.numpy() == pytest.approx(whole.time_ms.numpy())


@pytest.mark.parametrize("config", [SPEECH, AUDIO, VIDEO], ids=lambda config: config["modality"])
def test_a_clip_that_a_window_covers_is_embedded_as_without_it(config: dict[str, Any]) -> None:
    whole, found = (embedder(config).embed(clip(config, 2.0), **given) for given in ({}, {"window": 2.0}))
    assert torch.equal(found.tokens, whole.tokens)
    assert torch.equal(found.scene, whole.scene)


@pytest.mark.parametrize("config", [SPEECH, AUDIO, VIDEO], ids=lambda config: config["modality"])
@pytest.mark.parametrize(("window", "overlap"), [(1.0, 0.25), (4.0, 1.0), (8.0, 1.0)])
def test_windows_share_a_quarter_of_one_and_at_most_a_second(
    config: dict[str, Any], window: float, overlap: float
) -> None:
    long = clip(config, 10.0)
    found, said = (embedder(config).embed(long, window=window, **given) for given in ({}, {"overlap": overlap}))
    assert torch.equal(found.tokens, said.tokens)


@pytest.mark.parametrize("config", [SPEECH, AUDIO, VIDEO], ids=lambda config: config["modality"])
@pytest.mark.parametrize("seconds", [3.0, 4.5, 7.25])
@pytest.mark.parametrize("overlap", [0.5, 1.5])
def test_what_sees_less_than_half_the_overlap_is_the_same_in_windows(
    config: dict[str, Any], seconds: float, overlap: float
) -> None:
    # the input of the first block: no token there sees further than 5 tokens of 10 ms, one patch or one tube
    given = {"layer": 0, "pool": "slices:3+std"}
    long = clip(config, seconds)
    whole = embedder(config).embed(long, **given)
    same(embedder(config).embed(long, window=2.0, overlap=overlap, **given), whole)
    same(embedder(config).embed(long, window=2.0, overlap=overlap, batch_size=1, **given), whole)


def test_each_window_gives_the_half_of_an_overlap_that_is_nearer_to_its_middle() -> None:
    wave = clip(SPEECH, 2.0)
    found = embedder(SPEECH).embed(wave, window=1.0, overlap=0.5)
    # windows from 0, 0.5 and 1 s on, each with (8000 - 85) // 80 + 1 = 99 tokens, 50 apart: they meet in the middle of
    # 50 to 99, and of 100 to 149
    parts = [embedder(SPEECH).embed(wave[start : start + 8000]).tokens[0] for start in (0, 4000, 8000)]
    expected = torch.cat([parts[0][:74], parts[1][24:74], parts[2][24:]])
    assert found.tokens[0].numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.scene[0].numpy() == pytest.approx(expected.mean(0).numpy(), abs=1e-5)


def test_the_class_token_is_the_mean_over_windows() -> None:
    # 1.28 s are 16 patches of 80 ms, so the second window begins where the first ends
    wave = clip(AUDIO, 2.56)
    found = embedder(AUDIO).embed(wave, window=1.28, overlap=0.0, pool="class", layer=[1, -1])
    halves = embedder(AUDIO).embed([wave[:10240], wave[10240:]], pool="class", layer=[1, -1])
    for one, half in zip(found, halves, strict=True):
        assert one.scene[0].numpy() == pytest.approx(half.scene.mean(0).numpy(), abs=1e-5)


def test_long_and_short_clips_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(SPEECH)
    waves = [clip(SPEECH, seconds) for seconds in (3.0, 0.5, 0.9, 2.2)]
    alone = [model.embed(wave, window=1.0, overlap=0.5).scene[0].numpy() for wave in waves]
    longest = []
    tokens = model.encoder.tokens
    monkeypatch.setattr(model.encoder, "tokens", lambda raw: longest.append(int(raw.lengths.max())) or tokens(raw))
    found = model.embed(waves, window=1.0, overlap=0.5)
    assert found.scene.numpy() == pytest.approx(np.stack(alone), abs=1e-5)
    assert max(longest) == 8000
    [streamed] = model.stream(waves, window=1.0, overlap=0.5)
    assert torch.equal(streamed[0].scene, found.scene)


def test_steps_of_time_have_one_token_each() -> None:
    for config, per_step in ((SPEECH, 1), (AUDIO, 2), (VIDEO, 6)):
        model = embedder(config)
        given = [clip(config, 2.0), clip(config, 1.0)]
        every, steps = model.embed(given), model.embed(given, tokens="steps")
        assert steps.valid.sum(1).tolist() == [n // per_step for n in every.valid.sum(1).tolist()]
        mean = every.tokens.unflatten(1, (-1, per_step)).mean(2)
        assert steps.tokens.numpy() == pytest.approx(mean.numpy(), abs=1e-6)
        assert steps.time_ms is not None
        assert len(set(steps.time_ms[0].tolist())) == steps.tokens.shape[1]
        assert torch.equal(steps.scene, every.scene)
        same(model.embed(given, tokens="steps", window=2.0), steps)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"window": 1.0, "overlap": 1.0}, "window=1, overlap=1: seconds, the overlap from 0 to below the window"),
        ({"window": 1.0, "overlap": -0.5}, "the overlap from 0 to below"),
        ({"window": 0, "overlap": 0}, "the overlap from 0 to below"),
        (
            {"window": 1.0, "overlap": 0.0},
            "windows of 8000 that share 0 leave out tokens between them, for one gives 99",
        ),
    ],
)
def test_windows_that_cannot_be_put_together_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        embedder(SPEECH).embed(clip(SPEECH, 3.0), **given)


def test_pictures_have_neither_windows_nor_steps() -> None:
    frontend = {"name": "patches", "size": [4, 4], "channels": 1, "mean": [0.5], "std": [0.5]}
    model = embedder({**AUDIO, "modality": "image", "frontend": frontend})
    with pytest.raises(ValueError, match="window=1: pictures have no time"):
        model.embed(torch.rand(1, 8, 8), window=1)
    with pytest.raises(ValueError, match="tokens='steps': pictures have no steps of time"):
        model.embed(torch.rand(1, 8, 8), tokens="steps")
    with pytest.raises(ValueError, match="HEAR measures sound, and this encoder is for image"):
        hear.Model(model)


# the middle second of three
PARTS = {
    "crop": {**SPEECH, "augment_eval": [{"name": "center_crop", "seconds": 1.0}]},
    "crops": {**AUDIO, "augment_eval": [{"name": "center_crop", "seconds": second} for second in (2.0, 1.0)]},
    "span": {**AUDIO, "augment_eval": [{"name": "center_span", "seconds": 1.0}]},
    "both": {
        **SPEECH,
        "augment_eval": [{"name": "center_span", "seconds": 2.0}, {"name": "center_crop", "seconds": 1.0}],
    },
    "frames": {**VIDEO, "augment_eval": [{"name": "center_span", "frames": 8}]},
}


@pytest.mark.parametrize("config", PARTS.values(), ids=PARTS)
def test_times_of_a_part_are_those_of_the_clip(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, long, short = embedder(config), clip(config, 3.0), clip(config, 1.0)
    assert model.embed(short).time_ms is not None
    assert not caplog.messages
    found, again = model.embed([long, short]), model.embed(long, tokens="steps")
    assert found.time_ms is not None
    assert again.time_ms is not None
    assert found.time_ms[0].tolist() == pytest.approx((1000 + found.time_ms[1]).tolist())
    assert again.time_ms[0].tolist() == pytest.approx(found.time_ms[0].unique().tolist())
    [said] = caplog.messages
    assert "input 0: only the 1 s from 1 s on are read" in said


@pytest.mark.parametrize("config", PARTS.values(), ids=PARTS)
def test_windows_are_of_all_of_a_clip_also_where_a_part_is_read_without_them(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"window": 1.0, "overlap": 0.5}
    long, whole = clip(config, 3.0), {**config, "augment_eval": []}
    same(embedder(config).embed(long, **given), embedder(whole).embed(long, **given))
    [[streamed]] = embedder(config).stream(long, tokens=True, **given)
    same(streamed, embedder(whole).embed(long, **given))
    assert not caplog.messages


@pytest.mark.parametrize("step", [{"name": "center_crop"}, {"name": "center_span"}], ids=lambda step: step["name"])
def test_a_part_of_a_row_of_a_manifest_has_the_times_of_that_row(step: dict[str, Any], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", clip(SPEECH, 4.0).numpy() / 8, 8000)
    row = {"id": "a", "audio": str(tmp_path / "a.wav"), "start": 1.0, "duration": 3.0, "seconds": 3.0}
    write_manifest(tmp_path / "m.jsonl", [row])
    model = embedder({**SPEECH, "augment_eval": [{**step, "seconds": 1.0}]})
    found, alone = model.embed(tmp_path / "m.jsonl"), model.embed(clip(SPEECH, 1.0))
    assert found.time_ms is not None
    assert alone.time_ms is not None
    assert found.time_ms[0].tolist() == pytest.approx((1000 + alone.time_ms[0]).tolist())
    file = model.embed(tmp_path / "a.wav").time_ms
    assert file is not None
    assert file[0].tolist() == pytest.approx((1500 + alone.time_ms[0]).tolist())


@pytest.mark.parametrize("config", [SPEECH, AUDIO], ids=lambda config: config["modality"])
def test_hear_gets_one_scene_and_evenly_spaced_timestamps(config: dict[str, Any]) -> None:
    model = hear.Model(embedder(config))
    audio = torch.stack([clip(config, 1.0), clip(config, 1.0).flip(0)])
    scenes = hear.get_scene_embeddings(audio, model)
    stamps, times = hear.get_timestamp_embeddings(audio, model)
    assert scenes.shape == (2, model.scene_embedding_size)
    assert stamps.shape == (*times.shape, model.timestamp_embedding_size)
    assert model.sample_rate == 8000
    assert scenes.numpy() == pytest.approx(stamps.mean(1).numpy(), abs=1e-5)
    gaps = times.diff(dim=1)
    assert gaps.numpy() == pytest.approx(10.0 if config is SPEECH else 80.0)
    # a run that reads the middle of a clip is measured on all of it
    middle = {**config, "augment_eval": [{"name": "center_crop", "seconds": 0.5}]}
    assert torch.equal(hear.get_timestamp_embeddings(audio, hear.Model(embedder(middle)))[1], times)


def test_hear_measures_one_encoder_of_several(tmp_path: Path) -> None:
    own = {name: {**one, "augment_eval": []} for name, one in (("speech", SPEECH), ("audio", AUDIO))}
    config = {**SPEECH, "modality": own, "backbone": "separate", "objective": None, "classes": None, "vocabulary": None}
    export_encoder(tmp_path, build_encoders(config), config)
    wave = clip(SPEECH, 1.0)
    for name, step in (("speech", 10.0), ("audio", 80.0)):
        _, times = hear.get_timestamp_embeddings(wave[None], hear.load_model(str(tmp_path), modality=name))
        assert times.diff(dim=1).numpy() == pytest.approx(step)
    with pytest.raises(ValueError, match="has encoders of speech and audio; say which, by modality"):
        hear.load_model(str(tmp_path))
