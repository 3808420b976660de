"""Speech: waveform -> strided convolutions -> one token every 20 ms.

The clips of a batch are laid end to end, each at a multiple of the total stride, and the stack runs once over that long
row: there is no padding to work on, and a clip's frames see its own samples only. Channels are last, so that a strided
convolution is two matrix products over views of its input, with nothing copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmssl.nn.linear import Linear, product
from mmssl.types import Frontend, Raw, Tokens, valid_mask

WAV2VEC2_LAYERS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))


def conv_lengths(samples: Tensor, layers: Sequence[Sequence[int]]) -> Tensor:
    """Frames after a stack of [channels, kernel, stride] convolutions without padding."""
    for _, kernel, stride in layers:
        samples = (torch.div(samples - kernel, stride, rounding_mode="floor") + 1).clamp_min(0)
    return samples


def refuse_short(raw: Raw, least: int) -> None:
    """Name the first clip that has fewer samples than one token sees.

    Raises:
        ValueError: there is one.
    """
    short = (raw.lengths < least).nonzero()[:, 0].tolist()
    if short:
        raise ValueError(
            f"{raw.ids[short[0]]}: {int(raw.lengths[short[0]])} samples are shorter than one token, {least}"
        )


class Waveform(Frontend):
    """The feature encoder of wav2vec 2.0, with statistics over real samples and frames only.

    Source: Baevski et al. 2020 (arXiv:2006.11477), section 2 and appendix; layers as in its released code.

    Differs from the released code: the statistics of the group norm leave padding out, so a clip's tokens are the same
    alone and beside a longer one, in both modes.

    Args:
        dim: width of the tokens.
        layers: [channels, kernel, stride] of each convolution; kernels no shorter than strides.
        norm: "group" normalizes each channel of the first layer over the clip (base), "layer" every frame of every
            layer over channels (large).
        normalize: bring each clip to mean 0 and deviation 1 first. Goes with "layer", as the authors pair them.
        normalize_eps: added to the clip's variance for that; transformers has 1e-7.
        bias: of the convolutions; they have one in the "layer" form of the large model.
        dropout: on the tokens.
        grad_mult: factor on the gradient that reaches the convolutions.
        rate: samples per second that the clips must have.
        eps: of the norms.
    """

    axes: ClassVar[tuple[str, ...]] = ("t",)
    learned: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        layers: Sequence[Sequence[int]] = WAV2VEC2_LAYERS,
        norm: Literal["group", "layer"] = "layer",
        normalize: bool = True,
        normalize_eps: float = 1e-5,
        bias: bool = False,
        dropout: float = 0.0,
        grad_mult: float = 1.0,
        rate: int = 16_000,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for channels, kernel, stride in layers:
            if not kernel >= stride >= 1 or channels < 1:
                raise ValueError(f"frontend.layers: [{channels}, {kernel}, {stride}] must have kernel >= stride >= 1")
        if norm == "group" and bias:
            raise ValueError(
                "frontend.bias=true: the group norm after the first layer would cancel it, set it to false"
            )
        self.dim, self.feature_dim = dim, layers[-1][0]
        self.layers = [tuple(layer) for layer in layers]
        self.group = norm == "group"
        self.normalize, self.normalize_eps = normalize, normalize_eps
        self.grad_mult = grad_mult
        self.dropout = dropout
        self.rate = rate
        self.eps = eps
        self.stride = math.prod(stride for _, _, stride in layers)
        self.min_length = 1
        for _, kernel, stride in reversed(layers):
            self.min_length = (self.min_length - 1) * stride + kernel
        self.reader_settings: dict[str, Any] = {"rate": rate}

        widths = [1] + [channels for channels, _, _ in layers]
        self.weights = nn.ParameterList(
            torch.empty(kernel * width, channels).normal_(std=math.sqrt(2.0 / (kernel * width)))
            for width, (channels, kernel, _) in zip(widths, layers, strict=False)
        )
        self.biases = nn.ParameterList(torch.zeros(channels) for channels, _, _ in layers) if bias else None
        self.norms = nn.ModuleList(
            [nn.GroupNorm(widths[1], widths[1], eps=eps)]
            if self.group
            else [nn.LayerNorm(channels, eps=eps) for channels, _, _ in layers]
        )
        self.norm = nn.LayerNorm(self.feature_dim, eps=eps)
        self.project = Linear(self.feature_dim, dim)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def lengths(self, raw: Raw) -> Tensor:
        refuse_short(raw, self.min_length)
        return conv_lengths(raw.lengths, self.layers)

    def forward(self, raw: Raw) -> Tokens:
        if raw.rate is not None and raw.rate != self.rate:
            raise ValueError(
                f"{raw.ids[0]}: {raw.rate:g} Hz, but this frontend reads {self.rate} Hz; resample the clip"
            )
        lengths = self.lengths(raw)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.grad_mult > 0):
            frames = self._convolve(raw, lengths)  # (B, N, C)
        if frames.requires_grad and self.grad_mult != 1:
            frames.register_hook(lambda grad: grad * self.grad_mult)
        feat = self.norm(frames)
        x = F.dropout(self.project(feat), self.dropout, self.training)
        size = frames.shape[1]
        if int(lengths.min()) < size:
            valid = valid_mask(lengths, size, x.device)[..., None]
            x, feat = x * valid, feat * valid
        return Tokens(
            x=x,
            lengths=lengths,
            coords=torch.arange(size, device=x.device)[None, :, None].expand(len(x), -1, -1),
            axes=self.axes,
            grid=(size,),
            feat=feat,
            pre_norm=frames,
            step_ms=1000 * self.stride / self.rate,
            span_ms=1000 * self.min_length / self.rate,
        )

    def _convolve(self, raw: Raw, lengths: Tensor) -> Tensor:
        """(B, L) samples -> (B, N, C) frames, zero past each length."""
        waves = [wave[:length] for wave, length in zip(raw.data, raw.lengths.tolist(), strict=True)]
        if self.normalize:
            waves = [F.layer_norm(wave, wave.shape, eps=self.normalize_eps) for wave in waves]
        # One slot a clip, a whole number of total strides, and slack at the end for the last slot's kernels to read.
        slots = [-(-len(wave) // self.stride) for wave in waves]
        slack = self._slack()
        row = torch.cat(
            [F.pad(wave, (0, slot * self.stride - len(wave))) for wave, slot in zip(waves, slots, strict=True)]
        )
        row = F.pad(row, (0, slack * self.stride))

        device = row.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else row.dtype
        with torch.autocast(device, enabled=False):
            h = self._first(row, waves, slots, dtype)
            for i, (_, kernel, stride) in enumerate(self.layers[1:], start=1):
                h = StridedConv.apply(h, self.weights[i].to(dtype), self._bias(i, dtype), kernel, stride)
                h = self._activate(h, i)
        return _unpack(h, slots, lengths)

    def _first(self, row: Tensor, waves: list[Tensor], slots: list[int], dtype: torch.dtype) -> Tensor:
        """The first convolution, with the group norm folded into its weights.

        A frame of the first layer is a linear map of its few taps, so the mean and variance of every channel over a
        clip follow from the mean and covariance of those taps: no pass over the widest activation of the network.
        """
        _, kernel, stride = self.layers[0]
        taps = row.unfold(0, kernel, stride)  # (M, kernel)
        weight = self.weights[0]
        if not self.group:
            h = taps.to(dtype) @ weight.to(dtype)
            bias = self._bias(0, dtype)
            return self._activate(h if bias is None else h + bias, 0)
        parts, start = [], 0
        for wave, slot in zip(waves, slots, strict=True):
            own = wave.unfold(0, kernel, stride)
            mean = own.mean(0)
            centered = own - mean
            covariance = centered.T @ centered / len(own)
            variance = ((covariance @ weight) * weight).sum(0).clamp_min(0)
            scale = self.norms[0].weight * (variance + self.eps).rsqrt()
            shift = self.norms[0].bias - (mean @ weight) * scale
            # the last clip's rows go on over the slack, which nobody reads: one clip is then whole without a copy
            stop = len(taps) if wave is waves[-1] else start + slot * (self.stride // stride)
            parts.append(torch.addmm(shift.to(dtype), taps[start:stop].to(dtype), (weight * scale).to(dtype)))
            start = stop
        return F.gelu(torch.cat(parts) if len(parts) > 1 else parts[0])

    def _activate(self, h: Tensor, i: int) -> Tensor:
        if not self.group:
            norm = cast(nn.LayerNorm, self.norms[i])
            h = F.layer_norm(h, h.shape[-1:], norm.weight.to(h.dtype), norm.bias.to(h.dtype), self.eps)
        return F.gelu(h)

    def _bias(self, i: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.biases is None else self.biases[i].to(dtype)

    def _slack(self) -> int:
        """Total strides to add at the end of the long row so that every slot comes out of the stack whole."""
        slack = 0
        while True:
            size = (1 + slack) * self.stride
            _, kernel, stride = self.layers[0]
            size = (size - kernel) // stride + 1
            for _, kernel, stride in self.layers[1:]:
                size = _out_rows(size, kernel, stride)
            if size >= 1:
                return slack
            slack += 1


def _out_rows(size: int, kernel: int, stride: int) -> int:
    """Rows that come out of a StridedConv: whole strides, less those that only the kernel's end reads."""
    return size // stride - (-(-kernel // stride) - 1)


class StridedConv(torch.autograd.Function):
    """A strided convolution over one long row with channels last, as products over views of its input.

    Seen as rows of `stride` steps, the input's row t holds the first taps of output t, and row t + 1 the next ones.

    x: (M, C); weight: (kernel * C, C'), taps outermost; bias: (C',) or None -> (M', C') with M' = `_out_rows`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = kernel, stride
        ctx.has_bias = bias is not None
        out: Tensor | None = None
        for view, part in _views(x, weight, kernel, stride):
            if out is None:
                out = product(view, part.t())
            else:
                out.addmm_(view, part)
        assert out is not None
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        kernel, stride = ctx.shape
        # as `product` would, but without its copies of two transposed views
        grad_weight = torch.cat([view.t() @ grad for view, _ in _views(x, weight, kernel, stride)])
        grad_bias = grad.sum(0) if ctx.has_bias else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            rows = len(grad)
            grad_x[rows * stride :] = 0
            for i, (view, part) in enumerate(_views(grad_x, weight, kernel, stride)):
                if i == 0:
                    view.copy_(product(grad, part))
                else:
                    view.addmm_(grad, part.T)
        return grad_x, grad_weight, grad_bias, None, None


def _views(x: Tensor, weight: Tensor, kernel: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """For each group of `stride` taps: the view (M', taps * C) of x that they read, and their part of the weight."""
    channels = x.shape[1]
    rows = _out_rows(len(x), kernel, stride)
    pairs = []
    for first in range(0, kernel, stride):
        taps = min(stride, kernel - first)
        view = x[first : first + rows * stride].view(rows, stride * channels)[:, : taps * channels]
        pairs.append((view, weight[first * channels : (first + taps) * channels]))
    return pairs


def _unpack(h: Tensor, slots: list[int], lengths: Tensor) -> Tensor:
    """(M, C) long row -> (B, N, C), zero past each length."""
    size = int(lengths.max())
    if len(set(slots)) == 1 and int(lengths.min()) == size:
        return h[: slots[0] * len(slots)].view(len(slots), slots[0], -1)[:, :size]
    clips = h.split([*slots, len(h) - sum(slots)])
    return torch.stack([F.pad(clip[:n], (0, 0, 0, size - n)) for clip, n in zip(clips, lengths.tolist(), strict=False)])
