"""Manifests of the Sign Language Digits Dataset.

python data_manifests/sign_digits/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
import re
from pathlib import Path

from mmssl.data.manifest import split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.image.reader import probe

# Picture numbers, first and last, of the people that are not for training. The set names nobody, but its numbers run
# through the digits 0 to 9 once for each person, so a new one starts where the digits start over.
HELD_OUT = {
    "valid": """
        1158-1168 1199-1208 4069-4078 4089-4098 4129-4138 4456-4465 4476-4485 4574-4583 4614-4623 4715-4724 4786-4795
        4956-4965 5132-5141 5255-5265 5350-5359 5370-5379 5412-5421 5572-5581 5806-5815 5928-5937""",
    "test": """
        1169-1178 1189-1198 1239-1248 1280-1289 1301-1311 4049-4058 4159-4169 4203-4212 4276-4295 4359-4368 4391-4400
        4506-4515 4604-4613 4624-4633 4684-4693 4776-4785 4806-4825 4936-4945 5007-5016 5028-5040 5163-5172 5203-5233
        5276-5285 5297-5307 5456-5465 5476-5485 5497-5506 5547-5561 5635-5664 5675-5684 5736-5745 5756-5765 5776-5785
        5826-5846 5877-5886""",
}
SPLITS = {
    number: split
    for split, ranges in HELD_OUT.items()
    for first, last in (part.split("-") for part in ranges.split())
    for number in range(int(first), int(last) + 1)
}


def main(folder: Path, out: Path) -> None:
    found = scan(folder, media="image", probe=probe, suffixes={".jpg", ".jpeg"}, label_from=-1)
    for path, reason in found.bad:
        print(f"left out: {path}: {reason}")
    for row in found.rows:
        number = re.fullmatch(r"IMG_(\d+)", Path(row["id"]).stem)
        if number is None or not row["label"].isdecimal():
            raise ValueError(f"{row['id']}: expected DIGIT/IMG_NUMBER.jpg; give the folder that holds 0 to 9")
        row |= {"id": number[0], "label": int(row["label"]), "split": SPLITS.get(int(number[1]), "train")}
    for split, rows in split_rows(found.rows).items():
        print(f"{write_manifest(out / f'{split}.jsonl', rows)} rows in {out / split}.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds the folders 0 to 9, or a tar of them")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
