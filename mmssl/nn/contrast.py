"""Comparing predictions with their own target and with other targets of the same clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.nn.predictor import places
from mmssl.nn.seeds import uniform
from mmssl.nn.spread import spread
from mmssl.types import Tokens, valid_mask

# a stream of its own for the negatives of a clip: masks take the small ones
_NEGATIVES = 1001


def draw_negatives(counts: Tensor, k: int, seeds: Tensor) -> Tensor:
    """k of the other hidden tokens of the same clip for each, all equally likely, with replacement.

    Args:
        counts: (B,) hidden tokens of each clip, 0 or at least 2.
        seeds: (B,) int64.

    Returns:
        (M, k) int64, places among the clip's hidden tokens, never a token's own.
    """
    size = int(counts.max())
    noise = uniform(seeds, size * k, stream=_NEGATIVES).view(len(counts), size, k)
    others = (counts - 1).clamp_min(1)[:, None, None]
    drawn = (noise * others).long().minimum(others - 1)
    drawn += drawn >= torch.arange(size)[:, None]  # skips the token's own place
    return drawn[valid_mask(counts, size)]


def contrast(prediction: Tensor, target: Tensor, same: Tensor, negatives: Tensor, counts: Tensor) -> Tensor:
    """Cosine similarity of each prediction with its own target and with its negatives.

    All targets of a clip are compared with all its predictions, and what was drawn is picked from that table: a
    product of M_b x D x M_b costs less than to gather M_b x K x D numbers as long as M_b is below some tens of K,
    because it reads each vector once.

    Args:
        prediction, target: (M, D).
        same: (M,) int64, equal where two targets are.
        negatives: (M, K), see `draw_negatives`.
        counts: (B,) on the CPU.

    Returns:
        (M, 1 + K) float32, the positive first; -inf for a negative that equals the positive.
    """
    device = prediction.device
    clips, size = len(counts), int(counts.max())
    clip = torch.arange(clips).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[clip]
    own = torch.arange(len(clip)) - first
    place = (clip * size + own).to(device)
    candidates = torch.cat([own[:, None], negatives], 1)
    codes = same[(first[:, None] + candidates).to(device)]

    def rows(x: Tensor) -> Tensor:
        x = F.normalize(x.float(), dim=-1)
        return x.new_zeros(clips * size, x.shape[1]).index_copy(0, place, x).view(clips, size, x.shape[1])

    with torch.autocast(device.type, enabled=False):
        table = rows(prediction) @ rows(target).transpose(1, 2)  # (B, size, size)
        picked = table.flatten(0, 1).index_select(0, place).gather(1, candidates.to(device))
    equal = codes == codes[:, :1]
    equal[:, 0] = False
    return picked.masked_fill(equal, -torch.inf)


def draw_others(lengths: Tensor, k: int, seeds: Tensor) -> Tensor:
    """k of the other tokens of the same clip for each token, see `draw_negatives`.

    Args:
        lengths: (B,) real tokens.
        seeds: (B,) int64.

    Returns:
        (B, N, k) int64 on the CPU, places in the clip, never a token's own; 0 for tokens that have no other.
    """
    lengths = lengths.cpu()
    counts = lengths.masked_fill(lengths < 2, 0)
    drawn = torch.zeros(len(lengths), int(lengths.max()), k, dtype=torch.int64)
    drawn[valid_mask(counts, drawn.shape[1])] = draw_negatives(counts, k, seeds)
    return drawn


def contrast_ahead(prediction: Tensor, target: Tensor, others: Tensor, lengths: Tensor, *, shift: int) -> Tensor:
    """Compare the prediction at each token with the target `shift` tokens later, and with others of the clip.

    The scores are inner products over the root of their width, so that they start near one however wide they are.

    Args:
        prediction, target: (B, N, C), finite past each length.
        others: (B, N, K) on the CPU, for each *target* those it is told from: see `draw_others`.
        lengths: (B,) real tokens.

    Returns:
        (M, 1 + K) float32 of all tokens that have a target, row by row; the positive first.
    """
    lengths, size = lengths.cpu(), target.shape[1]
    rows = max(size - shift, 0)
    own = (torch.arange(rows) + shift).expand(len(lengths), rows)[..., None]
    candidates = torch.cat([own, others[:, shift:]], 2).to(target.device)
    here = valid_mask(lengths - shift, rows).flatten().nonzero()[:, 0].to(target.device)
    with torch.autocast(target.device.type, enabled=False):
        # as in `contrast`, one product of all pairs rather than to gather K vectors for each token
        table = prediction[:, :rows].float() @ target.float().transpose(1, 2) * target.shape[2] ** -0.5
        return table.gather(2, candidates).flatten(0, 1).index_select(0, here)


def contrast_steps(
    predictions: Sequence[Tensor], target: Tensor, tokens: Tokens, *, negatives: int, seeds: Tensor
) -> list[Tensor]:
    """The scores of predictions of one step ahead, of two, and so on, see `contrast_ahead`.

    Steps go along the first axis of the tokens; the negatives of a target are the same for all steps.

    Args:
        predictions: (B, N, C) each, finite past each length; the first of one step ahead.
        target: (B, N, C), finite past each length.
        tokens: their grid and lengths are read.
        negatives: K, for each target.
        seeds: (B,) int64.

    Returns:
        for each step (M, 1 + K) float32, the positive first.
    """
    others = draw_others(tokens.lengths, negatives, seeds)
    step = math.prod(tokens.grid[1:])
    return [
        contrast_ahead(prediction, target, others, tokens.lengths, shift=ahead * step)
        for ahead, prediction in enumerate(predictions, 1)
    ]


def binary_cross_entropy(scores: Tensor) -> Tensor:
    """The loss in nats of a yes for each positive and a no for each of its negatives, summed: (M, 1 + K) -> ()."""
    return F.softplus(-scores[:, 0]).sum() + F.softplus(scores[:, 1:]).sum()


def binary_chance(negatives: int) -> float:
    """The least `binary_cross_entropy` of a row whose answers are all the same: yes with probability 1 / (1 + K)."""
    return math.log(1 + negatives) + negatives * math.log((1 + negatives) / negatives)


def steps_metrics(
    logits: Sequence[Tensor], prediction: Tensor, target: Tensor, tokens: Tokens
) -> dict[str, tuple[float | Tensor, float]]:
    """Name -> (sum, count), for the log of objectives that look ahead.

    They are those of `contrast_metrics`; the accuracy of the first step ahead and of the last; and how far predictions
    and targets lie apart in direction, where unrelated ones do by about 1.

    Args:
        logits: see `contrast_steps`.
        prediction: (B, N, C), of one step ahead.
        target: (B, N, C).
        tokens: their lengths are read.
    """
    scores = torch.cat([each.detach() for each in logits])
    count = len(scores)
    metrics: dict[str, tuple[float | Tensor, float]] = {
        name: (value, count) for name, value in contrast_metrics(scores).items()
    }
    for ahead in {1, len(logits)}:
        of = logits[ahead - 1].detach()
        metrics[f"accuracy_{ahead}"] = contrast_metrics(of)["accuracy"], len(of)
    real = places(valid_mask(tokens.lengths, target.shape[1]), target.device)
    for name, x in (("prediction_std", prediction), ("feature_std", target)):
        directions = F.normalize(x.detach().flatten(0, 1).index_select(0, real).float(), dim=-1)
        metrics[name] = spread(directions * x.shape[-1] ** 0.5) * count, count
    return metrics


def contrast_metrics(logits: Tensor) -> dict[str, Tensor]:
    """Sums over frames that tell learning from chance and from collapse.

    accuracy counts a frame whose positive is above *all* negatives: where everything ties, or where no negative is
    left that differs from the positive, the loss is small and nothing was learned. chance and chance_accuracy are the
    loss and accuracy of equal guesses among what is left: ln(1 + K) and 1 / (1 + K) while the codes are diverse.

    Args:
        logits: (M, 1 + K), -inf for negatives that do not count.
    """
    positive, negatives = logits[:, 0], logits[:, 1:]
    left = (negatives > -torch.inf).sum(1)
    return {
        "accuracy": ((positive > negatives.amax(1)) & (left > 0)).sum(),
        "chance_accuracy": (left > 0).div(left + 1).sum(),
        "chance": left.float().log1p().sum(),
    }
