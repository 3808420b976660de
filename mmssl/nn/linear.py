"""A linear map that takes the faster of the two libraries that torch carries for the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """torch's Linear. In float32 on the CPU its products go to oneDNN, as those in bfloat16 do by themselves.

    On the processor of benchmarks/README.md oneDNN's float32 products were the faster ones, and the step with them;
    the results agree to rounding.
    """

    # oneDNN's copy, what it is a copy of, and its version then
    _packed: tuple[Tensor, Tensor, int] | None = None

    def pack(self) -> None:
        """Keep the weight a second time as oneDNN reads it on the CPU, for calls without gradients.

        Each call would else bring it into that order, which takes a tenth of the time where rows are few. It is kept
        until the weight is exchanged, changed or to be trained; a change through `.data` cannot be seen.
        """
        weight = self.weight
        if _HAS_ONEDNN and weight.device.type == "cpu" and not weight.requires_grad and not weight.is_inference():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None), weight, weight._version

    def __getstate__(self) -> dict[str, Any]:
        # of a copy: a packed weight cannot be copied
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}

    def forward(self, input: Tensor) -> Tensor:
        if self._packed is not None:
            packed, weight, version = self._packed
            # an update by a fused optimizer leaves no trace in the version
            if weight is not self.weight or weight.requires_grad or version != weight._version:
                self._packed = None
            elif not torch.is_grad_enabled() and _reaches_onednn(input) and _precision(input) is packed.dtype:
                return _product(input.to(packed.dtype), packed, self.bias)
        if _is_plain(input):
            return _OneDNN.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K) -> (M, N), for use inside an autograd function."""
    return _product(a, b) if _is_plain(a) else a @ b.t()


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain(x: Tensor) -> bool:
    return _reaches_onednn(x) and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


def _reaches_onednn(x: Tensor) -> bool:
    return _HAS_ONEDNN and x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _precision(x: Tensor) -> torch.dtype:
    """In which a product is computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None


def _weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
    """(M, N), (M, K) -> (N, K). oneDNN copies the transposed rows first: not worth it where they are the wider ones."""
    return rows.t() @ x if rows.shape[1] > x.shape[1] else _product(rows.t(), x.t())
