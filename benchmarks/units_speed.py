"""How much sound `mmssl units` turns into units, and what memory it takes for ten times as much.

    python benchmarks/units_speed.py                       # MFCC, then layer 6 of HuBERT base with random weights
    python benchmarks/units_speed.py --of mfcc --minutes 0.2

Clusters are found once; then the units of a set and of one ten times as large are written, each in a process of its
own. Prints hours of sound for an hour of one core (user and system time of all threads) and for an hour by the clock,
and the most memory that each process held, which the larger set must not raise. The smaller one is long enough to fill
what is read ahead (mfcc), which a set of half an hour is not. The sound is noise in 16-bit wav files of 1 to 15 s at
16 kHz; reading them is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RATE, CODES, FRAMES = 16_000, 100, 20_000
LAYER = 6
SETS = (1, 10)


def make_sound(folder: Path, seconds: float) -> Path:
    """A manifest of files that last `seconds` together."""
    import soundfile

    from mmssl.data.manifest import write_manifest

    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    left = seconds
    folder.mkdir()
    while left > 0:
        length = min(float(rng.uniform(1, 15)), max(left, 1.0))
        path = folder / f"{len(rows)}.wav"
        soundfile.write(path, (rng.standard_normal(int(length * RATE)) * 3000).astype(np.int16), RATE)
        rows.append({"audio": str(path), "seconds": length})
        left -= length
    manifest = folder.with_suffix(".jsonl")
    write_manifest(manifest, rows)
    return manifest


def make_model(folder: Path) -> None:
    """HuBERT base with random weights, as a run exports it."""
    import torch

    from mmssl.assemble import export_config
    from mmssl.build import build_encoder
    from mmssl.data.manifest import Manifest
    from mmssl.recipe import load
    from mmssl.resolve import resolve
    from mmssl.training.checkpoint import export_encoder

    torch.manual_seed(0)
    manifest = folder / f"set{SETS[0]}.jsonl"
    config = export_config(resolve(load("speech/hubert_base", [f"data.train={manifest}"])), Manifest(manifest))
    export_encoder(folder / "model", build_encoder(config), config)


def write(folder: Path, of: str, name: str) -> None:
    """In a process of its own: the units of one set; prints seconds, seconds of a core, and the most memory in MB."""
    from mmssl.memory import keep_freed_memory
    from mmssl.units import write_units

    keep_freed_memory()
    begin, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    manifest, out = folder / f"{name}.jsonl", folder / f"units_{of}"
    if of == "mfcc":
        write_units([manifest], out, codes=CODES, features="mfcc", rate=RATE, frames=FRAMES)
    else:
        write_units([manifest], out, codes=CODES, model=folder / "model", layer=LAYER, frames=FRAMES)
    end = resource.getrusage(resource.RUSAGE_SELF)
    core = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    print(json.dumps([time.perf_counter() - start, core, end.ru_maxrss / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=["mfcc", "hubert"], action="append")
    parser.add_argument("--minutes", type=float, help="of the smaller set; 90 for mfcc and 4 for hubert by default")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(Path(args.write[0]), args.write[1], args.write[2])
        return
    for of in args.of or ["mfcc", "hubert"]:
        minutes = args.minutes or {"mfcc": 90.0, "hubert": 4.0}[of]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for times in SETS:
                make_sound(folder / f"set{times}", 60 * minutes * times)
            make_sound(folder / "fitted", 60 * max(minutes, 4.0))
            if of == "hubert":
                make_model(folder)

            def run(name: str, of: str = of, place: str = place) -> tuple[float, float, float]:
                line = [sys.executable, __file__, "--write", place, of, name]
                done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
                seconds, core, memory = json.loads(done.stdout.splitlines()[-1])
                return seconds, core, memory

            run("fitted")
            found = {times: run(f"set{times}") for times in SETS}
        for times, (seconds, core, memory) in found.items():
            sound = 60 * minutes * times
            print(
                f"{of:6} {sound / 3600:6.3f} h of sound: {sound / core:7.1f} h for an hour of a core, "
                f"{sound / seconds:7.1f} h for an hour, at most {memory:6.0f} MB",
                flush=True,
            )
        small, large = (found[times][2] for times in SETS)
        print(f"{of:6} memory of the larger set over that of the smaller: {large / small:.2f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
