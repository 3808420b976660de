from __future__ import annotations

import pytest
import torch

from mmssl.nn.heads import AttentionPool, ClassifierHead, first_pool, mean_pool

# two clips of one prefix vector and two and one real tokens; 9s stand where nothing may look
X = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]], [[9.0, 9.0], [5.0, 7.0], [9.0, 9.0]]])
LENGTHS = torch.tensor([3, 2])


def test_the_mean_is_over_real_tokens_without_the_prefix() -> None:
    torch.testing.assert_close(mean_pool(X, LENGTHS, 1), torch.tensor([[2.0, 4.0], [5.0, 7.0]]))


def test_a_sum_beyond_half_precision_still_has_a_mean() -> None:
    x = torch.full((1, 1000, 1), 100.0, dtype=torch.float16)
    assert mean_pool(x, torch.tensor([1000])).item() == 100.0


def test_the_class_token_is_the_first_prefix_vector() -> None:
    assert first_pool(X, LENGTHS, 1).tolist() == [[9.0, 9.0], [9.0, 9.0]]


def test_an_encoder_without_class_token_is_told_so() -> None:
    with pytest.raises(ValueError, match="no class token"):
        first_pool(X, LENGTHS, 0)


def attention() -> AttentionPool:
    torch.manual_seed(0)
    pool = AttentionPool(8, heads=2)
    torch.nn.init.normal_(pool.query)
    return pool


def test_attention_over_one_token_is_that_token_s_value() -> None:
    pool = attention()
    x = torch.randn(1, 1, 8)
    value = pool.kv(pool.norm(x[:, 0]))[:, 8:]
    torch.testing.assert_close(pool(x, torch.tensor([1])), pool.out(value))


def test_attention_reads_neither_prefix_nor_padding() -> None:
    pool = attention()
    x = torch.randn(2, 6, 8)
    lengths = torch.tensor([6, 4])
    before = pool(x, lengths, 1)
    x[:, 0], x[1, 4:] = 3.0, torch.nan
    torch.testing.assert_close(pool(x, lengths, 1), before)
    torch.testing.assert_close(pool(x[1:, :4], lengths[1:], 1), before[1:], rtol=1e-5, atol=1e-5)


def test_attention_tells_tokens_apart() -> None:
    pool = attention()
    x = torch.randn(1, 5, 8)
    assert (pool(x, torch.tensor([5])) - pool.out(pool.kv(pool.norm(x)).mean(1)[:, 8:])).abs().max() > 1e-3


def test_a_head_of_small_weights_starts_at_even_odds() -> None:
    torch.manual_seed(0)
    odds = ClassifierHead(16, 4, std=2e-5)(torch.randn(3, 16)).softmax(-1)
    torch.testing.assert_close(odds, torch.full((3, 4), 0.25), rtol=0, atol=1e-3)


def test_an_unknown_norm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose layer or none"):
        ClassifierHead(2, 2, norm="group")  # type: ignore[arg-type]
