import math

import pytest
import torch

from mmssl.nn.quantizer import GumbelQuantizer, code_perplexity, perplexity


def build(groups: int = 2, codes: int = 3) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(dim_in=4, groups=groups, codes=codes, dim=6)


def test_a_vector_is_the_chosen_codewords_end_to_end() -> None:
    quantizer = build()
    out = quantizer(torch.randn(5, 4))
    for vector, (first, second) in zip(out.vectors, out.codes, strict=True):
        expected = torch.cat([quantizer.codebook[0, first], quantizer.codebook[1, second]])
        assert torch.equal(vector, expected)


def test_noise_decides_the_code_where_it_is_large_enough() -> None:
    quantizer = build()
    noise = torch.zeros(5, 2, 3)
    noise[:, 0, 2] = noise[:, 1, 1] = 1e4
    assert quantizer(torch.randn(5, 4), 1.0, noise).codes.tolist() == [[2, 1]] * 5


def test_temperature_and_noise_do_not_touch_the_soft_probabilities() -> None:
    """The diversity loss is about what the quantizer wants, not about what was drawn."""
    quantizer, x = build(), torch.randn(5, 4)
    assert torch.equal(quantizer(x, 0.5, torch.randn(5, 2, 3)).soft, quantizer(x, 2.0).soft)
    assert torch.equal(quantizer.probabilities(x), quantizer(x).soft)


def test_the_gradient_goes_straight_through_the_choice() -> None:
    """Worked by hand: one group, two codewords of width 1, scores (s, 0). The value is that of the chosen codeword,
    the gradient that of the softmax mixture: dv/ds = p (1 - p) (c0 - c1) / temperature."""
    quantizer = GumbelQuantizer(dim_in=1, groups=1, codes=2, dim=1)
    with torch.no_grad():
        quantizer.logits.weight.copy_(torch.tensor([[1.0], [0.0]]))
        quantizer.codebook.copy_(torch.tensor([[[3.0], [1.0]]]))
    x = torch.tensor([[0.4]], requires_grad=True)
    out = quantizer(x, temperature=0.8)
    out.vectors.sum().backward()
    p = 1 / (1 + math.exp(-0.4 / 0.8))
    assert out.vectors.item() == 3.0
    assert x.grad.item() == pytest.approx(p * (1 - p) * (3 - 1) / 0.8)
    assert quantizer.codebook.grad.flatten().tolist() == [1.0, 0.0]


def test_temperature_falls_with_updates_to_its_least() -> None:
    quantizer = GumbelQuantizer(dim_in=4, groups=1, codes=2, dim=2, temperature=(2.0, 0.5, 0.9))
    at = [quantizer.temperature_at(torch.tensor(n)).item() for n in (0, 1, 2, 13, 14, 400_000)]
    assert at == pytest.approx([2.0, 1.8, 1.62, 2 * 0.9**13, 0.5, 0.5])
    slow = GumbelQuantizer(dim_in=4, groups=1, codes=2, dim=2)
    # .999995 itself, kept in float32, would be off by a percent after 200,000 powers; its logarithm is not
    assert slow.temperature_at(torch.tensor(200_000)).item() == pytest.approx(2 * 0.999995**200_000, rel=1e-6)


def test_combined_codes_are_equal_exactly_where_all_groups_are() -> None:
    quantizer = build(groups=3, codes=4)
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    assert sorted(quantizer.combined(codes).tolist()) == list(range(64))


def test_perplexity_counts_codewords_in_use() -> None:
    probabilities = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert perplexity(probabilities).tolist() == pytest.approx([4.0, 2.0, 1.0])


def test_perplexity_has_a_finite_gradient_where_a_code_is_never_used() -> None:
    probabilities = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    perplexity(probabilities).backward()
    assert probabilities.grad.isfinite().all()


def test_code_perplexity_looks_at_each_group() -> None:
    codes = torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2]])
    assert code_perplexity(codes, 3).tolist() == pytest.approx([2.0, 1.0])


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantizer.dim=7: must be a multiple of groups=2"):
        GumbelQuantizer(dim_in=4, groups=2, codes=3, dim=7)
    with pytest.raises(ValueError, match=r"codes=320, groups=8"):
        GumbelQuantizer(dim_in=4, groups=8, codes=320, dim=8)
