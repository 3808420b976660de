"""JEPA: blocks hidden from their context, one encoding for all questions, the error worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.jepa import JEPA
from mmssl.types import Batch, Raw, Tokens

VIDEO = {"blocks": [(3, 0.15, 0.15), (1, 0.6, 0.6)], "context": (1.0, 1.0), "separately": False, "error": "l1"}


def build(**settings: Any) -> JEPA:
    torch.manual_seed(0)
    encoder = Encoder(
        Patches(dim=8, size=[2, 2], channels=1, mean=[0.5], std=[0.3]),
        Transformer(dim=8, depth=2, heads=2),
        SinCos(8),
        prefix=1,
    )
    return JEPA(encoder, **({"predictor_dim": 8, "predictor_depth": 1, "predictor_heads": 2} | settings))


def pictures(n: int = 3, height: int = 12, width: int = 16) -> Batch:
    data = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, torch.arange(n) + 5)


def sounds(lengths: list[int]) -> Tokens:
    """Nothing but lengths and a grid."""
    size = max(lengths)
    coords = torch.arange(size)[None, :, None].expand(len(lengths), -1, -1)
    return Tokens(torch.zeros(len(lengths), size, 8), torch.tensor(lengths), coords, ("t",), (size,))


@pytest.mark.parametrize("settings", [{}, VIDEO], ids=["image", "video"])
def test_what_is_asked_is_hidden_and_everything_else_of_a_video_is_seen(settings: dict[str, Any]) -> None:
    objective = build(**settings)
    tokens = objective.encoder.tokens(pictures(20).raw)
    views = objective.draw(tokens, torch.arange(20))
    sets = len(objective.blocks)
    assert views.plan.rows.tolist() == list(range(20)) * sets
    assert views.asked.any(1).all()
    assert not (views.asked & ~views.plan.masked[views.context]).any()
    if settings:
        # one question for each set, and its context is all the rest
        assert len(views.asked) == 20 * 2
        assert torch.equal(views.asked, views.plan.masked[views.context])
    else:
        assert len(views.asked) == 20 * 4
        assert views.context.tolist() == [clip for clip in range(20) for _ in range(4)]
        union = torch.stack([views.asked[views.context == clip].any(0) for clip in range(20)])
        visible = (~views.plan.masked).sum(1)
        # the context's block is .85 to 1 of 6 x 8 tokens, give or take the rounding of its sides
        assert (visible + union.sum(1) >= 0.85 * 48 - 7).all()


def test_a_context_is_never_empty() -> None:
    objective = build(blocks=[(4, 0.9, 1.0)], context=(0.2, 0.3))
    lengths = [1, 2, 3, 30]
    views = objective.draw(sounds(lengths), torch.arange(4))
    assert (views.plan.keep_lengths > 0).all()
    assert not (views.asked & ~views.plan.masked[views.context]).any()
    # of a clip of one token nothing is left to ask
    assert not views.asked[views.context == 0].any()
    assert all(views.asked[views.context == row].any() for row in (1, 2, 3))


@pytest.mark.parametrize("settings", [{}, VIDEO], ids=["image", "video"])
def test_the_loss_of_every_question_worked_one_by_one(settings: dict[str, Any]) -> None:
    objective, batch = build(**settings), pictures()
    tokens = objective.encoder.tokens(batch.raw)
    views = objective.draw(tokens, batch.seeds)
    teacher = objective.teacher.module
    whole = teacher(teacher.tokens(batch.raw)).x[:, 1:]
    target = (whole - whole.mean(-1, keepdim=True)) / (whole.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    total = torch.zeros(())
    for context, asked in zip(views.context.tolist(), views.asked, strict=True):
        clip = int(views.plan.rows[context])
        raw = Raw(batch.raw.data[clip : clip + 1], torch.ones(1, dtype=torch.int64), ["a"])
        alone = objective.encoder.tokens(raw)
        plan = plan_of(views.plan.masked[context][None], alone.lengths)
        encoded = objective.encoder(alone, plan, "drop")
        predicted = objective.predictor(encoded, alone, plan, predicted=asked[None])
        error = F.l1_loss if settings else F.smooth_l1_loss
        total = total + error(predicted, target[clip][asked]) * asked.sum()
    loss = objective(batch)
    assert loss.count == int(views.asked.sum())
    torch.testing.assert_close(loss.total, total, rtol=1e-4, atol=1e-5)


def test_every_context_is_encoded_once() -> None:
    objective = build()
    rows: list[int] = []
    objective.encoder.transformer.register_forward_hook(lambda part, given, out: rows.append(len(given[0])))
    objective.predictor.transformer.register_forward_hook(lambda part, given, out: rows.append(len(given[0])))
    objective(pictures())
    assert rows == [3, 12]


def test_the_teacher_is_an_average_of_the_whole_encoder() -> None:
    objective = build(ema_decay=0.5, ema_decay_end=0.9, ema_updates=4)
    assert set(objective.teacher.averaged) == {name for name, _ in objective.encoder.named_parameters()}
    before = objective.encoder.prefix.detach().clone()
    with torch.no_grad():
        objective.encoder.prefix.zero_()
    objective.after_step(1)
    torch.testing.assert_close(objective.teacher.module.prefix, 0.6 * before)
    objective(pictures()).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.blocks=\[4, 0.5, 0.2\]"):
        build(blocks=[(4, 0.5, 0.2)])(pictures())
