"""Units beside tokens, what a recipe says of them, and the heads that say which unit a token is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.quantizer import perplexity
from mmssl.types import Batch, Tokens, Units, valid_mask


def label_sets(units: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """Key -> how many codes each of its labels has.

    Raises:
        ValueError: a key that is no word, or fewer codes than two.
    """
    codes = {key: [n] if isinstance(n, int) else list(n) for key, n in units.items()}
    for key, sizes in codes.items():
        if not key.isidentifier() or min(sizes, default=0) < 2:
            raise ValueError(f"objective.units: {key} has {sizes} codes; a key is one word, and a choice takes two")
    return codes


def label_weights(
    codes: Mapping[str, list[int]], given: Mapping[str, float | Sequence[float]] | None
) -> dict[str, list[float]]:
    """Key -> the weight of each of its labels, 1 where none is given.

    Raises:
        ValueError: weights of an unknown label set, or not one for each label.
    """
    found = {key: [1.0] * len(sizes) for key, sizes in codes.items()}
    for key, weight in (given or {}).items():
        if key not in found:
            raise ValueError(f"objective.weights: there are no units called {key!r}; there are {', '.join(found)}")
        found[key] = [float(weight)] * len(found[key]) if isinstance(weight, int | float) else list(weight)
        if len(found[key]) != len(codes[key]):
            raise ValueError(
                f"objective.weights: {len(found[key])} for the {len(codes[key])} labels of {key!r}; give one for each"
            )
    return found


def label_names(codes: Mapping[str, list[int]]) -> dict[str, list[str]]:
    """Key -> what the log puts before the metrics of each of its labels; nothing before those of the very first."""
    first = next(iter(codes))
    return {
        key: [
            "" if key == first and label == 0 else f"{key}_{label}_" if len(sizes) > 1 else f"{key}_"
            for label in range(len(sizes))
        ]
        for key, sizes in codes.items()
    }


def units_at(batch: Batch, key: str) -> Units:
    """The label set of a batch.

    Raises:
        ValueError: it has none of that name.
    """
    if key not in batch.units:
        raise ValueError(f"the units at {key!r} of a row are to be predicted, and the batch has {sorted(batch.units)}")
    return batch.units[key]


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

    Source: Hsu et al. 2021, HuBERT (arXiv:2106.07447), section II-E, equation 3.

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
        name: goes before that of each metric, see `label_names`.
        logits: (M, V); target: (M,); losses: (M,) cross-entropies.
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
