"""The smallest thing that can be trained, for the tests of the loop; and, as a program, runs that get killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import distributed
from mmssl.nn.teacher import Teacher
from mmssl.nn.transformer import Transformer
from mmssl.training import TrainSettings, build_optimizer, train
from mmssl.training.checkpoint import export_encoder
from mmssl.training.gradients import backward
from mmssl.training.parallel import parallelize
from mmssl.types import Batch, Loss, Raw


def clip(number: int) -> Tensor:
    """Clip `number`: 1 to 9 frames of 4 values."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(1, 10, (), generator=generator))
    return torch.randn(length, 4, generator=generator, dtype=torch.float64)


def batch(numbers: range) -> Batch:
    clips = [clip(number) for number in numbers]
    lengths = torch.tensor([len(c) for c in clips])
    data = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return Batch({"toy": Raw(data, lengths, [f"clip{n}" for n in numbers])}, torch.tensor(list(numbers)))


class Loader:
    """Micro-batch k holds the clips from k * size on."""

    epoch_start = (0, 0)
    remark = ""

    def __init__(self, size: int = 4, *, rank: int = 0, world: int = 1) -> None:
        self.size, self.rank, self.world, self.consumed = size, rank, world, 0

    def __iter__(self) -> Iterator[Batch]:
        torch.rand(1)  # as torch's DataLoader draws when an epoch begins
        while True:
            k = self.consumed + self.rank
            self.consumed += self.world
            yield batch(range(k * self.size, (k + 1) * self.size))
            if k % 3 == 2:
                torch.rand(1)


class Toy(nn.Module):
    """Fits frames through a bottleneck, in double precision, with a teacher that follows."""

    def __init__(self, *, dropout: float = 0.0, then: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.down, self.up, self.extra = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 4, bias=False)
        self.teacher = nn.Linear(4, 3).requires_grad_(False)
        self.dropout = dropout
        self.then = then
        self.double()

    def forward(self, batch: Batch) -> Loss:
        raw = batch.raw
        real = torch.arange(raw.data.shape[1]) < raw.lengths[:, None]
        x = raw.data[real]
        h = F.dropout(self.down(x).tanh(), self.dropout, self.training)
        errors = (self.up(h) + self.extra(x) - x).square().sum(-1)
        return Loss(errors.sum(), len(x), {"error": (errors.detach().sum(), len(x))})

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.down.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        self.then(step)


class Skipping(Toy):
    """Leaves `extra` out of every second micro-batch of four clips: one of two processes never has it."""

    skips_parameters = True

    def forward(self, batch: Batch) -> Loss:
        raw = batch.raw
        x = raw.data[torch.arange(raw.data.shape[1]) < raw.lengths[:, None]]
        y = self.up(self.down(x).tanh())
        if int(batch.seeds[0]) % 8 == 0:
            y = y + self.extra(x)
        return Loss((y - x).square().sum(), len(x))


class Diverse(Toy):
    """A loss that is no sum over frames: the entropy of the mean choice over the whole batch, times its frames."""

    skips_parameters = True  # `extra` has no part in this loss
    global_statistics: Tensor | None = None

    def choices(self, batch: Batch) -> Tensor:
        raw = batch.raw
        x = raw.data[torch.arange(raw.data.shape[1]) < raw.lengths[:, None]]
        return self.down(x).softmax(-1)

    def statistics(self, batch: Batch) -> Tensor:
        choices = self.choices(batch)
        return torch.cat([choices.sum(0), choices.new_tensor([len(choices)])])

    def forward(self, batch: Batch) -> Loss:
        choices = self.choices(batch)
        local = choices.sum(0)
        sums = self.global_statistics
        if sums is None:
            sums = torch.cat([local.detach(), local.new_tensor([len(choices)])])
        mean = (sums[:-1] + local - local.detach()) / sums[-1]
        entropy = -(mean * mean.log()).sum()
        error = self.up(choices).square().sum()
        return Loss(error + sums[-1] * (entropy - entropy.detach()), len(choices))


class Deep(Toy):
    """The frames of a teacher, from a Transformer."""

    skips_parameters = True  # `extra`, and blocks that are left out

    def __init__(self, *, layer_drop: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoder = Transformer(dim=4, depth=3, heads=2, layer_drop=layer_drop)
        self.double()
        self.slow = Teacher(self.encoder)  # in single precision, as ever

    def forward(self, batch: Batch) -> Loss:
        raw = batch.raw
        real = torch.arange(raw.data.shape[1]) < raw.lengths[:, None]
        h = F.dropout(self.encoder(raw.data, raw.lengths)[0][real], self.dropout, self.training)
        target = self.slow(raw.data.float(), raw.lengths)[0][real]
        return Loss((self.up(self.down(h).tanh()) - target - raw.data[real]).square().sum(), len(h))

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.slow.update(self.encoder, 0.9)


class Dropping(Deep):
    """Leaves out blocks."""

    def __init__(self) -> None:
        super().__init__(layer_drop=0.5)


def run(
    folder: Path, objective: nn.Module, *, loader: Any = None, sgd: bool = False, **options: Any
) -> dict[str, float]:
    """Train; `options` are those of `train` and of `TrainSettings`."""
    rank, world = distributed.rank(), distributed.world_size()
    own = ("evaluate", "export", "recipe", "data", "resume", "schedule")
    inner = {name: options.pop(name) for name in own if name in options}
    optimizer: torch.optim.Optimizer
    if sgd:  # one update of rate 1 moves the weights by the gradient itself
        optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    else:
        optimizer = build_optimizer(objective, lr=0.01)
    return train(
        objective,
        loader or Loader(rank=rank, world=world),
        run=folder,
        optimizer=optimizer,
        settings=TrainSettings(**{"device": "cpu", "log_every": 5, **options}),
        **{"schedule": lambda step: 1.0, **inner},
    )


def built(kind: type[Toy] = Toy, **settings: Any) -> Toy:
    """The same weights every time."""
    torch.manual_seed(3)
    return kind(**settings)


def gradient(folder: Path, kind: type[Toy] = Toy, **options: Any) -> dict[str, Tensor]:
    """The gradient of the first update, by parameter."""
    objective = built(kind)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    run(folder, objective, sgd=True, steps=1, save_every=0, **options)
    after = {name: distributed.whole(value.detach()) for name, value in objective.named_parameters()}
    return {name: before[name] - value for name, value in after.items() if not name.startswith("teacher")}


def trained_on(folder: Path, steps: int, **options: Any) -> None:
    """A run of `Deep` with clipping and export, begun or resumed in `folder`."""
    objective = built(Deep)

    def export() -> None:
        export_encoder(folder / f"update_{steps}", objective.encoder, {}, objective=objective)

    run(folder, objective, steps=steps, clip=0.5, save_every=3, resume=True, export=export, **options)


def at_its_own_pace(objective: Deep) -> Callable[[int], dict[str, float]]:
    """An evaluation of which the second process does more than the first, and the first something else."""

    def evaluate(step: int) -> dict[str, float]:
        with torch.no_grad():
            if distributed.is_main():
                objective.slow(clip(0)[None].float())
            for number in range(distributed.rank() + 1):
                loss = objective(batch(range(number, number + 2)))
        return {"last": float(distributed.all_reduce_sum(loss.total))}

    return evaluate


def noting(steps: list[int], evaluate: Callable[[int], dict[str, float]]) -> Callable[[int], dict[str, float]]:
    """The evaluation, which notes when it is made."""

    def noted(step: int) -> dict[str, float]:
        steps.append(step)
        return evaluate(step)

    return noted


def exchanges(**options: Any) -> dict[str, int]:
    """How often processes exchange parameters and gradients in an update of three micro-batches."""
    from torch.distributed.tensor.debug import CommDebugMode

    objective = built(Deep)
    model = parallelize(objective, build_optimizer(objective, lr=0.01), torch.device("cpu"), **options)
    with CommDebugMode() as seen:
        backward(model, [batch(range(4))] * 3, torch.device("cpu"), "float32")
    return {str(kind).rpartition(".")[2]: count for kind, count in seen.get_comm_counts().items()}


def start(task: str, folder: Path, **environment: object) -> subprocess.Popen[str]:
    """This file as a program of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::FutureWarning", __file__, task, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


KILLED = {"steps": 14, "accumulate": 2, "save_every": 5, "clip": 1.0}


def main(task: str, folder: str) -> None:
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # type: ignore[assignment]
    if task == "killed":
        # at update 8, three after the last checkpoint
        dies = built(dropout=0.3, then=lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 8 else None)
        run(Path(folder), dies, **KILLED)
    if task == "rank":
        distributed.setup("cpu")
        here = Path(folder)
        # 4 + 4 clips of two processes are the 8 of one: sizes differ, and so do their frames
        found = {
            sharding: {
                kind.__name__: {
                    name: value.tolist()
                    for name, value in gradient(
                        here / f"{kind.__name__}_{sharding}", kind, accumulate=2, sharding=sharding
                    ).items()
                }
                for kind in (Toy, Skipping, Diverse, Deep, Dropping)
            }
            for sharding in ("none", "full")
        }
        final, equal, evaluated = {}, [], []
        for sharding in ("none", "full"):
            whole = built(Deep, dropout=0.3)
            final[sharding] = run(
                here / f"whole_{sharding}",
                whole,
                steps=8,
                sharding=sharding,
                eval_every=3,
                evaluate=at_its_own_pace(whole),
            )
            run(here / f"half_{sharding}", built(Deep, dropout=0.3), steps=4, sharding=sharding)
            resumed = built(Deep, dropout=0.3)
            evaluated.append([])
            run(
                here / f"half_{sharding}",
                resumed,
                steps=8,
                resume=True,
                sharding=sharding,
                eval_every=4,  # and the checkpoint after update 4 was saved without one
                evaluate=noting(evaluated[-1], at_its_own_pace(resumed)),
            )
            pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
            equal.append(all(torch.equal(distributed.whole(a), distributed.whole(b)) for a, b in pairs))
        trained_on(here / "given", 3, sharding="full")  # has made its three: it is loaded, saved and exported
        trained_on(here / "given", 6, sharding="full")
        trained_on(here / "together", 6, sharding="full")
        # the two would judge otherwise; an export by one alone would wait for ever
        scores = ([0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4])[distributed.rank()]
        waiting = built(Deep)
        judged = run(
            here / "best",
            waiting,
            steps=4,
            sharding="full",
            eval_every=1,
            best="accuracy",
            patience=2,
            evaluate=lambda step: {"accuracy": scores[step - 1]},
            export=lambda: export_encoder(here / "best", waiting.encoder, {}),
        )
        best = [judged["best/accuracy"], judged["best/step"], judged["evaluation/accuracy"]]
        own = {
            "best": best,
            "gradients": found,
            "final": final,
            "resumed": equal,
            "evaluated": evaluated,
            "exchanges": exchanges(sharded=True),
        }
        (here / f"{distributed.rank()}.json").write_text(json.dumps(own))
        distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
