"""Pictures of a run for people to look at, and sound to listen to."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GAP = 2  # white pixels around each picture
LEAST = 64  # pixels: smaller pictures are enlarged to about that, each pixel a square
HEARD = (8_000, 11_025, 12_000, 16_000)  # samples a second that MP3 has, as far as a page needs them
MOST = 112  # pixels: larger pictures that move are made smaller, or a page of them would have no end


def write_sheet(
    path: Path, rows: Mapping[str, Tensor], *, note: str = "", columns: int = 8, rate: float | None = None
) -> Path:
    """A row of pictures for each entry, a column for each clip; and beside it README.txt, which says so.

    Args:
        path: without its end: one PNG file, or of clips that move an animated WebP.
        rows: name -> (B, C, H, W) or (B, C, T, H, W) in [0, 1], all of the same shape; of other than 1 or 3 channels
            the first is shown.
        note: what else one must know to read them.
        columns: most clips.
        rate: frames a second, where they move.

    Returns:
        the file.
    """
    from PIL import Image

    lines = []
    for pictures in rows.values():
        x = pictures[:columns].detach().float().cpu()
        x = x[:, :1].expand(-1, 3, *x.shape[2:]) if x.shape[1] != 3 else x
        moving = x if x.ndim == 5 else x[:, :, None]
        frames = moving.transpose(1, 2).flatten(0, 1)  # one batch of pictures
        scale = max(1, round(LEAST / max(x.shape[-2:])))
        if scale > 1:
            frames = F.interpolate(frames, scale_factor=scale, mode="nearest")
        elif x.ndim == 5 and max(x.shape[-2:]) > MOST:
            frames = F.interpolate(frames, scale_factor=MOST / max(x.shape[-2:]), mode="area")
        frames = F.pad(frames, (GAP, GAP, GAP, GAP), value=1.0).unflatten(0, moving.shape[::2][:2])
        lines.append(torch.cat(list(frames), -1))  # (T, 3, height, all clips beside each other)
    sheets = (torch.cat(lines, -2).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(sheet.numpy()) for sheet in sheets]
    path = path.with_suffix(".png" if rate is None else ".webp")
    unfinished = path.with_name(path.name + ".tmp")
    if rate is None:
        images[0].save(unfinished, format="PNG")
    else:
        more: dict[str, Any] = {"append_images": images[1:], "duration": round(1000 / rate), "loop": 0, "quality": 60}
        images[0].save(unfinished, format="WEBP", save_all=True, **more)
    os.replace(unfinished, path)
    text = f"Each column is a clip; the rows, from the top: {', '.join(rows)}.\n" + (f"Note: {note}.\n" if note else "")
    path.with_name("README.txt").write_text(text, encoding="utf-8")
    return path


def write_sounds(folder: Path, rows: Mapping[str, Tensor], *, rate: float) -> None:
    """MP3 files CLIP_ROW_NAME, both counted from 1: what stands in the rows of a sheet, to be heard.

    Args:
        rows: name -> (clips, samples).
        rate: samples a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row, (name, waves) in enumerate(rows.items(), start=1):
        for clip, wave in enumerate(waves, start=1):
            (folder / f"{clip}_{row}_{name}.mp3").write_bytes(sound_file(wave, rate))


def sound_file(wave: Tensor, rate: float) -> bytes:
    """(L,) samples as MP3, which every browser plays."""
    import soundfile
    import soxr

    # the encoder of MP3 ends the whole process where it is given what is no number
    samples = wave.detach().float().nan_to_num(0.0, 1.0, -1.0).cpu().numpy()
    if rate not in HEARD:
        samples, rate = soxr.resample(samples, rate, HEARD[-1]), HEARD[-1]
    file = io.BytesIO()
    settings = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.9}
    soundfile.write(file, samples.clip(-1, 1), int(rate), **settings)
    return file.getvalue()
