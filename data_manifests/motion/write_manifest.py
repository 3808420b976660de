"""The generated set motion: textures that drift in one of eight directions, which no single frame tells.

python data_manifests/motion/write_manifest.py OUT_FOLDER
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np

from mmssl.data.manifest import split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.modalities.video.reader import probe

DIRECTIONS = ("east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast")
CLIPS = {"train": 2000, "valid": 400, "test": 800}
SIDE, FRAMES, FPS = 32, 16, 8
SPEED = (0.7, 2.0)  # pixels from one frame to the next
FINEST = 6  # waves of a texture across the picture


def main(out: Path, clips: dict[str, int] | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "videos.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for part, (split, count) in enumerate((clips or CLIPS).items()):
            for place in range(count):
                number = place % len(DIRECTIONS)
                clip = draw(number, np.random.default_rng([part, place]))
                content = encode(clip)
                member = tarfile.TarInfo(f"{split}/{DIRECTIONS[number]}/{split}_{place:05}.mp4")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    found = scan(out, media="video", probe=probe, suffixes={".mp4"}, split_from=1, label_from=2)
    for row in found.rows:
        row["id"] = Path(row["id"]).stem
    for split, rows in split_rows(found.rows).items():
        print(f"{write_manifest(out / f'{split}.jsonl', rows)} rows in {out / split}.jsonl")


def draw(direction: int, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W) uint8: a texture without edges on a torus, moved by any fraction of a pixel.

    It is a sum of waves with random phases, as many one way as the other, so a frame has the same distribution whatever
    the direction; and moving it is a change of the phases alone, which leaves no trace in a frame either.
    """
    rows, columns = np.meshgrid(np.fft.fftfreq(SIDE, 1 / SIDE), np.fft.fftfreq(SIDE, 1 / SIDE), indexing="ij")
    scale = np.hypot(rows, columns)
    spectrum = np.fft.fft2(rng.standard_normal((SIDE, SIDE)))
    spectrum *= (scale > 0) * (scale <= FINEST) / np.maximum(scale, 1.0) ** 0.5
    angle = 2 * np.pi * direction / len(DIRECTIONS)
    speed = rng.uniform(*SPEED)
    across, down = speed * np.cos(angle), -speed * np.sin(angle)
    time = np.arange(FRAMES)[:, None, None]
    moved = spectrum * np.exp(-2j * np.pi * time * (columns * across + rows * down) / SIDE)
    picture = np.fft.ifft2(moved).real
    picture /= picture.std()
    return np.round(255 / (1 + np.exp(-2 * picture))).astype(np.uint8)


def encode(clip: np.ndarray) -> bytes:
    """An mp4 of frames that are each coded for itself: a frame predicted from others would show where they moved."""
    import av

    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "veryfast"})
        stream.height, stream.width = clip.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(picture, format="gray").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return content.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the manifests and videos.tar go")
    main(parser.parse_args().out)
