import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.wav2vec2 import Draws, Wav2Vec2, draw_negatives, feature_size, masked_places
from mmssl.types import Batch, Raw

DIM = 16
LAYERS = [[8, 10, 5], [8, 4, 4]]


def encoder(*, norm: str = "layer", mask_token: bool = True, layer_drop: float = 0.0) -> Encoder:
    frontend = Waveform(dim=DIM, layers=LAYERS, norm=norm, rate=1000)
    transformer = Transformer(dim=DIM, depth=2, heads=2, layer_drop=layer_drop)
    return Encoder(frontend, transformer, Convolutional(DIM, kernel=5, groups=2), mask_token=mask_token)


def build(**settings: object) -> Wav2Vec2:
    torch.manual_seed(0)
    return Wav2Vec2(encoder(), **{"mask_span": 4, "negatives": 8, "codes": 6, "dim": 8, **settings})  # type: ignore[arg-type]


def clips(samples: list[int], first: int = 0) -> Batch:
    """Clips that are the same in whatever batch they come."""
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row))
    ids = [f"clip{first + row}" for row in range(len(samples))]
    seeds = torch.arange(len(samples)) + 100 + first
    return Batch({"speech": Raw(data, torch.tensor(samples), ids, 1000)}, seeds)


def images(number: int) -> Batch:
    data = torch.rand(number, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    lengths = torch.ones(number, dtype=torch.int64)
    return Batch({"image": Raw(data, lengths, [str(i) for i in range(number)])}, torch.arange(number))


def gradients(objective: Wav2Vec2) -> Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


def test_gradients_reach_every_parameter() -> None:
    objective = build()
    objective(clips([400, 700])).total.backward()
    silent = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_the_target_is_not_detached() -> None:
    """Nothing else would train the codebook, nor the frontend through it."""
    objective = build(diversity_weight=0.0, feature_penalty=0.0)
    objective.encoder.requires_grad_(False)
    objective(clips([400, 700])).total.backward()
    assert objective.quantizer.codebook.grad.abs().sum() > 0
    assert objective.quantizer.logits.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_eight_micro_batches_give_the_gradient_of_one_batch(penalty: float) -> None:
    """With Gumbel noise and feature dropout on: both are drawn from the clips' seeds."""
    samples = [300, 900, 450, 620, 480, 333, 710, 405]
    parts = [clips([n], first=i) for i, n in enumerate(samples)]
    objective = build(diversity_weight=3.0, feature_penalty=penalty).train()

    whole = objective(clips(samples))
    (whole.total / whole.count).backward()
    expected = gradients(objective)

    objective.zero_grad()
    objective.global_statistics = torch.stack([objective.statistics(part) for part in parts]).sum(0)
    losses = [objective(part) for part in parts]
    count = sum(loss.count for loss in losses)
    for loss in losses:
        (loss.total / count).backward()
    assert count == whole.count
    assert sum(loss.total.item() for loss in losses) == pytest.approx(whole.total.item(), rel=1e-5)
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(gradients(objective), expected, dim=0) > 0.99999

    objective.zero_grad()
    objective.global_statistics = None
    for part in parts:
        (objective(part).total / count).backward()
    assert torch.cosine_similarity(gradients(objective), expected, dim=0) < 0.9999  # what the statistics are for


def test_statistics_are_those_of_the_loss() -> None:
    objective = build().train()
    batch = clips([400, 700, 300])
    alone = objective(batch)
    objective.global_statistics = objective.statistics(batch)
    told = objective(batch)
    assert objective.global_statistics[-1] == alone.count
    assert told.total.item() == pytest.approx(alone.total.item(), rel=1e-6)


def test_a_stale_total_does_not_reach_the_evaluation() -> None:
    objective = build().eval()
    batch = clips([400])
    before = objective(batch).total
    objective.global_statistics = torch.ones(13)
    assert torch.equal(objective(batch).total, before)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_garbage_in_the_padding_changes_nothing(norm: str) -> None:
    torch.manual_seed(0)
    objective = Wav2Vec2(encoder(norm=norm), mask_span=4, negatives=8, codes=6, dim=8).train()
    batch = clips([400, 700, 310])
    raw = batch.raw
    dirty = raw.data.clone()
    for row, n in enumerate(raw.lengths.tolist()):
        dirty[row, n:] = 1e3
    assert (dirty != raw.data).any()
    clean = objective(batch).total
    assert torch.equal(objective(replace(batch, inputs={"speech": replace(raw, data=dirty)})).total, clean)


def test_twenty_steps_lower_the_loss_on_a_toy() -> None:
    """Notes of ten tokens each: what is hidden follows from what is beside it. It must get below what chance gives,
    which a prediction that is the same everywhere does not."""
    objective = build(mask_prob=0.3, mask_span=2, codes=8, dim=16, feature_penalty=0.0).train()
    batch = clips([1600] * 4)
    pitches = torch.Generator().manual_seed(0)
    for raw in batch.raw.data:
        pitch = 20.0 * torch.randint(2, 16, (9,), generator=pitches)
        raw.copy_(torch.sin(2 * math.pi * pitch.repeat_interleave(200)[:1600] * torch.arange(1600) / 1000))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    seen = []
    for step in range(1, 21):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        objective.after_step(step)
        seen.append({name: float(value) / n for name, (value, n) in loss.metrics.items()})
    assert seen[-1]["loss"] < 0.9 * seen[0]["loss"]
    assert seen[-1]["contrastive"] < 0.9 * seen[-1]["chance"]
    assert seen[-1]["accuracy"] > 2 * seen[-1]["chance_accuracy"]


def test_masks_negatives_and_noise_belong_to_the_clip() -> None:
    objective = build().train()
    together, alone = clips([400, 700]), clips([700], first=1)
    both = objective.draw(objective.encoder.tokens(together.raw), together.seeds)
    one = objective.draw(objective.encoder.tokens(alone.raw), alone.seeds)
    n = len(one.negatives)
    assert torch.equal(both.plan.masked[1], one.plan.masked[0])
    assert torch.equal(both.negatives[-n:], one.negatives)
    assert torch.equal(both.noise[-n:], one.noise)
    assert torch.equal(both.kept[-n:], one.kept)


def test_evaluation_draws_no_noise_and_repeats_itself() -> None:
    objective = build().eval()
    batch = clips([400, 700])
    draws = objective.draw(objective.encoder.tokens(batch.raw), batch.seeds)
    assert draws.noise is None
    assert draws.kept is None
    assert torch.equal(objective(batch).total, objective(batch).total)


def test_the_evaluation_takes_the_soft_perplexity_too() -> None:
    """Hard codes there would make its diversity loss another quantity than the training's."""
    objective = build(feature_dropout=0.0)
    batch = clips([400, 700])
    trained, evaluated = objective.train()(batch).metrics, objective.eval()(batch).metrics
    assert torch.equal(evaluated["diversity"][0], trained["diversity"][0])


def test_diversity_is_the_share_of_codes_not_in_use() -> None:
    """Two groups of 6 codes: always the same one leaves (12 - 2) / 12 unused, all alike leave none."""
    objective = build()
    one = torch.nn.functional.one_hot(torch.zeros(9, 2, dtype=torch.int64), 6).float()
    term, used = objective._diversity(one)
    assert term.item() == pytest.approx(9 * 10 / 12)
    assert used.tolist() == pytest.approx([1.0, 1.0])
    term, used = objective._diversity(torch.full((9, 2, 6), 1 / 6))
    assert term.item() == pytest.approx(0.0, abs=1e-5)
    assert used.tolist() == pytest.approx([6.0, 6.0])


def test_feature_size_is_each_clips_mean_square_for_each_hidden_token() -> None:
    pre_norm = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [9.0, 9.0]], [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]])
    # clip 0: (1 + 9 + 1 + 1) / 4 = 3 over its two real tokens; clip 1: 16 / 6
    size = feature_size(pre_norm, torch.tensor([2, 3]), torch.tensor([5, 2]))
    assert size.item() == pytest.approx(5 * 3 + 2 * 16 / 6)


def test_a_frame_alone_in_its_clip_is_counted_and_left_out() -> None:
    objective = build().eval()
    batch = clips([400, 400])
    tokens = objective.encoder.tokens(batch.raw)
    masked = torch.zeros(2, 20, dtype=torch.bool)[:, : tokens.x.shape[1]]
    masked[0, 3] = masked[1, 2] = masked[1, 5] = True
    plan = plan_of(masked, tokens.lengths)
    index, counts = masked_places(plan)
    assert counts.tolist() == [0, 2]
    loss = objective.loss_from(tokens, Draws(plan, draw_negatives(counts, 8, batch.seeds)))
    assert loss.count == 2
    assert loss.metrics["without_negatives"] == (1, 3)
    size = tokens.x.shape[1]
    assert index.tolist() == [size + 2, size + 5]


def test_a_batch_without_a_contrast_gives_zero_and_still_a_graph() -> None:
    """One token each leaves nothing to hide; other processes still wait for this one's gradients."""
    objective = build().train()
    loss = objective(clips([25, 25]))
    assert loss.count == 0
    assert loss.total.item() == 0.0
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
    assert all(math.isfinite(float(value)) for value, _ in loss.metrics.values())


def test_a_dead_codebook_reads_as_one() -> None:
    """All negatives equal the positive: the loss is 0, and nothing else may look good."""
    objective = build(feature_penalty=0.0, diversity_weight=0.0).eval()
    with torch.no_grad():
        objective.quantizer.logits.weight.zero_()
    loss = objective(clips([400, 700]))
    found = {name: float(value) / count for name, (value, count) in loss.metrics.items()}
    assert found["contrastive"] == 0.0
    assert found["accuracy"] == found["chance_accuracy"] == found["chance"] == 0.0
    assert found["code_perplexity"] == pytest.approx(1.0)
    assert found["target_std"] == pytest.approx(0.0, abs=1e-6)


def test_a_fresh_model_is_near_chance() -> None:
    objective = build(codes=64, negatives=20).eval()
    found = {k: float(v) / n for k, (v, n) in objective(clips([900] * 4)).metrics.items()}
    assert found["chance"] <= math.log(21)
    assert found["chance"] == pytest.approx(math.log(21), rel=0.05)
    assert found["accuracy"] < 5 * found["chance_accuracy"]
    assert 1 <= found["code_perplexity"] <= 64


def test_temperature_is_a_function_of_updates_and_survives_saving() -> None:
    objective = build(gumbel=(2.0, 0.5, 0.9))
    objective.after_step(3)
    other = build(gumbel=(2.0, 0.5, 0.9))
    other.load_state_dict(objective.state_dict())
    value, count = other(clips([400])).metrics["temperature"]
    assert float(value) / count == pytest.approx(2 * 0.9**3)


def test_it_runs_on_pictures_as_it_is() -> None:
    torch.manual_seed(0)
    frontend = Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5])
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM), prefix=1, mask_token=True)
    objective = Wav2Vec2(net, mask_span=3, negatives=5, codes=4, dim=8)
    loss = objective(images(3))
    loss.total.backward()
    assert loss.count > 0
    assert "feature_penalty" not in loss.metrics
    assert net.frontend.project.weight.grad.abs().sum() > 0


def test_the_codes_of_a_clip_do_not_depend_on_what_is_hidden() -> None:
    """The quantizer reads what the frontend measured, never the mask token."""
    objective = build().eval()
    batch = clips([400])
    tokens = objective.encoder.tokens(batch.raw)
    with torch.no_grad():
        before = objective(batch).metrics["code_perplexity"][0].clone()
        objective.encoder.mask_token.add_(5.0)
    assert torch.equal(objective(batch).metrics["code_perplexity"][0], before)
    assert tokens.feat.shape[-1] == objective.quantizer.logits.in_features


def test_a_part_without_a_contrast_has_a_loss_that_no_process_waits_for() -> None:
    """Every parameter has a gradient, of zero, so that processes may exchange them without a look at who has some."""
    model = Wav2Vec2(encoder())
    raw = Raw(
        torch.randn(1, model.encoder.frontend.min_length), torch.tensor([model.encoder.frontend.min_length]), ["a"]
    )
    loss = model(Batch({"speech": raw}, seeds=torch.tensor([0])))
    loss.total.backward()
    assert loss.count == 0
    assert not model.skips_parameters
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert not any(parameter.grad.any() for parameter in model.quantizer.parameters())


def test_an_encoder_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder.mask_token=false: wav2vec 2.0 replaces hidden tokens"):
        Wav2Vec2(encoder(mask_token=False))
    with pytest.raises(ValueError, match="objective.negatives=0"):
        Wav2Vec2(encoder(), negatives=0)
