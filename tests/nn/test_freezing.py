import pytest
import torch

from mmssl.nn.freezing import FreezeSchedule


def frozen(updates: range, **settings: int) -> list[int]:
    schedule = FreezeSchedule(**({"depth": 3, "freeze_updates": 0, "unfreeze_every": 0} | settings))
    return [schedule.frozen(torch.tensor(made)) for made in updates]


def test_blocks_begin_one_after_the_other_from_the_last_down_and_what_precedes_them_at_the_end() -> None:
    # of layers 0 to 3: none in the first two updates, then block 3, 2, 1 and the input for three updates each
    expected = [4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert frozen(range(14), freeze_updates=2, unfreeze_every=3) == expected
    assert frozen(range(5), unfreeze_every=1) == [3, 2, 1, 0, 0]


def test_without_steps_between_them_all_layers_begin_at_once() -> None:
    assert frozen(range(4), freeze_updates=2) == [4, 4, 0, 0]
    assert frozen(range(3)) == [0, 0, 0]


@pytest.mark.parametrize("name", ["freeze_updates", "unfreeze_every"])
def test_a_negative_number_of_updates_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"objective.{name}=-1: counts updates, so give at least 0"):
        frozen(range(1), **{name: -1})
