import math

import pytest

from mmssl.training.schedule import SCHEDULES, constant, linear, polynomial, tri_stage, warmup_cosine


@pytest.mark.parametrize("schedule", [constant, linear, polynomial, warmup_cosine])
def test_warmup_is_a_line_whose_last_update_has_the_full_rate(schedule) -> None:
    assert [schedule(step, steps=100, warmup=4) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", [constant, linear, polynomial, warmup_cosine])
def test_a_warmup_below_one_is_a_share_of_the_run(schedule) -> None:
    for step in range(1, 101):
        assert schedule(step, steps=100, warmup=0.2) == schedule(step, steps=100, warmup=20)


def test_constant_stays_at_the_full_rate() -> None:
    assert [constant(step, steps=10) for step in (1, 5, 10, 20)] == [1.0] * 4


def test_cosine_is_at_its_middle_halfway_down() -> None:
    # 10 updates up, 90 down; at update 55 half of them are done, at 40 a third: (1 + cos 60 degrees) / 2 = 3/4
    assert math.isclose(warmup_cosine(55, steps=100, warmup=10), 0.5)
    assert math.isclose(warmup_cosine(40, steps=100, warmup=10), 0.75)
    assert math.isclose(warmup_cosine(55, steps=100, warmup=10, final=0.2), 0.6)


def test_polynomial_and_linear_at_hand_worked_places() -> None:
    assert math.isclose(linear(55, steps=100, warmup=10), 0.5)
    assert math.isclose(polynomial(55, steps=100, warmup=10, power=2.0), 0.25)
    assert math.isclose(linear(70, steps=100, warmup=10, final=0.1), 0.1 + 0.9 / 3)


def test_tri_stage_goes_up_stays_and_falls_exponentially() -> None:
    def at(step: int) -> float:
        return tri_stage(step, steps=100, phases=[0.1, 0.4, 0.5], initial=0.01, final=0.04)

    assert math.isclose(at(5), 0.01 + 0.99 / 2)
    assert [at(step) for step in (10, 11, 30, 50)] == [1.0] * 4
    assert math.isclose(at(75), 0.2)  # halfway down: the square root of .04
    assert math.isclose(at(100), 0.04)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_the_last_update_has_the_final_multiplier_and_later_ones_too(name: str) -> None:
    for step in (40, 41, 1000):
        assert math.isclose(SCHEDULES[name](step, steps=40, final=0.03), 0.03)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule.warmup=500: must be from 0 to the 100 updates"):
        warmup_cosine(1, steps=100, warmup=500)


def test_phases_that_are_not_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule.phases=\[0.5, 0.6, 0.1\]"):
        tri_stage(1, steps=10, phases=[0.5, 0.6, 0.1])


def test_a_final_rate_that_an_exponential_never_reaches_and_a_power_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule.final=0: must be above 0"):
        tri_stage(1, steps=10, final=0.0)
    with pytest.raises(ValueError, match=r"schedule.power=-1: must be above 0"):
        polynomial(1, steps=10, power=-1.0)
