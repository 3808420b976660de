"""Manifests of ESC-10, environmental sounds of ten classes, one of all and one pair for each of its five folds.

python data_manifests/esc10/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
import re
from pathlib import Path

from mmssl.data.manifest import write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.speech.reader import probe

FOLDS = ("1", "2", "3", "4", "5")


def main(folder: Path, out: Path) -> None:
    found = scan(folder, media="audio", probe=probe, suffixes={".ogg", ".flac", ".wav"}, label_from=-1)
    for path, reason in found.bad:
        print(f"left out: {path}: {reason}")
    for row in found.rows:
        name = re.fullmatch(r"([1-5])-\d+-[A-Z]", Path(row["id"]).stem)
        if name is None:
            raise ValueError(
                f"{row['id']}: expected CLASS/FOLD-NUMBER-TAKE; give the folder that holds the ten classes"
            )
        # "001 - Dog bark" in the original
        row["label"] = re.sub(r"^\d+ - ", "", row["label"]).lower().replace(" ", "_")
        row |= {"id": f"{row['label']}/{name[0]}", "fold": name[1]}
    print(f"{write_manifest(out / 'all.jsonl', found.rows)} rows in {out / 'all.jsonl'}")
    for fold in FOLDS:
        for split in ("train", "test"):
            rows = [row for row in found.rows if (row["fold"] == fold) == (split == "test")]
            file = out / f"fold{fold}" / f"{split}.jsonl"
            print(f"{write_manifest(file, rows)} rows in {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds the ten classes, as folders or in a tar")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
