"""Manifests of the Asterisk telephone prompts.

python data_manifests/asterisk_prompts/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
from pathlib import Path

from mmssl.data.manifest import split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.speech.reader import probe

LONGEST = 12.0  # seconds of a clip for CTC


def main(folder: Path, out: Path) -> None:
    columns = {name: name for name in ("language", "speaker", "kind", "has_digits", "split")} | {"text": "norm"}
    found = scan(
        folder,
        media="audio",
        probe=probe,
        suffixes={".opus", ".ogg", ".wav", ".flac"},
        tsv=folder / "index.tsv",
        columns=columns,
    )
    for path, reason in found.bad:
        print(f"left out: {path}: {reason}")
    unlabelled = ("id", "audio", "offset", "size", "seconds", "language", "speaker", "split")
    manifests = {
        f"pretrain_{split}": [{key: row[key] for key in unlabelled if key in row} for row in rows]
        for split, rows in split_rows(found.rows).items()
        if split != "test"  # the sentences to be tested on are not heard in pretraining either
    }
    for split, rows in split_rows(found.rows).items():
        for row in rows:
            # digits and letters are read out as words that the text does not hold
            if row["kind"] != "letter" and row["has_digits"] == "0" and row["seconds"] <= LONGEST:
                manifests.setdefault(f"{row['language']}_{split}", []).append(row)
    for name, rows in sorted(manifests.items()):
        print(f"{write_manifest(out / f'{name}.jsonl', rows)} rows in {out / name}.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds index.tsv and the clips, as files or in a tar")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
