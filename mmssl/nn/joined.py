"""Tokens of several modalities as one sequence, and back; and a decoder for such sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.predictor import filled_in, places
from mmssl.nn.transformer import Transformer
from mmssl.types import Encoded, MaskPlan, Tokens, valid_mask


def join(parts: Sequence[Tensor], lengths: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of several sequences one after the other, without the padding between them.

    Args:
        parts: (B, N, D) each, of as many rows.
        lengths: (B,) each, on the CPU.

    Returns:
        (B, longest sum, D), zero past each length; and (B,) the sums.
    """
    total = torch.stack(list(lengths)).sum(0)
    size = int(total.max())
    if all(int(length.min()) == part.shape[1] for part, length in zip(parts, lengths, strict=True)):
        return torch.cat(list(parts), 1), total
    dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
    joined = parts[0].new_zeros(len(total) * size, parts[0].shape[2], dtype=dtype)
    for part, length, there in zip(parts, lengths, _rows(lengths, size), strict=True):
        here = places(valid_mask(length, part.shape[1]), part.device)
        joined = joined.index_copy(0, there.to(part.device), part.flatten(0, 1).index_select(0, here).to(dtype))
    return joined.view(len(total), size, -1), total


def split(joined: Tensor, lengths: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """What `join` put together: (B, N, D) each, zero past each length; `sizes` are their N."""
    if all(int(length.min()) == size for length, size in zip(lengths, sizes, strict=True)):
        return list(joined.split(list(sizes), 1))
    rows, dim = joined.flatten(0, 1), joined.shape[2]
    found = []
    for length, size, there in zip(lengths, sizes, _rows(lengths, joined.shape[1]), strict=True):
        here = places(valid_mask(length, size), joined.device)
        part = rows.new_zeros(len(length) * size, dim)
        found.append(part.index_copy(0, here, rows.index_select(0, there.to(rows.device))).view(len(length), size, dim))
    return found


def encode_jointly(transformer: Transformer, encoded: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """Modality -> what it becomes in one sequence with the others."""
    lengths = [each.lengths for each in encoded.values()]
    x, _ = transformer(*join([each.x for each in encoded.values()], lengths))
    parts = split(x, lengths, [each.x.shape[1] for each in encoded.values()])
    return {name: replace(each, x=part, layers={}) for (name, each), part in zip(encoded.items(), parts, strict=True)}


class JointPredictor(nn.Module):
    """MAE's decoder for several modalities: one narrow Transformer over the tokens and mask vectors of all of them.

    Source: Gong et al. 2022 (CAV-MAE, arXiv:2210.07839), the joint decoder: each token has its place in its own
    modality and a learned vector that says which that is; each modality has its own last map.

    Args:
        dim_in: width of the encoder.
        dim, depth, heads, mlp_dim, eps: of the decoder's own Transformer; mlp_dim is 4 * dim by default.
        out_dims: modality -> values to predict for each of its hidden tokens.
    """

    def __init__(
        self,
        *,
        dim_in: int,
        dim: int,
        depth: int,
        heads: int,
        out_dims: Mapping[str, int],
        mlp_dim: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.embed = Linear(dim_in, dim)
        self.mask_vector = nn.Parameter(torch.randn(dim) * 0.02)
        self.kinds = nn.ParameterDict({name: nn.Parameter(torch.randn(dim) * 0.02) for name in out_dims})
        self.transformer = Transformer(dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, eps=eps)
        outs = {name: Linear(dim, out_dim) for name, out_dim in out_dims.items()}
        self.outs = nn.ModuleDict(outs)
        for linear in (self.embed, *outs.values()):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, encoded: Mapping[str, Encoded], tokens: Mapping[str, Tokens], plans: Mapping[str, MaskPlan]
    ) -> dict[str, Tensor]:
        """Predict the hidden tokens of all modalities.

        Args:
            encoded: what the encoders gave for the tokens that the plans keep.
            tokens: all tokens of the clips; only their coordinates and lengths are read.
            plans: one copy of each clip, on the CPU.

        Returns:
            modality -> (M, P), one row for each hidden token in row-major order.
        """
        parts, lengths, hidden = [], [], {}
        for name, each in encoded.items():
            own, plan, prefix = tokens[name], plans[name], each.n_prefix
            coords = own.coords[:1] if own.coords.stride(0) == 0 else own.coords
            visible = valid_mask(own.lengths, plan.masked.shape[1]) & ~plan.masked
            filled = filled_in(self.embed(each.x), each.lengths, visible, self.mask_vector, coords, prefix)
            parts.append(filled + self.kinds[name].to(filled.dtype))
            lengths.append(own.lengths + prefix)
            hidden[name] = places(F.pad(plan.masked, (prefix, 0), value=False), filled.device)
        h, _ = self.transformer(*join(parts, lengths))
        back = split(h, lengths, [part.shape[1] for part in parts])
        return {
            name: self.outs[name](part.flatten(0, 1).index_select(0, hidden[name]))
            for name, part in zip(encoded, back, strict=True)
        }


def _rows(lengths: Sequence[Tensor], size: int) -> list[Tensor]:
    """For each part the flat places of its real tokens among rows of `size`, row by row."""
    found, before = [], torch.arange(len(lengths[0])) * size
    for length in lengths:
        real = valid_mask(length, int(length.max()))
        found.append((before[:, None] + torch.arange(real.shape[1]))[real])
        before = before + length
    return found
