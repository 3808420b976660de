"""Fills in what was dropped by convolutions over the grid: data2vec 2.0's decoder, of as many axes as the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.nn.predictor import places
from mmssl.types import Encoded, MaskPlan, Tokens, valid_mask

_CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvDecoder(nn.Module):
    """Visible tokens at their places in the grid, noise at the hidden ones, through grouped convolutions.

    Source: Baevski et al. 2023, data2vec 2.0 (arXiv:2212.07525), section 3.2, and its released code: each convolution
    is followed by a layer norm that has no weights, GELU, and a residual where the widths are the same.
    Differs from the released code: padding is silenced before every convolution, so a clip's predictions are the same
    alone and beside a longer one; the convolutions have as many axes as the tokens, so video has three.

    Args:
        dim_in: width of the encoder.
        dim: of the convolutions.
        depth: convolutions.
        kernel: tokens along each axis; odd.
        groups: must divide dim_in and dim.
        axes: 1 to 3.
        out_dim: values to predict for each hidden token.

    Raises:
        ValueError: settings that no convolution can have.
    """

    def __init__(self, *, dim_in: int, dim: int, depth: int, kernel: int, groups: int, axes: int, out_dim: int) -> None:
        super().__init__()
        if depth < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(
                f"objective.decoder_depth={depth}, decoder_kernel={kernel}: a decoder has at least one convolution, "
                "and its kernel an odd number of tokens"
            )
        if dim_in % groups or dim % groups:
            raise ValueError(
                f"objective.decoder_groups={groups}: must divide transformer.dim={dim_in} and "
                f"objective.decoder_dim={dim}"
            )
        self.convolutions = nn.ModuleList(
            _CONVOLUTION[axes](dim if i else dim_in, dim, kernel, padding=kernel // 2, groups=groups)
            for i in range(depth)
        )
        self.out = Linear(dim, out_dim)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, encoded: Encoded, tokens: Tokens, plan: MaskPlan, noise: Tensor) -> Tensor:
        """Predict the hidden tokens.

        Args:
            encoded: what the encoder gave for the tokens that `plan` keeps, with `hide="drop"`.
            tokens: all tokens of the B clips; only their grid and lengths are read.
            plan: on the CPU, so that no place has to be fetched from a device.
            noise: (M, dim_in), what stands in the place of each hidden token, in row-major order.

        Returns:
            (M, out_dim), in the same order.
        """
        lengths = tokens.lengths[plan.rows]
        rows, size = plan.masked.shape
        device = encoded.x.device
        real = valid_mask(lengths, size)
        seen = encoded.tokens.flatten(0, 1)
        if int(plan.keep_lengths.min()) < encoded.tokens.shape[1]:
            seen = seen.index_select(0, places(valid_mask(plan.keep_lengths, encoded.tokens.shape[1]), device))
        hidden = places(plan.masked, device)
        # both the encoder's rows and these are read in ascending order: the n-th visible token is the n-th True here
        filled = seen.new_zeros(rows * size, seen.shape[1]).index_copy(0, places(real & ~plan.masked, device), seen)
        filled = filled.index_copy(0, hidden, noise.to(seen.dtype))

        h = filled.view(rows, *tokens.grid, -1)
        inside = None
        if int(lengths.min()) < size:
            inside = real.to(device).view(rows, *tokens.grid, 1)
        for convolution in self.convolutions:
            out = convolution(h.movedim(-1, 1)).movedim(1, -1)
            out = F.gelu(F.layer_norm(out, out.shape[-1:]))
            out = h + out if h.shape == out.shape else out
            h = out if inside is None else out * inside
        return self.out(h.flatten(0, -2).index_select(0, hidden))
