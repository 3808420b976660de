"""The pieces of `make demo`: what it shows is only worth something if its splits are clean."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_digit_is_in_two_splits(demo):
    parts = demo.split(1797, np.random.default_rng(0))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    assert {name: len(part) for name, part in parts.items()} == {"test": 400, "valid": 200, "train": 1197}


def test_a_scattered_digit_is_whole_and_goes_everywhere(demo):
    digits = np.random.default_rng(0).integers(1, 17, (3, 8, 8))
    copies = demo.scatter(digits, 300, np.random.default_rng(1), canvas=16)
    assert copies.shape == (3, 300, 16, 16)
    places = set()
    for picture in copies[1]:
        rows, columns = np.nonzero(picture)
        top, left = rows.min(), columns.min()
        assert np.allclose(picture[top : top + 8, left : left + 8] / 15.9375, digits[1], atol=0.05)
        assert np.count_nonzero(picture) == 64
        places.add((int(top), int(left)))
    assert {0, 8} <= {top for top, _ in places}
    assert {0, 8} <= {left for _, left in places}
