"""Several sequences as one: nothing is lost, nothing between them, and a clip is the same alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmssl.nn.joined import JointPredictor, join, split
from mmssl.nn.masking import random_mask
from mmssl.nn.predictor import Predictor
from mmssl.types import Encoded, Tokens, valid_mask


def padded(lengths: list[int], dim: int = 3) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(len(lengths), max(lengths), dim, generator=made)
    return x * valid_mask(torch.tensor(lengths), max(lengths))[..., None], torch.tensor(lengths)


@pytest.mark.parametrize("lengths", [([4, 4], [2, 2]), ([4, 2, 3], [1, 5, 2]), ([3, 0], [2, 4])])
def test_rows_are_laid_end_to_end_and_taken_apart_again(lengths: tuple[list[int], list[int]]) -> None:
    (a, of_a), (b, of_b) = (padded(each) for each in lengths)
    joined, total = join([a, b], [of_a, of_b])
    assert total.tolist() == [m + n for m, n in zip(*lengths, strict=True)]
    for row, (m, n) in enumerate(zip(*lengths, strict=True)):
        assert torch.equal(
            joined[row], torch.cat([a[row, :m], b[row, :n], joined.new_zeros(len(joined[row]) - m - n, 3)])
        )
    back = split(joined, [of_a, of_b], [a.shape[1], b.shape[1]])
    assert torch.equal(back[0], a)
    assert torch.equal(back[1], b)


def test_rows_in_several_precisions_are_joined_in_the_finer() -> None:
    for lengths in ([2, 2], [1, 2]):
        joined, _ = join(
            [torch.ones(2, 2, 3), torch.ones(2, 2, 3).bfloat16()], [torch.tensor([2, 2]), torch.tensor(lengths)]
        )
        assert joined.dtype == torch.float32


def seen(lengths: list[int], seed: int) -> tuple[Encoded, Tokens, object]:
    x, n = padded(lengths, 8)
    coords = torch.arange(x.shape[1])[None, :, None].expand(len(x), -1, -1)
    tokens = Tokens(x, n, coords, ("t",), (x.shape[1],))
    plan = random_mask(n, ratio=0.5, seeds=torch.arange(len(x)) + seed)
    kept = torch.stack([row[keep] for row, keep in zip(x, plan.keep, strict=True)]) * plan.keep_valid[..., None]
    return Encoded(kept, plan.keep_lengths, {}, 0), tokens, plan


def test_of_one_modality_it_is_the_plain_decoder() -> None:
    torch.manual_seed(0)
    plain = Predictor(dim_in=8, dim=8, depth=2, heads=2, out_dim=5)
    joint = JointPredictor(dim_in=8, dim=8, depth=2, heads=2, out_dims={"a": 5})
    joint.load_state_dict(plain.state_dict(), strict=False)
    joint.outs["a"].load_state_dict(plain.out.state_dict())
    torch.nn.init.zeros_(joint.kinds["a"])
    encoded, tokens, plan = seen([6, 3, 5], 0)
    assert torch.allclose(
        joint({"a": encoded}, {"a": tokens}, {"a": plan})["a"], plain(encoded, tokens, plan), atol=1e-6
    )


def test_each_modality_sees_the_other_and_a_clip_no_other_clip() -> None:
    torch.manual_seed(0)
    joint = JointPredictor(dim_in=8, dim=8, depth=1, heads=2, out_dims={"a": 5, "b": 2})
    parts = {"a": seen([6, 3], 0), "b": seen([2, 4], 9)}

    def predicted(x: Tensor) -> dict[str, Tensor]:
        encoded = {name: each[0] for name, each in parts.items()}
        encoded["a"] = Encoded(x, encoded["a"].lengths, {}, 0)
        return joint(encoded, *({name: each[i] for name, each in parts.items()} for i in (1, 2)))

    before = predicted(parts["a"][0].x)
    assert before["a"].shape == (int(parts["a"][2].masked.sum()), 5)
    changed = parts["a"][0].x.clone()
    changed[0, 0] += 1
    after = predicted(changed)
    for name in "ab":
        first = int(parts[name][2].masked[0].sum())
        assert not torch.allclose(after[name][:first], before[name][:first])
        assert torch.equal(after[name][first:], before[name][first:])
