"""The constant-Q transform: a spectrum whose bins lie as far apart as notes do."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.types import Raw, Tokens

LOWEST = 32.7  # Hz: the C below the lowest string of a bass
OCTAVES, PER_OCTAVE = 7, 48
# of the spacing of bins: so many times does a bin's window hold a period of its pitch
_Q = 1 / (2 ** (1 / PER_OCTAVE) - 1)
# frames multiplied at a time: a window of the lowest octave is two seconds long
_PIECE = 256


def cqt(raw: Raw, tokens: Tokens) -> Tensor:
    """Magnitudes of a constant-Q transform, one frame for each token.

    Source: Brown 1991, "Calculation of a constant Q spectral transform"; bins, windows and scale are those of the
    target of MERT (Li et al. 2023, arXiv:2306.00107) in its released configuration.
    Differs from the paper: frame i lies around the middle of what token i sees, where the released code has it around
        the token's first sample; bins that reach past half the rate are left out.

    Windows reach over a clip's ends, where there is silence. A clip's frames are the same alone and beside a longer
    one.

    Returns:
        (B, N, n_bins) float32, zero past each length: half of a tone's amplitude in the bin of its pitch, times the
        root of the bin's window, in samples.

    Raises:
        ValueError: the batch has no rate, or the tokens no step in time.
    """
    if raw.rate is None or tokens.step_ms is None or tokens.span_ms is None:
        raise ValueError("cqt: needs sound with a rate and tokens with a step in time")
    hop, middle = round(raw.rate * tokens.step_ms / 1000), round(raw.rate * tokens.span_ms / 2000)
    device = raw.data.device
    out = torch.zeros(*tokens.x.shape[:2], n_bins(int(raw.rate)), device=device)
    for row, (samples, count) in enumerate(zip(raw.lengths.tolist(), tokens.lengths.tolist(), strict=True)):
        wave = raw.data[row, :samples].float()
        first = 0
        for kernel in kernels(int(raw.rate), device):
            half, bins = len(kernel) // 2, kernel.shape[1] // 2
            behind = (count - 1) * hop + middle + half + 1 - samples
            frames = F.pad(wave, (half - middle, max(behind, 0))).unfold(0, len(kernel), hop)[:count]
            for start in range(0, count, _PIECE):
                piece = (frames[start : start + _PIECE] @ kernel).unflatten(1, (2, bins))
                out[row, start : start + len(piece), first : first + bins] = piece.square().sum(1).sqrt()
            first += bins
    return out


def pitches(rate: int) -> Tensor:
    """(n_bins,) float64, Hz: those whose band lies below half the rate."""
    pitch = LOWEST * 2 ** (torch.arange(OCTAVES * PER_OCTAVE, dtype=torch.float64, device="cpu") / PER_OCTAVE)
    return pitch[pitch * (1 + 2 / _Q) <= rate / 2]


def n_bins(rate: int) -> int:
    """336 at 24 kHz."""
    return len(pitches(rate))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept must serve where there is a gradient, too
def kernels(rate: int, device: torch.device) -> list[Tensor]:
    """Of each octave, lowest first, what frames are multiplied with.

    Returns:
        (samples of the longest window, 2 * bins) float32: all bins' cosines, then their sines, under Hann windows whose
        middle is the frame's.
    """
    found = []
    for pitch in pitches(rate).split(PER_OCTAVE):
        width = _Q * rate / pitch
        half = math.floor(float(width.max()) / 2)
        time = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu")[:, None]
        window = torch.where(time.abs() <= width / 2, 0.5 + 0.5 * torch.cos(2 * math.pi * time / width), 0.0)
        window *= width.sqrt() / window.sum(0)
        angle = 2 * math.pi * time * pitch / rate
        found.append(torch.cat([window * angle.cos(), window * angle.sin()], 1).float().to(device))
    return found
