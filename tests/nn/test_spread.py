from __future__ import annotations

import torch

from mmssl.nn.spread import mean_distance, spread, token_spread
from mmssl.types import Encoded


def test_the_spread_is_the_mean_of_the_deviations_of_each_value() -> None:
    # 1, 3: deviation 1; 5, 5: deviation 0
    torch.testing.assert_close(spread(torch.tensor([[1.0, 5.0], [3.0, 5.0]])), torch.tensor(0.5))


def test_items_that_are_all_the_same_have_none() -> None:
    assert spread(torch.full((100, 3), 0.1)).item() < 1e-6


def test_no_items_have_none() -> None:
    assert spread(torch.zeros(0, 3)).item() == 0


def test_tokens_are_compared_without_prefix_and_padding() -> None:
    x = torch.tensor([[[9.0], [1.0], [3.0]], [[8.0], [2.0], [7.0]]])
    encoded = Encoded(x=x, lengths=torch.tensor([3, 2]), layers={}, n_prefix=1)
    # 1, 3 and 2: variance 2 / 3
    torch.testing.assert_close(token_spread(encoded), torch.tensor((2 / 3) ** 0.5))


def test_half_precision_tokens_are_compared_in_float32() -> None:
    x = torch.full((4096, 1), 100.0, dtype=torch.float16)
    x[::2] = 101.0
    torch.testing.assert_close(spread(x), torch.tensor(0.5))


def test_the_mean_distance_is_the_error_of_predicting_the_mean() -> None:
    # 1, 3, 8 lie 3, 1 and 4 from their mean 4; 5, 5, 5 nowhere
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    torch.testing.assert_close(mean_distance(values), torch.tensor(8 / 6))
    assert mean_distance(torch.zeros(0, 3)).item() == 0
