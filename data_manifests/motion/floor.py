"""What logistic regression makes of the set motion: from one frame, and from what differs between frames.

python data_manifests/motion/floor.py FOLDER    (where write_manifest.py wrote)
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from mmssl.data.manifest import Manifest
from mmssl.data.text import Classes
from mmssl.evaluation.probe import fit_linear
from mmssl.evaluation.protocol import Split, measure
from mmssl.loading import clips_of
from mmssl.modalities.video.frontend import Tubes

WAVES = 6  # each way, as in write_manifest.py


def main(folder: Path) -> None:
    manifests = {split: Manifest(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}
    classes = Classes.from_labels(manifests["train"].values("label"))
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for split, manifest in manifests.items():
        clips = clips_of(
            manifest, {"video": Tubes(dim=1, size=[2, 8, 8], rate=8, channels=1, mean=[0.0], std=[1.0])}, {"video": ()}
        )
        for place in track(range(len(clips)), split):
            frames = clips.read(place, 0).inputs["video"][0].numpy()
            for name, features in views(frames).items():
                found.setdefault(name, {}).setdefault(split, []).append(features)
    for name, of_split in found.items():
        splits = [
            Split(
                torch.from_numpy(np.stack(of_split[split])).float(),
                torch.tensor([classes.encode(label) for label in manifest.values("label")]),
            )
            for split, manifest in manifests.items()
        ]
        print(measure(fit_linear, *splits, task=name))


def views(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Features of a clip (T, H, W)."""
    waves = np.fft.fft2(frames - frames.mean((1, 2), keepdims=True))[:, : WAVES + 1, : WAVES + 1]
    turned = waves[1:] * waves[:-1].conj()
    turned /= np.abs(turned) + 1e-6
    return {
        "pixels of one frame": frames[len(frames) // 2].ravel(),
        "amplitudes of one frame": np.log(np.abs(waves[len(frames) // 2]).ravel() + 1e-3),
        "turns of phases between frames": np.concatenate([part.mean(0).ravel() for part in (turned.real, turned.imag)]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the manifests")
    main(parser.parse_args().folder)
