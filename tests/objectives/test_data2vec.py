"""data2vec: the target worked out by hand, a teacher that no gradient and no mask reaches, and how it moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.block_masks import block_mask
from mmssl.nn.positions import SinCos, StackedConvolutional
from mmssl.nn.transformer import Transformer
from mmssl.objectives.data2vec import Data2Vec
from mmssl.training.health import diagnose
from mmssl.types import Batch, Raw

LAYERS = [[8, 10, 5], [8, 4, 4], [8, 2, 2]]


def speech(norm: str = "post", rates: float = 0.0, dropout: float = 0.0, **settings: Any) -> Data2Vec:
    torch.manual_seed(0)
    frontend = Waveform(dim=8, layers=LAYERS, rate=8000, dropout=dropout)
    transformer = Transformer(
        dim=8, depth=3, heads=2, norm=norm, dropout=rates, attention_dropout=rates, drop_path=rates
    )
    encoder = Encoder(
        frontend, transformer, StackedConvolutional(8, depth=2, kernel=3, groups=2), prefix=1, mask_token=True
    )
    return Data2Vec(encoder, **({"mask_size": 3, "top_k": 2} | settings))


def sounds(samples: tuple[int, ...] = (1600, 700, 1000)) -> Batch:
    data = torch.zeros(len(samples), max(samples))
    for row, n in zip(data, samples, strict=True):
        row[:n] = torch.randn(n, generator=torch.Generator().manual_seed(n))
    raw = Raw(data, torch.tensor(samples), [str(n) for n in samples], rate=8000)
    return Batch({"speech": raw}, torch.tensor(samples))


def stepped(objective: Data2Vec, steps: int) -> list[dict[str, Tensor]]:
    """The encoder's weights before and after each update."""
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    seen = [{name: p.detach().clone() for name, p in objective.encoder.named_parameters()}]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        objective(sounds()).total.backward()
        optimizer.step()
        objective.after_step(step)
        seen.append({name: p.detach().clone() for name, p in objective.encoder.named_parameters()})
    return seen


def test_the_teachers_weights_after_three_updates_are_those_worked_by_hand() -> None:
    # decays .7, .8 and .9: the first weights are left with .7 * .8 * .9, those after update 1 with .3 * .8 * .9, ...
    objective = speech(ema_decay=0.6, ema_decay_end=0.9, ema_updates=3)
    seen = stepped(objective, 3)
    shares = [0.7 * 0.8 * 0.9, 0.3 * 0.8 * 0.9, 0.2 * 0.9, 0.1]
    weights = dict(objective.teacher.module.named_parameters())
    for name in objective.teacher.averaged:
        expected = sum(share * weight[name].double() for share, weight in zip(shares, seen, strict=True))
        torch.testing.assert_close(weights[name].double(), expected, rtol=1e-5, atol=1e-6)
    for name in objective.teacher.copied:
        if name in weights:
            assert torch.equal(weights[name], seen[-1][name])
    moved = [name for name in weights if not torch.equal(seen[0][name], seen[-1][name])]
    assert {name.partition(".")[0] for name in moved} == {
        "frontend",
        "positions",
        "transformer",
        "prefix",
        "mask_token",
    }


def test_what_is_averaged_and_what_is_copied_is_listed() -> None:
    teacher = speech().teacher
    assert {name.partition(".")[0] for name in teacher.averaged} == {"transformer", "prefix", "mask_token"}
    assert {name.partition(".")[0] for name in teacher.copied if "draws" not in name} == {"frontend", "positions"}
    assert {name.partition(".")[0] for name in speech(copied=[]).teacher.averaged} >= {"frontend", "positions"}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("point", ["mlp", "block"])
def test_the_target_worked_out_clip_by_clip(norm: str, point: str) -> None:
    objective = speech(norm, target_point=point)
    batch = sounds()
    encoder = objective.teacher.module
    for p in encoder.parameters():  # not the student's any more, to see that they are read
        p.mul_(1.1)
    objective.shares_tokens = False
    target = objective.target(batch.raw, objective.encoder.tokens(batch.raw))
    read: list[Tensor] = []
    for block in encoder.transformer.blocks:
        part = block.mlp if point == "mlp" else block
        part.register_forward_hook(lambda part, given, out: read.append(out if isinstance(out, Tensor) else out[0]))
    for row, n in enumerate(batch.raw.lengths.tolist()):
        read.clear()
        encoder(encoder.tokens(Raw(batch.raw.data[row : row + 1, :n], torch.tensor([n]), ["a"], 8000)))
        # the last two of three, without the class token; (1, N, D)
        normed = [F.instance_norm(layer[:, 1:].transpose(1, 2)).transpose(1, 2) for layer in read[1:]]
        expected = (normed[0] + normed[1])[0] / 2
        torch.testing.assert_close(target[row, : len(expected)], expected, rtol=1e-3, atol=1e-4)
        assert not target[row, len(expected) :].any()
        assert expected.std() > 0.3


def test_the_loss_is_the_error_at_hidden_tokens_and_nowhere_else() -> None:
    objective, batch = speech(), sounds()
    tokens = objective.encoder.tokens(batch.raw)
    plan = block_mask(tokens, ratio=0.49, size=3, seeds=batch.seeds)
    predicted = objective.predict(objective.encoder(tokens, plan, "replace").tokens)
    target = objective.target(batch.raw, tokens)
    loss = objective(batch)
    by_hand = (predicted - target)[plan.masked].square().sum() / 8**0.5
    assert loss.count == sum(round(0.49 * n) for n in tokens.lengths.tolist())
    torch.testing.assert_close(loss.total, by_hand)
    torch.testing.assert_close(loss.metrics["loss"][0], by_hand.detach())


def test_the_target_depends_on_no_mask_no_dropout_and_no_gradient() -> None:
    objective, batch = speech(rates=0.3), sounds()
    objective.train()
    tokens = objective.encoder.tokens(batch.raw)
    target = objective.target(batch.raw, tokens)
    assert torch.equal(objective.target(batch.raw, tokens), target)
    assert not target.requires_grad
    # the mask is of the seeds
    other = Batch(batch.inputs, batch.seeds + 1)
    assert torch.equal(objective.target(other.raw, tokens), target)
    student = objective.encoder(tokens).x
    assert not torch.equal(objective.encoder(tokens).x, student)


@pytest.mark.parametrize(
    ("name", "value"), [("dropout", 0.1), ("dither", 1.0), ("stripes", {"t": 0.2}), ("stripes", {"f": 0.2})]
)
def test_a_teacher_that_reads_the_students_tokens_takes_none_that_chance_changes(name: str, value: Any) -> None:
    def made(copied: list[str]) -> Data2Vec:
        if name == "dropout":
            return speech(dropout=value, copied=copied)
        frontend = SpectrogramPatches(dim=8, size=(4, 4), bands=8, **{name: value})
        encoder = Encoder(frontend, Transformer(dim=8, depth=3, heads=2), SinCos(8), mask_token=True)
        return Data2Vec(encoder, top_k=2, copied=copied)

    with pytest.raises(ValueError, match=rf"frontend\.{name}=.*: a teacher that copies the frontend reads"):
        made(["frontend"])
    assert not made([]).shares_tokens


def test_no_gradient_reaches_the_teacher() -> None:
    objective = speech()
    before = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    objective(sounds()).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(torch.equal(p, before[name]) for name, p in objective.teacher.named_parameters())
    # and what the student learns is through its own pass alone: without that there is nothing to learn from
    objective.predict.weight.requires_grad_(False).zero_()
    objective.zero_grad()
    objective(sounds()).total.backward()
    assert not any(p.grad is not None and p.grad.any() for p in objective.encoder.parameters())


@pytest.mark.parametrize("copied", [["frontend", "positions"], []])
def test_a_copied_frontend_runs_once_and_gives_the_same_target(copied: list[str]) -> None:
    objective, batch = speech(copied=copied), sounds()
    stepped(objective, 1)
    runs: list[int] = []
    objective.teacher.module.frontend.register_forward_hook(lambda *given: runs.append(1))
    tokens = objective.encoder.tokens(batch.raw)
    target = objective.target(batch.raw, tokens)
    assert len(runs) == (0 if copied else 1)
    objective.shares_tokens = False
    same = torch.equal(objective.target(batch.raw, tokens), target)
    assert same  # where it is averaged it was read in both
    if not copied:
        objective.shares_tokens = True
        assert not torch.equal(objective.target(batch.raw, tokens), target)


def test_a_constant_target_prediction_or_feature_shows_in_its_own_metric() -> None:
    def spreads(objective: Data2Vec) -> dict[str, float]:
        loss = objective(sounds())
        return {name: float(value) / count for name, (value, count) in loss.metrics.items() if name.endswith("_std")}

    healthy = spreads(speech())
    assert min(healthy.values()) > 0.02
    broken = speech()
    torch.nn.init.zeros_(broken.predict.weight)
    assert spreads(broken)["prediction_std"] < 1e-6
    broken = speech(layer_norm="none")
    for block in broken.teacher.module.transformer.blocks:
        torch.nn.init.zeros_(block.mlp.down.weight)
    assert spreads(broken)["target_std"] < 1e-6
    broken = speech()
    torch.nn.init.zeros_(broken.encoder.frontend.norm.weight)
    assert spreads(broken)["feature_std"] < 1e-6


@pytest.mark.parametrize(("lr", "named"), [(1e-3, set()), (0.3, {"constant_prediction"})])
def test_a_rate_far_too_high_is_named_once_the_run_is_old_enough(lr: float, named: set[str]) -> None:
    objective, batch = speech(), sounds((800, 600, 700))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    history = []
    for step in range(1, 26):
        loss = objective(Batch(batch.inputs, batch.seeds + step))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
        metrics = {name: float(value) / count for name, (value, count) in loss.metrics.items()}
        # each stands for a line of many updates: verdicts wait for some hundred
        history.append({"step": 100 * step, "loss": metrics["loss"], "grad_norm": 1.0, "metrics": metrics})
    assert set(diagnose(history)) == named


def test_fixed_positions_have_nothing_to_copy() -> None:
    encoder = Encoder(
        Patches(dim=8, size=[2, 2], channels=1, mean=[0.5], std=[0.3]),
        Transformer(dim=8, depth=1, heads=2),
        SinCos(8),
        mask_token=True,
    )
    copied = Data2Vec(encoder, top_k=1).teacher.copied
    assert {name.partition(".")[0] for name in copied if name != "transformer.draws"} == {"frontend"}


def test_an_encoder_without_a_mask_token_is_refused() -> None:
    encoder = speech().encoder
    encoder.mask_token = None
    with pytest.raises(ValueError, match="encoder.mask_token=false: data2vec replaces hidden tokens"):
        Data2Vec(encoder, top_k=1)


def test_dropout_on_tokens_that_the_teacher_reads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frontend.dropout=0.1: .* take frontend out of objective.copied"):
        speech(dropout=0.1)
    assert speech(dropout=0.1, copied=["positions"]).teacher.averaged
