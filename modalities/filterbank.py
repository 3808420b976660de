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
_PIECE = 512


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
        self.taper: Tensor
        self.bank: Tensor
        self.register_buffer("taper", _window(window, self.width), persistent=False)
        bank = triangles(rate, self.fft, bands, low=low, high=top, sides="mel").clone()
        bank[-1] = 0.0  # Kaldi leaves the bin at half the rate out
        # A bank is a band of a matrix: neighboring filters share a few bins, and the rest of their columns is zero.
        # Each bin stands twice, for the squares of its real and of its imaginary part, so that nobody has to add them.
        bank = bank.repeat_interleave(2, 0)
        self.register_buffer("bank", bank, persistent=False)
        self.blocks: list[tuple[slice, slice]] = []
        for first in range(0, bands, _BLOCK):
            used = bank[:, first : first + _BLOCK].any(1).nonzero()[:, 0].tolist() or [0]
            self.blocks.append((slice(used[0], used[-1] + 1), slice(first, first + _BLOCK)))

    def frames(self, samples: Tensor) -> Tensor:
        """Whole frames in so many samples."""
        return (torch.div(samples - self.width, self.hop, rounding_mode="floor") + 1).clamp_min(0)

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
            frames = waves.unfold(1, self.width, self.hop)[:, :size]
            out = waves.new_full((len(waves), size, self.bank.shape[1]), math.log(FLOOR))
            if waves.device.type == "cpu":
                scratch = waves.new_zeros(_PIECE, self.fft)
                for clip, count in enumerate(counts.tolist()):
                    for start in range(0, count, _PIECE):
                        part = clip, slice(start, min(start + _PIECE, count))
                        self._energies(frames[part], scratch[: part[1].stop - start], out[part])
            else:
                self._energies(frames, waves.new_zeros(len(waves), size, self.fft), out)
                # where padding was worked on, too
                out = torch.where(valid_mask(counts, size, waves.device)[..., None], out, math.log(FLOOR))
            return out

    def _energies(self, frames: Tensor, scratch: Tensor, out: Tensor) -> None:
        """Log-mel energies of frames.

        Args:
            frames: (..., width) samples.
            scratch: (..., fft) to work in; zero from `width` on, and left so.
            out: (..., F) to be filled.
        """
        inside = scratch[..., : self.width]
        torch.sub(frames[..., 1:], frames[..., :-1], alpha=self.preemphasis, out=inside[..., 1:])
        # the first sample of a frame counts as its own predecessor
        torch.mul(frames[..., :1], 1 - self.preemphasis, out=inside[..., :1])
        inside -= (1 - self.preemphasis) * frames.mean(-1, keepdim=True)
        inside *= self.taper
        squares = torch.view_as_real(torch.fft.rfft(scratch)).flatten(-2).square_()
        for bins, bands in self.blocks:
            out[..., bands] = squares[..., bins] @ self.bank[bins, bands]
        out.clamp_min_(FLOOR).log_()


def fill_to(frames: Tensor, size: int) -> Tensor:
    """(B, T, F) energies -> (B, size, F): the clips go on with digital silence."""
    return F.pad(frames, (0, 0, 0, size - frames.shape[1]), value=math.log(FLOOR))


def _mel(hertz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hertz / 700)


def _window(name: str, width: int) -> Tensor:
    # symmetric, as Kaldi has them
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
