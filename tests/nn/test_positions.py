"""Positions are functions of coordinates; the convolutional ones hear no padding."""

import math

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from mmssl.nn.positions import (
    Convolutional,
    FlatSinCos,
    Learned,
    NoPositions,
    SinCos,
    StackedConvolutional,
    sincos,
)
from mmssl.types import Tokens


def picture(height, width, dim=8, batch=2):
    coords = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).view(1, -1, 2)
    x = torch.zeros(batch, height * width, dim)
    return Tokens(
        x=x,
        lengths=torch.full((batch,), height * width),
        coords=coords.expand(batch, -1, -1),
        axes=("h", "w"),
        grid=(height, width),
    )


def speech(x, lengths):
    size = x.shape[1]
    coords = torch.arange(size)[None, :, None].expand(len(x), -1, -1)
    return Tokens(x=x, lengths=lengths, coords=coords, axes=("t",), grid=(size,))


def test_sines_and_cosines_by_hand():
    # two axes, width 8: two rates an axis, 1 and 1/100; the column comes first
    row, column = 3, 5
    wave = sincos(torch.tensor([row, column]), 8).tolist()
    expected = [math.sin(5), math.sin(0.05), math.cos(5), math.cos(0.05)]
    expected += [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    assert wave == pytest.approx(expected, abs=1e-6)


def test_no_position_is_zero_or_repeated():
    # a table of zeros trains without a complaint and blind to place
    table = SinCos(48)(None, picture(14, 14))[0]
    assert table.norm(dim=1).min() > 1
    assert (torch.cdist(table, table) + 10 * torch.eye(196)).min() > 0.1


def test_a_trained_range_of_positions_is_stretched_over_another_grid():
    positions = SinCos(16, train_grid=[7, 7])
    small = positions(None, picture(7, 7))[0].view(7, 7, -1)
    large = positions(None, picture(14, 14))[0].view(14, 14, -1)
    assert torch.allclose(large[::2, ::2], small, atol=1e-6)


def test_a_learned_table_is_read_by_coordinates_and_interpolated():
    positions = Learned(8, grid=[4, 4])
    with torch.no_grad():
        positions.table.copy_(torch.arange(16.0)[:, None].expand(-1, 8))
    assert positions(None, picture(4, 4))[0, :, 0].tolist() == list(range(16))
    stretched = positions(None, picture(8, 8))[0, :, 0].view(8, 8).detach()
    assert abs(stretched.mean() - 7.5) < 0.2
    assert (stretched.diff(dim=1)[:, 1:-1] > 0).all()


def test_convolutional_positions_are_a_weight_normalized_convolution():
    torch.manual_seed(0)
    ours = Convolutional(8, kernel=6, groups=2)
    conv = weight_norm(torch.nn.Conv1d(8, 8, 6, padding=3, groups=2), dim=2)
    with torch.no_grad():
        conv.parametrizations.weight.original0.copy_(ours.weight_g)
        conv.parametrizations.weight.original1.copy_(ours.weight_v)
        conv.bias.normal_()
        ours.bias.copy_(conv.bias)
    x = torch.randn(3, 20, 8)
    expected = torch.nn.functional.gelu(conv(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
    assert torch.allclose(ours(x, speech(x, torch.tensor([20, 20, 20]))), expected, atol=1e-5)


def test_convolutional_positions_start_at_the_deviation_of_the_paper():
    # initializing after weight norm was applied is lost without a word: released code starts at .00737 instead
    ours = Convolutional(768)
    weight = ours.weight_v * (ours.weight_g / ours.weight_v.norm(dim=(0, 1), keepdim=True))
    assert weight.std().item() == pytest.approx(math.sqrt(4 / (128 * 768)), rel=0.01)


def test_convolutional_positions_hear_no_padding():
    torch.manual_seed(0)
    ours = Convolutional(8, kernel=6, groups=2)
    ours.bias.data.normal_()
    x = torch.randn(2, 20, 8)
    x[1, 12:] = 0
    ragged = ours(x, speech(x, torch.tensor([20, 12])))
    alone = ours(x[1:, :12], speech(x[1:, :12], torch.tensor([12])))
    assert torch.allclose(ragged[1, :12], alone[0], atol=1e-6)
    assert ragged[1, 12:].abs().max() == 0


@pytest.mark.parametrize("positions", [SinCos(8, train_grid=[12]), Learned(8, grid=[20])])
def test_time_is_not_stretched_by_the_longest_clip_of_a_batch(positions):
    x = torch.zeros(1, 20, 8)
    long, short = speech(x, torch.tensor([20])), speech(x[:, :9], torch.tensor([9]))
    assert torch.allclose(positions(x, long)[:, :9], positions(x[:, :9], short), atol=1e-6)


def test_a_clip_past_the_end_of_a_learned_table_is_refused():
    x = torch.zeros(1, 21, 8)
    with pytest.raises(ValueError, match=r"a learned table of \(20,\) cells does not reach over \(21,\) tokens"):
        Learned(8, grid=[20])(x, speech(x, torch.tensor([21])))


def test_no_positions_add_nothing():
    tokens = picture(2, 3)
    added = NoPositions(8)(torch.randn(2, 6, 8), tokens)
    assert added.shape == (1, 6, 8)
    assert not added.any()


def test_tokens_in_one_line_by_hand():
    # the token of row 1 and column 2 in a grid of 2 x 3 is number 5; two rates in width 4, 1 and 1/100
    wave = FlatSinCos(4, grid=[2, 3])(None, picture(2, 3, dim=4))[0, 5].tolist()
    assert wave == pytest.approx([math.sin(5), math.cos(5), math.sin(0.05), math.cos(0.05)], abs=1e-6)


def test_tokens_in_one_line_go_on_in_time_and_nowhere_else():
    x = torch.zeros(1, 12, 4)
    longer = FlatSinCos(4, grid=[7])(x, speech(x, torch.tensor([12])))
    assert torch.equal(longer[:, :7], FlatSinCos(4, grid=[7])(x[:, :7], speech(x[:, :7], torch.tensor([7]))))
    with pytest.raises(ValueError, match=r"numbered over \(2, 3\) tokens, and these are \(3, 3\)"):
        FlatSinCos(4, grid=[2, 3])(None, picture(3, 3, dim=4))


@pytest.mark.parametrize("kernel", [5, 6])
def test_stacked_convolutional_positions_hear_no_padding(kernel):
    torch.manual_seed(0)
    ours = StackedConvolutional(8, kernel=kernel, depth=3, groups=2)
    x = torch.randn(2, 20, 8)
    x[1, 12:] = 0
    ragged = ours(x, speech(x, torch.tensor([20, 12])))
    alone = ours(x[1:, :12], speech(x[1:, :12], torch.tensor([12])))
    assert torch.allclose(ragged[1, :12], alone[0], atol=1e-6)
    assert ragged[1, 12:].abs().max() == 0


def frozen_positions(kernel=6):
    torch.manual_seed(0)
    positions = Convolutional(8, kernel=kernel, groups=2).requires_grad_(False)
    positions.bias.normal_()
    return positions


@pytest.mark.parametrize("kernel", [1, 5, 6, 128])
@pytest.mark.parametrize("size", [1, 6, 7, 20, 300])
@torch.no_grad()
def test_a_packed_kernel_is_the_same_convolution(kernel, size):
    ours = frozen_positions(kernel)
    x, lengths = torch.randn(2, size, 8), torch.tensor([size, (size + 1) // 2])
    before, names = ours(x, speech(x, lengths)), set(ours.state_dict())
    ours.pack()
    assert ours._spectrum() is not None
    assert torch.allclose(ours(x, speech(x, lengths)), before, atol=1e-5)
    assert set(ours.state_dict()) == names


@torch.no_grad()
def test_a_packed_kernel_rounds_no_products_in_bfloat16():
    ours, x = frozen_positions(), torch.randn(1, 50, 8).bfloat16()
    tokens = speech(x, torch.tensor([50]))
    exact = ours(x.float(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(x, tokens)
        ours.pack()
        packed = ours(x, tokens)
    assert packed.dtype is torch.bfloat16
    assert (packed - exact).abs().max() < (rounded - exact).abs().max()


@pytest.mark.parametrize("change", ["in place", "loaded", "exchanged", "trained"])
def test_a_kernel_that_changed_is_not_read_as_it_was_packed(change):
    ours, x = frozen_positions(), torch.randn(1, 20, 8)
    other = Convolutional(8, kernel=6, groups=2).requires_grad_(False)
    ours.pack()
    if change == "in place":
        ours.weight_g.mul_(2)
    elif change == "loaded":
        ours.load_state_dict(other.state_dict())
    elif change == "exchanged":
        ours.weight_v = other.weight_v
    else:
        ours.requires_grad_()
    fresh = Convolutional(8, kernel=6, groups=2)
    fresh.load_state_dict(ours.state_dict())
    with torch.no_grad():
        tokens = speech(x, torch.tensor([20]))
        assert torch.equal(ours(x, tokens), fresh(x, tokens))
    assert ours._packed is None
