"""Codes become the sum of their embeddings, and what is no code of theirs is told."""

import pytest
import torch

from mmssl.modalities.codes.frontend import Codes
from mmssl.types import Raw


def raw(lengths: list[int], rate: float | None = 50.0) -> Raw:
    torch.manual_seed(0)
    data = torch.stack([torch.randint(0, 4, (len(lengths), max(lengths))) for _ in range(2)], 1)
    return Raw(data, torch.tensor(lengths), [f"c{i}" for i in range(len(lengths))], rate)


def test_a_token_is_the_sum_of_an_embedding_of_each_codebook() -> None:
    frontend, clips = Codes(dim=6, codes=[5, 4], rate=50), raw([3, 5])
    tokens = frontend(clips)
    first, second = (table.weight for table in frontend.tables)
    for row, length in enumerate([3, 5]):
        for step in range(length):
            one, other = clips.data[row, :, step].tolist()
            assert torch.equal(tokens.x[row, step], first[one] + second[other])  # type: ignore[index, operator]
    assert not tokens.x[0, 3:].any()
    assert (tokens.step_ms, tokens.span_ms) == (20.0, 20.0)
    assert frontend.codes == (5, 4)


def test_the_gradient_of_the_tables_is_scaled_and_stopped_at_zero() -> None:
    gradients = []
    for factor in (1.0, 0.25, 0.0):
        torch.manual_seed(0)
        frontend = Codes(dim=6, codes=[5, 4], rate=50, grad_mult=factor)
        x = frontend(raw([4])).x
        if x.requires_grad:
            x.square().sum().backward()
        gradients.append([table.weight.grad for table in frontend.tables])
    whole, part, none = gradients
    assert all(torch.allclose(a * 0.25, b) for a, b in zip(whole, part, strict=True))  # type: ignore[operator, arg-type]
    assert none == [None, None]


def test_other_codes_than_the_frontends_are_refused() -> None:
    frontend = Codes(dim=6, codes=[5, 4, 3], rate=50)
    with pytest.raises(ValueError, match="c0: codes of 2 codebooks at 50 a second, but this frontend reads 3 at 50"):
        frontend(raw([3]))
    with pytest.raises(ValueError, match="2 codebooks at 100 a second, but this frontend reads 2 at 50"):
        Codes(dim=6, codes=[5, 4], rate=50)(raw([3], rate=100.0))
    with pytest.raises(ValueError, match=r"frontend.codes=\[5, 1\]"):
        Codes(dim=6, codes=[5, 1], rate=50)
