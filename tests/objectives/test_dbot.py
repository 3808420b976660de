"""dBOT: the teacher's features as the target, and a teacher that stays as it is."""

import copy
from typing import Any

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.dbot import DBOT
from mmssl.types import Batch, Raw


def encoder(size: int = 4, dim: int = 16, seed: int = 0, prefix: int = 1, dropout: float = 0.0) -> Encoder:
    torch.manual_seed(seed)
    frontend = Patches(dim=dim, size=[size, size], channels=1, mean=[0.5], std=[0.25])
    return Encoder(frontend, Transformer(dim=dim, depth=1, heads=2, dropout=dropout), SinCos(dim), prefix=prefix)


def dbot(theirs: Encoder, **settings: Any) -> DBOT:
    small = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return DBOT(encoder(), teacher_encoder=theirs, **small, **settings)


def pictures() -> Batch:
    data = torch.rand(3, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.ones(3, dtype=torch.int64), ["a", "b", "c"])
    return Batch({"image": raw}, torch.tensor([5, 6, 7]))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_is_the_smooth_error_against_normalized_features_of_hidden_tokens(beta: float) -> None:
    teacher, batch = encoder(dim=24, seed=1, prefix=2), pictures()
    objective = dbot(teacher, beta=beta)
    torch.nn.init.zeros_(objective.predictor.out.weight)
    torch.nn.init.constant_(objective.predictor.out.bias, 0.25)
    loss = objective(batch)
    features = teacher.eval()(teacher.tokens(batch.raw)).tokens
    features = (features - features.mean(-1, keepdim=True)) / (
        features.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    plan = random_mask(torch.tensor([8, 8, 8]), ratio=0.75, seeds=batch.seeds)
    error = (features[plan.masked] - 0.25).abs()
    by_hand = torch.where(error < beta, error.square() / (2 * beta), error - beta / 2).mean(1).sum()
    assert loss.count == 3 * 6
    torch.testing.assert_close(loss.total, by_hand)


def test_the_teacher_is_a_copy_that_neither_learns_nor_drops() -> None:
    teacher, batch = encoder(seed=1, dropout=0.5), pictures()
    objective = dbot(teacher).train()
    before = copy.deepcopy(objective.teacher.state_dict())
    first, second = objective(batch), objective(batch)
    assert torch.equal(first.total, second.total)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    first.total.backward()
    optimizer.step()
    objective.after_step(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.teacher.state_dict().items())
    assert any(name.startswith("teacher.") for name in objective.state_dict())


def test_a_teacher_of_another_grid_is_refused() -> None:
    objective = dbot(encoder(size=2, seed=1), teacher="runs/other")
    with pytest.raises(ValueError, match="teacher runs/other makes 32 tokens of a .* and the student 8"):
        objective(pictures())


@pytest.mark.parametrize(("wrong", "said"), [({"beta": 0.0}, "beta=0"), ({"mask": "stripes"}, "choose one of random")])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dbot(encoder(seed=1), **wrong)
