"""The memory and the time of a step of CLIP: a large batch by gradient caching, against a small one at once.

    python benchmarks/contrast_memory.py                          # 4,096 pairs in chunks of 128, against 256 at once
    python benchmarks/contrast_memory.py --size tiny --batch 64 --small 16 --chunk 8
    python benchmarks/contrast_memory.py --objective siglip

The model is that of small/clip_emoji: pictures of 64 x 64 pixels, captions of up to 32 tokens. Each is a process of its
own: one step to warm up, and one that is measured; the most memory is that of the process on the CPU, less what
it held before the first batch was there, and on a GPU what torch allocated. Pictures count, and so do weights there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch

from mmssl.memory import keep_freed_memory

SIZES = {"small": [], "tiny": ["transformer.dim=48", "transformer.depth=2"]}


def measure(args: argparse.Namespace, batch_size: int, chunk: int | None) -> tuple[float, float]:
    """Megabytes and seconds of a step, of a process of its own."""
    settings = [f"--size={args.size}", f"--objective={args.objective}", f"--precision={args.precision}"]
    one = [f"--one={batch_size}", *([] if chunk is None else [f"--chunk={chunk}"])]
    done = subprocess.run([sys.executable, __file__, *settings, *one], check=True, capture_output=True, text=True)
    memory, seconds = json.loads(done.stdout.splitlines()[-1])
    return memory, seconds


def one(args: argparse.Namespace) -> tuple[float, float]:
    """Megabytes and seconds of a step."""
    from mmssl.assemble import learn_tokenizer
    from mmssl.build import build_encoders, build_objective
    from mmssl.recipe import load
    from mmssl.resolve import resolve
    from mmssl.types import Batch, Raw

    keep_freed_memory()  # as `mmssl pretrain` does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    settings = [f"objective.name={args.objective}", "objective.same=null", "data.train=none.jsonl", *SIZES[args.size]]
    settings += [] if args.chunk is None else [f"objective.chunk={args.chunk}"]
    recipe = resolve(load("small/clip_emoji", settings))
    config = {**recipe.values, "tokenizer": learn_tokenizer(recipe, [{"text": "a red heart"}])}
    model = build_objective(config, build_encoders(config)).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = [str(n) for n in range(args.one)]
    lengths = torch.randint(4, 33, (args.one,))
    pictures = Raw(torch.rand(args.one, 3, 64, 64), torch.ones(args.one, dtype=torch.int64), ids)
    captions = Raw(torch.randint(2, 250, (args.one, int(lengths.max()))), lengths, ids)
    batch = Batch({"image": pictures, "text": captions}, torch.arange(args.one)).to(device)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss = model(batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20, seconds
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--objective", choices=["clip", "siglip"], default="clip")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--small", type=int, default=256)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args)))
        return
    chunk = args.chunk or 128
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    found = []
    for size, parts in ((args.small, None), (args.batch, chunk)):
        memory, seconds = measure(args, size, parts)
        found.append(memory)
        how = "at once" if parts is None else f"in chunks of {parts}"
        print(
            f"{args.objective:6} {args.size:5} {args.precision:9} {size:6,} pairs {how:17} at most {memory:7.0f} MB, "
            f"{seconds:7.2f} s, {1000 * seconds / size:6.2f} ms a pair",
            flush=True,
        )
    print(f"memory of {args.batch:,} pairs over that of {args.small:,}: {found[1] / found[0]:.2f}")


if __name__ == "__main__":
    main()
