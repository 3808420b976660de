"""From the losses of micro-batches on several processes to the one gradient of an update."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mmssl import distributed
from mmssl.training.parallel import Sharded, exchanging
from mmssl.training.rng import undisturbed
from mmssl.types import Batch, Loss


def backward(model: nn.Module, parts: Sequence[Batch], device: torch.device, precision: str) -> list[Loss]:
    """Add up the gradients of micro-batches; with several processes, over these too, once.

    Raises:
        ValueError: a loss has no gradient.
    """
    losses = []
    for number, part in enumerate(parts, 1):
        with exchanging(model, last=number == len(parts)):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss: Loss = model(part.to(device))
            if not loss.total.requires_grad:
                raise ValueError(
                    "the loss has no gradient: an objective that finds nothing to learn from in a batch should return "
                    "a sum that is zero but depends on its parameters, with a count of zero"
                )
            loss.total.backward()
        metrics = {n: (v.detach() if isinstance(v, Tensor) else v, count) for n, (v, count) in loss.metrics.items()}
        losses.append(replace(loss, total=loss.total.detach(), metrics=metrics))
    return losses


def share_statistics(
    model: nn.Module, objective: nn.Module, parts: Sequence[Batch], device: torch.device, precision: str
) -> None:
    """Tell an objective the sums over the whole batch that its loss needs beside a sum over clips.

    A term such as the diversity of codes is a function of a mean over the whole batch. `objective.statistics(batch)`
    gives the sums of a part; their total over all parts becomes `objective.global_statistics`, a constant to which
    the objective adds its own part's gradient. The gradients of the parts then add up exactly.
    """
    source = model if isinstance(model, Sharded) else objective
    with (
        undisturbed(device),
        torch.no_grad(),
        # a context of its own: within one, weights cast without gradient would be used again with gradient
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        sums = [source.statistics(part.to(device)) for part in parts]  # type: ignore[operator]
    objective.global_statistics = distributed.all_reduce_sum(torch.stack(sums).sum(0))


def weight_size(optimizer: torch.optim.Optimizer) -> float:
    """The root mean square of a typical matrix that is trained: the median over all of them.

    All processes ask for it together.
    """
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
    if not weights:
        return math.nan
    norms = torch.stack([distributed.whole(norm) for norm in torch._foreach_norm(weights)]).tolist()
    return statistics.median(norm / weight.numel() ** 0.5 for norm, weight in zip(norms, weights, strict=True))


def scale_gradients(optimizer: torch.optim.Optimizer, factor: float, clip: float | None) -> float:
    """Multiply all gradients by a factor, and shorten them together to norm `clip`; gives the norm before clipping."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = float(distributed.whole(get_total_norm(gradients))) * factor
    if clip is not None and norm > clip:
        factor *= clip / norm
    if gradients and math.isfinite(norm):
        torch._foreach_mul_(gradients, factor)
    return norm
