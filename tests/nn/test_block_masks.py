"""Masks of blocks: exact counts whatever was cropped, no place favored, and blocks that are blocks."""

import math

import pytest
import torch

from mmssl.nn.block_masks import BLOCK_MASKS, beit_mask, block_mask, rectangles
from mmssl.types import Tokens, valid_mask

AXES = {1: ("t",), 2: ("h", "w"), 3: ("t", "h", "w")}


def tokens(lengths, *rest):
    """Clips of so many steps of `rest` places."""
    grid = (max(lengths), *rest)
    size = math.prod(grid)
    return Tokens(
        x=torch.zeros(len(lengths), size, 1),
        lengths=torch.tensor(lengths) * math.prod(rest),
        coords=torch.cartesian_prod(*[torch.arange(n) for n in grid]).view(1, size, -1).expand(len(lengths), -1, -1),
        axes=AXES[len(grid)],
        grid=grid,
    )


SHAPES = {
    "speech": (tokens([40, 40, 17, 3, 1]), 5),
    "audio": (tokens([16, 16, 9, 2, 1], 8), 5),
    "image": (tokens([6] * 5, 6), 3),
    "video": (tokens([4, 4, 3, 2, 1], 5, 4), [2, 3, 2]),
}
each_kind = pytest.mark.parametrize("kind", BLOCK_MASKS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def size_for(kind, size):
    return 4 if kind == "beit_blocks" else size


@each_kind
@each_shape
def test_every_copy_of_every_clip_hides_exactly_the_share_and_no_padding(kind, shape):
    given, size = SHAPES[shape]
    if kind == "beit_blocks" and len(given.grid) != 2:
        with pytest.raises(ValueError, match=r"rectangles lie on two axes, .* choose blocks"):
            beit_mask(given, ratio=0.6, size=4, seeds=torch.arange(5))
        return
    plan = BLOCK_MASKS[kind](given, ratio=0.6, size=size_for(kind, size), seeds=torch.arange(5), clones=3)
    lengths = given.lengths[plan.rows]
    assert plan.rows.tolist() == [row for row in range(5) for _ in range(3)]
    assert not (plan.masked & ~valid_mask(lengths, plan.masked.shape[1])).any()
    expected = [0 if n == 1 else min(max(round(0.6 * n), 1), n - 1) for n in lengths.tolist()]
    assert plan.masked.sum(1).tolist() == expected
    assert torch.equal(plan.keep_lengths, lengths - plan.masked.sum(1))
    # the copies of a clip with room for it differ
    assert len({tuple(row.tolist()) for row in plan.masked[:3]}) == 3


@each_kind
def test_counts_are_equal_over_a_thousand_clips_cropped_anywhere(kind):
    # what a crop was cut from has no part in its mask: clips of one length have one count
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 13, (1000,), generator=generator).tolist()
    seeds = torch.randint(2**40, (1000,), generator=generator)
    given = tokens(lengths, 4)
    counts = BLOCK_MASKS[kind](given, ratio=0.8, size=3, seeds=seeds).masked.sum(1)
    assert {(n, int(count)) for n, count in zip(lengths, counts, strict=True)} == {
        (n, round(0.8 * 4 * n)) for n in range(5, 13)
    }


def test_eat_keeps_102_of_512_patches_and_data2vec_half_of_its_frames():
    patches = block_mask(tokens([64], 8), ratio=0.8, size=5, seeds=torch.arange(1), clones=16, inverse=True)
    assert patches.keep_lengths.tolist() == [102] * 16
    frames = block_mask(tokens([999]), ratio=0.5, size=5, seeds=torch.arange(1), clones=8)
    assert frames.masked.sum(1).tolist() == [500] * 8


@each_kind
@each_shape
def test_a_clip_has_the_same_mask_in_whatever_batch_it_comes(kind, shape):
    given, size = SHAPES[shape]
    if kind == "beit_blocks" and len(given.grid) != 2:
        return
    settings = {"ratio": 0.6, "size": size_for(kind, size), "clones": 2}
    whole = BLOCK_MASKS[kind](given, seeds=torch.arange(5), **settings).masked
    rest = math.prod(given.grid[1:])
    steps = int(given.lengths[2]) // rest
    alone = BLOCK_MASKS[kind](tokens([steps], *given.grid[1:]), seeds=torch.tensor([2]), **settings).masked
    assert torch.equal(whole[4:6, : steps * rest], alone)


@pytest.mark.parametrize("kind", ["blocks", "inverse_blocks"])
@pytest.mark.parametrize(("grid", "size"), [((12,), 4), ((6, 5), 3), ((3, 4, 4), 2)])
def test_every_place_is_hidden_as_often_as_every_other(kind, grid, size):
    given, n = tokens([grid[0]], *grid[1:]), math.prod(grid)
    share = BLOCK_MASKS[kind](given, ratio=0.5, size=size, seeds=torch.tensor([7]), clones=4000).masked.float().mean(0)
    # five standard errors of a share of 4,000
    assert (share - round(0.5 * n) / n).abs().max() < 5 * (0.25 / 4000) ** 0.5


def neighbors(marked):
    """How many pairs of neighbors on a grid of (R, H, W) are both marked."""
    return int((marked[:, :, 1:] & marked[:, :, :-1]).sum() + (marked[:, 1:] & marked[:, :-1]).sum())


def test_what_is_hidden_is_spans_of_the_size_asked_for():
    masked = block_mask(tokens([400]), ratio=0.2, size=8, seeds=torch.arange(1), clones=50).masked
    edges = torch.nn.functional.pad(masked.int(), (1, 1)).diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    # 80 of 400 are ten spans or more: only the one that is cut short and the one over the edges come in pieces
    assert (runs >= 8).sum() > 50 * 6
    assert runs[runs >= 8].sum() > 50 * (80 - 2 * 8)


@pytest.mark.parametrize("kind", BLOCK_MASKS)
def test_blocks_are_blocks(kind):
    given = tokens([6], 6)
    # 9 of 36 are one block of 3 x 3, or parts of more, which overlap, reach over an edge or are cut short
    ratio = 0.75 if kind == "inverse_blocks" else 0.25
    masked = BLOCK_MASKS[kind](given, ratio=ratio, size=size_for(kind, 3), seeds=torch.arange(1), clones=200).masked
    marked = (~masked if kind == "inverse_blocks" else masked).view(200, 6, 6)
    scattered = torch.rand(200, 36, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1) < 9
    assert neighbors(marked) > 2 * neighbors(scattered.view(200, 6, 6))


def test_rectangles_are_wide_and_tall():
    # of 25: from 3 by 9 to 9 by 3
    plan = beit_mask(tokens([10], 10), ratio=0.25, size=25, seeds=torch.arange(1), clones=200)
    heights = plan.masked.view(200, 10, 10).any(2).sum(1)
    assert heights.min() == 3
    assert heights.max() >= 9
    assert (heights <= 4).float().mean() > 0.1


@pytest.mark.parametrize("size", [0, [3], [2, 2, 2], [2, 0]])
def test_a_size_that_does_not_fit_the_axes_is_refused(size):
    with pytest.raises(ValueError, match=r"objective.mask_size=.* of the axes h, w; give one number, or one for each"):
        block_mask(tokens([4], 4), ratio=0.5, size=size, seeds=torch.arange(1))


def test_a_rectangle_has_one_least_size():
    with pytest.raises(ValueError, match=r"objective.mask_size=\[2, 2\]: the least tokens of a rectangle"):
        beit_mask(tokens([4], 4), ratio=0.5, size=[2, 2], seeds=torch.arange(1))


@each_kind
def test_a_share_outside_its_range_is_refused(kind):
    with pytest.raises(ValueError, match=r"mask_ratio=1.0"):
        BLOCK_MASKS[kind](tokens([4], 4), ratio=1.0, size=2, seeds=torch.arange(1))


def drawn(given, count=3000, **settings):
    """(count, *grid) rectangles of one clip."""
    settings = {"scale": (0.2, 0.3), "aspect": (0.75, 1.5), "seeds": torch.tensor([3])} | settings
    return rectangles(given, count=count, **settings)[0].view(count, *given.grid)


def test_rectangles_have_the_shares_and_shapes_asked_for():
    blocks = drawn(tokens([20], 20))
    heights, widths = blocks.any(2).sum(1), blocks.any(1).sum(1)
    assert torch.equal(blocks.flatten(1).sum(1), heights * widths)
    # sides are whole: half a row and half a column around the area
    areas = (heights * widths).float()
    assert (areas >= 0.2 * 400 - 0.5 * (heights + widths + 0.5)).all()
    assert (areas <= 0.3 * 400 + 0.5 * (heights + widths + 0.5)).all()
    assert ((heights - 0.5) / (widths + 0.5) <= 1.5).all()
    assert ((heights + 0.5) / (widths - 0.5) >= 0.75).all()
    assert abs(float(areas.mean()) - 100) < 2


def test_a_share_of_a_long_clip_is_that_share():
    assert abs(float(drawn(tokens([60], 6), aspect=(1.0, 1.0)).float().mean()) - 0.25) < 0.02
    assert drawn(tokens([60], 6), scale=(1.0, 1.0), aspect=(1.0, 1.0)).all()
    assert drawn(tokens([9]), scale=(1.0, 1.0)).all()


def test_on_one_axis_they_are_spans():
    blocks = drawn(tokens([40]))
    assert (blocks.int().diff(dim=1) == 1).sum(1).max() <= 1
    assert {int(n) for n in blocks.sum(1)} == {8, 9, 10, 11, 12}


def test_in_video_they_are_the_same_in_every_step():
    blocks = drawn(tokens([5], 6, 6), count=50)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    ragged = rectangles(
        tokens([5, 2], 6, 6), count=2, scale=(0.2, 0.3), aspect=(1.0, 1.0), seeds=torch.tensor([3, 3])
    ).view(2, 2, 5, 6, 6)
    assert torch.equal(ragged[1, :, :2], ragged[0, :, :2])
    assert not ragged[1, :, 2:].any()


def test_the_last_row_and_column_are_reached_unless_as_published():
    def shares(edges):
        blocks = drawn(tokens([14], 14), edges=edges).float().mean(0)
        return blocks.sum(1) / blocks.sum(), blocks.sum(0) / blocks.sum()

    for rows, columns in (shares(edges=True),):
        # the first and the last alike, within five standard errors of some 3000 * .25 draws of each
        assert abs(float(rows[0] / rows[-1]) - 1) < 0.5
        assert abs(float(columns[0] / columns[-1]) - 1) < 0.5
        assert rows.min() > 0
    rows, columns = shares(edges=False)
    assert rows[-1] == columns[-1] == 0
    assert rows[0] > 0


def test_rectangles_are_a_clips_own_in_any_batch():
    given = {"count": 2, "scale": (0.2, 0.5), "aspect": (0.5, 2.0)}
    whole = rectangles(tokens([9, 4, 6], 5), seeds=torch.arange(3), **given)
    alone = rectangles(tokens([6], 5), seeds=torch.tensor([2]), **given)
    assert torch.equal(whole[2, :, :30], alone[0])


@pytest.mark.parametrize("wrong", [{"scale": (0.0, 0.2)}, {"scale": (0.3, 0.2)}, {"aspect": (2.0, 1.0)}, {"count": 0}])
def test_shares_out_of_order_are_refused(wrong):
    given = {"count": 2, "scale": (0.2, 0.5), "aspect": (0.5, 2.0)} | wrong
    with pytest.raises(ValueError, match=r"objective.blocks=.*at least one block"):
        rectangles(tokens([9], 5), seeds=torch.arange(1), **given)
