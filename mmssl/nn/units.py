"""Units beside tokens, and the heads that say which unit a token is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.quantizer import perplexity
from mmssl.types import Tokens, Units, valid_mask


def units_of_tokens(units: Units, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The unit of each token: the one whose step the token's time lies in, where units have a rate.

    A token's time is that at which what it sees begins, as that of a unit is: with units at twice the tokens' rate
    (MFCC every 10 ms, tokens every 20) each token takes the unit that sees the same sound, and every other unit is
    left out; with slower units a few tokens share one. Tokens at the same time on other axes have the same unit.

    Returns:
        (B, N, G) int64 on the units' device; (B, N) bool on the CPU, False past a clip's tokens and past its units.

    Raises:
        ValueError: units without a rate that are not as many as the tokens, or tokens without a time.
    """
    size, lengths = tokens.x.shape[1], tokens.lengths.cpu()
    valid = valid_mask(lengths, size)
    if units.rate is None:
        odd = (units.lengths != lengths).nonzero()[:, 0].tolist()
        if odd:
            raise ValueError(
                f"clip {odd[0]} of the batch has {int(units.lengths[odd[0]])} units for {int(lengths[odd[0]])} tokens; "
                "units without a rate are one for each token, so write them with the same frontend"
            )
        return F.pad(units.values, (0, 0, 0, max(0, size - units.values.shape[1])))[:, :size], valid
    if tokens.step_ms is None or tokens.axes[0] != "t":
        raise ValueError(
            f"units with {units.rate:g} steps a second need tokens along time, and these lie on "
            f"{', '.join(tokens.axes)}; write the units of tokens, without a rate"
        )
    # from the grid and not from the coordinates, which lie on the accelerator; row-major, time outermost
    steps = torch.arange(size) // math.prod(tokens.grid[1:])
    times = units.starts[:, None] + steps.double() * (tokens.step_ms / 1000)
    # a hair more, so that 0.06 s at 50 a second is step 3 whatever the rounding
    place = (times * units.rate + 1e-6).long()
    known = valid & (place < units.lengths[:, None])
    place = place.masked_fill(~known, 0).to(units.values.device, non_blocking=True)
    if not units.values.shape[1]:
        return units.values.new_zeros(*place.shape, units.values.shape[2]), known
    return units.values.gather(1, place[..., None].expand(-1, -1, units.values.shape[2])), known


class CosineHead(nn.Module):
    """Which of several codes a vector is, by the cosine to an embedding of each.

    Source: Hsu et al. 2021, HuBERT (arXiv:2106.07447), section II-B.

    Args:
        dim: width of the vectors.
        codes: V.
        code_dim: width in which they are compared.
        temperature: divides the cosine.
    """

    def __init__(self, dim: int, codes: int, *, code_dim: int, temperature: float) -> None:
        super().__init__()
        self.project = nn.Linear(dim, code_dim)
        # U[0, 1), as the released code draws them
        self.codes = nn.Parameter(torch.rand(codes, code_dim))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, V) logits, float32."""
        with torch.autocast(x.device.type, enabled=False):
            projected = F.linear(x.float(), self.project.weight, self.project.bias)
            return F.normalize(projected, dim=-1) @ F.normalize(self.codes, dim=-1).t() / self.temperature


class CodeHead(nn.Module):
    """Which code of each of several codebooks a vector stands for: a language model's head, with an output for each.

    Source: Liu et al. 2019, RoBERTa (arXiv:1907.11692), whose head is a linear map, GELU, a norm and a linear map.
    Differs from RoBERTa: the last map has weights of its own and not those of the embeddings.

    Args:
        dim: width of the vectors.
        codes: how many codes each codebook has.
        eps: of the norm.
    """

    def __init__(self, dim: int, codes: Sequence[int], *, eps: float = 1e-5) -> None:
        super().__init__()
        self.codes = list(codes)
        self.dense = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.out = Linear(dim, sum(codes))
        for linear in (self.dense, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(M, D) -> (M, V) logits, float32, for each codebook."""
        return list(self.out(self.norm(F.gelu(self.dense(x)))).float().split(self.codes, 1))


def choices(name: str, logits: Tensor, target: Tensor, losses: Tensor) -> dict[str, tuple[float | Tensor, float]]:
    """What the log says of M choices among V units, each name with `name` before it.

    chance_accuracy is that of always naming the commonest unit of the batch; unit_perplexity how many units the targets
    have, as if all came alike, and predicted_perplexity the same of the choices.

    Args:
        logits: (M, V).
        target: (M,) int64.
        losses: (M,) of each choice, in nats.
    """
    n = len(target)
    chosen = logits.argmax(1)
    uses = [torch.bincount(units, minlength=logits.shape[1]).float() / n for units in (target, chosen)]
    return {
        f"{name}accuracy": ((chosen == target).sum(), n),
        f"{name}chance_accuracy": (uses[0].max() * n, n),
        f"{name}cross_entropy": (losses.sum(), n),
        f"{name}unit_perplexity": (perplexity(uses[0]) * n, n),
        f"{name}predicted_perplexity": (perplexity(uses[1]) * n, n),
    }
