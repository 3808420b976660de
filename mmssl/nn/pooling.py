"""From a clip's tokens to one vector, by name, without parameters. Every way of them reads real tokens only."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.nn.heads import first_pool, last_pool, mean_pool
from mmssl.types import Encoded, Tokens, valid_mask

NAMES = "mean, class, last, slices:4, grid:2x2, or one of them but class and last with +std"


@dataclass(frozen=True)
class Pool:
    """How tokens become one vector.

    parts: regions along each axis that `slices` or `grid` cuts a clip into; none for the whole clip.
    std: whether each mean is followed by the standard deviation (population) of the same tokens.
    """

    name: str
    kind: str
    parts: tuple[int, ...] = ()
    std: bool = False

    @classmethod
    def named(cls, name: str) -> Pool:
        """A pooling by its name.

        "mean" of all tokens; "class", the class token; "last", the last token, which of a caption is its end;
        "slices:4", the means of four equal slices of time; "grid:2x2", the means of 2 by 2 regions along the last
        axes: of pictures and frames down x across ("grid:4x2x2" of a video begins with time), of spectrograms time x
        frequency. "+std" behind a mean adds the deviations.

        Raises:
            ValueError: there is none of that name.
        """
        number = r"[1-9]\d*"
        found = re.fullmatch(rf"(mean|class|last|slices:{number}|grid:{number}(?:x{number}){{1,2}})(\+std)?", name)
        if found is None or (found[1] in ("class", "last") and found[2]):
            raise ValueError(f"pool={name!r}: choose {NAMES}")
        kind, _, parts = found[1].partition(":")
        return cls(name, kind, tuple(int(part) for part in parts.split("x") if part), found[2] is not None)

    def __call__(self, x: Tensor, encoded: Encoded, tokens: Tokens) -> Tensor:
        """One layer of an encoder to one vector a clip.

        Args:
            x: (B, prefix + N, D), `encoded.x` or one of `encoded.layers`.
            tokens: what was encoded, nothing of it dropped.

        Returns:
            (B, E) float32: D for each region in row-major order, its mean and then its deviation.

        Raises:
            ValueError: the encoder has no class token, or the tokens lie on other axes.
        """
        x = x.float()
        if self.kind == "class":
            if encoded.n_prefix < 1:
                raise ValueError(
                    "pool='class': this encoder has no class token (encoder.prefix=0), choose another pool"
                )
            return first_pool(x, encoded.lengths, encoded.n_prefix)
        if self.kind == "last":
            return last_pool(x, encoded.lengths, encoded.n_prefix)
        if self.kind == "mean" and not self.std:
            return mean_pool(x, encoded.lengths, encoded.n_prefix)
        x = x[:, encoded.n_prefix :]
        members = self._regions(tokens).to(x.device).float()  # (B, S, N)
        shares = members / members.sum(2, keepdim=True)
        means = shares @ x
        if not self.std:
            return means.flatten(1)
        # around each region's own mean, one after the other: a difference of squares would lose the small ones
        deviations = [
            torch.einsum("bn,bnd->bd", shares[:, s], (x - means[:, s, None]).square()).sqrt()
            for s in range(means.shape[1])
        ]
        return torch.stack([means, torch.stack(deviations, 1)], 2).flatten(1)

    def _regions(self, tokens: Tokens) -> Tensor:
        """(B, S, N) bool: which real tokens lie in which region."""
        valid = valid_mask(tokens.lengths, tokens.x.shape[1], tokens.coords.device)
        if self.kind == "mean":
            return valid[:, None]
        wanted = ("t",) if self.kind == "slices" else tokens.axes[-len(self.parts) :]
        if len(wanted) < len(self.parts) or wanted[0] not in tokens.axes:
            needed = "t" if self.kind == "slices" else f"{len(self.parts)} axes"
            raise ValueError(
                f"pool={self.name!r}: needs tokens along {needed}, and these lie along {', '.join(tokens.axes)}"
            )
        members = valid[:, None]
        for axis, parts in zip(wanted, self.parts, strict=True):
            place = tokens.coords[..., tokens.axes.index(axis)]
            # the clip's own extent, not the batch's
            extent = place.masked_fill(~valid, -1).amax(1)[:, None, None] + 1
            part = torch.arange(parts, device=place.device)[None, :, None]
            # as adaptive pooling cuts: neighbors share a token where it does not come out even, and none is empty
            first, end = part * extent // parts, -(-(part + 1) * extent // parts)
            inside = (place[:, None] >= first) & (place[:, None] < end)  # (B, parts, N)
            members = (members[:, :, None] & inside[:, None]).flatten(1, 2)
        return members
