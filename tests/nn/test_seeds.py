"""Counter-based random numbers: uniform, independent, and a function of the seed alone."""

import torch

from mmssl.nn.seeds import normal_per_clip, seed_of, uniform


def test_a_seed_gives_the_same_numbers_in_any_batch():
    seeds = torch.tensor([3, 2**62, 7])
    assert torch.equal(uniform(seeds, 50)[1], uniform(seeds[1:2], 50)[0])
    assert torch.equal(uniform(seeds, 50)[:, :20], uniform(seeds, 20))


def test_streams_and_neighboring_seeds_are_unrelated():
    first = uniform(torch.arange(2000), 200) - 0.5
    other = uniform(torch.arange(2000), 200, stream=1) - 0.5
    bound = 5 / (12 * (2000 * 200) ** 0.5)  # five deviations of a product of two centered uniforms
    assert abs((first * other).mean()) < bound
    assert abs((first[1:] * first[:-1]).mean()) < bound
    assert abs((first[:, 1:] * first[:, :-1]).mean()) < bound


def test_numbers_are_uniform():
    numbers = uniform(torch.arange(1000), 1000).flatten()
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert 50 < chi_square < 165  # 99 degrees of freedom: outside with a chance of about 1 in 30,000


def test_a_seed_of_words_is_the_same_on_every_machine():
    # blake2b of b"a\x1f1", first 8 bytes little-endian, halved
    assert seed_of("a", 1) == seed_of("a", "1")
    assert seed_of("a", 1) != seed_of("a1")
    assert 0 <= seed_of("x") < 2**63


def test_normal_vectors_are_each_clips_own_and_what_torch_draws_from_its_seed():
    drawn = normal_per_clip(torch.tensor([2, 0, 3]), 4, torch.tensor([7, 8, 9]))
    torch.manual_seed(9)
    assert torch.equal(drawn[2:], torch.randn(3, 4))
    assert torch.equal(drawn[:2], normal_per_clip(torch.tensor([2]), 4, torch.tensor([7])))
    assert len(drawn) == 5
