"""CrossVideoMAE: a clip under two masks and one of its frames, reconstructed, and compared as clips and as frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS
from mmssl.nn.masking import plan_of, random_mask, tube_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.seeds import uniform
from mmssl.nn.transformer import Transformer
from mmssl.objectives import cross_video_mae
from mmssl.objectives.cross_video_mae import CrossVideoMAE
from mmssl.types import Batch, Raw

SMALL = {"hidden_dim": 16, "dim": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
LENGTHS = [8, 4, 6, 2]


def made(**settings: Any) -> CrossVideoMAE:
    torch.manual_seed(0)
    frontend = Tubes(dim=16, size=[2, 4, 4], rate=5, channels=1, mean=[0.5], std=[0.25])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=1)
    target = TARGETS["pixels"]
    return CrossVideoMAE(encoder, target=target.values, target_dim=target.dim(frontend), **{**SMALL, **settings})


def batch(rows: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    data = torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))[list(rows)]
    lengths = torch.tensor(LENGTHS)[list(rows)]
    data = (
        data[:, :, : int(lengths.max())] * (torch.arange(int(lengths.max())) < lengths[:, None])[:, None, :, None, None]
    )
    return Batch({"video": Raw(data, lengths, [f"v{row}" for row in rows], 5.0)}, torch.tensor(rows) + 7)


def plainly(model: CrossVideoMAE, row: int, step: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The errors of one clip and of its frame, and the vectors of its two masks, its frame, and its own step."""
    one = batch((row,))
    tokens = model.encoder.tokens(one.raw)
    errors, vectors = [], []
    for other in (0, 1):
        plan = tube_mask(tokens, ratio=0.5, seeds=one.seeds + other)
        encoded = model.encoder(tokens, plan, "drop")
        errors.append((model.predictor(encoded, tokens, plan) - tokens.feat[plan.masked]).square().mean())
        vectors.append(model.projector(encoded.x[:, 1:].mean(1))[0])
        if other == 0:
            there = plan.keep[0] // 4 == step
            own = model.projector(encoded.x[:, 1:][:, there].mean(1))[0]
    raw = replace(one.raw, data=one.raw.data[:, :, 2 * step : 2 * step + 2], lengths=torch.tensor([2]))
    frame = model.encoder.tokens(raw)
    plan = random_mask(frame.lengths, ratio=0.5, seeds=one.seeds + 2)
    encoded = model.encoder(frame, plan, "drop")
    of_frame = (model.predictor(encoded, frame, plan) - frame.feat[plan.masked]).square().mean()
    return sum(errors) / 2, of_frame, [*vectors, model.projector(encoded.x[:, 1:].mean(1))[0], own]


def test_all_losses_are_those_of_each_clip_for_itself() -> None:
    model = made(mask_ratio=0.5, frame_mask_ratio=0.5, weight=0.3, temperature=0.2)
    loss = model(batch())
    # a step of each clip, drawn from its seed: clips have 4, 2, 3 and 1 of them
    chances = uniform(batch().seeds, 1, stream=1_000_004)[:, 0]
    steps = [int(chance * length // 2) for chance, length in zip(chances, LENGTHS, strict=True)]
    assert steps[3] == 0
    found = [plainly(model, row, step) for row, step in enumerate(steps)]
    torch.testing.assert_close(loss.metrics["clip_loss"][0], sum(clip for clip, _, _ in found).detach())
    torch.testing.assert_close(loss.metrics["frame_loss"][0], sum(frame for _, frame, _ in found).detach())
    one, other, frame, own = (torch.stack([each[2][place] for each in found]) for place in range(4))
    both = torch.cat([one, other])
    scores = (both @ both.T / 0.2).fill_diagonal_(-torch.inf)
    expected = {"views": F.cross_entropy(scores, (torch.arange(8) + 4) % 8, reduction="sum") / 2}
    for name, here in (("clip", one), ("frame", own)):
        table = here @ frame.T / 0.2
        expected[name] = sum(F.cross_entropy(way, torch.arange(4), reduction="sum") / 2 for way in (table, table.T))
    for name, value in expected.items():
        torch.testing.assert_close(loss.metrics[name][0], value.detach(), rtol=1e-5, atol=1e-5)
    total = sum(clip + frame for clip, frame, _ in found) + 0.3 * sum(expected.values())
    torch.testing.assert_close(loss.total, total, rtol=1e-5, atol=1e-5)
    assert loss.count == 4


def test_every_step_is_drawn() -> None:
    steps = (uniform(torch.arange(400), 1, stream=1_000_004)[:, 0] * 4).long()
    assert steps.bincount().min() > 70


def test_the_frame_is_reconstructed_from_itself_alone() -> None:
    model = made(mask_ratio=0.5, frame_mask_ratio=0.5).eval()
    one = batch((0,))
    step = int(uniform(one.seeds, 1, stream=1_000_004)[0, 0] * 4)
    before = model(one).metrics
    for changed in range(4):
        data = one.raw.data.clone()
        data[:, :, 2 * changed : 2 * changed + 2] = 1 - data[:, :, 2 * changed : 2 * changed + 2]
        after = model(Batch({"video": replace(one.raw, data=data)}, one.seeds)).metrics
        assert bool(after["frame_loss"][0] != before["frame_loss"][0]) == (changed == step)
        assert after["clip_loss"][0] != before["clip_loss"][0]


def test_the_frame_shows_other_places_than_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def kept(make: Any) -> Any:
        def recorded(*given: Any, **settings: Any) -> Any:
            plans.append(make(*given, **settings))
            return plans[-1]

        return recorded

    monkeypatch.setattr(cross_video_mae, "tube_mask", kept(tube_mask))
    monkeypatch.setattr(cross_video_mae, "random_mask", kept(random_mask))
    data = torch.rand(64, 1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.full((64,), 2), [str(row) for row in range(64)], 5.0)
    made(mask_ratio=0.5, frame_mask_ratio=0.5)(Batch({"video": raw}, torch.arange(64)))
    *of_clip, of_frame = [~plan.masked for plan in plans]
    for visible in of_clip:
        # of 8 visible places of 16 half by chance: 4 on average, with a deviation of 1.03 for one clip
        assert abs(float((visible & of_frame).sum(1).float().mean()) - 4) < 4 * 1.03 / 8


def test_a_mask_that_leaves_one_place_leaves_it_in_every_step() -> None:
    model = made(mask_ratio=0.9)
    tokens = model.encoder.tokens(batch().raw)
    plan = tube_mask(tokens, ratio=0.9, seeds=batch().seeds)
    assert plan.keep_lengths.tolist() == [4, 2, 3, 1]
    assert model(batch()).total.isfinite()
    assert plan_of(plan.masked, tokens.lengths).keep_lengths.tolist() == [4, 2, 3, 1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": 0.0}, "objective.weight=0: must be above 0"),
        ({"temperature": -1.0}, "objective.temperature=-1: must be above 0"),
        ({"target_learned": True}, "Tubes learns what it measures"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        made(**settings)


def test_clips_without_a_time_are_refused() -> None:
    encoder = Encoder(Patches(dim=16, size=(4, 4)), Transformer(dim=16, depth=1, heads=2), SinCos(16))
    with pytest.raises(ValueError, match="the tokens of Patches lie on h, w; choose mae"):
        CrossVideoMAE(encoder, target=TARGETS["pixels"].values, target_dim=48, **SMALL)
