"""What `classify` and `ctc` have in common: a freeze schedule, and weighted layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.classify import Classify
from mmssl.objectives.ctc import CTC
from mmssl.training import checkpoint
from mmssl.training.optimizer import build_optimizer
from mmssl.types import Batch, Raw

DEPTH = 3
Objective = Classify | CTC
Build = Callable[..., Objective]


def classifier(norm: str = "pre", seed: int = 0, **settings: Any) -> Classify:
    torch.manual_seed(seed)
    frontend = Patches(dim=8, size=[2, 2], channels=1, mean=[0.5], std=[0.3])
    body = Transformer(dim=8, depth=DEPTH, heads=2, norm=norm, bias={"name": "alibi"})
    return Classify(Encoder(frontend, body, SinCos(8), prefix=1), n_classes=3, head_std=0.5, **settings)


def speller(norm: str = "pre", seed: int = 0, **settings: Any) -> CTC:
    torch.manual_seed(seed)
    frontend = Waveform(dim=8, layers=[[8, 10, 5], [8, 4, 4]], rate=1000)
    body = Transformer(dim=8, depth=DEPTH, heads=2, norm=norm)
    encoder = Encoder(frontend, body, Convolutional(8, kernel=5, groups=2), mask_token=True)
    given = {"freeze_updates": 0, "freeze_frontend": False, "mask_span": 3, "channel_mask_span": 3}
    return CTC(encoder, n_characters=4, **(given | settings))


def batch_for(objective: Objective) -> Batch:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.arange(2) + 10
    if isinstance(objective, Classify):
        pictures = torch.rand(2, 1, 4, 4, generator=generator)
        return Batch(
            {"image": Raw(pictures, torch.ones(2, dtype=torch.int64), ["a", "b"])}, seeds, torch.tensor([0, 2])
        )
    waves = Raw(torch.randn(2, 400, generator=generator), torch.tensor([400, 300]), ["a", "b"], 1000)
    return Batch({"speech": waves}, seeds, torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))


EACH = pytest.mark.parametrize("build", [classifier, speller])


def layer_of(name: str) -> int | None:
    """The layer of an encoder, with a norm before and none but one behind its blocks; None for what is new."""
    if not name.startswith("encoder."):
        return None
    if name.startswith("encoder.transformer.blocks."):
        return int(name.split(".")[3]) + 1
    return DEPTH if name.startswith("encoder.transformer.norm.") else 0


def update(objective: Objective, optimizer: torch.optim.Optimizer, number: int) -> None:
    """As the training loop has it."""
    objective(batch_for(objective)).total.backward()
    optimizer.step()
    objective.zero_grad(set_to_none=True)
    objective.after_step(number)


@EACH
def test_each_update_moves_the_layers_of_its_turn_and_leaves_the_others_without_decay_and_moments(build: Build) -> None:
    objective = build(freeze_updates=1, unfreeze_every=2).train()
    optimizer = build_optimizer(objective, lr=1e-2, weight_decay=0.5)
    assert objective.skips_parameters
    turns: list[set[int]] = [set(), {3}, {3}, {2, 3}, {2, 3}, {1, 2, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    for number, turn in enumerate(turns, start=1):
        before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
        assert objective.frozen == DEPTH + 1 - len(turn)
        update(objective, optimizer, number)
        for name, parameter in objective.named_parameters():
            layer = layer_of(name)
            moves = layer is None or layer in turn
            assert torch.equal(parameter, before[name]) != moves, f"update {number}: {name}"
            assert (parameter in optimizer.state) == moves, f"update {number}: {name}"


@EACH
def test_what_is_not_frozen_gets_the_gradient_that_it_has_where_nothing_is(build: Build) -> None:
    whole = build().train()
    whole(batch_for(whole)).total.backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for made in range(5):
        objective = build(freeze_updates=1, unfreeze_every=1).train()
        objective.after_step(made)
        objective(batch_for(objective)).total.backward()
        for name, parameter in objective.named_parameters():
            layer = layer_of(name)
            if layer is None or layer >= DEPTH + 1 - made:
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)
            else:
                assert parameter.grad is None, name


@EACH
def test_a_run_goes_on_from_a_checkpoint_to_the_bit_where_blocks_begin_later(build: Build, tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Objective, torch.optim.Optimizer]:
        objective = build(seed=seed, unfreeze_every=2, weighted_layers=True).train()
        return objective, build_optimizer(objective, lr=1e-2)

    objective, optimizer = made(0)
    for number in range(1, 8):
        update(objective, optimizer, number)
        if number == 3:
            checkpoint.save(tmp_path, objective, optimizer, rng={}, state={"step": 3}, keep=1)
    other, memory = made(1)
    checkpoint.load(tmp_path / "step_3", other, memory)
    for number in range(4, 8):
        update(other, memory, number)
    expected, moments = objective.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    found = memory.state_dict()["state"]
    assert found.keys() == moments.keys()
    assert all(torch.equal(found[i][key], moments[i][key]) for i in found for key in found[i])


def scores(objective: Objective) -> Tensor:
    """What the head says of the clips, nothing masked."""
    batch = batch_for(objective)
    return objective.predict(batch) if isinstance(objective, Classify) else objective.log_probs(batch.raw)[0]


@EACH
def test_all_weight_on_the_last_layer_of_a_post_norm_encoder_is_its_output(build: Build) -> None:
    plain, weighted = build("post").eval(), build("post", weighted_layers=True).eval()
    weighted.load_state_dict(plain.state_dict(), strict=False)
    assert weighted.layer_weights is not None
    assert not torch.allclose(scores(weighted), scores(plain), atol=1e-4)
    weighted.layer_weights.scores.data[-1] = 100.0
    torch.testing.assert_close(scores(weighted), scores(plain))


@EACH
def test_the_head_reads_the_sum_of_all_layers(build: Build) -> None:
    objective = build(weighted_layers=True).eval()
    assert objective.layer_weights is not None
    objective.layer_weights.scores.data = torch.tensor([1.0, 2.0, 4.0, 8.0]).log()
    tokens = objective.encoder.tokens(batch_for(objective).raw)
    encoded = objective.encoder(tokens, layers=[0, 1, 2, 3])
    x = sum(2**i / 15 * encoded.layers[i] for i in range(4))
    if isinstance(objective, Classify):
        by_hand = objective.head(x[:, 1:].mean(1))
    else:
        by_hand = objective.head(x).log_softmax(-1)
    torch.testing.assert_close(scores(objective), by_hand)


@EACH
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_weighted_layers_reach_all_but_the_norm_behind_the_blocks(build: Build, norm: str) -> None:
    objective = build(norm, weighted_layers=True).train()
    objective(batch_for(objective)).total.backward()
    unreached = {name for name, p in objective.named_parameters() if p.grad is None}
    behind = {f"encoder.transformer.norm.{part}" for part in ("weight", "bias")}
    assert unreached == (behind if norm == "pre" else set())
    assert objective.skips_parameters == bool(unreached)
    assert objective.layer_weights is not None
    assert objective.layer_weights.scores.grad.abs().min() > 0


@pytest.mark.parametrize(("build", "setting"), [(classifier, "freeze_encoder"), (speller, "freeze_updates")])
def test_on_a_frozen_encoder_the_weights_and_the_head_learn(build: Build, setting: str) -> None:
    objective = build(weighted_layers=True, **{setting: True}).train()
    objective(batch_for(objective)).total.backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in objective.named_parameters() if layer_of(name) is None}
    assert "layer_weights.scores" in reached


def test_a_schedule_for_an_encoder_that_is_never_trained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.unfreeze_every=2: the encoder is never trained"):
        classifier(unfreeze_every=2, freeze_encoder=True)
