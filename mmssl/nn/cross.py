"""Fills in what was dropped of one view of a clip, looking at another view of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.positions import shared, sincos
from mmssl.nn.predictor import filled_in, places
from mmssl.nn.transformer import MLP, Attention, Layout
from mmssl.types import Encoded, MaskPlan, Tokens, valid_mask


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of one view to those of another."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)

    def forward(self, h: Tensor, other: Tensor, layout: Layout, beside: Layout) -> Tensor:
        """Tokens and those of the other view, each as its layout has them -> as `h`; each sees its own clip's alone."""
        q, kv = self.q(h), self.kv(other)
        if not layout.ragged and not beside.ragged:
            return self.out(self._attend(q, kv))
        rows = zip(layout.rows(q), beside.rows(kv), strict=True)
        mixed = [self._attend(own[None], seen[None])[0] for own, seen in rows]
        return self.out(torch.cat(mixed) if layout.ragged else torch.stack(mixed))

    def _attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """(B, N, D), (B, M, 2D) -> (B, N, D)."""
        batch, size, dim = q.shape
        q = q.view(batch, size, self.heads, -1).transpose(1, 2)
        k, v = kv.view(batch, kv.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, size, dim)


class CrossBlock(nn.Module):
    """Attention to the other view, attention to the own one, and an MLP, each with a norm before it and a residual."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=eps) for _ in range(3))
        self.cross = CrossAttention(dim, heads)
        self.attention = Attention(dim, heads, dropout=0.0, layer_scale=None, gated=False)
        self.mlp = MLP(dim, mlp_dim, dropout=0.0, activation="gelu", layer_scale=None)

    def forward(self, h: Tensor, other: Tensor, layout: Layout, beside: Layout) -> Tensor:
        h = h + self.cross(self.norm1(h), other, layout, beside)
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
        """
        size = plan.masked.shape[1]
        visible = valid_mask(tokens.lengths, size) & ~plan.masked
        seen, known = self.embed(encoded.tokens), encoded.lengths - encoded.n_prefix
        h = filled_in(seen, known, visible, self.mask_vector, shared(tokens.coords), prefix=0)
        context = self.embed(other.tokens)
        context = context + sincos(shared(others.coords), context.shape[-1]).to(context.dtype)
        layout, beside = Layout(h, tokens.lengths), Layout(context, others.lengths)
        h, context = layout.pack(h), beside.pack(context)
        for block in self.blocks:
            h = block(h, context, layout, beside)
        hidden = places(plan.masked, h.device)
        return self.out(layout.unpack(self.norm(h)).flatten(0, 1).index_select(0, hidden))
