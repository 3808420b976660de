"""Mel-frequency cepstral coefficients and how they change: what HuBERT's first units are clusters of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.modalities.filterbank import Filterbank

BANDS = 23
COEFFICIENTS = 13
_LIFTER = 22  # Kaldi's


class MFCC(nn.Module):
    """13 coefficients of 25 ms every 10 ms as Kaldi computes them, their first and their second differences.

    Source: Davis and Mermelstein 1980; Kaldi's defaults without dither and without energy, as in Hsu et al. 2021
    (HuBERT, arXiv:2106.07447), section IV-B. Differences are slopes of a line through five frames; before its first and
    after its last frame a clip goes on as it was there.
    """

    dim = 3 * COEFFICIENTS

    def __init__(self, *, rate: int) -> None:
        super().__init__()
        self.filterbank = Filterbank(
            bands=BANDS, window_ms=25.0, hop_ms=10.0, window="povey", low=20.0, high=0.0, preemphasis=0.97, rate=rate
        )
        order = torch.arange(COEFFICIENTS)
        cosine = torch.cos(math.pi / BANDS * (torch.arange(BANDS)[:, None] + 0.5) * order) * math.sqrt(2 / BANDS)
        cosine[:, 0] /= math.sqrt(2)
        self.cosine: Tensor
        self.register_buffer(
            "cosine", cosine * (1 + _LIFTER / 2 * torch.sin(math.pi * order / _LIFTER)), persistent=False
        )

    def forward(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) samples, of which (B,) `lengths` are real -> (B, T, 39), zero past each clip's frames."""
        counts = self.filterbank.frames(lengths)
        with torch.autocast(waves.device.type, enabled=False):
            cepstra = self.filterbank(waves, lengths) @ self.cosine
            out = cepstra.new_zeros(*cepstra.shape[:2], self.dim)
            for row, count in enumerate(counts.tolist()):
                own = cepstra[row, :count]
                first = _slopes(own)
                out[row, :count] = torch.cat([own, first, _slopes(first)], 1)
        return out


def _slopes(x: Tensor) -> Tensor:
    """(T, C) -> (T, C): of the line of least squares through each frame and the two on either side."""
    padded = F.pad(x.t()[None], (2, 2), mode="replicate")[0].t()
    size = len(x)
    return (2 * (padded[4:] - padded[:size]) + padded[3 : size + 3] - padded[1 : size + 1]) / 10
