"""From what an encoder made of the visible tokens to what it would make of the hidden ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.transformer import MLP
from mmssl.types import Encoded, valid_mask


class RegressorBlock(nn.Module):
    """Queries look at latents and at each other, then go through an MLP; the latents stay as they are."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm = (nn.LayerNorm(dim, eps=eps) for _ in range(4))
        self.q = Linear(dim, dim)
        # a bias here adds the same to all scores of a query, which the softmax takes away again
        self.k = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim)
        self.out = Linear(dim, dim)
        self.mlp = MLP(dim, mlp_dim, dropout=0.0, activation="gelu", layer_scale=None)

    def forward(self, h: Tensor, at: Tensor, latents: Tensor, latents_at: Tensor, attended: Tensor | None) -> Tensor:
        """(B, Q, D) queries with their positions, (B, K, D) latents with theirs -> (B, Q, D).

        Args:
            attended: (B, 1, 1, K + Q) bool, True = real.
        """
        seen, seen_at = torch.cat([latents, h], 1), torch.cat([latents_at, at], 1)
        q = self.q(self.norm_q(h + at))
        k, v = self.k(self.norm_k(seen + seen_at)), self.v(self.norm_v(seen))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm(h))


class Regressor(nn.Module):
    """Mask vectors that become latents of hidden tokens, by attention to the latents of the visible ones.

    Source: Chen et al. 2022 (CAE, arXiv:2202.03026), section 3.1, "latent contextual regressor": the visible latents
    are never updated, and positions say where to look, not what is seen there: queries and keys have them, values
    have none. Norms, and none for the bias of the keys, are the released code's.
    Differs from the released code: no layer scale.

    Args:
        dim: width of the encoder.
        depth, heads, mlp_dim, eps: of its blocks; mlp_dim is 4 * dim by default.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, *, dim: int, depth: int, heads: int, mlp_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"objective.regressor_heads={heads}: must divide transformer.dim={dim}")
        self.mask_vector = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(RegressorBlock(dim, heads, mlp_dim or 4 * dim, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, encoded: Encoded, encoded_at: Tensor, at: Tensor, lengths: Tensor) -> Tensor:
        """Predict.

        Args:
            encoded: the visible tokens; class token and registers are not looked at.
            encoded_at: (B, K, D) positions of the visible tokens.
            at: (B, Q, D) positions of the tokens to predict.
            lengths: (B,) int64 on the CPU, how many of these each clip has.

        Returns:
            (B, Q, D); what stands past a clip's length is no prediction.
        """
        latents, known = encoded.tokens, encoded.lengths - encoded.n_prefix
        attended = None
        if int(known.min()) < latents.shape[1] or int(lengths.min()) < at.shape[1]:
            real = [valid_mask(known, latents.shape[1]), valid_mask(lengths, at.shape[1])]
            attended = torch.cat(real, 1)[:, None, None].to(at.device, non_blocking=True)
        h = self.mask_vector.expand(at.shape)
        for block in self.blocks:
            h = block(h, at, latents, encoded_at, attended)
        return self.norm(h)
