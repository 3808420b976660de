"""A grouped convolution along time by Fourier transforms, for long kernels that do not change between calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kernel_spectrum(weight: Tensor, groups: int) -> Tensor:
    """What `fft_conv` multiplies with.

    Args:
        weight: (C', C / groups, K), as in `F.conv1d`.

    Returns:
        (K + 1, groups, C / groups, C' / groups) complex64.
    """
    size = weight.shape[-1]
    # twice the kernel: half of each piece is result, and the spectra stay small
    spectrum = torch.fft.rfft(weight.float().unflatten(0, (groups, -1)), n=2 * size)
    # conjugated, as F.conv1d does not turn its kernel around
    return spectrum.conj().permute(3, 0, 2, 1).contiguous()


def fft_conv(x: Tensor, spectrum: Tensor) -> Tensor:
    """`F.conv1d(..., padding=K // 2)` with channels last, and as long as its input: (B, N, C) -> (B, N, C') float32.

    Pieces of 2K steps, K - 1 of which they share with the next one, are multiplied in the frequency domain ("overlap
    and save"). Of wav2vec 2.0's positions, kernel 128 in 16 groups, that is some twentieth of the operations.

    Args:
        x: (B, N, C), zero where it is to read as silence.
        spectrum: of `kernel_spectrum`.
    """
    size = len(spectrum) - 1
    groups, width = spectrum.shape[1:3]
    batch, steps, _ = x.shape
    hop = size + 1
    pieces = -(-steps // hop)
    padded = F.pad(x.float(), (0, 0, size // 2, pieces * hop - steps + size - 1 - size // 2))
    heard = torch.fft.rfft(padded.unfold(1, 2 * size, hop))  # (B, pieces, C, K + 1)
    heard = heard.reshape(batch * pieces, groups, width, size + 1).permute(3, 1, 0, 2)
    said = torch.fft.irfft((heard @ spectrum).permute(2, 0, 1, 3), n=2 * size, dim=1)[:, :hop]
    return said.reshape(batch, pieces * hop, -1)[:, :steps]
