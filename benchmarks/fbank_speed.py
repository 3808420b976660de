"""Log-mel energies of a ragged batch: ours against torchaudio's `compliance.kaldi.fbank`, called for each clip.

    python benchmarks/fbank_speed.py --threads 1 --rounds 5

Prints seconds (median over rounds, all in one process, in turn), the ratio, and how far the energies lie apart. With a
GPU the same there, theirs too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

from mmssl.modalities.filterbank import Filterbank

RATE = 16_000


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(clips: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    settings = {"bands": 128, "window_ms": 25.0, "hop_ms": 10.0, "window": "hanning", "low": 20.0, "high": 0.0}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for shortest, longest in ((1, 5), (5, 10), (10, 10)):
            lengths = torch.randint(shortest * RATE, longest * RATE + 1, (clips,), generator=generator)
            waves = 0.1 * torch.randn(clips, int(lengths.max()), generator=generator).to(device)
            filterbank = Filterbank(**settings, preemphasis=0.97, rate=RATE).to(device)

            def ours(bank: Filterbank = filterbank, x: Tensor = waves, n: Tensor = lengths) -> Tensor:
                return bank(x, n)

            def theirs(x: Tensor = waves, n: Tensor = lengths) -> list[Tensor]:
                return [
                    fbank(wave[None, :size], num_mel_bins=128, window_type="hanning", sample_frequency=RATE, dither=0.0)
                    for wave, size in zip(x, n.tolist(), strict=True)
                ]

            apart = torch.cat(
                [(one[: len(other)] - other).abs().flatten() for one, other in zip(ours(), theirs(), strict=True)]
            )
            pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds)]
            mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"{device}, {threads} threads, {clips} clips of {shortest} to {longest} s: {mine:.4f} s, torchaudio "
                f"{other:.4f} s, ratio {other / mine:.2f}; {(apart < 1e-4).double().mean():.5f} of the energies within "
                f"1e-4, mean difference {apart.mean():.1e}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.clips, arguments.rounds, arguments.threads)
