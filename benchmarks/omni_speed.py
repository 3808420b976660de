"""One trunk for four modalities against a Transformer for each of them: seconds of a step, and parameters.

    python benchmarks/omni_speed.py                       # small/omni, float32 and bfloat16
    python benchmarks/omni_speed.py --size tiny --rounds 1

A joint run makes its updates of one modality each, so four of them, one of each modality, stand against one update of
each of four separate runs on the same clips. All are small/omni: as it is, and with `backbone: separate`. Prints
seconds for the four updates (median over rounds, in turn, in one process) and their ratio; parameters of the encoders,
and of all that is trained.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mmssl.build import build_encoders, build_objective
from mmssl.memory import keep_freed_memory
from mmssl.objectives.omni import Omni
from mmssl.recipe import load
from mmssl.resolve import resolve
from mmssl.types import Batch, Raw

TINY = ["transformer.dim=48", "transformer.depth=3", "objective.of.decoder_dim=48"]
# modality -> clips of a batch as small/omni has them, shape of one, units a second
CLIPS: dict[str, tuple[int, tuple[int, ...], float | None]] = {
    "image": (128, (1, 28, 28), None),
    "audio": (32, (16_000,), 16_000.0),
    "speech": (64, (8_000,), 8_000.0),
    "video": (64, (1, 16, 32, 32), 8.0),
}


def model_of(settings: list[str], size: str) -> Omni:
    torch.manual_seed(0)
    train = [f"data.train.{name}=none.jsonl" for name in CLIPS]
    recipe = load("small/omni", [*train, *settings, *(TINY if size == "tiny" else ())])
    config = resolve(recipe).values
    model = build_objective(config, build_encoders(config)).train()
    assert isinstance(model, Omni)
    return model


def batch_of(modality: str, size: str) -> Batch:
    count, shape, rate = CLIPS[modality]
    count = 2 if size == "tiny" else count
    steps = 1 if rate is None else shape[1] if modality == "video" else shape[0]
    raw = Raw(torch.rand(count, *shape), torch.full((count,), steps), [str(i) for i in range(count)], rate)
    return Batch({modality: raw}, seeds=torch.arange(count))


def step_of(model: nn.Module, batches: list[Batch], precision: torch.dtype) -> Callable[[], None]:
    """An update with each of some batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for number, batch in enumerate(batches, 1):
            with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
                loss = model(batch)
            (loss.total / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step(number)  # type: ignore[operator]

    return step


def parameters(model: nn.Module) -> float:
    """In millions; what is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "tiny"], default="small")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    joint, apart = (model_of(settings, args.size) for settings in ([], ["backbone=separate"]))
    for name, one, four in (("the encoders", joint.encoder, apart.encoder), ("all that is trained", joint, apart)):
        print(
            f"parameters of {name}: {parameters(one):.2f} M on one trunk, {parameters(four):.2f} M in four runs, "
            f"ratio {parameters(four) / parameters(one):.2f}"
        )
    batches = {name: batch_of(name, args.size) for name in CLIPS}
    for precision in args.precision or ["float32", "bfloat16"]:
        dtype = getattr(torch, precision)
        together = step_of(joint, list(batches.values()), dtype)
        each = [step_of(apart.of[name], [batch], dtype) for name, batch in batches.items()]
        for step in (together, *each):
            step()
        whole, singles = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            together()
            middle = time.perf_counter()
            for step in each:
                step()
            whole.append(middle - start)
            singles.append(time.perf_counter() - middle)
        one, four = statistics.median(whole), statistics.median(singles)
        print(
            f"{precision:9} four updates on one trunk {one:7.3f} s, in four runs {four:7.3f} s, ratio {four / one:.2f}"
        )


if __name__ == "__main__":
    main()
