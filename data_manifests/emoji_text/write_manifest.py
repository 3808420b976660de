"""Manifests of emoji with their names, drawn in two styles.

python data_manifests/emoji_text/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
from pathlib import Path

from mmssl.data.manifest import split_rows, write_manifest
from mmssl.data.scan import read_table, scan
from mmssl.modalities.image.reader import probe

KEPT = ("name", "subcategory", "concept", "split")


def main(folder: Path, out: Path) -> None:
    table = {entry["file"]: entry for _, entry in read_table(folder / "index.tsv")}
    rows = []
    for picture in scan(folder, media="image", probe=probe, suffixes={".png"}).rows:
        file, style = Path(picture["id"]).name, Path(picture["image"]).stem
        if style not in table[file]["styles"].split(","):
            raise ValueError(f"{picture['image']}: {file} is not of this style, by {folder / 'index.tsv'}")
        known = {key: table[file][key] for key in KEPT} | {"label": table[file]["category"], "style": style}
        name = f"{style}/{Path(file).stem}"
        rows.append({**picture, **known, "id": name, "text": known["name"]})
        keywords = table[file]["keywords"].replace(";", ",")
        if known["split"] == "train" and keywords:
            rows.append({**picture, **known, "id": f"{name}#keywords", "text": keywords})
    for split, part in split_rows(rows).items():
        print(f"{write_manifest(out / f'{split}.jsonl', part)} rows in {out / split}.jsonl")
        for style in ("noto", "twemoji"):
            own = [row for row in part if row["style"] == style]
            if split != "train" and own:
                print(f"{write_manifest(out / f'{split}_{style}.jsonl', own)} rows in {out / split}_{style}.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds noto.tar, twemoji.tar and index.tsv")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
