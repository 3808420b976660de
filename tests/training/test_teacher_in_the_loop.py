"""A teacher in the loop: it moves once for each update, and a run that was cut off ends with the same one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy import Loader, run

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.data2vec import Data2Vec
from mmssl.objectives.data2vec2 import Data2Vec2
from mmssl.objectives.jepa import JEPA
from mmssl.types import Batch, Raw


class Pictures(Loader):
    """Micro-batch k holds the pictures from k * size on."""

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self.consumed * self.size
            self.consumed += 1
            numbers = torch.arange(first, first + self.size)
            data = torch.stack([torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(int(n))) for n in numbers])
            raw = Raw(data, torch.ones(self.size, dtype=torch.int64), [str(int(n)) for n in numbers])
            yield Batch({"image": raw}, numbers)


Kind = type[Data2Vec] | type[Data2Vec2] | type[JEPA]


def build(kind: Kind) -> Data2Vec | Data2Vec2 | JEPA:
    torch.manual_seed(0)
    frontend = Patches(dim=8, size=[2, 2], channels=1, mean=[0.5], std=[0.3])
    encoder = Encoder(frontend, Transformer(dim=8, depth=2, heads=2, dropout=0.1), SinCos(8), mask_token=True)
    teacher = {"ema_decay": 0.5, "ema_decay_end": 0.9, "ema_updates": 4}
    if kind is Data2Vec:
        return Data2Vec(encoder, top_k=2, mask_size=2, **teacher)
    if kind is JEPA:
        return JEPA(encoder, predictor_dim=8, predictor_depth=1, predictor_heads=2, **teacher)
    return Data2Vec2(
        encoder, top_k=2, mask_size=2, clones=2, decoder_dim=8, decoder_depth=1, decoder_groups=2, **teacher
    )


each_kind = pytest.mark.parametrize("kind", [Data2Vec, Data2Vec2, JEPA])


@each_kind
def test_a_teacher_moves_once_for_each_update_however_many_parts_it_has(kind: Kind, tmp_path: Path) -> None:
    objective = build(kind)
    decays: list[float] = []
    move = objective.teacher.update
    objective.teacher.update = lambda student, decay: (decays.append(decay), move(student, decay))[1]  # type: ignore
    run(tmp_path, objective, loader=Pictures(2), steps=5, accumulate=3, save_every=0)
    assert decays == pytest.approx([0.6, 0.7, 0.8, 0.9, 0.9])


@each_kind
def test_a_run_that_was_cut_off_has_the_same_teacher_to_the_bit(kind: Kind, tmp_path: Path) -> None:
    whole, cut, resumed = build(kind), build(kind), build(kind)
    run(tmp_path / "whole", whole, loader=Pictures(2), steps=6)
    run(tmp_path / "cut", cut, loader=Pictures(2), steps=3)
    run(tmp_path / "cut", resumed, loader=Pictures(2), steps=6, resume=True)
    ours, theirs, first = resumed.state_dict(), whole.state_dict(), build(kind).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    moved = [name for name in theirs if name.startswith("teacher.") and not torch.equal(theirs[name], first[name])]
    assert len(moved) > 10
