"""One training step with only visible tokens encoded against the same with all of them, for each modality.

    python benchmarks/mask_speed.py                          # base size, float32 and bfloat16
    python benchmarks/mask_speed.py --size large --modality image
    python benchmarks/mask_speed.py --size tiny --rounds 1 --modality audio

Encoder, decoder, masks and input are the same; where all tokens are encoded, mask tokens stand for the hidden ones.
Prints seconds (median over rounds, in turn, in one process) and their ratio. The papers' shares to hide: .75 of a
picture, .8 of a spectrogram, .9 of a video; their decoders.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmssl.encoder import Encoder
from mmssl.modalities import MODALITIES
from mmssl.nn.masking import take
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Batch, Encoded, Hide, MaskPlan, Raw, Tokens

ENCODERS = {
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "tiny": {"dim": 48, "depth": 2, "heads": 3},
}
# modality -> (frontend, clips of a batch, MAE's settings)
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "image": ("patches", 8, {"mask_ratio": 0.75, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}),
    "audio": (
        "spectrogram",
        4,
        {"mask_ratio": 0.8, "decoder_dim": 512, "decoder_depth": 16, "decoder_heads": 16, "decoder_window": [4, 4]},
    ),
    "video": (
        "tubes",
        2,
        {"mask": "tube", "mask_ratio": 0.9, "decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 6},
    ),
}
SECONDS, RATE, FRAMES, SIDE = 10, 16_000, 16, 224


class Everything(Encoder):
    """Encodes all tokens, mask tokens in the place of hidden ones, and hands on those that are visible."""

    def forward(
        self, tokens: Tokens, plan: MaskPlan | None = None, hide: Hide = "none", *, layers: Sequence[int] = ()
    ) -> Encoded:
        encoded = super().forward(tokens, plan, "none" if plan is None else "replace", layers=layers)
        if plan is None:
            return encoded
        visible = take(encoded.tokens, plan.keep.to(encoded.x.device))
        x = torch.cat([encoded.x[:, : encoded.n_prefix], visible], 1)
        return replace(encoded, x=x, lengths=plan.keep_lengths + encoded.n_prefix)


def clips(modality: str, count: int) -> Raw:
    shapes = {"image": (3, SIDE, SIDE), "audio": (SECONDS * RATE,), "video": (3, FRAMES, SIDE, SIDE)}
    units, rate = {"image": (1, None), "audio": (SECONDS * RATE, float(RATE)), "video": (FRAMES, 7.5)}[modality]
    lengths = torch.full((count,), units, dtype=torch.int64)
    return Raw(torch.rand(count, *shapes[modality]), lengths, [str(i) for i in range(count)], rate)


def step_of(modality: str, size: str, kind: type[Encoder], precision: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    name, count, settings = TASKS[modality]
    shape = ENCODERS[size]
    frontend = MODALITIES[modality].frontends[name](dim=shape["dim"])
    encoder = kind(frontend, Transformer(**shape), SinCos(shape["dim"]), prefix=1, mask_token=kind is Everything)
    target = MODALITIES[modality].targets["normalized_spectrogram" if modality == "audio" else "normalized_pixels"]
    if size == "tiny":
        settings = settings | {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    model = MAE(encoder, target=target.values, target_dim=target.dim(frontend), **settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = Batch({modality: clips(modality, count)}, seeds=torch.arange(count))

    def step() -> None:
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            loss = model(batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=list(TASKS), action="append")
    parser.add_argument("--size", choices=list(ENCODERS), default="base")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    for modality in args.modality or list(TASKS):
        for precision in args.precision or ["float32", "bfloat16"]:
            dtype = getattr(torch, precision)
            steps = [step_of(modality, args.size, kind, dtype) for kind in (Encoder, Everything)]
            for step in steps:
                step()
            seconds: list[list[float]] = [[], []]
            for _ in range(args.rounds):
                for step, times in zip(steps, seconds, strict=True):
                    start = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - start)
            visible, everything = map(statistics.median, seconds)
            ratio = TASKS[modality][2]["mask_ratio"]
            print(
                f"{modality:6} {args.size} {precision:9} {ratio:.2f} hidden: visible tokens {visible:7.3f} s, all "
                f"{everything:7.3f} s, ratio {everything / visible:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
