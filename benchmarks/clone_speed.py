"""A step of data2vec 2.0 with eight masked copies of each clip against eight steps with one; what its teacher takes.

    python benchmarks/clone_speed.py                          # base and small, image and speech, float32 and bfloat16
    python benchmarks/clone_speed.py --size tiny --rounds 1 --modality image

Both go through as many masked copies: eight share what the teacher makes of a clip, the frontend and one update of all
weights. The models are those of the shipped recipes, and only the number of copies differs. Prints seconds (median over
rounds, in turn, in one process), their ratio, and the share of a step with eight copies that the teacher's update is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mmssl.build import build_encoder, build_objective
from mmssl.memory import keep_freed_memory
from mmssl.recipe import load
from mmssl.resolve import resolve
from mmssl.types import Batch, Raw

CLONES = 8
# (modality, size) -> recipe, settings to change, clips of a batch, shape of one, samples a second
TINY = ["transformer.dim=48", "transformer.heads=3", "objective.decoder_dim=48"]
TASKS: dict[tuple[str, str], tuple[str, list[str], int, tuple[int, ...], int | None]] = {
    ("image", "base"): ("image/data2vec2_base", [], 4, (3, 224, 224), None),
    ("image", "small"): ("small/data2vec2_image", [], 32, (1, 28, 28), None),
    ("image", "tiny"): ("small/data2vec2_image", TINY, 2, (1, 28, 28), None),
    ("speech", "base"): ("speech/data2vec2_base", [], 2, (8 * 16_000,), 16_000),
    ("speech", "small"): ("small/data2vec2_speech", [], 8, (3 * 8_000,), 8_000),
    ("speech", "tiny"): ("small/data2vec2_speech", TINY, 2, (8_000,), 8_000),
}


def model_of(modality: str, size: str, clones: int) -> nn.Module:
    torch.manual_seed(0)
    recipe, changes, *_ = TASKS[modality, size]
    config = resolve(load(recipe, ["data.train=none.jsonl", f"objective.clones={clones}", *changes])).values
    return build_objective(config, build_encoder(config)).train()


def step_of(model: nn.Module, modality: str, size: str, precision: torch.dtype) -> Callable[[], float]:
    """A step, which gives the seconds of the teacher's update in it."""
    _, _, count, shape, rate = TASKS[modality, size]
    lengths = torch.full((count,), shape[0] if rate else 1)
    raw = Raw(torch.rand(count, *shape), lengths, [str(i) for i in range(count)], rate)
    batch = Batch({modality: raw}, seeds=torch.arange(count))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            loss = model(batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model.after_step(1)  # type: ignore[operator]
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=["image", "speech"], action="append")
    parser.add_argument("--size", choices=["base", "small", "tiny"], action="append")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    for size in args.size or ["base", "small"]:
        for modality in args.modality or ["image", "speech"]:
            for precision in args.precision or ["float32", "bfloat16"]:
                dtype = getattr(torch, precision)
                together, one = (
                    step_of(model_of(modality, size, clones), modality, size, dtype) for clones in (CLONES, 1)
                )
                together()
                one()
                whole, single, teacher = [], [], []
                for _ in range(args.rounds):
                    start = time.perf_counter()
                    teacher.append(together())
                    middle = time.perf_counter()
                    for _ in range(CLONES):
                        one()
                    whole.append(middle - start)
                    single.append(time.perf_counter() - middle)
                seconds, singles, moved = map(statistics.median, (whole, single, teacher))
                print(
                    f"{modality:6} {size:5} {precision:9} {CLONES} copies in a step {seconds:7.3f} s, {CLONES} steps "
                    f"of one {singles:7.3f} s, ratio {singles / seconds:.2f}   the teacher's update {moved:.4f} s, "
                    f"{moved / seconds:.1%} of the step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
