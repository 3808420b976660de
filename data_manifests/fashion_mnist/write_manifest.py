"""Pictures and manifests of Fashion-MNIST.

python data_manifests/fashion_mnist/write_manifest.py DATA_FOLDER OUT_FOLDER
"""

import argparse
import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mmssl.data.manifest import split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.image.reader import probe

NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
VALID = 5000  # pictures from the end of the training files


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "images.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for split, files in (("train", "train"), ("test", "t10k")):
            images = read_idx(folder / f"{files}-images-idx3-ubyte.gz")
            labels = read_idx(folder / f"{files}-labels-idx1-ubyte.gz")
            if len(images) != len(labels):
                raise ValueError(f"{folder}: {len(images)} pictures but {len(labels)} labels for {split}")
            for place, (image, label) in enumerate(zip(images, labels)):
                part = "valid" if split == "train" and place >= len(images) - VALID else split
                add(shard, f"{part}/{label}/{files}_{place:05}.png", image)
    found = scan(out, media="image", probe=probe, suffixes={".png"}, split_from=1, label_from=2)
    for row in found.rows:
        row["id"] = Path(row["id"]).stem
        row["label"] = int(row["label"])
        row["text"] = NAMES[row["label"]]
    for split, rows in split_rows(found.rows).items():
        print(f"{write_manifest(out / f'{split}.jsonl', rows)} rows in {out / split}.jsonl")


def read_idx(path: Path) -> np.ndarray:
    """The unsigned bytes of an idx file: two zeros, 8 for the type, the number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of bytes")
    axes = content[3]
    sizes = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def add(shard: tarfile.TarFile, name: str, image: np.ndarray) -> None:
    """Append a picture as PNG; nothing of it depends on who writes it or when."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "png")
    member = tarfile.TarInfo(name)
    member.size = content.tell()
    content.seek(0)
    shard.addfile(member, content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the four idx .gz files")
    parser.add_argument("out", type=Path, help="where the manifests and images.tar (90 MB) go")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.out)
