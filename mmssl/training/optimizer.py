"""AdamW over the parameters of an objective: which decay, and how fast each layer learns."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

_BLOCK = re.compile(r"encoder\.transformer\.blocks\.(\d+)\.")
# tables of positions, learned tokens, and the lengths of weight norm: whatever their shape, they say where zero is
_NO_DECAY = re.compile(r"(^|[._])(table|prefix|tokens?|weight_g|original0)$")


def build_optimizer(
    objective: nn.Module,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
) -> torch.optim.AdamW:
    """AdamW, with one group of parameters for each weight decay and layer.

    Each group has `lr_scale`: the loop sets its rate to lr * lr_scale * schedule(step) before every update. Parameters
    that need no gradient at this time, such as a teacher's, are left out.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101); layer decay as in Bao et al. 2022 (arXiv:2106.08254).

    Args:
        lr: the rate where the schedule says 1.
        weight_decay: not for biases, norms, positions and learned tokens.
        layer_decay: each layer learns this much slower than the one above it: the head has the full rate, block i of
            `depth` blocks has layer_decay ** (depth - i), and what comes before the blocks layer_decay ** (depth + 1).
            What all blocks share, the bias of their attention, learns as the first of them, where BEiT's released code
            gives it the full rate.

    Raises:
        ValueError: a setting outside its range, or nothing to train.
    """
    if lr <= 0:
        raise ValueError(f"optimizer.lr={lr}: must be above 0")
    if weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay={weight_decay}: must be at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={list(betas)}: two numbers are wanted, each from 0 to below 1")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"optimizer.layer_decay={layer_decay}: must be above 0 and at most 1; leave it out for none")
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError(f"{type(objective).__name__}: no parameter needs a gradient, so there is nothing to train")
    transformer = dict(objective.named_modules()).get("encoder.transformer")
    post = not getattr(transformer, "pre", True)
    depth = max((int(match[1]) + 1 for name, _ in named if (match := _BLOCK.match(name))), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = weight_decay if decays(name, parameter) else 0.0
        scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer_id(name, depth, post=post))
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        # one kernel for all parameters rather than a dozen for each: small models wait for little else
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter in named),
    )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is right for a parameter: for matrices and kernels.

    A class token may be stored as (1, 1, D): counting dimensions alone would decay it.
    """
    one_vector = parameter.numel() == max(parameter.shape, default=1)
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and not (one_vector and leaf != "weight") and not _NO_DECAY.search(name)


def layer_id(name: str, depth: int, *, post: bool = False) -> int:
    """0 for what comes before the encoder's blocks, i + 1 for block i, depth + 1 for what comes after.

    Args:
        post: whether the Transformer's own norm stands before its blocks, as in the post-norm one, and not behind them.
    """
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    if name.startswith("encoder.transformer.bias."):
        return 1
    if name.startswith("encoder.transformer."):
        return 0 if post or ".input_norm." in name else depth + 1
    return 0 if name.startswith("encoder.") else depth + 1
