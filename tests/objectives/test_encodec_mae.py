from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.block_masks import block_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.encodec_mae import EncodecMAE
from mmssl.types import Batch, Raw, Units

DIM, BANDS = 16, 8
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def encoder(frontend: SpectrogramPatches | Patches, prefix: int = 0) -> Encoder:
    return Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM), prefix=prefix)


def build(prefix: int = 0, **settings: object) -> EncodecMAE:
    """Over frames of 20 ms, one token each, at 1,000 samples a second."""
    torch.manual_seed(0)
    frontend = SpectrogramPatches(dim=DIM, size=[1, BANDS], bands=BANDS, window_ms=25, hop_ms=20, rate=1000, low=0)
    wanted = {"units": {"codec": [5, 7]}, "mask_size": 3, **DECODER, **settings}
    return EncodecMAE(encoder(frontend, prefix), **wanted).eval()  # type: ignore[arg-type]


def clips(samples: list[int], steps: int = 1000) -> Batch:
    """Noise, and at most so many steps of two codes at 50 a second."""
    data = torch.zeros(len(samples), max(samples))
    values = torch.zeros(len(samples), max(samples) // 20, 2, dtype=torch.int64)
    lengths = torch.tensor([min(n // 20, steps) for n in samples])
    for row, n in enumerate(samples):
        generator = torch.Generator().manual_seed(row)
        data[row, :n] = torch.randn(n, generator=generator)
        values[row] = torch.randint(5, values[row].shape, generator=generator)
    units = Units(values, lengths, 50.0, torch.zeros(len(samples), dtype=torch.float64))
    raw = Raw(data, torch.tensor(samples), [str(row) for row in range(len(samples))], 1000)
    return Batch({"audio": raw}, torch.arange(len(samples)) + 7, units={"codec": units})


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_the_loss_is_the_weighed_cross_entropy_of_every_token_and_code(prefix: int) -> None:
    objective = build(prefix, weights={"codec": [0.75, 0.25]}, mask_ratio=0.4, masked_weight=0.9)
    batch = clips([425, 265])
    tokens = objective.encoder.tokens(batch.raw)
    plan = block_mask(tokens, ratio=0.4, size=3, seeds=batch.seeds)
    seen = objective.encoder(tokens, plan, "drop")
    logits = objective.predictor(seen, tokens, plan, predicted=tokens.valid)
    expected, row_of = 0.0, 0
    for row, length in enumerate(tokens.lengths.tolist()):
        for place in range(length):
            weight = 0.9 / 0.4 if plan.masked[row, place] else 0.1 / 0.6
            scores = logits[row_of, :5].log_softmax(0), logits[row_of, 5:].log_softmax(0)
            first, second = batch.units["codec"].values[row, place].tolist()
            expected -= weight * float(0.75 * scores[0][first] + 0.25 * scores[1][second])
            row_of += 1
    loss = objective(batch)
    assert loss.count == row_of == 34
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_with_half_hidden_it_is_the_papers_mix_of_two_means() -> None:
    objective = build()
    batch = clips([425 - 20])  # 20 tokens, so that 10 are hidden
    metrics, loss = objective(batch).metrics, objective(batch)
    means = [metrics[f"{name}cross_entropy"] for name in ("", "codec_1_")]
    hidden = sum(float(total) / count for total, count in means)
    all_hidden = _with(objective, 1.0)(batch)
    assert [count for _, count in means] == [10, 10]
    assert float(all_hidden.total) / all_hidden.count == pytest.approx(hidden, rel=1e-5)
    only_seen = _with(objective, 0.0)(batch)
    seen = float(only_seen.total) / only_seen.count
    assert float(loss.total) / loss.count == pytest.approx(0.9 * hidden + 0.1 * seen, rel=1e-5)


def _with(objective: EncodecMAE, masked_weight: float) -> EncodecMAE:
    other = build(masked_weight=masked_weight)
    other.load_state_dict(objective.state_dict())
    return other


@torch.no_grad()
def test_what_is_hidden_is_never_encoded() -> None:
    torch.manual_seed(0)
    frontend = Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5])
    objective = EncodecMAE(encoder(frontend), units={"codec": 5}, mask_size=1, **DECODER).eval()  # type: ignore[arg-type]
    raw = Raw(torch.rand(1, 1, 4, 8), torch.ones(1, dtype=torch.int64), ["a"])
    units = Units(torch.arange(8)[None, :, None] % 5, torch.tensor([8]), None, torch.zeros(1, dtype=torch.float64))
    batch = Batch({"image": raw}, torch.arange(1), units={"codec": units})
    plan = block_mask(objective.encoder.tokens(raw), ratio=0.5, size=1, seeds=batch.seeds)
    hidden, visible = plan.masked[0].nonzero()[0].item(), plan.keep[0, 0].item()
    before = objective(batch).total
    for place, same in ((hidden, True), (visible, False)):
        data = raw.data.clone()
        top, left = 2 * (place // 4), 2 * (place % 4)
        data[..., top : top + 2, left : left + 2] += 1
        after = objective(replace(batch, inputs={"image": replace(raw, data=data)})).total
        assert torch.equal(after, before) == same


@torch.no_grad()
def test_tokens_without_units_are_left_out() -> None:
    objective = build()
    loss = objective(clips([425, 265], steps=8))
    assert loss.count == 16
    hidden, of = loss.metrics["hidden"]
    assert 0 < hidden < of == 16


def test_a_batch_without_any_units_gives_zero_and_still_a_graph() -> None:
    objective = build()
    loss = objective(clips([425], steps=0))
    loss.total.backward()
    assert (loss.count, loss.total.item()) == (0, 0.0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"units": {}}, "name a key of the manifest"),
        ({"weights": {"codec": [1.0]}}, "1 for the 2 labels of 'codec'"),
        ({"mask_ratio": 1.0}, "lies between 0 and 1"),
        ({"masked_weight": 1.5}, "lies between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(**settings)


def test_a_batch_without_the_label_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the units at 'codec' of a row are to be predicted"):
        build()(replace(clips([425]), units={}))
