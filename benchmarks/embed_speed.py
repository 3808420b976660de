"""Embedding utterances of 1 to 16 s with wav2vec 2.0 base: ours against transformers' in each of its best ways.

    python benchmarks/embed_speed.py --rounds 3

Prints seconds of audio embedded a second (median over rounds, in turn), at random weights: ours through
`Embedder.embed` at three batch sizes, theirs as one padded batch with a mask, in four buckets by length, and one by
one. All take turns in one process. `mmssl embed` keeps freed memory: before a side's turn the process is given the
setting that it comes with, and one run that is not timed; transformers has another turn with ours. The ratios are over
the best of their ways in the same precision.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from allocator import as_it_comes

from mmssl.embed import Embedder
from mmssl.encoder import Encoder
from mmssl.memory import keep_freed_memory
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.positions import Convolutional
from mmssl.nn.transformer import Transformer

RATE = 16_000


def ours(waves: list[np.ndarray], precision: str) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    encoder = Encoder(
        Waveform(dim=768, norm="group", normalize=False),
        Transformer(dim=768, depth=12, heads=12, norm="post", eps=1e-5, init="normal"),
        Convolutional(768),
    )
    embedder = Embedder(encoder, {"modality": "speech", "augment_eval": []}, device="cpu", precision=precision)
    return {
        f"ours, batch_size={size}": lambda size=size: embedder.embed(waves, batch_size=size, tokens=False)
        for size in (1, 4, 16)
    }


def theirs(waves: list[np.ndarray], precision: str) -> dict[str, Callable[[], object]]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config()).eval()
    by_length = sorted(range(len(waves)), key=lambda i: len(waves[i]))

    def run(groups: list[list[int]]) -> None:
        for group in groups:
            longest = max(len(waves[i]) for i in group)
            batch, mask = torch.zeros(len(group), longest), torch.zeros(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                batch[row, : len(waves[i])] = torch.from_numpy(waves[i])
                mask[row, : len(waves[i])] = 1
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                hidden = model(batch, attention_mask=mask if len(group) > 1 else None).last_hidden_state
                frames = model._get_feat_extract_output_lengths(mask.sum(1))
                _ = [hidden[row, :n].float().mean(0) for row, n in enumerate(frames)]

    quarter = len(waves) // 4
    return {
        "transformers, one padded batch": lambda: run([by_length]),
        "transformers, four buckets": lambda: run([by_length[i : i + quarter] for i in range(0, len(waves), quarter)]),
        "transformers, one by one": lambda: run([[i] for i in by_length]),
    }


def compare(waves: list[np.ndarray], precision: str, rounds: int) -> None:
    own_ways, their_ways = ours(waves, precision), theirs(waves, precision)
    turns = ((keep_freed_memory, own_ways), (as_it_comes, their_ways), (keep_freed_memory, their_ways))
    seconds: list[dict[str, list[float]]] = [{name: [] for name in ways} for _, ways in turns]
    for _ in range(rounds):
        for (setting, ways), times in zip(turns, seconds, strict=True):
            setting()
            list(ways.values())[-1]()
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    audio = sum(map(len, waves)) / RATE
    own, comes, helped = ({name: audio / statistics.median(t) for name, t in ways.items()} for ways in seconds)
    best, best_helped = max(comes.values()), max(helped.values())
    for name, speed in own.items():
        print(
            f"{precision:9} {name:32} {speed:6.1f} s of audio a second   {speed / best:5.2f} of their best, "
            f"{speed / best_helped:.2f} with freed memory kept",
            flush=True,
        )
    for name, speed in comes.items():
        print(f"{precision:9} {name:32} {speed:6.1f}, with freed memory kept {helped[name]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(int(n * RATE)).astype(np.float32) for n in rng.permutation(np.linspace(1, 16, 16))]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    for precision in args.precision or ["float32", "bfloat16"]:
        compare(waves, precision, args.rounds)


if __name__ == "__main__":
    main()
