"""Codes -> the sum of their embeddings, one token a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.types import Frontend, Raw, Tokens, valid_mask


class Codes(Frontend):
    """The sum of an embedding for each codebook's code.

    Source: Baevski, Schneider and Auli 2020, vq-wav2vec (arXiv:1910.05453), section 4, whose language model reads codes
        in the place of words.
    Differs from the paper: there each combination of two codebooks' codes is a word of its own, 102,400 possible ones
        of two codebooks with 320 codes. Here every codebook has a table of its own: most combinations never come, those
        that do share what their codes have in common, none is unknown, and the eight codebooks of a codec have 2^80. A
        sum can say all that the embeddings end to end could, once these are mapped to the width of the tokens.

    Args:
        dim: width of the tokens.
        codes: how many codes each codebook has.
        rate: steps per second.
        dropout: on the tokens.
        grad_mult: factor on the gradient that reaches the tables.
    """

    axes: ClassVar[tuple[str, ...]] = ("t",)
    learned: ClassVar[bool] = True

    def __init__(
        self, *, dim: int, codes: Sequence[int], rate: float, dropout: float = 0.0, grad_mult: float = 1.0
    ) -> None:
        super().__init__()
        if not codes or min(codes) < 2 or rate <= 0:
            raise ValueError(
                f"frontend.codes={list(codes)}, frontend.rate={rate:g}: name at least one codebook, each of 2 codes or "
                "more, and a rate above 0"
            )
        self.dim, self.feature_dim = dim, dim
        self.codes, self.rate = tuple(codes), rate
        self.dropout, self.grad_mult = dropout, grad_mult
        self.min_length = 1
        self.reader_settings: dict[str, Any] = {"rate": rate, "codes": list(codes)}
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in codes)
        for table in self.tables:
            # so that a token is as wide as what is added to tell its position
            nn.init.normal_(table.weight, std=len(codes) ** -0.5)  # type: ignore[arg-type]
        self.project = nn.Identity()

    def lengths(self, raw: Raw) -> Tensor:
        empty = (raw.lengths < 1).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"{raw.ids[empty[0]]}: no code, where a token is one step of them")
        return raw.lengths

    def forward(self, raw: Raw) -> Tokens:
        """(B, G, T) codes to (B, T, D).

        Raises:
            ValueError: another number of codebooks, or another rate.
        """
        if raw.data.shape[1] != len(self.codes) or (raw.rate is not None and raw.rate != self.rate):
            at = "" if raw.rate is None else f" at {raw.rate:g} a second"
            raise ValueError(
                f"{raw.ids[0]}: codes of {raw.data.shape[1]} codebooks{at}, but this frontend reads {len(self.codes)} "
                f"at {self.rate:g}; set frontend.codes and frontend.rate to those of the codes"
            )
        lengths = self.lengths(raw)
        size = int(lengths.max())
        real = valid_mask(lengths, size, raw.data.device)[:, None]
        # where, not a product: what stands in the padding may be no code at all
        found = torch.where(real, raw.data[..., :size], 0).long().unbind(1)
        feat = torch.stack([table(codes) for table, codes in zip(self.tables, found, strict=True)]).sum(0)
        feat = feat * real.transpose(1, 2)
        if self.grad_mult == 0:
            feat = feat.detach()
        elif feat.requires_grad and self.grad_mult != 1:
            feat.register_hook(lambda grad: grad * self.grad_mult)
        return Tokens(
            x=F.dropout(feat, self.dropout, self.training),
            lengths=lengths,
            coords=torch.arange(size, device=feat.device)[None, :, None].expand(len(feat), -1, -1),
            axes=self.axes,
            grid=(size,),
            feat=feat,
            step_ms=1000 / self.rate,
            span_ms=1000 / self.rate,
        )
