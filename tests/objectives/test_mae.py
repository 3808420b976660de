from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS, unpatch
from mmssl.modalities.modality import Target
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.speech.targets import TARGETS as SPEECH_TARGETS
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.seeds import seed_of
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Batch, Raw

LAYERS = [[8, 10, 5], [8, 8, 4], [8, 4, 2]]


def seeds(n: int) -> Tensor:
    return torch.tensor([seed_of("clip", i) for i in range(n)])


def images(n: int = 8, height: int = 8, width: int = 12, channels: int = 2) -> Batch:
    """Pictures with something to predict: waves of random phase and direction."""
    generator = torch.Generator().manual_seed(0)
    phase, slope = torch.rand(2, n, channels, 1, 1, generator=generator)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    data = 0.5 + 0.4 * torch.sin(6 * phase + slope * y + x)
    raw = Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, seeds(n))


def sounds(samples: tuple[int, ...] = (2000, 1200, 600)) -> Batch:
    data = torch.zeros(len(samples), max(samples))
    generator = torch.Generator().manual_seed(0)
    for row, n in zip(data, samples, strict=True):
        row[:n] = torch.sin(torch.arange(n) * torch.rand(1, generator=generator)) + 0.1 * torch.randn(
            n, generator=generator
        )
    raw = Raw(data, torch.tensor(samples), [str(n) for n in samples], rate=8000)
    return Batch({"speech": raw}, seeds(len(samples)))


def image_mae(target: str = "normalized_pixels", prefix: int = 1, **settings: Any) -> MAE:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[2, 3], channels=2, mean=[0.5, 0.5], std=[0.3, 0.3])
    encoder = Encoder(frontend, Transformer(dim=16, depth=2, heads=2), SinCos(16), prefix=prefix)
    return MAE(
        encoder,
        target=TARGETS[target].values,
        target_dim=TARGETS[target].dim(frontend),
        target_learned=TARGETS[target].learned,
        pictures=TARGETS[target].pictures,
        decoder_dim=16,
        decoder_depth=2,
        decoder_heads=2,
        **settings,
    )


def speech_mae(target: Target = SPEECH_TARGETS["normalized_log_mel"]) -> MAE:
    torch.manual_seed(0)
    frontend = Waveform(dim=16, layers=LAYERS, rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    return MAE(
        encoder,
        target=target.values,
        target_dim=target.dim(frontend),
        target_learned=target.learned,
        mask_ratio=0.5,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    )


def part_of(batch: Batch, rows: list[int]) -> Batch:
    """Some clips of a batch, padded no further than they need."""
    raw = batch.raw
    lengths = raw.lengths[rows]
    data = raw.data[rows] if raw.rate is None else raw.data[rows][:, : int(lengths.max())]
    name = next(iter(batch.inputs))
    return Batch({name: Raw(data, lengths, [raw.ids[i] for i in rows], raw.rate)}, batch.seeds[rows])


def gradient(objective: MAE, batches: list[Batch]) -> Tensor:
    """The gradient of the sum of losses over the count of all micro-batches, as the loop takes it."""
    objective.zero_grad()
    losses = [objective(batch) for batch in batches]
    count = sum(loss.count for loss in losses)
    for loss in losses:
        (loss.total / count).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


BOTH = pytest.mark.parametrize(("build", "make"), [(image_mae, images), (speech_mae, sounds)], ids=["image", "speech"])


@BOTH
def test_gradients_reach_every_weight_of_frontend_transformer_and_predictor(build, make) -> None:
    objective = build()
    objective(make()).total.backward()
    silent = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_the_loss_is_the_mean_over_values_summed_over_hidden_tokens() -> None:
    objective, batch = image_mae("pixels"), images(2)
    torch.nn.init.zeros_(objective.predictor.out.weight)
    torch.nn.init.constant_(objective.predictor.out.bias, 0.25)
    loss = objective(batch)
    tokens = objective.encoder.tokens(batch.raw)
    plan = random_mask(tokens.lengths, ratio=0.75, seeds=batch.seeds)
    by_hand = sum(((row - 0.25) ** 2).mean() for row in tokens.feat[plan.masked])
    assert loss.count == 2 * 12
    assert int(plan.masked.sum()) == 24
    torch.testing.assert_close(loss.total, by_hand)
    total, count = loss.metrics["loss"]
    assert count == 24
    assert float(total) == pytest.approx(float(by_hand))


@BOTH
def test_eight_micro_batches_give_the_gradient_of_one_batch(build, make) -> None:
    objective = build()
    batch = make() if make is images else make((2000, 700, 1200, 650, 1900, 900, 1000, 601))
    whole = gradient(objective, [batch])
    parts = gradient(objective, [part_of(batch, [i]) for i in range(8)])
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.99999
    torch.testing.assert_close(whole.norm(), parts.norm(), rtol=1e-4, atol=0)


@BOTH
def test_the_order_of_a_batch_is_irrelevant(build, make) -> None:
    objective, batch = build(), make()
    rows = list(range(len(batch)))[::-1]
    torch.testing.assert_close(objective(part_of(batch, rows)).total, objective(batch).total, rtol=1e-5, atol=1e-5)


def test_permuting_a_batch_permutes_its_reconstructions() -> None:
    objective, batch = image_mae(), images(4)
    order = [2, 0, 3, 1]
    shown, moved = objective.reconstruct(batch), objective.reconstruct(part_of(batch, order))
    for name in ("input", "masked", "reconstruction"):
        torch.testing.assert_close(moved[name], shown[name][order], rtol=1e-4, atol=1e-5)


def test_padding_of_a_ragged_batch_may_hold_anything() -> None:
    objective, batch = speech_mae(), sounds()
    before = objective(batch).total
    for row, n in zip(batch.raw.data, batch.raw.lengths.tolist(), strict=True):
        row[n:] = 7.0
    torch.testing.assert_close(objective(batch).total, before, rtol=1e-6, atol=0)


def test_a_hidden_patch_cannot_leak() -> None:
    """Neither what is encoded nor what is predicted may change with the pixels of a hidden patch."""
    objective, batch = image_mae(), images(4)
    tokens = objective.encoder.tokens(batch.raw)
    plan = random_mask(tokens.lengths, ratio=0.75, seeds=batch.seeds)
    hidden = unpatch(plan.masked[..., None].expand(-1, -1, 12), tokens.grid, (2, 3), 2)
    garbage = torch.rand(batch.raw.data.shape, generator=torch.Generator().manual_seed(1))
    other = Batch(
        {"image": Raw(torch.where(hidden, garbage, batch.raw.data), batch.raw.lengths, batch.ids)}, batch.seeds
    )

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = objective.encoder.tokens(batch.raw)
        encoded = objective.encoder(tokens, plan, "drop")
        return encoded.x, objective.predictor(encoded, tokens, plan)

    for before, after in zip(run(batch), run(other), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    # and the other way round: a visible pixel does reach both
    visible = Batch(
        {"image": Raw(torch.where(hidden, batch.raw.data, garbage), batch.raw.lengths, batch.ids)}, batch.seeds
    )
    for before, after in zip(run(batch), run(visible), strict=True):
        assert (before - after).abs().max() > 1e-3


@BOTH
def test_twenty_steps_lower_the_loss(build, make) -> None:
    objective, batch = build(), make()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        losses.append(float(loss.total.detach()) / loss.count)
    assert losses[-1] < 0.9 * losses[0]


def test_masks_come_from_the_clips_own_seeds() -> None:
    objective, batch = image_mae(), images(4)
    first = objective.reconstruct(batch)["masked"]
    torch.testing.assert_close(objective.reconstruct(batch)["masked"], first)
    other = Batch(batch.inputs, batch.seeds + 1)
    assert (objective.reconstruct(other)["masked"] != first).any()


def test_a_constant_prediction_shows_in_the_metrics() -> None:
    objective, batch = image_mae(), images(4)
    loss = objective(batch)
    torch.nn.init.zeros_(objective.predictor.out.weight)
    constant = objective(batch)

    def metric(loss, name: str) -> float:
        total, count = loss.metrics[name]
        return float(total) / count

    assert metric(constant, "prediction_std") == 0 < metric(loss, "prediction_std")
    assert metric(constant, "target_std") == pytest.approx(metric(loss, "target_std"))
    assert metric(constant, "feature_std") == pytest.approx(metric(loss, "feature_std"), rel=1e-5)


def test_features_that_are_all_the_same_have_no_spread() -> None:
    objective, batch = image_mae(), images(4)
    before = objective(batch).metrics["feature_std"]
    torch.nn.init.zeros_(objective.encoder.transformer.norm.weight)
    torch.nn.init.ones_(objective.encoder.transformer.norm.bias)
    assert float(objective(batch).metrics["feature_std"][0]) == 0 < float(before[0])


def test_the_spread_of_features_leaves_padding_out() -> None:
    objective = speech_mae()
    alone = objective(sounds((600,)))
    torch.nn.init.zeros_(objective.encoder.transformer.norm.weight)
    torch.nn.init.ones_(objective.encoder.transformer.norm.bias)
    ragged = objective(sounds((2000, 600)))
    assert float(ragged.metrics["feature_std"][0]) == 0 < float(alone.metrics["feature_std"][0])


def test_the_loss_is_taken_in_float32_under_bfloat16() -> None:
    objective, batch = image_mae(), images(4)
    exact = objective(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, exact.total, rtol=2e-2, atol=0)


def test_the_target_is_the_same_under_bfloat16() -> None:
    objective, batch = speech_mae(), sounds()
    exact = objective(batch).metrics["target_std"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective(batch).metrics["target_std"]
    torch.testing.assert_close(rounded[0], exact[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
def test_a_picture_of_a_reconstruction_keeps_what_was_visible(target: str) -> None:
    objective, batch = image_mae(target), images(3)
    objective.train()
    state = copy.deepcopy(objective.state_dict())
    shown = objective.reconstruct(batch)
    visible = shown["masked"] == shown["input"]
    torch.testing.assert_close(shown["input"], batch.raw.data)
    torch.testing.assert_close(shown["reconstruction"][visible], shown["input"][visible], rtol=1e-4, atol=1e-4)
    assert 0.2 < visible.float().mean() < 0.3
    assert objective.training
    assert not shown["reconstruction"].requires_grad
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())


def test_learned_features_are_refused_as_a_target() -> None:
    sentence = (
        "Waveform learns what it measures, so the target would collapse onto the prediction; choose a fixed target"
    )
    with pytest.raises(ValueError, match=sentence):
        speech_mae(SPEECH_TARGETS["features"])


def test_a_target_without_a_picture_says_so() -> None:
    with pytest.raises(ValueError, match="there is no picture of this target"):
        speech_mae().reconstruct(sounds())


def hidden_in(shown: dict[str, Any]) -> Tensor:
    """(B, N): which patches of 2 x 3 pixels a picture shows as gray."""
    gray = (shown["masked"] == 0.5).all(1).float()
    return torch.nn.functional.avg_pool2d(gray[:, None], (2, 3))[:, 0].flatten(1) == 1


def test_a_mask_of_ones_own_is_what_the_model_sees() -> None:
    objective, batch = image_mae("pixels"), images(2)
    own = torch.zeros(2, 16, dtype=torch.bool)
    own[0, 3] = True
    own[1, 5:15] = True
    shown = objective.reconstruct(batch, masked=own)
    assert torch.equal(hidden_in(shown), own)
    pixels = unpatch(own[..., None].expand(-1, -1, 12), (4, 4), (2, 3), 2)
    torch.testing.assert_close(shown["reconstruction"][~pixels], batch.raw.data[~pixels])
    assert (shown["reconstruction"][pixels] != batch.raw.data[pixels]).all()
    # the mask that training would draw is given back as it is
    tokens = objective.encoder.tokens(batch.raw)
    drawn = random_mask(tokens.lengths, ratio=0.75, seeds=batch.seeds).masked
    again = objective.reconstruct(batch, masked=drawn)
    torch.testing.assert_close(again["reconstruction"], objective.reconstruct(batch)["reconstruction"])


def test_a_mask_that_hides_nothing_shows_the_clip() -> None:
    objective, batch = image_mae("pixels"), images(2)
    shown = objective.reconstruct(batch, masked=torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(shown["reconstruction"], batch.raw.data)


@pytest.mark.parametrize(
    ("masked", "sentence"),
    [
        (torch.zeros(2, 15).bool(), r"masked is \(2, 15\) bool, but these clips have \(2, 16\) tokens"),
        (torch.zeros(2, 16), r"masked is \(2, 16\) float32, .* give one bool for each"),
        (torch.arange(2)[:, None].expand(2, 16) == 1, "masked hides all tokens of clip 1; leave one"),
    ],
    ids=["shape", "type", "all"],
)
def test_a_mask_that_does_not_fit_is_refused(masked: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        image_mae().reconstruct(images(2), masked=masked)


def test_a_mask_over_padding_is_refused() -> None:
    objective, batch = speech_mae(), sounds()
    objective.pictures = lambda frontend, tokens, masked, values: {}
    lengths = objective.encoder.tokens(batch.raw).lengths
    masked = torch.zeros(3, int(lengths.max()), dtype=torch.bool)
    masked[1, -1] = True
    with pytest.raises(ValueError, match=f"hides tokens of clip 1 past its {lengths[1]} real ones; set them to False"):
        objective.reconstruct(batch, masked=masked)


def test_a_share_to_hide_goes_evenly_over_its_updates_and_stays() -> None:
    objective, batch = image_mae(mask_ratio=[0.25, 0.75, 4]), images(2)
    hidden = [objective(batch).count]
    for step in range(1, 7):
        objective.after_step(step)
        hidden.append(objective(batch).count)
    # of 16 patches in each of 2 pictures
    assert hidden == [2 * n for n in (4, 6, 8, 10, 12, 12, 12)]


def test_a_share_that_changes_goes_on_where_it_was_saved() -> None:
    objective = image_mae(mask_ratio=[0.25, 0.75, 4])
    objective.after_step(3)
    resumed = image_mae(mask_ratio=[0.25, 0.75, 4])
    resumed.load_state_dict(objective.state_dict())
    assert resumed.mask_ratio == objective.mask_ratio == 0.625


def test_a_fixed_share_has_no_state() -> None:
    assert "updates" not in image_mae().state_dict()


@pytest.mark.parametrize("ratio", [0.0, 1.0, [0.5, 1.0, 10], [0.5, 0.9, 0]])
def test_a_share_outside_its_range_is_refused(ratio: Any) -> None:
    with pytest.raises(
        ValueError, match=r"objective.mask_ratio=.* give a share, or \[first share, last share, updates"
    ):
        image_mae(mask_ratio=ratio)


def test_noise_on_positions_is_each_clips_own_and_of_training_alone() -> None:
    objective, still, batch = image_mae(position_noise=0.25), image_mae(), images(4)
    loss = objective(batch)
    torch.testing.assert_close(objective(batch).total, loss.total, rtol=0, atol=0)
    parts = [objective(part_of(batch, [i])).total for i in (3, 1, 0, 2)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss.total, rtol=1e-5, atol=0)
    assert abs(float(loss.total.detach() - still(batch).total.detach())) > 1e-3
    objective.eval()
    still.eval()
    torch.testing.assert_close(objective(batch).total, still(batch).total, rtol=0, atol=0)


def test_noise_on_positions_has_the_variance_asked_for() -> None:
    noise = image_mae(position_noise=0.25)._noise(torch.tensor([500, 1000]), seeds(2), torch.zeros(1, 16))
    assert noise is not None
    assert noise.shape == (1500, 16)
    # five standard errors of the variance of 24,000 normal numbers
    assert abs(float(noise.square().mean()) - 0.25) < 5 * 0.25 * (2 / 24_000) ** 0.5


def test_a_negative_variance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.position_noise=-0.1: a variance is at least 0"):
        image_mae(position_noise=-0.1)


def test_a_decoder_with_windows_needs_one_for_each_axis() -> None:
    assert image_mae(decoder_window=[2, 2]).predictor.window == [2, 2]
    with pytest.raises(ValueError, match=r"decoder_window=\[4\]: give the tokens of a window along each axis, h, w"):
        image_mae(decoder_window=[4])
