from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmssl.nn.masking import plan_of, random_mask
from mmssl.nn.positions import sincos
from mmssl.nn.predictor import Predictor
from mmssl.types import Encoded, MaskPlan, Tokens


def line(lengths: list[int], dim: int = 4) -> Tokens:
    size = max(lengths)
    coords = torch.arange(size)[None, :, None].expand(len(lengths), -1, -1)
    return Tokens(
        x=torch.zeros(len(lengths), size, dim), lengths=torch.tensor(lengths), coords=coords, axes=("t",), grid=(size,)
    )


def encoded_for(plan: MaskPlan, n_prefix: int = 0, dim: int = 4) -> Encoded:
    """Random vectors for what a plan keeps, zero past each length."""
    lengths = plan.keep_lengths + n_prefix
    size = plan.keep.shape[1] + n_prefix
    x = torch.randn(len(lengths), size, dim, generator=torch.Generator().manual_seed(1))
    x[torch.arange(size) >= lengths[:, None]] = 0
    return Encoded(x=x, lengths=lengths, layers={}, n_prefix=n_prefix)


def predictor(depth: int = 1) -> Predictor:
    torch.manual_seed(0)
    return Predictor(dim_in=4, dim=8, depth=depth, heads=2, out_dim=3)


def test_without_blocks_a_hidden_token_is_the_mask_vector_at_its_place() -> None:
    part = predictor(depth=0)
    tokens = line([4])
    plan = plan_of(torch.tensor([[False, True, False, True]]), tokens.lengths)
    out = part(encoded_for(plan, n_prefix=1), tokens, plan)
    places = torch.tensor([[1], [3]])
    expected = part.out(part.transformer.norm(part.mask_vector + sincos(places, 8)))
    torch.testing.assert_close(out, expected)


def test_each_visible_token_stands_at_its_own_place() -> None:
    """Moving a visible token's place, and its vector with it, must not be the same as leaving it."""
    part = predictor()
    tokens = line([4])
    plan = plan_of(torch.tensor([[False, True, False, True]]), tokens.lengths)
    encoded = encoded_for(plan)
    swapped = Encoded(x=encoded.x.flip(1), lengths=encoded.lengths, layers={}, n_prefix=0)
    here, there = part(encoded, tokens, plan), part(swapped, tokens, plan)
    assert (here - there).abs().max() > 1e-3

    # and by hand: the whole row, filled in one token after another
    row = torch.stack([part.embed(encoded.x[0, 0]), part.mask_vector, part.embed(encoded.x[0, 1]), part.mask_vector])
    h, _ = part.transformer((row + sincos(tokens.coords[0], 8))[None])
    torch.testing.assert_close(here, part.out(h[0, [1, 3]]))


def test_predictions_come_in_row_major_order_and_are_the_same_alone_and_in_a_ragged_batch() -> None:
    part = predictor()
    tokens = line([5, 3, 4])
    masked = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    plan = plan_of(masked, tokens.lengths)
    encoded = encoded_for(plan, n_prefix=2)
    together = part(encoded, tokens, plan).split([3, 1, 2])
    for i, n in enumerate([5, 3, 4]):
        alone = line([n])
        own = plan_of(masked[i : i + 1, :n], alone.lengths)
        length = int(encoded.lengths[i])
        one = Encoded(x=encoded.x[i : i + 1, :length], lengths=encoded.lengths[i : i + 1], layers={}, n_prefix=2)
        torch.testing.assert_close(together[i], part(one, alone, own), rtol=1e-5, atol=1e-5)


def test_copies_of_a_clip_are_predicted_each_by_its_own_mask() -> None:
    part = predictor()
    tokens = line([4, 3])
    masked = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    lengths = torch.tensor([4, 4, 3, 3])
    plan = plan_of(masked, lengths, rows=torch.tensor([0, 0, 1, 1]))
    encoded = encoded_for(plan)
    out = part(encoded, tokens, plan).split([1, 2, 2, 1])
    last = plan_of(masked[3:, :3], lengths[3:])
    one = Encoded(x=encoded.x[3:, :2], lengths=encoded.lengths[3:], layers={}, n_prefix=0)
    torch.testing.assert_close(out[3], part(one, line([3]), last), rtol=1e-5, atol=1e-5)


def test_each_clip_is_predicted_at_its_own_coordinates() -> None:
    part = predictor()
    tokens = line([4, 4])
    apart = replace(tokens, coords=torch.stack([tokens.coords[0], tokens.coords[0] + 7]))
    plan = plan_of(torch.tensor([[False, True, False, True]] * 2), tokens.lengths)
    encoded = encoded_for(plan)
    here, there = part(encoded, tokens, plan), part(encoded, apart, plan)
    torch.testing.assert_close(there[:2], here[:2])
    assert (there[2:] - here[2:]).abs().max() > 1e-3


def test_gradients_reach_the_mask_vector_and_every_visible_token() -> None:
    part = predictor()
    tokens = line([4])
    plan = plan_of(torch.tensor([[False, True, False, True]]), tokens.lengths)
    encoded = encoded_for(plan, n_prefix=1)
    encoded.x.requires_grad_(True)
    part(encoded, tokens, plan).square().sum().backward()
    assert part.mask_vector.grad is not None
    assert part.mask_vector.grad.abs().max() > 0
    assert encoded.x.grad is not None
    assert (encoded.x.grad.abs().amax(-1) > 0).all()


def test_noise_moves_the_places_of_hidden_tokens_by_the_map_of_visible_ones() -> None:
    part = predictor(depth=0)
    tokens = line([4, 3])
    plan = plan_of(torch.tensor([[False, True, False, True], [True, False, False, False]]), tokens.lengths)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    out = part(encoded_for(plan, n_prefix=1), tokens, plan, noise=noise)
    moved = part.mask_vector + sincos(torch.tensor([[1], [3], [0]]), 8) + noise @ part.embed.weight.T
    torch.testing.assert_close(out, part.out(part.transformer.norm(moved)))


def plane(steps: list[int], rows: int, dim: int = 4) -> Tokens:
    """Tokens on a grid of time and one other axis."""
    grid = (max(steps), rows)
    coords = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(rows))[None].expand(len(steps), -1, -1)
    lengths = rows * torch.tensor(steps)
    x = torch.zeros(len(steps), grid[0] * rows, dim)
    return Tokens(x=x, lengths=lengths, coords=coords, axes=("t", "f"), grid=grid)


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("global_blocks", [0, 1])
def test_predictions_in_windows_are_the_same_alone_and_in_a_ragged_batch(
    share: float | None, global_blocks: int
) -> None:
    torch.manual_seed(0)
    settings = {"window": [2, 2], "global_blocks": global_blocks}
    part = Predictor(dim_in=4, dim=8, depth=3, heads=2, out_dim=3, **settings)
    steps = [5, 2, 3]
    tokens = plane(steps, 3)
    plan = random_mask(tokens.lengths, ratio=0.6, seeds=torch.arange(3))
    encoded = encoded_for(plan, n_prefix=2)
    chosen = None
    if share is not None:  # those that a second mask leaves to the decoder
        chosen = plan.masked & (torch.rand(plan.masked.shape, generator=torch.Generator().manual_seed(3)) < share)
    wanted = plan.masked if chosen is None else chosen
    together = part(encoded, tokens, plan, predicted=chosen).split(wanted.sum(1).tolist())
    for i, n in enumerate(steps):
        alone = plane([n], 3)
        own = plan_of(plan.masked[i : i + 1, : 3 * n], alone.lengths)
        length = int(encoded.lengths[i])
        one = Encoded(x=encoded.x[i : i + 1, :length], lengths=encoded.lengths[i : i + 1], layers={}, n_prefix=2)
        found = part(one, alone, own, predicted=None if chosen is None else chosen[i : i + 1, : 3 * n])
        torch.testing.assert_close(together[i], found, rtol=1e-5, atol=1e-5)


def test_a_window_over_all_tokens_is_the_whole_clip_without_its_class_token() -> None:
    torch.manual_seed(0)
    windowed = Predictor(dim_in=4, dim=8, depth=1, heads=2, out_dim=3, window=[4, 3])
    plain = Predictor(dim_in=4, dim=8, depth=1, heads=2, out_dim=3)
    plain.load_state_dict(windowed.state_dict())
    tokens = plane([4, 3], 3)
    plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(2))
    encoded = encoded_for(plan, n_prefix=1)
    bare = Encoded(x=encoded.tokens, lengths=encoded.lengths - 1, layers={}, n_prefix=0)
    torch.testing.assert_close(windowed(encoded, tokens, plan), plain(bare, tokens, plan), rtol=1e-5, atol=1e-5)
    assert (windowed(encoded, tokens, plan) - plain(encoded, tokens, plan)).abs().max() > 1e-4


@pytest.mark.parametrize("settings", [{"window": [2, 0]}, {"window": [2, 2], "global_blocks": 2}])
def test_windows_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"decoder_window=\[2, .*at least 1 token .* of 1 blocks 0 to 1 can be global"):
        Predictor(dim_in=4, dim=8, depth=1, heads=2, out_dim=3, **settings)
