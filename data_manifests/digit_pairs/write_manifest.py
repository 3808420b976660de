"""Manifests of a hand sign, a spoken digit and its word, joined from those of sign_digits and fsdd.

python data_manifests/digit_pairs/write_manifest.py SIGNS_FOLDER SPEECH_FOLDER OUT_FOLDER
"""

import argparse
from pathlib import Path

import numpy as np

from mmssl.data.manifest import Manifest, Row, write_manifest

PER_DIGIT = {"train": 400, "valid": 40, "test": 100}
# what a row says of its one file; beside another it stands within that file's own entry
_WITHIN = ("offset", "size", "start", "duration")


def main(signs: Path, speech: Path, out: Path, per_digit: dict[str, int] = PER_DIGIT) -> None:
    for split, count in per_digit.items():
        found = [list(Manifest(folder / f"{split}.jsonl")) for folder in (signs, speech)]
        rows = joined(*found, count)
        print(f"{write_manifest(out / f'{split}.jsonl', rows)} rows in {out / split}.jsonl")


def joined(signs: list[Row], speech: list[Row], count: int) -> list[Row]:
    """So many pairs of each digit; each picture and each recording as often as any other, give or take one."""
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for digit in sorted({row["label"] for row in speech}):
        own = [[row for row in part if row["label"] == digit] for part in (signs, speech)]
        if not all(own):
            raise ValueError(f"digit {digit}: one of the two sets has none in this split")
        orders = [np.concatenate([rng.permutation(len(part)) for _ in range(-(-count // len(part)))]) for part in own]
        for n, (i, j) in enumerate(zip(orders[0][:count].tolist(), orders[1][:count].tolist(), strict=True)):
            sign, clip = own[0][i], own[1][j]
            rows.append(
                {
                    "id": f"{digit}_{n:03}",
                    "image": _file(sign, "image"),
                    "audio": _file(clip, "audio"),
                    "seconds": clip["seconds"],
                    "text": clip["text"],
                    "label": digit,
                    "speaker": clip["speaker"],
                }
            )
    return rows


def _file(row: Row, key: str) -> dict[str, object]:
    return {"path": row[key]} | {name: row[name] for name in _WITHIN if name in row}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("signs", type=Path, help="the manifests of sign_digits")
    parser.add_argument("speech", type=Path, help="the manifests of fsdd")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.signs, arguments.speech, arguments.out)
