"""What connectionist temporal classification asks of lengths, and its plainest decoding."""

from __future__ import annotations

import torch
from torch import Tensor

BLANK = 0


def frames_needed(labels: Tensor, label_lengths: Tensor) -> Tensor:
    """The fewest frames that can spell each transcript: its characters, and a blank between two that are the same.

    Source: Graves et al. 2006, section 3.1. A clip with fewer frames has probability zero, so its loss is infinite.

    Args:
        labels: (B, S) int64, padded with anything.
        label_lengths: (B,) int64.
    """
    again = labels[:, 1:] == labels[:, :-1]
    inner = torch.arange(1, again.shape[1] + 1, device=labels.device) < label_lengths[:, None]
    return label_lengths + (again & inner).sum(1)


def best_path(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """The likeliest character of each frame, repeats merged and blanks left out.

    Source: Graves et al. 2006, section 3.2, "best path decoding". The likeliest path is not always that of the
    likeliest transcript: see `evaluation.speech.prefix_beam`.

    Args:
        log_probs: (B, N, V), or any other scores of the same order.
        lengths: (B,) real frames.
    """
    paths = log_probs.argmax(-1).cpu()
    merged = (path[:n].unique_consecutive() for path, n in zip(paths, lengths.tolist(), strict=True))
    return [path[path != BLANK].tolist() for path in merged]
