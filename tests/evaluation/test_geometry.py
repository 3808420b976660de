import math

import pytest
import torch

from mmssl.evaluation.geometry import measure_rank, rank_me, spread


def test_rank_by_hand() -> None:
    # singular values 3 and 1: p = 3/4 and 1/4, each with epsilon added
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    p = [0.75 + 1e-7, 0.25 + 1e-7]
    assert rank_me(features) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-12)
    # four equal ones, and on a line: epsilon alone keeps it from 4 and from 1
    assert rank_me(torch.eye(4)) == pytest.approx(4.0, rel=1e-6)
    line = torch.arange(1.0, 6.0)[:, None] * torch.tensor([[1.0, 2.0, 2.0]])
    assert rank_me(line) == pytest.approx(math.exp(-2e-7 * math.log(1e-7) - 1e-7), rel=1e-7)
    assert rank_me(line, epsilon=0.1) == pytest.approx(math.exp(-1.1 * math.log(1.1) - 0.2 * math.log(0.1)), rel=1e-9)


def test_rank_knows_neither_scale_nor_rotation() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 6).double()
    turn = torch.linalg.qr(torch.randn(6, 6).double())[0]
    assert rank_me(features @ turn * 100) == pytest.approx(rank_me(features), rel=1e-9)


def test_spread_by_hand() -> None:
    # two directions: each dimension is 0 half of the time and 1 the other half
    assert spread(torch.tensor([[2.0, 0.0], [0.0, 5.0]])) == pytest.approx(0.5)
    # one direction, however long
    assert spread(torch.tensor([[1.0, 1.0], [3.0, 3.0]])) == pytest.approx(0.0, abs=1e-12)
    torch.manual_seed(0)
    assert spread(torch.randn(20_000, 64)) == pytest.approx(1 / 8, rel=1e-2)


def test_both_come_with_interval_and_protocol() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 5) * torch.tensor([5.0, 3.0, 1.0, 0.3, 0.1])
    found = measure_rank(features)
    assert found["rank_me"].value == rank_me(features)
    assert found["spread"].value == spread(features)
    for score in found.values():
        assert score.low < score.value < score.high
        assert " % (" not in str(score)
    assert "200 x 5 features, not centered, of at most 5" in found["rank_me"].protocol
    # more clips, less doubt
    wide = found["rank_me"].high - found["rank_me"].low
    many = measure_rank(torch.randn(3200, 5) * torch.tensor([5.0, 3.0, 1.0, 0.3, 0.1]))["rank_me"]
    assert many.high - many.low < wide


@pytest.mark.parametrize("measured", [rank_me, spread, measure_rank])
def test_features_without_a_rank_are_refused(measured: object) -> None:
    for features in (torch.zeros(0, 3), torch.full((12, 3), torch.inf)):
        with pytest.raises(ValueError, match="rank: "):
            measured(features)  # type: ignore[operator]
    with pytest.raises(ValueError, match="not all 0"):
        rank_me(torch.zeros(12, 3))
