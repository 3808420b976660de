"""The shared Transformer: it sees vectors and how many of them are real, and nothing of where they came from.

Source: Vaswani et al. 2017 (arXiv:1706.03762); pre-norm as in Dosovitskiy et al. 2021, post-norm as in the base model
of wav2vec 2.0.

A ragged batch is packed: rows are laid end to end without their padding, so that every product works on real tokens
only and a clip's result is the same alone as beside a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.bias import Gate, build_bias
from mmssl.nn.linear import Linear
from mmssl.nn.seeds import seed_of, uniform
from mmssl.nn.windows import Windows
from mmssl.types import Point, valid_mask

# On the CPU, rows at least this long are attended to one by one: the square of their padding would cost more than the
# calls do. Shorter ones go as one padded call with a mask.
_ROW_BY_ROW = 128
# In bfloat16 on the CPU torch's own attention, with its backward pass, is slower than its two products written out.
# Calls of more scores than these, 128 MiB a block, keep torch's, which never holds all of them.
_PLAIN_SCORES = 2**26


class Layout:
    """How the rows of a batch lie in memory, and which of their tokens see which.

    Rows are (B, N, D) where all are full, else (M, D) end to end. `seen`, (N, N) or (B, 1, N or 1, N), is True where
    the token of a row sees that of a column; None where each sees all.
    """

    def __init__(
        self,
        x: Tensor,
        lengths: Tensor | None,
        *,
        causal: bool = False,
        window: int | None = None,
        attended: Tensor | None = None,
    ) -> None:
        self.batch, self.size = x.shape[:2]
        self.ragged = lengths is not None and int(lengths.min()) < self.size
        self.seen = _reach(self.size, x.device, causal=causal, window=window)
        if attended is not None:
            among = attended[:, None, None, :]
            self.seen = among if self.seen is None else _or_itself(among & self.seen)
        if not self.ragged or lengths is None:
            return
        self.sizes = lengths.tolist()
        self.longest = max(self.sizes)
        self.index = valid_mask(lengths, self.size).flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        self.row_by_row = x.device.type == "cpu" and self.longest >= _ROW_BY_ROW
        if self.seen is not None:
            self.seen = self.seen[..., : self.longest, : self.longest]
        if not self.row_by_row:
            self.valid = valid_mask(lengths, self.longest, x.device)
            real = self.valid[:, None, None, :]
            self.seen = real if self.seen is None else _or_itself(real & self.seen)

    def seen_in(self, row: int) -> Tensor | None:
        """`seen` among the real tokens of one row."""
        if self.seen is None:
            return None
        own = self.seen if self.seen.ndim == 2 else self.seen[row : row + 1]
        return own[..., : self.sizes[row], : self.sizes[row]]

    def bias_in(self, row: int, bias: Tensor | None) -> Tensor | None:
        """(1 or B, heads, N, N) among the real tokens of one row."""
        if bias is None:
            return None
        own = bias if len(bias) == 1 else bias[row : row + 1]
        return own[..., : self.sizes[row], : self.sizes[row]]

    def rows(self, h: Tensor) -> tuple[Tensor, ...]:
        """The real tokens of each clip, (n, D)."""
        return h.split(self.sizes) if self.ragged else h.unbind()

    def pad(self, h: Tensor) -> Tensor:
        """(M, D) -> (B, longest, D), zero past each length."""
        padded = h.new_zeros(self.batch, self.longest, h.shape[-1])
        padded[self.valid] = h
        return padded

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (M, D) real tokens."""
        return x.flatten(0, 1).index_select(0, self.index) if self.ragged else x

    def unpack(self, h: Tensor) -> Tensor:
        """(M, D) -> (B, N, D), zero past each length."""
        if not self.ragged:
            return h
        rows = h.new_zeros(self.batch * self.size, h.shape[-1])
        return rows.index_copy(0, self.index, h).view(self.batch, self.size, -1)

    def packed(self, places: Tensor) -> Tensor:
        """Flat places of real tokens in (B, N), ascending -> their rows in what `pack` gives, flat as well."""
        return torch.searchsorted(self.index, places) if self.ragged else places

    def per_clip(self, value: Tensor, wanted: Tensor | None = None) -> Tensor:
        """(B,) values in the shape that multiplies packed tokens, or the rows `wanted` of them."""
        if not self.ragged and wanted is None:
            return value[:, None, None]
        place = self.index if wanted is None else self.index[wanted] if self.ragged else wanted
        return value[torch.div(place, self.size, rounding_mode="floor")][:, None]


class Attention(nn.Module):
    """Multi-head self-attention within each clip, or within windows of it."""

    def __init__(self, dim: int, heads: int, *, dropout: float, layer_scale: float | None, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.scale = _layer_scale(dim, layer_scale)
        self.gate = Gate(dim, heads) if gated else None

    def forward(
        self,
        h: Tensor,
        layout: Layout,
        windows: Windows | None = None,
        bias: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """What each token takes from those that it sees, in the shape of `h`; `bias` as in `mmssl.nn.bias`.

        Of the rows `wanted` alone where they are given: (W, D).
        """
        qkv = self.qkv(h)
        gate = None if self.gate is None else self.gate(h)
        if windows is not None:
            mixed = windows.join(self._attend(windows.split(qkv), windows.mask), h)
        elif not layout.ragged:
            mixed = self._attend(qkv, _biased(layout.seen, bias, gate))
        elif layout.row_by_row:
            gates = [None] * layout.batch if gate is None else gate.split(layout.sizes)
            rows = [
                self._attend(row[None], _biased(layout.seen_in(i), layout.bias_in(i, bias), own))[0]
                for i, (row, own) in enumerate(zip(qkv.split(layout.sizes), gates, strict=True))
            ]
            mixed = torch.cat(rows)
        else:
            gate = None if gate is None else layout.pad(gate)
            bias = None if bias is None else bias[..., : layout.longest, : layout.longest]
            mixed = self._attend(layout.pad(qkv), _biased(layout.seen, bias, gate))[layout.valid]
        return _scaled(self.out(_rows(mixed, wanted)), self.scale)

    def _attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, 3D) -> (B, N, D)."""
        batch, size, width = qkv.shape
        q, k, v = parts = qkv.view(batch, size, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        halved = _is_halved(q)
        if halved:
            q, k, v = parts.contiguous()  # here once, or each product would for itself
        attend = _attend_plainly if halved else F.scaled_dot_product_attention
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        mixed = attend(q, k, v, attn_mask=mask, dropout_p=rate)
        return mixed.transpose(1, 2).reshape(batch, size, width // 3)


def _reach(size: int, device: torch.device, *, causal: bool, window: int | None) -> Tensor | None:
    """(N, N) bool, True where the token of a row sees that of a column; None where each sees all."""
    if not causal and window is None:
        return None
    place = torch.arange(size, device=device)
    ahead = place - place[:, None]
    seen = ahead <= (0 if causal or window is None else window)
    return seen if window is None else seen & (ahead >= -window)


def _or_itself(seen: Tensor) -> Tensor:
    """(..., N or 1, N), in which a token that would see none, and have NaN for attention weights, sees itself."""
    alone = ~seen.any(-1, keepdim=True)
    return seen | (alone & torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device))


def _biased(seen: Tensor | None, bias: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """What attention adds to its scores: the bias where a token is seen, and minus infinity where it is not.

    Args:
        seen: as in `Layout`; it is what comes back where there is no bias.
        bias: (1 or B, heads, N, N).
        gate: (B, N, heads), or (N, heads) of one row.
    """
    if bias is None:
        return seen
    if gate is not None:
        bias = bias * gate.transpose(-1, -2)[..., None]
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


def _is_halved(q: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.shape[:-1].numel() * q.shape[-2] <= _PLAIN_SCORES
        and (
            q.dtype is torch.bfloat16
            or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16)
        )
    )


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
    """What scaled dot product attention computes, written out."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None:
        is_bias = attn_mask.is_floating_point()
        scores = scores + attn_mask if is_bias else scores.masked_fill(~attn_mask, -torch.inf)
    # a softmax sums in float32 whatever it reads; autocast would have it write float32 as well
    with torch.autocast(q.device.type, enabled=False):
        weights = scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ v


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(
        self, dim: int, hidden: int, *, dropout: float, activation: Activation, layer_scale: float | None
    ) -> None:
        super().__init__()
        # a gated one takes twice as many values as it gives
        self.up = Linear(dim, 2 * hidden if activation == "swiglu" else hidden)
        self.down = Linear(hidden, dim)
        self.activate = ACTIVATIONS[activation]
        self.scale = _layer_scale(dim, layer_scale)
        self.dropout = dropout

    def forward(self, h: Tensor) -> Tensor:
        return _scaled(self.down(F.dropout(self.activate(self.up(h)), self.dropout, self.training)), self.scale)


def _rows(h: Tensor, wanted: Tensor | None) -> Tensor:
    """(..., D) -> (W, D), some rows of all."""
    return h if wanted is None else h.flatten(0, -2).index_select(0, wanted)


def _layer_scale(dim: int, start: float | None) -> nn.Parameter | None:
    return None if start is None else nn.Parameter(torch.full((dim,), float(start)))


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype)


def _swiglu(h: Tensor) -> Tensor:
    gate, value = h.chunk(2, -1)
    return F.silu(gate) * value


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "swiglu": _swiglu,
}


class Block(nn.Module):
    """Attention and MLP, each with a residual; the norm before the branch (pre) or after the sum (post)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        *,
        norm: Literal["pre", "post"],
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        eps: float,
        activation: Activation,
        layer_scale: float | None,
        gated: bool,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.dropout = dropout
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, heads, dropout=attention_dropout, layer_scale=layer_scale, gated=gated)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_dim, dropout=activation_dropout, activation=activation, layer_scale=layer_scale)

    def forward(
        self,
        h: Tensor,
        layout: Layout,
        windows: Windows | None = None,
        bias: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block's output; and that of its MLP, before dropout and the residual. Of the rows `wanted`: (W, D)."""
        if self.pre:
            mixed = self.attention(self.norm1(h), layout, windows, bias, wanted)
            h = _rows(h, wanted) + self._branch(mixed, layout, wanted)
            added = self.mlp(self.norm2(h))
            return h + self._branch(added, layout, wanted), added
        mixed = self.attention(h, layout, windows, bias, wanted)
        h = self.norm1(_rows(h, wanted) + self._branch(mixed, layout, wanted))
        added = self.mlp(h)
        return self.norm2(h + self._branch(added, layout, wanted)), added

    def _branch(self, branch: Tensor, layout: Layout, wanted: Tensor | None = None) -> Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        if not self.training or self.drop_path == 0:
            return branch
        # Stochastic depth, Huang et al. 2016 (arXiv:1603.09382): a clip's branch is left out whole.
        keep = 1 - self.drop_path
        alive = torch.rand(layout.batch, device=branch.device) < keep
        return branch * layout.per_clip(alive.to(branch.dtype) / keep, wanted)


class Transformer(nn.Module):
    """A stack of blocks over ragged rows.

    Args:
        dim: width.
        depth: blocks.
        heads: attention heads; must divide dim.
        mlp_dim: hidden width of each MLP; 4 * dim by default.
        norm: "pre" puts a norm before each branch and one at the end; "post" puts one after each sum and one at the
            start, as wav2vec 2.0 base has it.
        causal: whether a token sees those before it and itself only. A class token at the front then sees nothing.
        window: how many tokens to each side a token sees, besides itself; all by default. Counted in the row as it
            comes: for objectives that drop no tokens.
        dropout: after the input and after each branch.
        attention_dropout, activation_dropout: on attention weights, and after the GELU.
        drop_path: chance to leave out a clip's branch, growing linearly from 0 at the first block.
        layer_drop: chance to leave out a whole block (Fan et al. 2020, arXiv:1909.11556). Drawn from a counter, so
            that every rank leaves out the same ones.
        eps: of the norms.
        init: "xavier" (He et al. 2022) or "normal" with deviation .02 (wav2vec 2.0).
        activation: of each MLP: "gelu", its approximations "gelu_tanh" (SigLIP) and "quick_gelu" (CLIP), or "swiglu",
            gated by a part of its own (Shazeer 2020, arXiv:2002.05202, section 2), as DINOv2's largest has it.
        layer_scale: each branch is multiplied by a learned vector that starts at this value (Touvron et al. 2021,
            arXiv:2103.17239, section 2); None for none.
        input_norm: with "pre" a norm before the first block as well, as CLIP has it.
        final_norm: with "pre" the norm at the end.
        bias: what attention adds to its scores for where tokens lie relative to each other, one of `mmssl.nn.bias` by
            its `name` with its settings: {name: grid, grid: [14, 14]} as BEiT has it; None for nothing.
        gated_bias: whether each token weighs the bias of each head by its content, as in WavLM.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        causal: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_drop: float = 0.0,
        eps: float = 1e-6,
        init: Literal["xavier", "normal"] = "xavier",
        activation: Activation = "gelu",
        layer_scale: float | None = None,
        input_norm: bool = False,
        final_norm: bool = True,
        bias: Mapping[str, Any] | None = None,
        gated_bias: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"transformer.heads={heads}: must divide dim={dim}")
        if window is not None and window < 0:
            raise ValueError(
                f"transformer.window={window}: tokens to each side are at least 0; leave it out to see all"
            )
        if norm == "post" and (input_norm or not final_norm):
            raise ValueError(
                "transformer.norm=post: has its norm at the start and none at the end, so leave input_norm and "
                "final_norm out"
            )
        if gated_bias and bias is None:
            raise ValueError("transformer.gated_bias=true: there is no bias to weigh; choose a transformer.bias")
        self.dim, self.depth = dim, depth
        self.heads, self.mlp_dim, self.activation, self.eps = heads, mlp_dim or 4 * dim, activation, eps
        self.causal, self.window = causal, window
        self.pre = norm == "pre"
        self.dropout = dropout
        self.layer_drop = layer_drop
        # at the end of "pre", at the start of "post"
        self.norm = nn.LayerNorm(dim, eps=eps) if final_norm else nn.Identity()
        self.input_norm = nn.LayerNorm(dim, eps=eps) if input_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                self.mlp_dim,
                norm=norm,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
                eps=eps,
                activation=activation,
                layer_scale=layer_scale,
                gated=gated_bias,
            )
            for i in range(depth)
        )
        # the encoder calls it, because it needs coordinates, and hands on what it gives
        self.bias = None if bias is None else build_bias(bias, heads=heads, depth=depth)
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                if init == "xavier":
                    nn.init.xavier_uniform_(part.weight)
                else:
                    nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
        point: Point = "block",
        attended: Tensor | None = None,
        windows: Sequence[Windows | None] = (),
        bias: Sequence[Tensor] = (),
        until: int | None = None,
        frozen: int = 0,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode rows of which the first `lengths[b]` places are real.

        Args:
            x: (B, N, D).
            lengths: (B,) int64 on the CPU; None where all rows are full.
            layers: which to return as well: 0 is the input to the first block, i the output of block i, both
                without the final norm.
            point: "mlp" returns what the MLP of block i gives, before dropout and the residual, in the place of its
                output.
            attended: (B, N) bool, True = others see it; all by default. Each token has its own content in any case.
            windows: for each block those within which it attends, or None for the whole clip; left out, no block has
                any.
            bias: for each block what it adds to its scores, (1 or B, heads, N, N), as `self.bias` gives it; left out,
                nothing. Not beside windows.
            until: the last block to go through, without the norm at the end; all blocks and that norm by default.
            frozen: layers that get no gradient, from the input on: the input where it is 1, block i where it is above
                i, and the norm at the end where it is above all blocks.
            wanted: (W,) int64, ascending flat places in (B, N) of the real tokens whose output is wanted, for which
                alone the last block then has an MLP; all by default. Not beside that block in `layers`.

        Returns:
            (B, N, D) after the final norm (of "pre"), zero past each length, or (W, D) of those wanted; and the layers
            asked for. A block that `layer_drop` leaves out has no MLP output: it is left out of them as well.
        """
        wrong = [i for i in layers if not 0 <= i <= self.depth]
        if wrong:
            raise ValueError(f"layer={wrong[0]}: this Transformer has layers 0 (its input) to {self.depth}")
        learning = torch.is_grad_enabled()
        layout = Layout(x, lengths, causal=self.causal, window=self.window, attended=attended)
        with torch.set_grad_enabled(learning and not frozen):
            h = layout.pack(x)
            h = self.input_norm(h) if self.pre else self.norm(h)
            h = F.dropout(h, self.dropout, self.training)
        left_out = self._left_out()
        rows = None if wanted is None else layout.packed(wanted)
        kept = {0: layout.unpack(h)} if 0 in layers else {}
        none: list[None] = [None] * self.depth
        for i, (block, own, places) in enumerate(zip(self.blocks, windows or none, bias or none, strict=True), start=1):
            if until is not None and i > until:
                break
            added = None
            if i not in left_out:
                only = rows if i == self.depth else None
                with torch.set_grad_enabled(learning and i >= frozen):
                    h, added = block(h, layout, own, places, only)
            value = h if point == "block" else added
            if i in layers and value is not None:
                kept[i] = layout.unpack(value)
        if self.pre and until is None:
            with torch.set_grad_enabled(learning and self.depth >= frozen):
                h = self.norm(h)
        if rows is None:
            return layout.unpack(h), kept
        # the last block has taken them, if it was gone through
        return h if until is None and self.depth and self.depth not in left_out else _rows(h, rows), kept

    def _left_out(self) -> set[int]:
        if not self.training or self.layer_drop == 0:
            return set()
        seed = torch.tensor([seed_of("layer_drop", int(self.draws))])
        self.draws += 1
        return {i for i, chance in enumerate(uniform(seed, self.depth)[0].tolist(), 1) if chance < self.layer_drop}
