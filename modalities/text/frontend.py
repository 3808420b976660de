"""Text: ids of tokens, each a vector of a table."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.modalities.text.tokenizer import Tokenizer
from mmssl.types import Frontend, Raw, Tokens, valid_mask


class TokenTable(Frontend):
    """One learned vector for each entry of a tokenizer's vocabulary.

    Source: Radford et al. 2021 (CLIP, arXiv:2103.00020), section 2.4; the deviation of new vectors is that of its
        released code.

    Args:
        dim: width of the tokens.
        tokenizer: JSON, see `mmssl.modalities.text.tokenizer`.
        context: most tokens of a caption, with the marks around it; longer ones are cut.
        pad: id of the tokenizer that fills shorter ones up to the context, as tokens like all others: SigLIP reads
            captions so (Zhai et al. 2023, arXiv:2303.15343, released code). None where captions keep their lengths.
    """

    axes: ClassVar[tuple[str, ...]] = ("t",)
    learned: ClassVar[bool] = True

    def __init__(self, *, dim: int, tokenizer: str, context: int = 77, pad: int | None = None) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(tokenizer, context, pad)
        self.dim = self.feature_dim = dim
        self.min_length = 1
        self.grad_mult = 1.0
        self.reader_settings: dict[str, Any] = {"tokenizer": self.tokenizer}
        self.table = nn.Embedding(len(self.tokenizer), dim)
        nn.init.normal_(self.table.weight, std=0.02)
        self.project = nn.Identity()

    def lengths(self, raw: Raw) -> Tensor:
        if int(raw.lengths.min()) < 1:
            raise ValueError(f"{raw.ids[int(raw.lengths.argmin())]}: the caption has no token")
        return raw.lengths

    def forward(self, raw: Raw) -> Tokens:
        lengths, size = self.lengths(raw), raw.data.shape[1]
        valid = valid_mask(lengths, size, raw.data.device)
        # what padding holds need not be in the table
        x = self.table(raw.data.masked_fill(~valid, 0)) * valid[..., None]
        coords = torch.arange(size, device=x.device).view(1, -1, 1).expand(len(x), -1, -1)
        return Tokens(x=x, lengths=lengths, coords=coords, axes=self.axes, grid=(size,), feat=x)
