"""Positions to add to tokens: functions of coordinates, never of a place in a packed sequence.

Each is a module called as `positions(x, tokens)` that returns what to *add*: (B, N, D), or (1, N, D) where it is the
same for all clips. The convolutional ones read the content `x`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.fft_conv import fft_conv, kernel_spectrum
from mmssl.types import Tokens, valid_mask


def sincos(coords: Tensor, dim: int, *, base: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of each axis, the fastest-moving axis first.

    Source: Vaswani et al. 2017, section 3.5, in the arrangement of He et al. 2022: the first half of the width tells
    the column and the second the row, so that released weights fit.

    Args:
        coords: (..., A) numbers; fractions are fine.
        dim: width of the result; what does not divide by 2A stays zero at the end.

    Returns:
        (..., dim) float32.
    """
    axes = coords.shape[-1]
    part = dim // (2 * axes)
    rates = base ** (-torch.arange(part, device=coords.device, dtype=torch.float64) / part)
    angles = coords.flip(-1).unsqueeze(-1).double() * rates  # (..., A, part)
    waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
    return F.pad(waves, (0, dim - waves.shape[-1])).float()


class SinCos(nn.Module):
    """Fixed sine and cosine positions on a grid of any number of axes and any size.

    With `train_grid` the coordinates on another grid are scaled to span the same range, which is interpolation;
    without, they count on. Time always counts on: how long a clip is says nothing of how far apart its tokens are, and
    the batch's longest clip nothing of the others.
    """

    def __init__(self, dim: int, *, train_grid: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.train_grid = train_grid

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        coords = shared(tokens.coords)
        if self.train_grid is not None:
            sizes = zip(self.train_grid, tokens.grid, tokens.axes, strict=True)
            scale = torch.tensor([1.0 if axis == "t" else old / new for old, new, axis in sizes])
            coords = coords * scale.to(coords.device)
        return sincos(coords, self.dim)


class FlatSinCos(nn.Module):
    """Fixed sines and cosines of a token's number, as if all tokens lay in one line.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, over the tubes of a clip as in the released code of
    VideoMAE (Tong et al. 2022, arXiv:2203.12602): sines on even places of the vector, cosines on odd ones.

    Args:
        grid: tokens along each axis; it says how tokens are numbered. Time, the outermost axis, may go on.
    """

    def __init__(self, dim: int, *, grid: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.grid = dim, tuple(grid)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Sines and cosines of each token's number.

        Raises:
            ValueError: the clips are of another size.
        """
        fits = all(
            new == old or axis == "t" for old, new, axis in zip(self.grid, tokens.grid, tokens.axes, strict=True)
        )
        if not fits:
            raise ValueError(
                f"positions: numbered over {self.grid} tokens, and these are {tuple(tokens.grid)}; resize the clips, "
                "or use sincos positions"
            )
        number = _number(shared(tokens.coords), self.grid)[..., None]
        rates = 10_000.0 ** (-torch.arange(0, self.dim, 2, device=number.device, dtype=torch.float64) / self.dim)
        angles = number.double() * rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : self.dim].float()


class Learned(nn.Module):
    """A table of one vector for each cell of a grid, interpolated for a picture of another size.

    Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.2. Time is not stretched, see `SinCos`.

    Args:
        antialias: whether the table is smoothed where it is brought to a smaller grid, as DINOv2's with registers.
    """

    def __init__(self, dim: int, *, grid: Sequence[int], antialias: bool = False) -> None:
        super().__init__()
        self.grid, self.antialias = tuple(grid), antialias
        self.table = nn.Parameter(torch.empty(math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Add the vector of each token's cell.

        Raises:
            ValueError: a clip goes on past the end of the table in time, or it is no picture and of another size.
        """
        table: Tensor = self.table
        grid = self.grid
        fits = all(
            new <= old if axis == "t" else new == old
            for old, new, axis in zip(grid, tokens.grid, tokens.axes, strict=True)
        )
        if not fits:
            if tokens.axes != ("h", "w"):
                raise ValueError(
                    f"positions: a learned table of {grid} cells does not reach over {tuple(tokens.grid)} tokens; crop "
                    "the clips, or use sincos positions"
                )
            cells = table.T.reshape(1, -1, *grid)
            stretched = F.interpolate(
                cells, size=tuple(tokens.grid), mode="bicubic", align_corners=False, antialias=self.antialias
            )
            table, grid = stretched.flatten(2)[0].T, tuple(tokens.grid)
        return table[_number(shared(tokens.coords), grid)]


class Convolutional(nn.Module):
    """Positions that a grouped convolution along time reads off the content.

    Source: Baevski et al. 2020 (arXiv:2006.11477), section 2: kernel 128, 16 groups, weight norm
    over the kernel axis, GELU.
    Padding and hidden tokens read as silence: without that a clip's embedding would depend on its neighbors' length.
    """

    def __init__(self, dim: int, *, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        # The direction of each kernel tap and its length, as weight norm has them. They are drawn before they are
        # split: initializing the weight of a module that already has weight norm changes nothing.
        weight = torch.empty(dim, dim // groups, kernel).normal_(std=math.sqrt(4.0 / (kernel * dim)))
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(dim))

    # the kernel's spectrum; what it was made of, and their versions then
    _packed: tuple[Tensor, list[tuple[Tensor, int]]] | None = None

    def pack(self) -> None:
        """Keep the kernel's spectrum for calls without gradients on the CPU, which `fft_conv` answers with it.

        As `mmssl.nn.linear.Linear.pack`: until the kernel is exchanged, changed or to be trained.
        """
        made_of = [self.weight_v, self.weight_g]
        if all(part.device.type == "cpu" and not part.requires_grad and not part.is_inference() for part in made_of):
            self._packed = kernel_spectrum(self._kernel(), self.groups), [(part, part._version) for part in made_of]

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        spectrum = None if torch.is_grad_enabled() or x.device.type != "cpu" else self._spectrum()
        if spectrum is None:
            kernel = self._kernel().to(x.dtype)
            out = F.conv1d(x.transpose(1, 2), kernel, self.bias, padding=self.kernel // 2, groups=self.groups)
            out = F.gelu(out[..., : x.shape[1]]).transpose(1, 2)
        else:
            with torch.autocast("cpu", enabled=False):
                out = F.gelu((fft_conv(x, spectrum) + self.bias).to(x.dtype))
        if int(tokens.lengths.min()) < x.shape[1]:
            out = out * valid_mask(tokens.lengths, x.shape[1], x.device)[..., None]
        return out

    def _kernel(self) -> Tensor:
        # the norm written out would walk over all but the last axis in strides, which is slow on the CPU
        return torch._weight_norm(self.weight_v, self.weight_g, 2)

    def _spectrum(self) -> Tensor | None:
        """The packed one, if it is still that of the kernel."""
        if self._packed is None:
            return None
        spectrum, made_of = self._packed
        for part, (then, version) in zip((self.weight_v, self.weight_g), made_of, strict=True):
            # an update by a fused optimizer leaves no trace in the version
            if part is not then or part.requires_grad or part._version != version:
                self._packed = None
                return None
        return spectrum


class StackedConvolutional(nn.Module):
    """Positions that several grouped convolutions along time read off the content, one after the other.

    Source: Baevski et al. 2022, data2vec (arXiv:2202.03555), section 4.2, and its released code: 5 convolutions with
    kernel 19 and 16 groups, each with a layer norm that has no weights, and GELU.
    Differs from the released code: padding is silenced before each of them, and not before the first alone. A norm
    makes something of nothing, so without that a clip's embedding depends on its neighbors' length.
    """

    def __init__(self, dim: int, *, depth: int = 5, kernel: int = 19, groups: int = 16) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        size = x.shape[1]
        real = None
        if int(tokens.lengths.min()) < size:
            real = valid_mask(tokens.lengths, size, x.device)[..., None]
        for convolution in self.convolutions:
            # an even kernel gives one more than went in
            out = convolution(x.transpose(1, 2))[..., :size].transpose(1, 2)
            x = F.gelu(F.layer_norm(out, out.shape[-1:]))
            x = x if real is None else x * real
        return x


def _number(coords: Tensor, grid: Sequence[int]) -> Tensor:
    """(..., A) coordinates -> the number of the cell in row-major order."""
    number = torch.zeros_like(coords[..., 0])
    for axis, size in enumerate(grid):
        number = number * size + coords[..., axis]
    return number


def shared(coords: Tensor) -> Tensor:
    """(1, N, A) where all clips have the same coordinates because they are one expanded view."""
    return coords[:1] if coords.stride(0) == 0 or len(coords) == 1 else coords


class NoPositions(nn.Module):
    """Adds nothing: a Transformer then sees a set of tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x.new_zeros(1, x.shape[1], self.dim)


POSITIONS: dict[str, type[nn.Module]] = {
    "sincos": SinCos,
    "flat_sincos": FlatSinCos,
    "learned": Learned,
    "conv": Convolutional,
    "none": NoPositions,
    "stacked_conv": StackedConvolutional,
}
# what they add to a token depends on its neighbors
READ_CONTENT = (Convolutional, StackedConvolutional)
