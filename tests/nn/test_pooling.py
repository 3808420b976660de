import pytest
import torch
from torch import Tensor

from mmssl.nn.pooling import Pool
from mmssl.types import Encoded, Tokens


def along_time(*lengths: int) -> tuple[Encoded, Tokens]:
    """Clips of these lengths whose token i is (i, i * i), zero past each length."""
    size = max(lengths)
    place = torch.arange(size)
    x = torch.stack([place, place * place], 1).float() * (place[None] < torch.tensor(lengths)[:, None])[..., None]
    counts = torch.tensor(lengths)
    tokens = Tokens(x, counts, place[None, :, None].expand(len(lengths), -1, -1), ("t",), (size,))
    return Encoded(x, counts, {}, 0), tokens


def in_a_grid(tall: int, wide: int, n_prefix: int = 0) -> tuple[Encoded, Tokens]:
    """One picture whose tokens hold their number, after a prefix of 100s."""
    x = torch.arange(tall * wide).float()[None, :, None]
    rows, columns = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    coords = torch.stack([rows, columns], -1).view(1, -1, 2)
    tokens = Tokens(x, torch.tensor([tall * wide]), coords, ("h", "w"), (tall, wide))
    with_prefix = torch.cat([torch.full((1, n_prefix, 1), 100.0), x], 1)
    return Encoded(with_prefix, tokens.lengths + n_prefix, {}, n_prefix), tokens


def pooled(name: str, given: tuple[Encoded, Tokens]) -> Tensor:
    return Pool.named(name)(given[0].x, *given)


def test_mean_and_deviation_by_hand() -> None:
    assert pooled("mean", along_time(3)).tolist() == [[1.0, pytest.approx(5 / 3)]]
    # deviation of (0, 1, 2) and of (0, 1, 4), dividing by their number
    deviations = (2 / 3) ** 0.5, (26 / 9) ** 0.5
    assert pooled("mean+std", along_time(3))[0].tolist() == pytest.approx([1.0, 5 / 3, *deviations])
    assert pooled("mean+std", along_time(1))[0].tolist() == [0.0] * 4


def test_slices_are_of_the_clips_own_length() -> None:
    # 6 tokens in 3 slices, and 4 tokens beside them, which share where it does not come out even: 0-1, 1-2, 2-3
    both = pooled("slices:3", along_time(6, 4))
    assert both[0].tolist() == pytest.approx([0.5, 0.5, 2.5, 6.5, 4.5, 20.5])
    assert both[1].tolist() == pytest.approx([0.5, 0.5, 1.5, 2.5, 2.5, 6.5])
    assert torch.equal(pooled("slices:3", along_time(4))[0], both[1])
    # no slice of a clip with fewer tokens than slices is empty
    assert pooled("slices:4", along_time(2))[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_slices_are_those_of_adaptive_pooling() -> None:
    for length in (5, 7, 11):
        encoded, tokens = along_time(length, 13)
        expected = torch.nn.functional.adaptive_avg_pool1d(tokens.x[:1, :length].mT, 4).mT.flatten()
        assert pooled("slices:4", (encoded, tokens))[0].tolist() == pytest.approx(expected.tolist())


def test_each_slice_has_its_deviation_beside_its_mean() -> None:
    assert pooled("slices:2+std", along_time(4))[0].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 2.5, 6.5, 0.5, 2.5])


def test_deviation_of_features_far_from_zero_is_not_lost() -> None:
    encoded, tokens = along_time(3)
    moved = Encoded(encoded.x + 1e4, encoded.lengths, {}, 0)
    assert Pool.named("mean+std")(moved.x, moved, tokens)[0, 2:].tolist() == pytest.approx(
        [(2 / 3) ** 0.5, (26 / 9) ** 0.5], rel=1e-3
    )


def test_regions_of_a_picture_run_row_by_row() -> None:
    # 0 1 2 3 / 4 5 6 7
    assert pooled("grid:2x2", in_a_grid(2, 4)).tolist() == [[0.5, 2.5, 4.5, 6.5]]
    assert pooled("grid:1x2", in_a_grid(2, 4)).tolist() == [[2.5, 4.5]]
    assert pooled("grid:2x1", in_a_grid(2, 4, n_prefix=2)).tolist() == [[1.5, 5.5]]


def test_a_grid_goes_along_the_last_axes_of_each_clip() -> None:
    # 3 steps of 2 bands that hold 0 to 5, and beside them 1 step
    coords = torch.tensor([[t, f] for t in range(3) for f in range(2)])[None].expand(2, -1, -1)
    x = torch.arange(6).float()[None, :, None] * torch.tensor([[1], [0]])[..., None]
    x[1, :2, 0] = torch.tensor([7.0, 9.0])
    sound = Tokens(x, torch.tensor([6, 2]), coords, ("t", "f"), (3, 2))
    encoded = Encoded(x, sound.lengths, {}, 0)
    assert pooled("grid:1x2", (encoded, sound)).tolist() == [[2.0, 3.0], [7.0, 9.0]]
    assert pooled("grid:2x1", (encoded, sound)).tolist() == [[1.5, 3.5], [8.0, 8.0]]
    # two frames of 1 x 2
    coords = torch.tensor([[t, 0, w] for t in range(2) for w in range(2)])[None]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    video = Tokens(x, torch.tensor([4]), coords, ("t", "h", "w"), (2, 1, 2))
    encoded = Encoded(x, video.lengths, {}, 0)
    assert pooled("grid:1x2", (encoded, video)).tolist() == [[2.0, 3.0]]
    assert pooled("grid:2x1x1", (encoded, video)).tolist() == [[1.5, 3.5]]


def test_prefix_is_no_token_and_its_first_is_the_class() -> None:
    assert pooled("mean", in_a_grid(2, 2, n_prefix=1)).tolist() == [[1.5]]
    assert pooled("class", in_a_grid(2, 2, n_prefix=1)).tolist() == [[100.0]]
    with pytest.raises(ValueError, match="no class token"):
        pooled("class", in_a_grid(2, 2))


@pytest.mark.parametrize(
    "name", ["max", "slices", "slices:0", "grid:2", "grid:2x", "grid:2x2x2x2", "class+std", "last+std", "mean+", ""]
)
def test_a_pooling_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="choose mean, class, last, slices"):
        Pool.named(name)


def test_a_pooling_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs tokens along t"):
        pooled("slices:2", in_a_grid(2, 2))
    with pytest.raises(ValueError, match="needs tokens along 2 axes, and these lie along t"):
        pooled("grid:2x2", along_time(3))


def test_the_last_real_token_is_the_clips_own() -> None:
    encoded, tokens = along_time(3, 1)
    assert torch.equal(pooled("last", (encoded, tokens)), torch.stack([encoded.x[0, 2], encoded.x[1, 0]]))
