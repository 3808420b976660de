"""What pretraining is for, in five minutes: handwritten digits scattered over a canvas, few labels.

    python benchmarks/demo.py [--out runs/demo]

The digits are the 1,797 real ones of 8 x 8 pixels that come with scikit-learn; nothing is downloaded. Each is put at a
random place of an empty canvas of 12 x 12: on centered digits raw pixels are hard to beat, and a demonstration there
would show nothing. Without labels, every training digit is seen at many places. Labelled clips are one place each: 10
digits of each class, or all. Test digits, and their places, were never seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mmssl

CANVAS = 12
PLACES = 20  # of each training digit in the clips without labels
FEW = 10  # labels of each class
SPLITS = {"test": 400, "valid": 200}  # digits; the rest is for training

SHARED = (
    "frontend.size=[2,2]",
    "frontend.mean=[0.08]",
    "frontend.std=[0.21]",
    "encoder.prefix=0",
    "transformer.dim=96",
    "transformer.depth=4",
    "transformer.heads=4",
    "augment.train=[]",
    "data.batch_size=64",
    "trainer.precision=bfloat16",
    "trainer.log_every=100",
    "trainer.eval_every=500",
    "trainer.save_every=0",
)
PRETRAIN = (
    "objective.target=pixels",
    "objective.mask_ratio=0.5",
    "objective.decoder_dim=64",
    "objective.decoder_depth=1",
    "objective.decoder_heads=4",
    "optimizer.lr=2e-3",
)
FINETUNE = (
    'augment.train=[{"name":"shift","pixels":2}]',
    "transformer.drop_path=0.0",
    "optimizer.lr=1e-3",
    "optimizer.layer_decay=0.85",
)


def scatter(digits: np.ndarray, places: int, rng: np.random.Generator, canvas: int = CANVAS) -> np.ndarray:
    """(n, 8, 8) digits of 0 to 16 -> (n, places, canvas, canvas) bytes, each copy whole and at a place of its own."""
    n, height, width = digits.shape
    out = np.zeros((n, places, canvas, canvas), np.uint8)
    rows = rng.integers(canvas - height + 1, size=(n, places))
    columns = rng.integers(canvas - width + 1, size=(n, places))
    for i in range(n):
        for j in range(places):
            top, left = rows[i, j], columns[i, j]
            out[i, j, top : top + height, left : left + width] = (digits[i] * 15.9375).round()
    return out


def split(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Digits of each split, by number; no digit is in two."""
    order = rng.permutation(n)
    parts, start = {}, 0
    for name, size in SPLITS.items():
        parts[name] = order[start : start + size]
        start += size
    parts["train"] = order[start:]
    return parts


def write(folder: Path) -> dict[str, Path]:
    """The pictures and a manifest for each use of them."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits().images, load_digits().target
    rng = np.random.default_rng(0)
    parts = split(len(digits), rng)
    uses = {name: (numbers, 1) for name, numbers in parts.items()} | {"unlabelled": (parts["train"], PLACES)}
    by_class = [parts["train"][labels[parts["train"]] == c][:FEW] for c in range(10)]
    manifests = {}
    for name, (numbers, places) in uses.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, copies in zip(numbers, scatter(digits[numbers], places, rng), strict=True):
            for place, picture in enumerate(copies):
                file = f"{name}/{number:04}_{place}.png"
                Image.fromarray(picture).save(folder / file)
                rows.append({"id": file, "image": file, "label": int(labels[number]), "digit": int(number)})
        manifests[name] = _manifest(folder / f"{name}.jsonl", rows)
        if name == "train":
            chosen = set(np.concatenate(by_class).tolist())
            manifests["few"] = _manifest(folder / "few.jsonl", [row for row in rows if row["digit"] in chosen])
    return manifests


def _manifest(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learn(recipe: str, run: Path, steps: int, *settings: str) -> Path:
    return mmssl.train(recipe, run, [*SHARED, *settings, f"trainer.steps={steps}"])


def table(out: Path, manifests: dict[str, Path], steps: int) -> list[tuple[str, str, str, str, str]]:
    """Rows of (what, kNN with few labels, with all, linear with few, with all)."""
    run = learn(
        "small/mae_image",
        out / "pretrained",
        steps,
        *PRETRAIN,
        f"data.train={manifests['unlabelled']}",
        f"data.valid={manifests['valid']}",
    )
    rows = []
    for name, baseline in (("raw pixels", "pixels"), ("random weights", "random"), ("pretrained", None)):
        cells = [
            mmssl.evaluate(
                run,
                task=task,
                train=manifests[labels],
                valid=manifests["valid"],
                test=manifests["test"],
                pool="mean" if baseline == "pixels" else "mean+std",
                baseline=baseline,
                batch_size=200,
                **({"k": 5} if task == "knn" else {}),
            )["accuracy"].value
            for task in ("knn", "linear")
            for labels in ("few", "train")
        ]
        rows.append((name if baseline == "pixels" else f"{name}, frozen", *(f"{100 * cell:.1f}" for cell in cells)))
    for name, init in (("fine-tuned from random weights", "null"), ("fine-tuned from pretrained", str(run))):
        cells = []
        for labels, share in (("few", 0.3), ("train", 0.6)):
            tuned = learn(
                "small/classify_image",
                out / f"{name.split()[-1]}_{labels}",
                max(int(steps * share), 1),
                *FINETUNE,
                f"init={init}",
                f"data.train={manifests[labels]}",
                f"data.valid={manifests['valid']}",
            )
            cells.append(mmssl.evaluate(tuned, task="classify", test=manifests["test"])["accuracy"].value)
        rows.append((name, "", "", *(f"{100 * cell:.1f}" for cell in cells)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1000, help="updates of pretraining; fine-tuning takes its shares")
    args = parser.parse_args()
    start = time.monotonic()
    print(f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    manifests = write(args.out / "digits")
    rows = table(args.out, manifests, args.steps)

    from rich.console import Console
    from rich.table import Table

    shown = Table(title="accuracy in % on 400 digits never seen, each at one random place of a 12 x 12 canvas")
    shown.add_column("")
    for head in ("kNN, 100 labels", "kNN, 1,197 labels", "trained, 100 labels", "trained, 1,197 labels"):
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    print(
        "The task: digits of 8 x 8 pixels, scattered, because on centered ones raw pixels are hard to beat; few "
        "labels,\nbecause with many a network learns them without pretraining. What pretraining adds is the "
        "difference to the\nrow of random weights. One seed; `trained` is a logistic regression on frozen features, "
        "or all weights."
    )
    print(f"Runs: {args.out}. Inputs, masks, reconstructions: {args.out / 'pretrained' / 'pictures'}.")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
