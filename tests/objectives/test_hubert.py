import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import span_mask
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.nn.units import CosineHead, units_of_tokens
from mmssl.objectives.hubert import HuBERT
from mmssl.types import Batch, Raw, Tokens, Units

DIM = 16
RATE = 50.0  # tokens a second: 1,000 samples a second, one token every 20


def encoder(*, mask_token: bool = True) -> Encoder:
    frontend = Waveform(dim=DIM, layers=[[8, 10, 5], [8, 4, 4]], rate=1000)
    positions = Convolutional(DIM, kernel=5, groups=2)
    return Encoder(frontend, Transformer(dim=DIM, depth=2, heads=2), positions, mask_token=mask_token)


def build(**settings: object) -> HuBERT:
    torch.manual_seed(0)
    return HuBERT(encoder(), **{"units": {"units": 7}, "mask_span": 4, "dim": 8, **settings})  # type: ignore[arg-type]


def label_set(clips: list[list[int]], rate: float | None = RATE, starts: list[float] | None = None) -> Units:
    values = torch.nn.utils.rnn.pad_sequence([torch.tensor(clip) for clip in clips], batch_first=True)
    values = values[..., None] if values.ndim == 2 else values
    begin = torch.tensor(starts or [0.0] * len(clips), dtype=torch.float64)
    return Units(values, torch.tensor([len(clip) for clip in clips]), rate, begin)


def clips(samples: list[int], first: int = 0, codes: int = 7) -> Batch:
    """Clips that are the same in whatever batch they come; units at the rate of the tokens."""
    data = torch.zeros(len(samples), max(samples))
    units = []
    for row, n in enumerate(samples):
        generator = torch.Generator().manual_seed(first + row)
        data[row, :n] = torch.randn(n, generator=generator)
        units.append(torch.randint(codes, (n // 20,), generator=generator).tolist())
    ids = [f"clip{first + row}" for row in range(len(samples))]
    seeds = torch.arange(len(samples)) + 100 + first
    return Batch({"speech": Raw(data, torch.tensor(samples), ids, 1000)}, seeds, units={"units": label_set(units)})


def tokens_of(
    lengths: list[int], *, axes: tuple[str, ...] = ("t",), rest: int = 1, step_ms: float | None = 20
) -> Tokens:
    size = max(lengths)
    grid = (size // rest, rest) if rest > 1 else (size,)
    coords = torch.zeros(1, size, len(axes), dtype=torch.int64)
    return Tokens(torch.zeros(len(lengths), size, 4), torch.tensor(lengths), coords, axes, grid, step_ms=step_ms)


def gradients(objective: HuBERT) -> Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


@torch.no_grad()
def test_logits_are_cosines_over_the_temperature_by_hand() -> None:
    head = CosineHead(2, 3, code_dim=2, temperature=0.1)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(2))
        head.project.bias.zero_()
        head.codes.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5], [3.0, 4.0]]))
    # (3, 4) has the cosines 3/5, 4/5 and 1 with them, however long they are
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0]])), torch.tensor([[6.0, 8.0, 10.0]]))


@pytest.mark.parametrize("unmasked", [0.0, 0.25])
@torch.no_grad()
def test_the_loss_is_cross_entropy_over_cosines_at_hidden_tokens(unmasked: float) -> None:
    """Token by token, with nothing of the objective but its encoder and its weights."""
    objective = build(unmasked_weight=unmasked, feature_penalty=0.0).eval()
    batch = clips([700, 400])
    tokens = objective.encoder.tokens(batch.raw)
    plan = span_mask(tokens.lengths, prob=0.8, span=4, seeds=batch.seeds)
    x = objective.encoder(tokens, plan, "replace").tokens
    [head] = objective.heads["units"]
    expected, count = 0.0, 0
    for row, length in enumerate(tokens.lengths.tolist()):
        for place in range(length):
            weight = 1.0 if plan.masked[row, place] else unmasked
            if not weight:
                continue
            vector = head.project(x[row, place])
            scores = [float(torch.dot(vector, code) / vector.norm() / code.norm()) / 0.1 for code in head.codes]
            unit = int(batch.units["units"].values[row, place, 0])
            expected -= weight * (scores[unit] - math.log(sum(math.exp(score) for score in scores)))
            count += 1
    loss = objective(batch)
    assert loss.count == count
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_several_label_sets_add_up_with_their_weights() -> None:
    batch = clips([700, 400])
    pairs = torch.randint(5, (2, 35, 2))
    units = {**batch.units, "codec": replace(batch.units["units"], values=pairs)}
    both = replace(batch, units=units)
    objective = build(units={"units": 7, "codec": [5, 5]}, weights={"codec": [0.5, 0.25]}, feature_penalty=0.0).eval()
    metrics = objective(both).metrics
    parts = [metrics[f"{name}cross_entropy"][0] for name in ("", "codec_0_", "codec_1_")]
    assert objective(both).total.item() == pytest.approx(float(parts[0] + 0.5 * parts[1] + 0.25 * parts[2]), rel=1e-5)
    assert len({round(float(part), 3) for part in parts}) == 3


@torch.no_grad()
def test_a_topic_counts_once_for_each_hidden_token_of_its_clip() -> None:
    batch = clips([700, 400])
    topic = label_set([[2], [0]], rate=None)
    objective = build(topics={"topic": 3}, weights={"units": 0.0}, feature_penalty=0.0).eval()
    loss = objective(replace(batch, units={**batch.units, "topic": topic}))
    tokens = objective.encoder.tokens(batch.raw)
    plan = span_mask(tokens.lengths, prob=0.8, span=4, seeds=batch.seeds)
    x = objective.encoder(tokens, plan, "replace").x
    expected = 0.0
    for row, unit in ((0, 2), (1, 0)):
        pooled = x[row, : tokens.lengths[row]].mean(0)
        logits = objective.heads["topic"][0](pooled[None])[0]
        expected += int(plan.masked[row].sum()) * float(logits.logsumexp(0) - logits[unit])
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_the_regression_adds_the_mean_square_error_at_hidden_tokens() -> None:
    def target(raw: Raw, tokens: Tokens) -> Tensor:
        return tokens.coords.float() * torch.tensor([1.0, -2.0])

    batch = clips([700, 400])
    settings = {"feature_penalty": 0.0, "unmasked_weight": 0.5}
    plain = build(**settings).eval()
    objective = build(**settings, regression=0.3, target=target, target_dim=2).eval()
    objective.load_state_dict({**objective.state_dict(), **plain.state_dict()})
    tokens = objective.encoder.tokens(batch.raw)
    plan = span_mask(tokens.lengths, prob=0.8, span=4, seeds=batch.seeds)
    x = objective.encoder(tokens, plan, "replace").tokens
    assert objective.regress is not None
    expected = 0.0
    for row, place in plan.masked.nonzero().tolist():
        wanted = torch.tensor([place, -2.0 * place])
        expected += 0.3 * float((objective.regress(x[row, place]) - wanted).square().mean())
    loss, without = objective(batch), plain(batch)
    assert loss.count == without.count
    assert float(loss.total - without.total) == pytest.approx(expected, rel=1e-4)
    assert 0.3 * float(loss.metrics["regression"][0]) == pytest.approx(expected, rel=1e-4)
    assert "regression" not in without.metrics


def test_units_at_twice_the_rate_are_taken_every_other_one() -> None:
    found, known = units_of_tokens(label_set([list(range(9))], rate=100), tokens_of([4]))
    assert found[0, :, 0].tolist() == [0, 2, 4, 6]
    assert known.all()


def test_slower_units_are_shared_and_a_codec_of_75_is_met_where_time_says() -> None:
    found, _ = units_of_tokens(label_set([[5, 6, 7]], rate=25), tokens_of([6]))
    assert found[0, :, 0].tolist() == [5, 5, 6, 6, 7, 7]
    # token i begins at 20 i ms: 1.5 i steps of 75 a second, rounded down
    found, _ = units_of_tokens(label_set([list(range(10))], rate=75), tokens_of([6]))
    assert found[0, :, 0].tolist() == [0, 1, 3, 4, 6, 7]


def test_no_rounding_moves_a_unit_over_an_hour() -> None:
    size = 180_000
    found, known = units_of_tokens(label_set([list(range(size))], rate=50), tokens_of([size]))
    assert torch.equal(found[0, :, 0], torch.arange(size))
    assert known.all()


def test_a_clip_that_begins_within_a_step_keeps_its_time() -> None:
    """At 25 a second, a clip from 20 ms on: its first token shares the first step, the next two the second."""
    found, _ = units_of_tokens(label_set([[5, 6, 7]], rate=25, starts=[0.02]), tokens_of([4]))
    assert found[0, :, 0].tolist() == [5, 6, 6, 7]


def test_tokens_of_one_time_have_one_unit() -> None:
    found, known = units_of_tokens(label_set([[4, 5], [6]]), tokens_of([6, 3], axes=("t", "f"), rest=3))
    assert found[0, :, 0].tolist() == [4, 4, 4, 5, 5, 5]
    assert found[1, :3, 0].tolist() == [6, 6, 6]
    assert known.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


def test_tokens_past_the_last_unit_are_left_out_and_counted() -> None:
    batch = clips([700])
    units = replace(batch.units["units"], values=batch.units["units"].values[:, :20], lengths=torch.tensor([20]))
    loss = build().eval()(replace(batch, units={"units": units}))
    missing, hidden = loss.metrics["without_units"]
    assert 0 < missing < hidden
    assert loss.count == hidden - missing


def test_units_without_a_rate_are_one_for_each_token() -> None:
    found, _ = units_of_tokens(label_set([[3, 4, 5], [6]], rate=None), tokens_of([3, 1], axes=("h",), step_ms=None))
    assert found[..., 0].tolist() == [[3, 4, 5], [6, 0, 0]]
    with pytest.raises(ValueError, match="clip 0 of the batch has 2 units for 3 tokens"):
        units_of_tokens(label_set([[3, 4]], rate=None), tokens_of([3], step_ms=None))
    with pytest.raises(ValueError, match="need tokens along time"):
        units_of_tokens(label_set([[3, 4]]), tokens_of([2], axes=("h",), step_ms=None))


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    samples = [300, 900, 450, 620, 710, 405]
    objective = build(feature_penalty=10.0, unmasked_weight=0.3)
    whole = objective(clips(samples))
    (whole.total / whole.count).backward()
    expected = gradients(objective)
    objective.zero_grad()
    losses = [objective(clips([n], first=i)) for i, n in enumerate(samples)]
    assert sum(loss.count for loss in losses) == whole.count
    for loss in losses:
        (loss.total / whole.count).backward()
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-3, atol=1e-6)


def test_what_stands_past_a_clips_units_changes_nothing() -> None:
    objective = build(feature_penalty=0.0).eval()
    batch = clips([400, 700])
    units = batch.units["units"]
    values = units.values.clone()
    values[0, 20:] = 6
    assert torch.equal(
        objective(replace(batch, units={"units": replace(units, values=values)})).total, objective(batch).total
    )


def test_a_batch_without_units_to_predict_gives_zero_and_still_a_graph() -> None:
    objective = build()
    batch = clips([400])
    empty = Units(torch.zeros(1, 0, 1, dtype=torch.int64), torch.tensor([0]), RATE, torch.zeros(1, dtype=torch.float64))
    loss = objective(replace(batch, units={"units": empty}))
    loss.total.backward()
    assert (loss.count, loss.total.item()) == (0, 0.0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_it_learns_which_unit_a_note_is() -> None:
    """Notes of ten tokens each: what is hidden follows from what is beside it."""
    objective = build(mask_prob=0.3, mask_span=2, dim=16, feature_penalty=0.0, units={"units": 4})
    notes = torch.randint(4, (4, 8), generator=torch.Generator().manual_seed(0))
    pitch = (60.0 + 80 * notes).repeat_interleave(200, 1)
    data = torch.sin(2 * math.pi * pitch * torch.arange(1600) / 1000)
    units = label_set(notes.repeat_interleave(10, 1).tolist())
    raw = Raw(data, torch.full((4,), 1600), list("abcd"), 1000)
    batch = Batch({"speech": raw}, torch.arange(4), units={"units": units})
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for _ in range(25):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    right, n = loss.metrics["accuracy"]
    most, _ = loss.metrics["chance_accuracy"]
    assert right / n > 1.5 * most / n


def test_it_runs_on_pictures_with_a_unit_for_each_patch() -> None:
    frontend = Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5])
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM), prefix=1, mask_token=True)
    objective = HuBERT(net, units={"patches": 5}, mask_span=1, mask_prob=0.5, dim=8)
    raw = Raw(torch.rand(2, 1, 4, 6), torch.ones(2, dtype=torch.int64), ["a", "b"])
    units = label_set([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 4]], rate=None)
    loss = objective(Batch({"image": raw}, torch.arange(2), units={"patches": units}))
    loss.total.backward()
    assert loss.count == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"units": {}}, "name a key of the manifest"),
        ({"units": {"units": 1}}, "a choice takes two"),
        ({"units": {"a b": 5}}, "a key is one word"),
        ({"topics": {"units": 3}}, "a label set is one or the other"),
        ({"weights": {"other": 1.0}}, "there are no units called 'other'"),
        ({"units": {"codec": [4, 4]}, "weights": {"codec": [1.0]}}, "1 for the 2 labels of 'codec'"),
        ({"regression": 1.0}, "a weight above 0 goes with a target"),
        ({"target": lambda raw, tokens: tokens.x, "target_dim": DIM}, "no target without one"),
        (
            {"regression": 1.0, "target": lambda raw, tokens: tokens.feat, "target_dim": 8, "target_learned": True},
            "choose a fixed target such as cqt",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(**settings)


def test_an_encoder_without_a_mask_token_and_a_batch_without_units_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder.mask_token=false: HuBERT replaces hidden tokens"):
        HuBERT(encoder(mask_token=False), units={"units": 5})
    with pytest.raises(ValueError, match="the units at 'units' of a row are to be predicted"):
        build()(replace(clips([400]), units={}))
