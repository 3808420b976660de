"""The convolutional decoder: every token at its place, padding silent, each convolution worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmssl.nn.block_masks import block_mask
from mmssl.nn.conv_decoder import ConvDecoder
from mmssl.nn.masking import take
from mmssl.types import Encoded, MaskPlan, Tokens

AXES = {1: ("t",), 2: ("h", "w"), 3: ("t", "h", "w")}
GRIDS = pytest.mark.parametrize("rest", [(), (4,), (3, 2)], ids=["1d", "2d", "3d"])


def tokens(lengths: list[int], *rest: int) -> Tokens:
    """Clips of so many steps of `rest` places."""
    grid = (max(lengths), *rest)
    coords = torch.cartesian_prod(*[torch.arange(n) for n in grid]).view(1, -1, len(grid)).expand(len(lengths), -1, -1)
    x = torch.zeros(*coords.shape[:2], 1)
    return Tokens(x, torch.tensor(lengths) * math.prod(rest), coords, AXES[len(grid)], grid)


def build(axes: int, **settings: int) -> ConvDecoder:
    torch.manual_seed(0)
    given = {"dim_in": 8, "dim": 8, "depth": 3, "kernel": 3, "groups": 2, "out_dim": 5} | settings
    return ConvDecoder(axes=axes, **given)


def case(lengths: list[int], rest: tuple[int, ...], seeds: list[int]) -> tuple[Encoded, Tokens, MaskPlan, torch.Tensor]:
    """What stands at each place is a function of the clip's seed and the place; two masked copies of each clip."""
    given = tokens(lengths, *rest)
    plan = block_mask(given, ratio=0.5, size=2, seeds=torch.tensor(seeds), clones=2)
    size = plan.masked.shape[1]
    values = torch.stack([torch.randn(100, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    visible = take(values[:, :size][plan.rows], plan.keep)
    padding = torch.full_like(visible, 9.0)
    visible = torch.where(plan.keep_valid[..., None], visible, padding)
    prefix = torch.randn(len(visible), 1, 8)
    encoded = Encoded(torch.cat([prefix, visible], 1), plan.keep_lengths + 1, {}, n_prefix=1)
    noise = torch.cat([values[row][:size][hidden] * 0.1 for row, hidden in zip(plan.rows, plan.masked, strict=True)])
    return encoded, given, plan, noise


@GRIDS
def test_a_clip_alone_is_predicted_as_beside_a_longer_one(rest: tuple[int, ...]) -> None:
    model = build(1 + len(rest))
    together = model(*case([5, 2, 3], rest, [11, 12, 13]))
    alone = torch.cat([model(*case([n], rest, [seed])) for n, seed in ((5, 11), (2, 12), (3, 13))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_every_step_worked_by_hand() -> None:
    model = build(1)
    encoded, given, plan, noise = case([6], (), [3])
    predictions = model(encoded, given, plan, noise).split(plan.masked.sum(1).tolist())
    for copy, masked in enumerate(plan.masked):
        row = torch.zeros(6, 8)
        row[~masked] = encoded.x[copy, 1 : 1 + int(plan.keep_lengths[copy])]
        row[masked] = noise[copy * int(masked.sum()) : (copy + 1) * int(masked.sum())]
        for convolution in model.convolutions:
            out = torch.zeros(6, 8)
            for place in range(6):
                for tap in (-1, 0, 1):
                    if 0 <= place + tap < 6:
                        for group in range(2):
                            part = slice(4 * group, 4 * group + 4)
                            out[place, part] += convolution.weight[part, :, tap + 1] @ row[place + tap, part]
                out[place] += convolution.bias
            row = row + F.gelu(
                (out - out.mean(1, keepdim=True)) / (out.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            )
        torch.testing.assert_close(predictions[copy], model.out(row)[masked], rtol=1e-4, atol=1e-5)


@GRIDS
def test_a_hidden_token_sees_as_many_places_as_the_kernels_reach_along_each_axis(rest: tuple[int, ...]) -> None:
    model = build(1 + len(rest), depth=1)
    encoded, given, plan, noise = case([7], rest, [5])
    encoded.x.requires_grad_()
    place = int(plan.masked[0].nonzero()[0, 0])
    model(encoded, given, plan, noise)[0].sum().backward()
    assert encoded.x.grad is not None
    reached = encoded.x.grad[0, 1:].any(1)[plan.keep_valid[0]]
    coords = given.coords[0]
    near = ((coords - coords[place]).abs() <= 1).all(1)
    assert torch.equal(reached, near[plan.keep[0]][plan.keep_valid[0]])
    assert not encoded.x.grad[1].any()  # the other copy


def test_the_first_convolution_has_no_residual_where_widths_differ() -> None:
    model = build(2, dim=4)
    assert model(*case([5, 2], (4,), [1, 2])).shape[1] == 5
    assert [convolution.in_channels for convolution in model.convolutions] == [8, 4, 4]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kernel": 4}, "decoder_kernel=4: .* an odd number of tokens"),
        ({"depth": 0}, "decoder_depth=0"),
        ({"groups": 3}, "decoder_groups=3: must divide transformer.dim=8 and objective.decoder_dim=8"),
    ],
)
def test_settings_that_no_convolution_can_have_are_refused(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(1, **settings)
