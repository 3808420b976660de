"""Triangular mel filters, and Kaldi's log-mel filterbank over ragged batches: the signal code that sound shares."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.seeds import normal
from mmssl.types import valid_mask

Window = Literal["hanning", "povey", "hamming", "rectangular"]
# Kaldi's floor of an energy: silence becomes log(2^-23) = -15.94
FLOOR = torch.finfo(torch.float32).eps
# bands multiplied at a time, and frames worked on at a time on the CPU, in whose cache they then stay
_BLOCK = 16
_PIECE = 1024


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve where there is a gradient, too
def triangles(
    rate: int, fft: int, bands: int, *, low: float = 0.0, high: float | None = None, sides: Literal["hertz", "mel"]
) -> Tensor:
    """Filters whose corners are evenly spaced on the mel scale, each with a peak of 1.

    Source: Davis and Mermelstein 1980; the scale 1127 ln(1 + f / 700) is O'Shaughnessy's, as in HTK and Kaldi.

    Args:
        rate: samples per second.
        fft: size of the Fourier transform.
        low, high: of the lowest and the highest filter, in Hz; half the rate by default.
        sides: on which scale the sides of a triangle are straight: in "hertz" (HTK's figures, librosa) or in "mel"
            (Kaldi).

    Returns:
        (fft // 2 + 1, bands) float32; a filter narrower than a bin may be empty.
    """
    high = rate / 2 if high is None else high
    # On the CPU whatever the default device: the result is kept, and a bank is read as it is built. In the precision
    # of the counterparts: the corners of a bank of narrow bands lie on few bins, and show it.
    dtype = torch.float64 if sides == "hertz" else torch.float32
    place = torch.arange(bands + 2, dtype=dtype, device="cpu")
    bins = torch.arange(fft // 2 + 1, dtype=dtype, device="cpu")[:, None] * (rate / fft)
    bottom, top = (1127 * math.log(1 + hertz / 700) for hertz in (low, high))
    corners = bottom + place * ((top - bottom) / (bands + 1))
    if sides == "hertz":
        corners = 700 * ((corners / 1127).exp() - 1)
    else:
        bins = 1127 * (1 + bins / 700).log()
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((bins - left) / (peak - left), (right - bins) / (right - peak)).clamp_min(0).float()


class Filterbank(nn.Module):
    """Log-mel energies as Kaldi computes them, of any number of clips at once.

    Source: Povey et al. 2011, "The Kaldi speech recognition toolkit"; equal to torchaudio's `compliance.kaldi.fbank`
    with its defaults for everything that is no argument here: power spectrum, `snip_edges`, no energy. The mean of each
    frame goes first, so a constant offset of the clip changes nothing.

    Args:
        bands: mel bands. 128 of them between 20 and 8,000 Hz leave the third one empty at 16 kHz, as everywhere.
        window_ms, hop_ms: length of a frame, and from one frame to the next.
        window: of a frame; "povey" is hanning to the power .85.
        low, high: in Hz, of the lowest and the highest band; `high` at or below 0 counts from half the rate.
        preemphasis: this share of each sample's predecessor is taken off.
        dither: deviation of the normal noise put on the samples, in their own units, where there are seeds; Kaldi's 1.0
            for 16 bits is 3e-5 for samples in [-1, 1]. It is drawn once for a sample, where Kaldi draws it anew in each
            frame.
        rate: samples per second.
    """

    def __init__(
        self,
        *,
        bands: int,
        window_ms: float,
        hop_ms: float,
        window: Window,
        low: float,
        high: float,
        preemphasis: float,
        rate: int,
        dither: float = 0.0,
    ) -> None:
        super().__init__()
        if dither < 0:
            raise ValueError(f"frontend.dither={dither:g}: a deviation is at least 0; 0 puts no noise on the samples")
        top = high if high > 0 else rate / 2 + high
        if not 0 <= low < top <= rate / 2:
            raise ValueError(
                f"frontend.low={low:g}, frontend.high={high:g}: the bands must lie between 0 and half the rate, "
                f"{rate / 2:g} Hz"
            )
        # as Kaldi counts them, without rounding
        self.width, self.hop = int(rate * window_ms / 1000), int(rate * hop_ms / 1000)
        if self.width < 2 or self.hop < 1 or bands < 1:
            raise ValueError(
                f"frontend.window_ms={window_ms:g}, frontend.hop_ms={hop_ms:g}, frontend.bands={bands}: a frame at "
                f"{rate} Hz would be {self.width} samples every {self.hop}; make them longer"
            )
        self.preemphasis, self.dither = preemphasis, dither
        self.fft = 2 ** math.ceil(math.log2(self.width))
        taper = _window(window, self.width)
        # what becomes of a frame's first sample, which counts as its own predecessor: nothing where tapers begin at 0
        self.edge = (1 - preemphasis) * float(taper[0])
        self.taper: Tensor
        self.register_buffer("taper", taper, persistent=False)
        bank = triangles(rate, self.fft, bands, low=low, high=top, sides="mel").clone()
        bank[-1] = 0.0  # Kaldi leaves the bin at half the rate out
        # A bank is a band of a matrix: neighboring filters share a few bins, and the rest of their columns is zero.
        # Each bin stands twice, for the squares of its real and of its imaginary part, so that nobody has to add them.
        bank = bank.repeat_interleave(2, 0)
        self.bands = bands
        self.blocks: list[slice] = []
        for i, block in enumerate(bank.split(_BLOCK, 1)):
            used = block.any(1).nonzero()[:, 0].tolist() or [0]
            self.blocks.append(slice(used[0], used[-1] + 1))
            # in one piece: rows that lie a power of two apart would share their place in the cache
            self.register_buffer(f"bank{i}", block[self.blocks[-1]].contiguous(), persistent=False)

    def frames(self, samples: Tensor) -> Tensor:
        """Whole frames in so many samples."""
        return (torch.div(samples - self.width, self.hop, rounding_mode="floor") + 1).clamp_min(0)

    def sound(self, energies: Tensor) -> Tensor:
        """Samples whose band energies are about these, to be heard.

        Bands share their energy out to their bins; phases are those of 32 rounds of Griffin and Lim's algorithm
        (1984, "Signal estimation from modified short-time Fourier transform", section IV), from ones that are the same
        every time.

        Args:
            energies: (B, T, F), as `forward` gives them.

        Returns:
            (B, T x hop).

        Raises:
            ValueError: frames that overlap by less than a half, between which sound would be lost.
        """
        if 2 * self.hop > self.width:
            raise ValueError(f"frames of {self.width} samples every {self.hop} cannot be made sound of again")
        length = energies.shape[1] * self.hop
        # what is reflected at the ends is no longer than the rest
        energies = fill_to(energies, max(energies.shape[1] + 1, self.fft // self.hop + 2))
        weights = energies.new_zeros(self.fft + 2, self.bands)
        for i, (bins, columns) in enumerate(zip(self.blocks, weights.split(_BLOCK, 1), strict=True)):
            columns[bins] = getattr(self, f"bank{i}")
        weights = weights[::2]  # each bin stands twice
        # what an encoder predicts may be any number
        loudest = 60.0
        density = (energies.clamp(max=loudest).nan_to_num(math.log(FLOOR)).exp() - FLOOR).clamp_min(0) / weights.sum(
            0
        ).clamp_min(1e-3)
        power = density @ weights.T / weights.sum(1).clamp_min(1e-3)
        turn = torch.arange(self.fft // 2 + 1, device=energies.device) * (2 * math.pi / self.fft)
        emphasis = torch.polar(torch.full_like(turn, -self.preemphasis), -turn) + 1
        size = (power.sqrt() / emphasis.abs().clamp_min(1e-2)).transpose(1, 2)
        taper = torch.hann_window(self.width, device=energies.device)
        settings = {"n_fft": self.fft, "hop_length": self.hop, "win_length": self.width, "window": taper}
        phase = torch.rand(size.shape, generator=torch.Generator().manual_seed(0)).to(size) * (2 * math.pi)
        for _ in range(32):
            wave = torch.istft(torch.polar(size, phase), **settings)
            phase = torch.stft(wave, return_complex=True, **settings).angle()
        return torch.istft(torch.polar(size, phase), **settings)[:, :length]

    def forward(self, waves: Tensor, lengths: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Natural logarithms of band energies.

        Args:
            waves: (B, L); what stands past a clip's length is never read.
            lengths: (B,) int64 on the CPU, samples.
            seeds: (B,) int64 on the CPU, of the clips' dither; none without.

        Returns:
            (B, T, F) float32, the floor past each clip's frames.
        """
        counts = self.frames(lengths)
        size = int(counts.max())
        with torch.no_grad(), torch.autocast(waves.device.type, enabled=False):
            waves = waves.to(self.taper.dtype)
            if self.dither and seeds is not None:
                waves = waves.clone()
                for wave, samples, seed in zip(waves, lengths.tolist(), seeds.tolist(), strict=True):
                    wave[:samples] += self.dither * normal(seed, samples, name="dither", device=waves.device)
            out = waves.new_empty(len(waves), size, self.bands)
            if waves.device.type != "cpu":
                padded = waves.new_zeros(len(waves), size, self.fft)
                self._cut(waves, padded, torch.zeros_like(waves))
                torch.log(
                    self._energies(padded.flatten(0, 1), torch.empty_like(out).flatten(0, 1)).view_as(out), out=out
                )
                # where padding was worked on, too
                return torch.where(valid_mask(counts, size, waves.device)[..., None], out, math.log(FLOOR))
            piece = min(size, _PIECE)
            padded, energies = waves.new_zeros(piece, self.fft), waves.new_empty(piece, self.bands)
            emphasized = waves.new_zeros(piece * self.hop + self.width)
            for wave, count, own in zip(waves, counts.tolist(), out, strict=True):
                for first in range(0, count, piece):
                    rows = min(piece, count - first)
                    self._cut(wave[first * self.hop :], padded[:rows], emphasized)
                    torch.log(self._energies(padded[:rows], energies[:rows]), out=own[first : first + rows])
                own[count:] = math.log(FLOOR)
            return out

    def _cut(self, waves: Tensor, padded: Tensor, emphasized: Tensor) -> None:
        """Frames, tapered and without their mean.

        Args:
            waves: (..., L) samples.
            padded: (..., T, fft) to be filled with as many frames; zero past their width, and left so.
            emphasized: (..., at least L) to work in; zero at the first.
        """
        size = (padded.shape[-2] - 1) * self.hop + self.width
        waves, emphasized = waves[..., :size], emphasized[..., :size]
        torch.sub(waves[..., 1:], waves[..., :-1], alpha=self.preemphasis, out=emphasized[..., 1:])
        frames, inside = waves.unfold(-1, self.width, self.hop), padded[..., : self.width]
        torch.mul(emphasized.unfold(-1, self.width, self.hop), self.taper, out=inside)
        torch.mul(frames[..., 0], self.edge, out=inside[..., 0])  # in any case: what comes before is none of it
        inside.addcmul_(frames.mean(-1, keepdim=True), self.taper, value=self.preemphasis - 1)

    def _energies(self, padded: Tensor, out: Tensor) -> Tensor:
        """Band energies (T, F) of frames (T, fft)."""
        squares = torch.view_as_real(torch.fft.rfft(padded)).flatten(-2).square_()
        for i, (bins, part) in enumerate(zip(self.blocks, out.split(_BLOCK, 1), strict=True)):
            torch.mm(squares[:, bins], getattr(self, f"bank{i}"), out=part)
        return out.clamp_min_(FLOOR)


def fill_to(frames: Tensor, size: int) -> Tensor:
    """(B, T, F) energies -> (B, size, F): the clips go on with digital silence."""
    return F.pad(frames, (0, 0, 0, size - frames.shape[1]), value=math.log(FLOOR))


def _mel(hertz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hertz / 700)


def _window(name: str, width: int) -> Tensor:
    # symmetric, as Kaldi has them; on the CPU whatever the default device, as the first value is read
    with torch.device("cpu"):
        hann = torch.hann_window(width, periodic=False)
        windows = {
            "hanning": hann,
            "povey": hann**0.85,
            "hamming": torch.hamming_window(width, periodic=False, alpha=0.54, beta=0.46),
            "rectangular": torch.ones(width),
        }
    if name not in windows:
        raise ValueError(f"frontend.window={name!r}: choose one of {', '.join(windows)}")
    return windows[name]
