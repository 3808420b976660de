"""Vectors to a product of codebooks, and back, with a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """What became of M vectors.

    vectors: (M, dim) the chosen codewords, the groups' end to end.
    codes: (M, G) int64, which codeword each group chose.
    soft: (M, G, V) float32, how likely each codeword was, without noise and at temperature 1.
    """

    vectors: Tensor
    codes: Tensor
    soft: Tensor


class GumbelQuantizer(nn.Module):
    """Choose one of `codes` codewords in each of `groups` groups; the gradient goes straight through the choice.

    Source: Baevski et al. 2020 (arXiv:2006.11477), section 2; Jang et al. 2017 (arXiv:1611.01144). There is no random
    number in here: the noise is handed in.

    Args:
        dim_in: width of the vectors to quantize.
        groups: G codebooks, each of which gives dim / G of the result.
        codes: V codewords in each.
        dim: width of the result.
        temperature: of the softmax whose gradient is used: (at the start, least, factor for one optimizer update).

    Raises:
        ValueError: dim is not a multiple of groups, or there are more combinations of codes than 64 bits can count.
    """

    def __init__(
        self,
        *,
        dim_in: int,
        groups: int,
        codes: int,
        dim: int,
        temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995),
    ) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"quantizer.dim={dim}: must be a multiple of groups={groups}")
        if codes**groups >= 2**63:
            raise ValueError(f"quantizer.codes={codes}, groups={groups}: codes to the power of groups must fit 63 bits")
        self.groups, self.codes, self.dim = groups, codes, dim
        self.temperature = temperature
        self.logits = nn.Linear(dim_in, groups * codes)
        self.codebook = nn.Parameter(torch.rand(groups, codes, dim // groups))
        # Logits as wide as this start from choices that differ; at PyTorch's own width all start near one code.
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def temperature_at(self, updates: Tensor) -> Tensor:
        """The temperature after so many optimizer updates: () int64 -> () float32, on the device of `updates`.

        A function of updates rather than of calls, so that neither accumulation nor resuming changes it.
        """
        start, least, factor = self.temperature
        return (start * torch.exp(updates.float() * math.log(factor))).clamp_min(least)

    def probabilities(self, x: Tensor) -> Tensor:
        """(M, dim_in) -> (M, G, V) float32: `Quantized.soft` alone."""
        return self._scores(x).softmax(-1)

    def forward(self, x: Tensor, temperature: Tensor | float = 1.0, noise: Tensor | None = None) -> Quantized:
        """Quantize.

        Args:
            x: (M, dim_in).
            temperature: see `temperature_at`; it changes the gradient only.
            noise: (M, G, V) Gumbel noise, -log(-log(u)); None for the likeliest codeword.
        """
        scores = self._scores(x)
        noisy = scores if noise is None else scores + noise
        codes = noisy.argmax(-1)
        slope = (noisy / temperature).softmax(-1)
        # The difference is zero to the bit, so equal codes give equal vectors; (hard - slope) + slope would not.
        chosen = torch.zeros_like(slope).scatter(-1, codes[..., None], 1.0) + (slope - slope.detach())
        vectors = torch.einsum("mgv,gvd->mgd", chosen.to(self.codebook.dtype), self.codebook).flatten(1)
        return Quantized(vectors=vectors, codes=codes, soft=scores.softmax(-1))

    def combined(self, codes: Tensor) -> Tensor:
        """(M, G) codes -> (M,) one number for each combination: two vectors are equal where it is."""
        weights = torch.tensor([self.codes**g for g in range(self.groups)], device=codes.device)
        return (codes * weights).sum(-1)

    def _scores(self, x: Tensor) -> Tensor:
        return self.logits(x).float().unflatten(-1, (self.groups, self.codes))


class KMeansQuantizer(nn.Module):
    """Replace a vector, group by group, by the nearest of `codes` codewords; codewords and vectors move together.

    Source: Baevski, Schneider and Auli 2020 (arXiv:1910.05453), section 3.2, after van den Oord et al. 2017
        (arXiv:1711.00937): the gradient goes straight through to the projected vector; a codeword is drawn to its
        vectors and, `commitment` times as much, each vector to its codeword.
    Differs from the paper: each group of a vector is normalized by itself, not over the clip, so that padding plays no
        part; codewords are not shared between groups.

    Args:
        dim: width of the vectors and of the result.
        groups: G parts of a vector, each with a codebook of its own.
        codes: V codewords in each.
        commitment: see above.

    Raises:
        ValueError: dim is not a multiple of groups.
    """

    def __init__(self, *, dim: int, groups: int, codes: int, commitment: float = 0.25) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"quantizer.dim={dim}: must be a multiple of groups={groups}")
        self.groups, self.codes, self.dim, self.commitment = groups, codes, dim, commitment
        part = dim // groups
        self.project = nn.Parameter(torch.randn(groups, part, part) * part**-0.5)
        self.norm = nn.LayerNorm(part)
        # as wide as what is normalized: near zero all vectors would choose among codewords by their lengths alone
        self.codebook = nn.Parameter(torch.randn(groups, codes, part))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize (M, dim).

        Returns:
            (M, dim) vectors, (M, G) int64 codes, and (M,) the two distances, each a mean square over the vector.
        """
        with torch.autocast(x.device.type, enabled=False):
            split = torch.einsum("mgd,gde->mge", x.float().unflatten(1, (self.groups, -1)), self.project)
            split = self.norm(split)
            with torch.no_grad():
                # |x - c|^2 without |x|^2, which is the same for all codewords
                products = torch.einsum("mgd,gvd->mgv", split, self.codebook)
                codes = (self.codebook.square().sum(2) - 2 * products).argmin(2)
            chosen = self.codebook[torch.arange(self.groups, device=x.device), codes]  # (M, G, D / G)
            drawn = (chosen - split.detach()).square().mean((1, 2))
            committed = (split - chosen.detach()).square().mean((1, 2))
            # the difference is zero to the bit, so equal codes give equal vectors
            vectors = chosen.detach() + (split - split.detach())
        return vectors.flatten(1), codes, drawn + self.commitment * committed


class RandomQuantizer(nn.Module):
    """The nearest of random codewords to a random projection: codes that nothing trains.

    Source: Chiu et al. 2022, BEST-RQ (arXiv:2202.01855), section 3.1: a Xavier-uniform projection, normal codewords,
    and the code of the nearest one after both are brought to length 1. Several codebooks at once are those of Zhang et
    al. 2023 (USM, arXiv:2303.01037).

    Projection and codewords are buffers: saved, and never trained.

    Args:
        dim_in: width of the vectors to quantize.
        groups: G codebooks, each with a projection of its own.
        codes: V codewords in each.
        dim: width of a codeword.
        seed: of the random numbers.
    """

    def __init__(self, *, dim_in: int, groups: int, codes: int, dim: int, seed: int) -> None:
        super().__init__()
        self.groups, self.codes = groups, codes
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = math.sqrt(6 / (dim_in + dim))
        self.projection: Tensor
        self.codebook: Tensor
        uniform = torch.rand(groups, dim_in, dim, generator=generator, device="cpu")
        normal = torch.randn(groups, codes, dim, generator=generator, device="cpu")
        self.register_buffer("projection", (2 * uniform - 1) * bound)
        self.register_buffer("codebook", F.normalize(normal, dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(M, dim_in) -> (M, G) int64 codes, found in float32."""
        with torch.autocast(x.device.type, enabled=False):
            # of vectors of length 1 the nearest has the largest product, and the length of x does not change which
            projected = torch.einsum("mc,gcd->gmd", x.float(), self.projection)
            return torch.bmm(projected, self.codebook.transpose(1, 2)).argmax(-1).t()


def perplexity(probabilities: Tensor) -> Tensor:
    """exp of the entropy: how many codewords are in use, as if all were used alike. (..., V) -> (...)."""
    # clamped inside the logarithm: at zero, x log x is zero, but its gradient would be infinite
    tiny = torch.finfo(probabilities.dtype).tiny
    return (-(probabilities * probabilities.clamp_min(tiny).log()).sum(-1)).exp()


def code_perplexity(codes: Tensor, size: int) -> Tensor:
    """How many codewords of each group are in use: (M, G) codes below `size` -> (G,), from 1 to min(M, size).

    It is that of one micro-batch and is averaged for the log: many small parts show less than one large one.
    """
    seen = torch.zeros(codes.shape[1], size, device=codes.device)
    seen.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=seen.dtype))
    return perplexity(seen / len(codes))
