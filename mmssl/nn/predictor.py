"""Fills in what was dropped: from the encoded visible tokens to a value for each hidden one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.masking import plan_of, take
from mmssl.nn.positions import sincos
from mmssl.nn.transformer import Transformer
from mmssl.nn.windows import Windows, window_cells
from mmssl.types import Encoded, MaskPlan, Tokens, valid_mask


class Predictor(nn.Module):
    """MAE's decoder: visible tokens and mask vectors, each with its position, through a narrow Transformer.

    Source: He et al. 2022 (arXiv:2111.06377), section 3, "MAE decoder"; windows are Huang et al. 2022 (Audio-MAE,
    arXiv:2207.06405), section 3, "decoder with local attention".
    Differs from Audio-MAE: windows are shifted along every axis, as its text has it, where its released code shifts
        them in time only; blocks are the same as elsewhere, where that code has those of Swin V2 (cosine attention, a
        norm after each branch, a bias for each distance).

    Args:
        dim_in: width of the encoder.
        dim, depth, heads: of the decoder's own Transformer.
        mlp_dim: hidden width of its MLPs; 4 * dim by default.
        out_dim: values to predict for each hidden token.
        eps: of its norms.
        window: tokens along each axis within which its blocks attend, shifted by half of that in every second block; a
            class token and registers then have no part in it. None for all of a clip.
        global_blocks: of the blocks with windows, so many last ones attend to all of a clip.

    Raises:
        ValueError: a window of less than a token.
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
        window: Sequence[int] | None = None,
        global_blocks: int = 0,
    ) -> None:
        super().__init__()
        if window is not None and (min(window) < 1 or not 0 <= global_blocks <= depth):
            raise ValueError(
                f"objective.decoder_window={list(window)}, objective.decoder_global_blocks={global_blocks}: a window "
                f"is at least 1 token along each axis, and of {depth} blocks 0 to {depth} can be global"
            )
        self.window, self.local_blocks = window, depth - global_blocks
        self.embed = Linear(dim_in, dim)
        self.mask_vector = nn.Parameter(torch.randn(dim) * 0.02)
        self.transformer = Transformer(dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, eps=eps)
        self.out = Linear(dim, out_dim)
        for linear in (self.embed, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        encoded: Encoded,
        tokens: Tokens,
        plan: MaskPlan,
        *,
        predicted: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Predict the hidden tokens.

        Args:
            encoded: what the encoder gave for the tokens that `plan` keeps, with `hide="drop"`.
            tokens: all tokens of the B clips; only their coordinates and lengths are read.
            plan: on the CPU, so that no place has to be fetched from a device.
            predicted: (R, N) bool on the CPU, those of the hidden tokens that are to be predicted; all by default. The
                Transformer never sees the others.
            noise: (M, dim_in), put on the positions of the mask vectors by the map that brings encoded tokens here: Bar
                et al. 2023 (arXiv:2308.00566), section 3, where that map is shared so that it cannot shrink the noise
                away.

        Returns:
            (M, out_dim), one row for each True of `predicted`, in its row-major order.
        """
        prefix, x, known = encoded.n_prefix, encoded.x, encoded.lengths
        if self.window is not None:  # what has no place lies in no window
            prefix, x, known = 0, encoded.tokens, encoded.lengths - encoded.n_prefix
        device = x.device
        lengths = tokens.lengths[plan.rows]
        place = torch.arange(plan.masked.shape[1])[None]  # of each token on the grid
        visible = valid_mask(lengths, plan.masked.shape[1]) & ~plan.masked
        coords = tokens.coords[:1] if tokens.coords.stride(0) == 0 else tokens.coords[plan.rows]
        if predicted is None:
            predicted = plan.masked
        else:
            shown = plan_of(~(visible | predicted), lengths)
            lengths, real = shown.keep_lengths, shown.keep_valid
            visible, predicted = (mask.gather(1, shown.keep) & real for mask in (visible, predicted))
            coords = take(coords.expand(len(visible), -1, -1), shown.keep.to(device, non_blocking=True))
            place = shown.keep
        filled = filled_in(self.embed(x), known, visible, self.mask_vector, coords, prefix)
        hidden = places(F.pad(predicted, (prefix, 0), value=False), device)
        if noise is not None:
            moved = F.linear(noise.to(self.embed.weight.dtype), self.embed.weight)
            filled = filled.flatten(0, 1).index_add(0, hidden, moved.to(filled.dtype)).view_as(filled)
        windows = self._windows(tokens.grid, place.expand(len(visible), -1), lengths, device)
        h, _ = self.transformer(filled, lengths + prefix, windows=windows, wanted=hidden)
        return self.out(h)

    def _windows(
        self, grid: Sequence[int], place: Tensor, lengths: Tensor, device: torch.device
    ) -> list[Windows | None]:
        """Those of each block, of tokens at (R, N) places of the grid; empty where all blocks are global."""
        if self.window is None:
            return []
        plain, shifted = (
            Windows(window_cells(grid, self.window, shifted=late)[place], lengths, device) for late in (False, True)
        )
        local = [shifted if i % 2 else plain for i in range(self.local_blocks)]
        return [*local, *[None] * (self.transformer.depth - self.local_blocks)]


def filled_in(seen: Tensor, known: Tensor, visible: Tensor, vector: Tensor, coords: Tensor, prefix: int) -> Tensor:
    """Visible tokens and mask vectors, each in its place and with its position: (R, prefix + N, D).

    Args:
        seen: (R, prefix + K, D) visible tokens of each row in ascending order, after `prefix` that have no place.
        known: (R,) on the CPU, real rows of `seen`.
        visible: (R, N) bool on the CPU, where those go; the mask vector goes everywhere else, past a row's end too.
        vector: (D,).
        coords: (1 or R, N, A).
    """
    (rows, size), device = visible.shape, seen.device
    taken = places(F.pad(visible, (prefix, 0), value=True), device)
    real = seen.flatten(0, 1)
    if int(known.min()) < seen.shape[1]:
        real = real.index_select(0, places(valid_mask(known, seen.shape[1]), device))
    # Both the encoder's rows and these are read in ascending order, so the n-th real row is the n-th True here.
    filled = vector.to(seen.dtype).expand(rows * (prefix + size), -1).index_copy(0, taken, real)
    # A class token has no place: its position is zero.
    added = F.pad(sincos(coords, seen.shape[-1]), (0, 0, prefix, 0)).to(seen.dtype)
    return filled.view(rows, prefix + size, -1) + added


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Flat indices of the True places of a mask on the CPU, on `device`."""
    return mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)
