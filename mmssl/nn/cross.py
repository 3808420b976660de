"""Fills in what was dropped of one view of a clip, looking at another view of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.positions import sincos
from mmssl.nn.predictor import places
from mmssl.nn.transformer import MLP, Attention, Layout
from mmssl.types import Encoded, MaskPlan, Tokens


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of one view to those of another."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        """(B, N, D) tokens and (B, M, D) of the other view -> (B, N, D)."""
        batch, size, dim = h.shape
        q = self.q(h).view(batch, size, self.heads, -1).transpose(1, 2)
        k, v = self.kv(other).view(batch, other.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, size, dim))


class CrossBlock(nn.Module):
    """Attention to the other view, attention to the own one, and an MLP, each with a norm before it and a residual."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=eps) for _ in range(3))
        self.cross = CrossAttention(dim, heads)
        self.attention = Attention(dim, heads, dropout=0.0, layer_scale=None, gated=False)
        self.mlp = MLP(dim, mlp_dim, dropout=0.0, activation="gelu", layer_scale=None)

    def forward(self, h: Tensor, other: Tensor, layout: Layout) -> Tensor:
        h = h + self.cross(self.norm1(h), other)
        h = h + self.attention(self.norm2(h), layout)
        return h + self.mlp(self.norm3(h))


class CrossPredictor(nn.Module):
    """A decoder of the visible tokens of one view, and of mask vectors, that attends to all tokens of another view.

    Source: Gupta et al. 2023 (SiamMAE, arXiv:2305.14344), section 3, "cross-self decoder".

    Args:
        dim_in: width of the encoder.
        dim, depth, heads, mlp_dim, eps: of its blocks; mlp_dim is 4 * dim by default.
        out_dim: values to predict for each hidden token.
    """

    def __init__(
        self,
        *,
        dim_in: int,
        dim: int,
        depth: int,
        heads: int,
        out_dim: int,
        mlp_dim: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"objective.decoder_heads={heads}: must divide objective.decoder_dim={dim}")
        self.embed = Linear(dim_in, dim)
        self.mask_vector = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, mlp_dim or 4 * dim, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.out = Linear(dim, out_dim)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, encoded: Encoded, tokens: Tokens, plan: MaskPlan, other: Encoded, others: Tokens) -> Tensor:
        """Predict the hidden tokens of one view.

        Args:
            encoded: what the encoder gave for the tokens that `plan` keeps, with `hide="drop"`.
            tokens: all tokens of that view; only their coordinates are read.
            plan: one copy of each clip, on the CPU.
            other: what the encoder gave for all tokens of the other view.
            others: those tokens.

        Returns:
            (M, out_dim), one row for each hidden token, in row-major order.

        Raises:
            ValueError: clips of which one view has more tokens than that of another.
        """
        for view in (encoded, other):
            if int(view.lengths.min()) < view.x.shape[1]:
                raise ValueError("views: those of all clips of a batch must have as many tokens; draw them of one size")
        seen, context = self.embed(encoded.tokens), _placed(self.embed(other.tokens), others)
        rows, size = plan.masked.shape
        taken = places(~plan.masked, seen.device)
        filled = self.mask_vector.to(seen.dtype).expand(rows * size, -1).index_copy(0, taken, seen.flatten(0, 1))
        h = _placed(filled.view(rows, size, -1), tokens)
        layout = Layout(h, None)
        for block in self.blocks:
            h = block(h, context, layout)
        hidden = places(plan.masked, h.device)
        return self.out(self.norm(h).flatten(0, 1).index_select(0, hidden))


def _placed(h: Tensor, tokens: Tokens) -> Tensor:
    """With the positions of its tokens added."""
    coords = tokens.coords[:1] if tokens.coords.stride(0) == 0 else tokens.coords
    return h + sincos(coords, h.shape[-1]).to(h.dtype)
