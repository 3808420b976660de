"""Manifests of the sample videos: windows with scenes, windows with events, whole files, and those with sound.

python data_manifests/sample_videos/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
from pathlib import Path

from mmssl.data.manifest import Row, split_rows, write_manifest
from mmssl.data.scan import read_table, scan
from mmssl.modalities.video.reader import probe


def main(folder: Path, out: Path) -> None:
    files = {}
    for row in scan(folder, media="video", probe=probe, suffixes={".mp4"}, workers=1).rows:
        files[Path(row["id"]).name] = row
    index = {row["file"]: row for _, row in read_table(folder / "index.tsv")}
    whole = [files[name] | {"id": Path(name).stem, "split": row["split"]} for name, row in index.items()]
    manifests = {f"pretrain_{split}": rows for split, rows in split_rows(whole).items() if split != "test"}
    heard = [row for row in files.values() if row["sound"]]
    if heard:
        manifests["with_sound"] = heard
    for kind, table in (("scene", "windows.tsv"), ("event", "event_windows.tsv")):
        rows: list[Row] = []
        for _, window in read_table(folder / table):
            fps = float(index[window["file"]]["fps"])
            start, duration = int(window["start"]) / fps, int(window["frames"]) / fps
            rows.append(
                files[window["file"]]
                | {
                    "id": f"{Path(window['file']).stem}@{window['start']}",
                    "start": round(start, 6),
                    "duration": round(duration, 6),
                    "seconds": round(duration, 6),
                    "label": window[kind],
                    "split": window["split"],
                }
            )
        manifests |= {f"{kind}_{split}": part for split, part in split_rows(rows).items()}
    for name, part in manifests.items():
        print(f"{write_manifest(out / f'{name}.jsonl', part)} rows in {out / name}.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that holds index.tsv and videos.tar")
    parser.add_argument("out", type=Path, help="where the manifests go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
