"""Spectrogram patches: where a sound lies is the token that lights up, for any clip length."""

import math
from dataclasses import replace

import pytest
import torch

from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.filterbank import FLOOR
from mmssl.types import Raw

SMALL = {"bands": 32, "size": [4, 8], "rate": 8000}
SILENCE = (math.log(FLOOR) + 4.2677393) / (2 * 4.5689974)


def clip(*waves, rate=8000.0):
    data = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return Raw(data, torch.tensor([len(w) for w in waves]), [f"clip{i}" for i in range(len(waves))], rate)


def frontend(**settings):
    torch.manual_seed(0)
    return SpectrogramPatches(dim=4, **SMALL | settings)


def samples(frames):
    """Of so many frames of 25 ms every 10 ms, at 8 kHz."""
    return 200 + 80 * (frames - 1)


def test_ten_seconds_are_512_tokens_less_the_two_steps_that_are_no_sound():
    front = SpectrogramPatches(dim=4)
    raw = Raw(torch.randn(1, 160_000), torch.tensor([160_000]), ["ten seconds"], 16_000.0)
    tokens = front(raw)
    # 998 frames: 62 whole patches along time, and 6 frames in another
    assert tokens.grid == (63, 8)
    assert tokens.lengths.tolist() == [504]
    assert tokens.feat.shape == (1, 504, 256)
    assert (tokens.step_ms, tokens.span_ms) == (160, 175)


def test_a_patch_holds_its_frames_and_bands_time_outermost():
    front, wave = frontend(), torch.randn(samples(12), generator=torch.Generator().manual_seed(0))
    tokens = front(clip(wave))
    frames = (front.filterbank(wave[None], torch.tensor([len(wave)]))[0] + 4.2677393) / (2 * 4.5689974)
    assert tokens.grid == (3, 4)
    for place, (t, f) in enumerate(tokens.coords[0].tolist()):
        assert place == 4 * t + f
        cell = frames[4 * t : 4 * t + 4, 8 * f : 8 * f + 8]
        assert torch.allclose(tokens.feat[0, place].view(4, 8), cell, atol=1e-6)
    assert torch.allclose(tokens.x, front.project(tokens.feat))


@pytest.mark.parametrize(("pitch", "start"), [(150.0, 0), (700.0, 9), (1800.0, 20), (3400.0, 33)])
def test_a_tone_lights_up_the_patch_of_its_time_and_pitch(pitch, start):
    front = frontend()
    quiet = torch.zeros(samples(40))
    tone = quiet.clone()
    # over the three frames from `start` on, in the middle of their windows
    inside = slice(80 * start + 100, 80 * (start + 2) + 101)
    time = torch.arange(len(quiet)) / 8000
    tone[inside] = torch.sin(2 * torch.pi * pitch * time)[inside]
    moved = (front(clip(tone)).feat - front(clip(quiet)).feat).abs().sum(-1)[0]
    place = int(moved.argmax())

    def mel(hertz):
        return 1127 * math.log(1 + hertz / 700)

    # 32 bands have their middles at 1 to 32 of 33 steps from 20 Hz to 4 kHz
    band = round((mel(pitch) - mel(20)) / (mel(4000) - mel(20)) * 33) - 1
    assert front(clip(tone)).coords[0, place].tolist() == [(start + 1) // 4, band // 8]


def test_an_impulse_lights_up_the_frames_over_it_and_no_others():
    front = frontend()
    quiet = torch.zeros(samples(16))
    click = quiet.clone()
    click[80 * 7 + 100] = 1.0  # the middle of frame 7, in the windows of frames 6 to 8: tokens of times 1 and 2
    moved = (front(clip(click)).feat - front(clip(quiet)).feat).abs().amax(-1)[0].view(4, 4)
    assert moved.amax(1).nonzero()[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("stride", [None, [3, 6], [1, 1]])
def test_lengths_are_the_valid_tokens_for_any_length_and_no_frame_is_lost(stride):
    front = frontend(stride=stride)
    lengths = torch.randint(200, 6000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    raw = clip(*(torch.ones(n) for n in [200, *lengths]))
    tokens = front(raw)
    assert torch.equal(front.lengths(raw), tokens.valid.sum(1))
    steps = tokens.lengths // front.down
    frames = front.filterbank.frames(raw.lengths)
    reach = (steps - 1) * front.stride[0] + 4
    assert (reach >= frames).all()
    # and one patch less would not reach
    assert ((reach - front.stride[0] < frames) | (steps == 1)).all()


def test_the_last_patch_goes_on_with_silence_and_not_with_the_mean():
    front = frontend()
    wave = torch.randn(samples(6), generator=torch.Generator().manual_seed(0))
    for raw in (clip(wave), clip(wave, torch.randn(4000))):
        last = front(raw).feat[0, 4:8].view(4, 4, 8)  # band, frame, value
        assert (last[:, :2] > SILENCE).all()
        assert torch.allclose(last[:, 2:], torch.tensor(SILENCE))


def test_past_a_clip_tokens_are_zero_whatever_stands_there():
    front = frontend()
    raw = clip(torch.randn(400), torch.randn(4000))
    raw.data[0, 400:] = torch.nan
    tokens = front(raw)
    assert tokens.lengths.tolist() == [4, 48]
    assert not tokens.feat[0, 4:].any()
    assert not tokens.x[0, 4:].any()
    assert tokens.x.isfinite().all()


def test_constants_and_their_formula_are_arguments():
    wave = torch.randn(samples(4), generator=torch.Generator().manual_seed(0))
    energies = frontend().filterbank(wave[None], torch.tensor([len(wave)]))[0]
    # CAV-MAE: one deviation instead of two
    cav = frontend(mean=-5.081, std=4.4849, deviations=1.0)(clip(wave)).feat[0].view(4, 4, 8).transpose(0, 1)
    assert torch.allclose(cav.reshape(4, 32), (energies + 5.081) / 4.4849, atol=1e-5)


def test_the_shortest_clip_is_one_frame():
    front = frontend()
    assert front(clip(torch.zeros(200))).lengths.tolist() == [4]
    with pytest.raises(ValueError, match="clip1: 199 samples are shorter"):
        front(clip(torch.zeros(400), torch.zeros(199)))


def test_another_rate_is_refused():
    with pytest.raises(ValueError, match="clip0: 16000 Hz, but this frontend reads 8000 Hz; resample"):
        frontend()(clip(torch.zeros(400), rate=16_000.0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bands": 30}, "not a whole number of patches of 8 bands"),
        ({"bands": 4}, "not a whole number of patches of 8 bands"),
        ({"stride": [5, 8]}, "sound between the patches would be lost"),
        ({"size": [4]}, "give two numbers above 0"),
        ({"std": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_make_no_sense_say_so(wrong, said):
    with pytest.raises(ValueError, match=said):
        frontend(**wrong)


def test_overlapping_patches_leave_out_the_bands_where_none_fits():
    # as AST: 128 bands, 16 of them every 10, are 12 patches down to band 125
    front = SpectrogramPatches(dim=4, stride=[10, 10])
    raw = Raw(torch.randn(1, 16_000), torch.tensor([16_000]), ["a second"], 16_000.0)
    assert front(raw).grid == (10, 12)


def test_stripes_put_frames_and_bands_to_the_mean_in_training_only():
    front, raw = frontend(stripes={"t": 0.5, "f": 0.5}), clip(torch.randn(samples(24)), torch.randn(samples(12)))
    plain = frontend()(raw)
    assert torch.equal(front(raw).feat, plain.feat)  # nothing to draw from
    seeded = replace(raw, seeds=torch.tensor([3, 4]))
    assert torch.equal(front.eval()(seeded).feat, plain.feat)
    striped = front.train()(seeded)
    for row, frames in enumerate((24, 12)):
        patches = striped.feat[row, : striped.lengths[row]].view(frames // 4, 4, 4, 8)  # steps, up, frames, bands
        energies = patches.transpose(1, 2).reshape(frames, 32)
        before = plain.feat[row, : plain.lengths[row]].view(frames // 4, 4, 4, 8).transpose(1, 2).reshape(frames, 32)
        hidden = energies == 0
        assert torch.equal(energies[~hidden], before[~hidden])
        times, bands = hidden.all(1), hidden.all(0)
        assert torch.equal(hidden, times[:, None] | bands)
        assert 0 < times.sum() + bands.sum() <= frames // 2 + 16
    assert torch.equal(front(seeded).feat, striped.feat)


def test_dither_is_drawn_from_the_clips_seeds_in_training_only():
    front, raw = frontend(dither=1e-3), clip(torch.zeros(samples(8)), torch.zeros(samples(4)))
    seeded = replace(raw, seeds=torch.tensor([3, 4]))
    for silent in (front(raw), front.eval()(seeded)):
        assert torch.allclose(silent.feat[0], torch.tensor(SILENCE))
    noisy = front.train()(seeded)
    assert (noisy.feat[0] > SILENCE + 0.1).float().mean() > 0.9
    alone = front(replace(clip(torch.zeros(samples(4))), seeds=torch.tensor([4])))
    assert torch.allclose(noisy.feat[1, :4], alone.feat[0], atol=1e-5)


@pytest.mark.parametrize("stripes", [{"t": 1.0}, {"t": 0.1, "h": 0.1}, {"f": -0.1}])
def test_stripes_that_cannot_be_are_refused(stripes):
    with pytest.raises(ValueError, match="give a share from 0 to below 1 for t, f or both"):
        frontend(stripes=stripes)


def test_clips_are_cut_and_filled_to_so_many_frames():
    # 10 frames in patches of 4 every 3: two whole ones, and a frame that no whole patch holds is left out
    front = frontend(frames=9, stride=[3, 8])
    generator = torch.Generator().manual_seed(0)
    short, long = torch.randn(samples(5), generator=generator), torch.randn(samples(30), generator=generator)
    raw = clip(short, long)
    tokens = front(raw)
    assert tokens.grid == (2, 4)
    assert front.lengths(raw).tolist() == tokens.lengths.tolist() == [8, 8]
    for row, wave in enumerate((short, long)):
        frames = front.filterbank(wave[None], torch.tensor([len(wave)]))[0]
        # zeros before the normalization
        filled = torch.cat([frames, torch.zeros(9, 32)])[:9]
        expected = (filled[3:7, 8:16] + 4.2677393) / (2 * 4.5689974)
        assert torch.allclose(tokens.feat[row, 5], expected.flatten(), atol=1e-5)
    with pytest.raises(ValueError, match="frontend.frames=3: fewer than the 4 of a patch"):
        frontend(frames=3)
