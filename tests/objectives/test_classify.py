from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import axis_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.seeds import seed_of
from mmssl.nn.transformer import Transformer
from mmssl.objectives.classify import Classify, mix
from mmssl.types import Batch, Raw

SAMPLES = (700, 400, 550, 620)


def seeds(n: int) -> Tensor:
    return torch.tensor([seed_of("clip", i) for i in range(n)])


def images(n: int = 4) -> Batch:
    data = torch.rand(n, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, seeds(n), labels=torch.arange(n) % 3)


def sounds(samples: tuple[int, ...] = SAMPLES) -> Batch:
    data = torch.zeros(len(samples), max(samples))
    generator = torch.Generator().manual_seed(0)
    for row, n in zip(data, samples, strict=True):
        row[:n] = torch.randn(n, generator=generator)
    raw = Raw(data, torch.tensor(samples), [str(n) for n in samples], rate=8000)
    return Batch({"speech": raw}, seeds(len(samples)), labels=torch.arange(len(samples)) % 3)


def image_classifier(prefix: int = 1, **settings: Any) -> Classify:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[2, 2], channels=1, mean=[0.5], std=[0.3])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=prefix)
    return Classify(encoder, n_classes=3, pool_heads=2, **settings)


def speech_classifier(prefix: int = 1, **settings: Any) -> Classify:
    torch.manual_seed(0)
    frontend = Waveform(dim=16, layers=[[8, 10, 5], [8, 8, 4], [8, 4, 2]], rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=prefix)
    return Classify(encoder, n_classes=3, pool_heads=2, **settings)


def part_of(batch: Batch, rows: list[int]) -> Batch:
    raw = batch.raw
    lengths = raw.lengths[rows]
    data = raw.data[rows] if raw.rate is None else raw.data[rows][:, : int(lengths.max())]
    name = next(iter(batch.inputs))
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch({name: Raw(data, lengths, [raw.ids[i] for i in rows], raw.rate)}, batch.seeds[rows], labels=labels)


def gradient(objective: Classify, batches: list[Batch]) -> Tensor:
    objective.zero_grad()
    losses = [objective(batch) for batch in batches]
    count = sum(loss.count for loss in losses)
    for loss in losses:
        (loss.total / count).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


BOTH = pytest.mark.parametrize(
    ("build", "make"), [(image_classifier, images), (speech_classifier, sounds)], ids=["image", "speech"]
)
POOLINGS = pytest.mark.parametrize("pooling", ["mean", "class", "last", "attention"])


@POOLINGS
@BOTH
def test_gradients_reach_every_weight(build, make, pooling: str) -> None:
    objective = build(pooling=pooling)
    objective(make()).total.backward()
    silent = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@POOLINGS
def test_a_clip_has_the_same_logits_alone_and_in_a_ragged_batch(pooling: str) -> None:
    objective, batch = speech_classifier(pooling=pooling).eval(), sounds()
    together = objective.predict(batch)
    for i in range(len(batch)):
        torch.testing.assert_close(objective.predict(part_of(batch, [i]))[0], together[i], rtol=1e-5, atol=1e-5)
    for row, n in zip(batch.raw.data, SAMPLES, strict=True):
        row[n:] = 9.0
    torch.testing.assert_close(objective.predict(batch), together, rtol=1e-5, atol=1e-5)


@BOTH
def test_permuting_a_batch_permutes_the_logits(build, make) -> None:
    objective, batch = build().eval(), make()
    order = [2, 0, 3, 1]
    moved = objective.predict(part_of(batch, order))
    torch.testing.assert_close(moved, objective.predict(batch)[order], rtol=1e-5, atol=1e-5)


@BOTH
def test_eight_micro_batches_give_the_gradient_of_one_batch(build, make) -> None:
    objective = build(label_smoothing=0.1)
    batch = make(8) if make is images else make((700, 400, 550, 620, 410, 600, 499, 501))
    whole = gradient(objective, [batch])
    parts = gradient(objective, [part_of(batch, [i]) for i in range(8)])
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.99999
    torch.testing.assert_close(whole.norm(), parts.norm(), rtol=1e-4, atol=0)


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
    assert losses[-1] < 0.8 * losses[0]


def test_even_odds_cost_the_logarithm_of_the_number_of_classes() -> None:
    objective, batch = image_classifier(), images()
    torch.nn.init.zeros_(objective.head.linear.weight)
    with torch.no_grad():
        loss = objective(batch)
    assert float(loss.total) == pytest.approx(4 * math.log(3), rel=1e-5)
    assert loss.count == 4


def test_smoothed_labels_cost_what_was_worked_by_hand() -> None:
    objective, batch = image_classifier(label_smoothing=0.3), images(1)
    torch.nn.init.zeros_(objective.head.linear.weight)
    with torch.no_grad():
        objective.head.linear.bias.copy_(torch.tensor([math.log(2.0), 0.0, 0.0]))  # odds 1/2, 1/4, 1/4
        loss = objective(batch)
    # label 0: .8 of the target on class 0, .1 on each other
    assert float(loss.total) == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4), rel=1e-5)


def test_accuracy_counts_the_clips_that_are_right() -> None:
    objective, batch = image_classifier(), images()
    torch.nn.init.zeros_(objective.head.linear.weight)
    with torch.no_grad():
        objective.head.linear.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        right, count = objective(batch).metrics["accuracy"]  # labels 0, 1, 2, 0
    assert (int(right), count) == (2, 4)


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_evaluation_mode() -> None:
    objective = image_classifier(freeze_encoder=True).train()
    objective(images()).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.encoder.parameters())
    assert all(p.grad is not None for p in objective.head.parameters())
    assert not any(part.training for part in objective.encoder.modules())
    assert objective.head.training


def test_mixing_pictures_by_hand() -> None:
    data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    raw = Raw(data, torch.ones(2, dtype=torch.int64), ["a", "b"])
    mixed, share = mix(raw, torch.tensor([3, 4]), alpha=0.8)
    # clip a is 0 and b is 1: what a shows is the share of b in it
    torch.testing.assert_close(mixed.data.flatten(), torch.stack([1 - share[0], share[1]]))
    assert share.min() > 0
    assert share.max() < 1
    assert share[0] != share[1]


def test_mixing_clips_of_different_length_stops_where_the_shorter_ends() -> None:
    raw = Raw(
        torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, torch.nan, torch.nan, torch.nan]]), torch.tensor([4, 1]), ["a", "b"]
    )
    mixed, share = mix(raw, torch.tensor([3, 4]), alpha=0.8)
    own = [np.random.default_rng(seed).beta(0.8, 0.8) for seed in (3, 4)]
    assert mixed.data[0].tolist() == pytest.approx([own[0] + 5 * (1 - own[0]), 1, 1, 1])
    assert float(mixed.data[1, 0]) == pytest.approx(5 * own[1] + 1 - own[1])
    # the long clip is the short one's for a quarter of its length only
    assert share.tolist() == pytest.approx([1 - (1 - own[0]) / 4, own[1]])
    assert mixed.lengths.tolist() == [4, 1]


def test_mixing_depends_on_the_clips_seeds_only() -> None:
    batch = images()
    torch.manual_seed(1)
    first, share = mix(batch.raw, batch.seeds, alpha=0.8)
    torch.manual_seed(2)
    again, _ = mix(batch.raw, batch.seeds, alpha=0.8)
    torch.testing.assert_close(first.data, again.data, rtol=0, atol=0)
    _, reversed_share = mix(batch.raw, batch.seeds.flip(0), alpha=0.8)
    torch.testing.assert_close(reversed_share, share.flip(0))


def test_mixed_clips_pay_for_both_labels_by_share() -> None:
    objective, batch = image_classifier(mixup=0.8).train(), images()
    with torch.no_grad():
        loss = objective(batch)
        mixed, share = mix(batch.raw, batch.seeds, alpha=0.8)
        logs = objective.predict(Batch({"image": mixed}, batch.seeds)).log_softmax(-1)
    rows = torch.arange(4)
    by_hand = -(share * logs[rows, batch.labels] + (1 - share) * logs[rows, batch.labels.flip(0)]).sum()
    torch.testing.assert_close(loss.total, by_hand)
    objective.eval()
    with torch.no_grad():
        plain = -objective.predict(batch).log_softmax(-1)[rows, batch.labels].sum()
        torch.testing.assert_close(objective(batch).total, plain)


def test_the_loss_is_taken_in_float32_under_bfloat16() -> None:
    objective, batch = image_classifier(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch)
    assert loss.total.dtype == torch.float32
    assert objective.predict(batch).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pooling": "class", "prefix": 0}, "no class token .encoder.prefix=0.; choose mean or attention"),
        ({"pooling": "max"}, "objective.pooling='max': choose one of attention, mean, class, last"),
        ({"head_norm": "batch"}, "objective.head_norm='batch': choose layer or none"),
        ({"pooling": "attention", "pool_heads": 3}, "must divide dim=16"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], sentence: str) -> None:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[2, 2], channels=1, mean=[0.5], std=[0.3])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=settings.pop("prefix", 1))
    with pytest.raises(ValueError, match=sentence):
        Classify(encoder, n_classes=3, **settings)


def test_one_class_is_not_a_task() -> None:
    encoder = image_classifier().encoder
    with pytest.raises(ValueError, match="n_classes=1: there must be at least two"):
        Classify(encoder, n_classes=1)


def test_a_label_out_of_range_is_named_with_its_clip() -> None:
    batch = images()
    assert batch.labels is not None
    batch.labels[2] = 3
    with pytest.raises(ValueError, match="2: label 3 is none of the 3 classes 0 to 2"):
        image_classifier()(batch)


def test_a_batch_without_labels_is_refused() -> None:
    batch = images()
    with pytest.raises(ValueError, match="give each manifest row a 'label'"):
        image_classifier()(Batch(batch.inputs, batch.seeds))


def several(labels: list[list[int]]) -> Batch:
    """The first pictures, each with a list of classes."""
    batch = images(len(labels))
    rows = [torch.tensor(row, dtype=torch.int64) for row in labels]
    sizes = torch.tensor([len(row) for row in rows])
    return Batch(batch.inputs, batch.seeds, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), sizes)


def test_several_labels_cost_what_was_worked_by_hand() -> None:
    objective = image_classifier(multi_label=True)
    torch.nn.init.zeros_(objective.head.linear.weight)
    with torch.no_grad():
        objective.head.linear.bias.copy_(torch.tensor([math.log(3.0), 0.0, -math.log(3.0)]))  # .75, .5 and .25
        loss = objective(several([[0, 2], [], [1]]))
    first, none, last = ([0.75, 0.5, 0.25], [0.25, 0.5, 0.75], [0.25, 0.5, 0.75])
    by_hand = sum(-sum(map(math.log, row)) / 3 for row in (first, none, last))
    assert float(loss.total) == pytest.approx(by_hand, rel=1e-5)
    # the likeliest is class 0, which the first clip has
    assert [float(x) for x in loss.metrics["accuracy"]] == [1, 3]
    assert [float(x) for x in loss.metrics["chance_accuracy"]] == [1, 3]  # three labels of three clips, three classes


def test_mixed_clips_with_several_labels_pay_for_both_by_share() -> None:
    objective, batch = image_classifier(multi_label=True, mixup=0.8).train(), several([[0], [1, 2]])
    with torch.no_grad():
        loss = objective(batch)
        mixed, share = mix(batch.raw, batch.seeds, alpha=0.8)
        logits = objective.predict(Batch({"image": mixed}, batch.seeds))
    truth = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    soft = share[:, None] * truth + (1 - share[:, None]) * truth.flip(0)
    by_hand = -(soft * logits.sigmoid().log() + (1 - soft) * (1 - logits.sigmoid()).log()).mean(1).sum()
    torch.testing.assert_close(loss.total, by_hand)


def test_several_labels_are_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="every clip needs a list of labels"):
        image_classifier(multi_label=True)(images())
    with pytest.raises(ValueError, match="every clip needs one label"):
        image_classifier()(several([[0], [1, 2]]))
    with pytest.raises(ValueError, match="set it to 0"):
        image_classifier(multi_label=True, label_smoothing=0.1)


def test_a_masked_step_sees_the_tokens_that_the_mask_leaves_and_evaluation_sees_all() -> None:
    objective, batch = image_classifier(mask={"h": 0.5, "w": 0.4}).train(), images()
    tokens = objective.encoder.tokens(batch.raw)
    plan = axis_mask(tokens.lengths, grid=tokens.grid, ratios=[0.5, 0.4], seeds=batch.seeds)
    assert plan.keep_lengths.tolist() == [2] * 4  # of 2 x 3, one row and two columns
    encoded = objective.encoder(tokens, plan, "drop")
    logits = objective.head(objective.pool(encoded.x, encoded.lengths, encoded.n_prefix))
    by_hand = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    torch.testing.assert_close(objective(batch).total, by_hand)
    torch.testing.assert_close(objective.eval()(batch).total, image_classifier().eval()(batch).total)


@pytest.mark.parametrize("mask", [{"t": 0.2}, {"h": 1.0}, {"w": -0.1}])
def test_a_mask_that_makes_no_sense_is_refused(mask: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a share from 0 to below 1 for an axis of the tokens, h, w"):
        image_classifier(mask=mask)


def test_ids_are_not_mixed() -> None:
    raw = Raw(torch.tensor([[3, 4], [5, 6]]), torch.tensor([2, 2]), ["a", "b"])
    with pytest.raises(ValueError, match=r"objective.mixup=0.8: ids of tokens cannot be mixed"):
        mix(raw, torch.tensor([3, 4]), alpha=0.8)


def test_the_frozen_start_trains_the_head_only_and_ends_by_updates() -> None:
    objective, batch = image_classifier(freeze_updates=2), images()
    assert objective.skips_parameters
    for update in range(4):
        objective.zero_grad()
        objective(batch).total.backward()
        trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(name.startswith("head.") for name in trained) == (update < 2)
        assert trained
        objective.after_step(update + 1)
    other = image_classifier(freeze_updates=2)
    other.load_state_dict(objective.state_dict())
    assert not other.frozen
    # a run without one is saved as ever
    assert "updates" not in image_classifier().state_dict()


def test_a_rare_class_weighs_as_much_as_a_common_one() -> None:
    """6 clips, 3 classes, of 3, 2 and 1 clips: 6 / (3 x 3), 6 / (3 x 2) and 6 / (3 x 1)."""
    plain, weighted = image_classifier(), image_classifier(class_weights="balanced", class_counts=[3, 2, 1])
    assert weighted.weights is not None
    torch.testing.assert_close(weighted.weights, torch.tensor([2 / 3, 1.0, 2.0]))
    batch = images(6)
    batch = part_of(batch, [0, 3, 0, 1, 4, 2])
    logits = plain.eval().predict(batch)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 0, 1, 1, 2]), reduction="none")
    found = weighted.eval()(batch)
    expected = 2 / 3 * losses[:3].sum() + losses[3:5].sum() + 2 * losses[5]
    torch.testing.assert_close(found.total, expected)
    assert found.count == 6
    assert plain.state_dict().keys() == weighted.state_dict().keys()


def test_weights_and_a_frozen_start_that_make_no_sense_are_refused() -> None:
    for settings in ({"multi_label": True, "class_counts": [1, 1, 1]}, {}):
        with pytest.raises(ValueError, match=r"objective.class_weights=balanced: weighs clips by their class"):
            image_classifier(class_weights="balanced", **settings)
    with pytest.raises(ValueError, match=r"objective.freeze_updates=3: the encoder is never trained"):
        image_classifier(freeze_updates=3, freeze_encoder=True)
