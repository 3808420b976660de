"""data2vec 2.0: copies that share one target, a student that sees no hidden token, the utterance loss by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import unpatch
from mmssl.nn.block_masks import block_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.data2vec2 import Data2Vec2
from mmssl.types import Batch, Raw


def build(prefix: int = 1, **settings: Any) -> Data2Vec2:
    torch.manual_seed(0)
    encoder = Encoder(
        Patches(dim=8, size=[2, 2], channels=1, mean=[0.5], std=[0.3]),
        Transformer(dim=8, depth=3, heads=2, norm="post"),
        SinCos(8),
        prefix=prefix,
    )
    given = {"mask_size": 2, "clones": 3, "decoder_dim": 8, "decoder_depth": 2, "decoder_groups": 2, "top_k": 2}
    return Data2Vec2(encoder, **(given | settings))


def pictures(n: int = 3, height: int = 8, width: int = 12) -> Batch:
    data = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, torch.arange(n) + 5)


def test_one_pass_of_the_teacher_serves_all_copies() -> None:
    objective, batch = build(), pictures()
    rows: list[int] = []
    objective.teacher.module.transformer.register_forward_hook(lambda part, given, out: rows.append(len(given[0])))
    student: list[int] = []
    objective.encoder.transformer.register_forward_hook(lambda part, given, out: student.append(given[0].shape))
    loss = objective(batch)
    assert rows == [3]
    # 24 tokens of which a fifth, rounded, is visible, and the class token
    assert student == [(9, 1 + 5, 8)]
    assert loss.count == 9 * 19


def test_the_loss_of_all_copies_is_that_of_each_against_one_target() -> None:
    objective, batch = build(utterance_weight=0.5), pictures()
    tokens = objective.encoder.tokens(batch.raw)
    target = objective.target(batch.raw, tokens)
    plan = block_mask(tokens, ratio=0.8, size=2, seeds=batch.seeds, clones=3, inverse=True)
    encoded = objective.encoder(tokens, plan, "drop")
    noise = objective._noise(plan, batch.seeds, encoded.x)
    predictions = objective.decoder(encoded, tokens, plan, noise).split(plan.masked.sum(1).tolist())
    at_tokens, at_clips = torch.zeros(()), torch.zeros(())
    for copy in range(9):
        mine, clip = target[copy // 3], encoded.x[copy, 0]
        hidden = plan.masked[copy]
        at_tokens = at_tokens + (predictions[copy] - mine[hidden]).square().sum() / 8**0.5
        at_clips = at_clips + hidden.sum() * (clip - mine.mean(0)).square().sum() / 8**0.5
    loss = objective(batch)
    torch.testing.assert_close(loss.total, at_tokens + 0.5 * at_clips)
    torch.testing.assert_close(loss.metrics["token_loss"][0], at_tokens.detach())
    torch.testing.assert_close(loss.metrics["utterance_loss"][0], at_clips.detach())


def test_a_hidden_patch_cannot_leak() -> None:
    objective, batch = build(clones=1), pictures()
    tokens = objective.encoder.tokens(batch.raw)
    plan = block_mask(tokens, ratio=0.8, size=2, seeds=batch.seeds, inverse=True)
    hidden = unpatch(plan.masked[..., None].expand(-1, -1, 4), tokens.grid, (2, 2), 1)
    garbage = torch.rand(batch.raw.data.shape, generator=torch.Generator().manual_seed(1))

    def predictions(data: Tensor) -> Tensor:
        tokens = objective.encoder.tokens(Raw(data, batch.raw.lengths, batch.ids))
        encoded = objective.encoder(tokens, plan, "drop")
        return objective.decoder(encoded, tokens, plan, objective._noise(plan, batch.seeds, encoded.x))

    before = predictions(batch.raw.data)
    assert torch.equal(predictions(torch.where(hidden, garbage, batch.raw.data)), before)
    assert not torch.equal(predictions(torch.where(hidden, batch.raw.data, garbage)), before)


def test_masks_and_noise_come_from_the_clips_own_seeds() -> None:
    objective, batch = build(), pictures()
    whole = objective(batch).total
    torch.testing.assert_close(objective(batch).total, whole, rtol=0, atol=0)
    raw = batch.raw
    parts = [
        objective(Batch({"image": Raw(raw.data[i : i + 1], raw.lengths[:1], ["a"])}, batch.seeds[i : i + 1])).total
        for i in (2, 0, 1)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-5, atol=0)
    assert objective(Batch(batch.inputs, batch.seeds + 1)).total != whole


def test_noise_has_the_deviation_asked_for() -> None:
    objective, batch = build(mask_noise=0.25), pictures(n=8, height=32, width=32)
    plan = block_mask(objective.encoder.tokens(batch.raw), ratio=0.8, size=2, seeds=batch.seeds, clones=3)
    noise = objective._noise(plan, batch.seeds, torch.zeros(1, 8))
    assert noise.shape == (int(plan.masked.sum()), 8)
    # five standard errors of the deviation
    assert abs(float(noise.std()) - 0.25) < 5 * 0.25 / (2 * noise.numel()) ** 0.5


def test_an_utterance_loss_without_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.utterance_weight=1.0: .* set encoder.prefix to 1"):
        build(prefix=0, utterance_weight=1.0)


def test_no_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="objective.clones=0: a clip has at least 1 masked copy"):
        build(clones=0)
