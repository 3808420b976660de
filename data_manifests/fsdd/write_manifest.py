"""Manifests of the Free Spoken Digit Dataset.

python data_manifests/fsdd/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
from pathlib import Path

import numpy as np

from mmssl.data.manifest import Row, split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.speech.reader import probe

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"george": "valid", "theo": "test"}  # by speaker; the other four are for training
PASSES = {"train": 3, "valid": 1, "test": 1}  # how often each clip is part of a digit string


def main(folder: Path, out: Path) -> None:
    found = scan(folder, media="audio", probe=probe, suffixes={".wav", ".flac"})
    for path, reason in found.bad:
        print(f"left out: {path}: {reason}")
    for row in found.rows:
        row["id"] = Path(row["id"]).stem
        digit, speaker, _ = row["id"].split("_")
        row |= {"label": int(digit), "text": WORDS[int(digit)], "speaker": speaker}
        row["split"] = SPLITS.get(speaker, "train")
    for split, rows in split_rows(found.rows).items():
        strings = digit_strings(rows, PASSES[split])
        for name, part in ((split, rows), (f"strings_{split}", strings)):
            print(f"{write_manifest(out / f'{name}.jsonl', part)} rows in {out / name}.jsonl")


def digit_strings(rows: list[Row], passes: int) -> list[Row]:
    """Two to five clips of one speaker in a row, each clip once in a pass; the same ones every time."""
    rng = np.random.default_rng(0)
    strings: list[Row] = []
    for speaker in sorted({row["speaker"] for row in rows}):
        clips = [row for row in rows if row["speaker"] == speaker]
        for _ in range(passes):
            order = rng.permutation(len(clips)).tolist()
            while order:
                size = int(rng.integers(2, 6))
                part = [clips[i] for i in order[:size]]
                # a single clip left over is no string; it joins the last one
                part += [clips[i] for i in order[size:]] if len(order) == size + 1 else []
                del order[: len(part)]
                strings.append(
                    {
                        "id": f"string_{speaker}_{len(strings)}",
                        "audio": [
                            {"path": clip["audio"]} | {key: clip[key] for key in ("offset", "size") if key in clip}
                            for clip in part
                        ],
                        "seconds": round(sum(clip["seconds"] for clip in part), 6),
                        "text": " ".join(clip["text"] for clip in part),
                        "speaker": speaker,
                        "split": part[0]["split"],
                    }
                )
    return strings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds the clips, as files or in a tar")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
