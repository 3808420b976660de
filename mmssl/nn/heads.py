"""From tokens to one vector a clip, and from that to classes. All of them read real tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.transformer import MLP, Transformer
from mmssl.types import valid_mask


def mean_pool(x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
    """The mean of a clip's real tokens, without class token and registers.

    Args:
        x: (B, prefix + N, D).
        lengths: (B,) int64 on the CPU, real positions including the prefix, as `Encoded` has them.

    Returns:
        (B, D) in the type of x; summed in float32.
    """
    x, lengths = x[:, n_prefix:], lengths - n_prefix
    if int(lengths.min()) < x.shape[1]:
        x = x.masked_fill(~valid_mask(lengths, x.shape[1], x.device)[..., None], 0.0)
    total = x.sum(1, dtype=torch.float32)
    return (total / lengths.to(x.device, non_blocking=True)[:, None]).to(x.dtype)


def first_pool(x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
    """The class token: (B, prefix + N, D) -> (B, D).

    Raises:
        ValueError: there is none.
    """
    if n_prefix < 1:
        raise ValueError(
            "pooling='class': this encoder has no class token (encoder.prefix=0), use 'mean' or 'attention'"
        )
    return x[:, 0]


def prefix_pool(x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
    """The mean of the class token and all registers, as DeiT and AST read their two: (B, prefix + N, D) -> (B, D).

    Raises:
        ValueError: there are none.
    """
    if n_prefix < 1:
        raise ValueError("pooling='prefix': this encoder has no prefix (encoder.prefix=0), use 'mean' or 'attention'")
    return x[:, :n_prefix].mean(1)


def last_pool(x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
    """The last real token, which in a causal Transformer has seen all others: (B, prefix + N, D) -> (B, D)."""
    rows = torch.arange(len(x), device=x.device)
    return x[rows, (lengths - 1).to(x.device, non_blocking=True)]


POOLS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "mean": mean_pool,
    "class": first_pool,
    "last": last_pool,
    "prefix": prefix_pool,
}


class AttentionPool(nn.Module):
    """One learned query looks at all real tokens of a clip.

    Source: Lee et al. 2019 (arXiv:1810.00825), section 3.2, "pooling by multihead attention" with one seed vector;
    for frozen masked image models, Chen et al. 2022 (CAE, arXiv:2202.03026), "attentive probing".

    Args:
        norm: whether tokens go through a norm of its own; those behind an encoder's last norm need none.
    """

    def __init__(self, dim: int, heads: int, *, norm: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads}: must divide dim={dim}")
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=eps) if norm else nn.Identity()
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        for linear in (self.kv, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
        """(B, prefix + N, D) -> (B, D), as `mean_pool`."""
        x, lengths = x[:, n_prefix:], lengths - n_prefix
        batch, size, dim = x.shape
        mask = None
        if int(lengths.min()) < size:
            mask = valid_mask(lengths, size, x.device)
            # A weight of zero does not silence NaN or infinity in the padding.
            x = x.masked_fill(~mask[..., None], 0.0)
            mask = mask[:, None, None, :]
        k, v = self.kv(self.norm(x)).view(batch, size, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, dim))


class AttentionHead(nn.Module):
    """Attention pooling of an encoder's output, and an MLP with a residual: the head MAP of SigLIP.

    Source: Zhai et al. 2022 (Scaling Vision Transformers, arXiv:2106.04560), section 3.2, "multihead attention
        pooling", and the released code of SigLIP (arXiv:2303.15343).
    Differs from the released code: the query is learned as it is, and not mapped once more.

    Args:
        transformer: of the encoder; the head is as wide, with as many heads and such an MLP.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        dim = transformer.dim
        self.attention = AttentionPool(dim, transformer.heads, norm=False)
        self.norm = nn.LayerNorm(dim, eps=transformer.eps)
        self.mlp = MLP(dim, transformer.mlp_dim, dropout=0.0, activation=transformer.activation, layer_scale=None)
        for linear in (self.mlp.up, self.mlp.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, lengths: Tensor, n_prefix: int = 0) -> Tensor:
        """(B, prefix + N, D) -> (B, D), as `mean_pool`."""
        pooled = self.attention(x, lengths, n_prefix)
        return pooled + self.mlp(self.norm(pooled))


class ClassifierHead(nn.Module):
    """A norm and a linear map to classes.

    Source: He et al. 2022 (arXiv:2111.06377), appendix A: fine-tuning puts a LayerNorm on the pooled tokens.
    Differs from the paper: linear probing has a BatchNorm there. Its statistics are those of a micro-batch on one
    process, so neither micro-batches nor processes would add up to one batch; `mmssl.evaluation.probe` standardizes
    each feature over all clips instead.

    Args:
        std: of the initial weights: He et al. take .01 for probes and 2e-5 for fine-tuning.
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        norm: Literal["layer", "none"] = "layer",
        dropout: float = 0.0,
        std: float = 0.01,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm not in ("layer", "none"):
            raise ValueError(f"objective.head_norm={norm!r}: choose layer or none")
        self.norm = nn.LayerNorm(dim, eps=eps) if norm == "layer" else nn.Identity()
        self.dropout = dropout
        self.linear = nn.Linear(dim, n_classes)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, classes) logits."""
        return self.linear(F.dropout(self.norm(x), self.dropout, self.training))
