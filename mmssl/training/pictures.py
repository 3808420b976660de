"""Pictures of a run for people to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

GAP = 2  # white pixels around each picture
LEAST = 64  # pixels: smaller pictures are enlarged to about that, each pixel a square


def write_sheet(path: Path, rows: Mapping[str, Tensor], *, note: str = "", columns: int = 8) -> None:
    """One PNG file: a row of pictures for each entry, a column for each clip; and beside it README.txt, which says so.

    Args:
        rows: name -> (B, C, H, W) in [0, 1], all of the same shape; of other than 1 or 3 channels the first is shown.
        note: what else one must know to read them.
        columns: most clips.
    """
    from PIL import Image

    lines = []
    for pictures in rows.values():
        x = pictures[:columns].detach().float().cpu()
        x = x[:, :1].expand(-1, 3, -1, -1) if x.shape[1] != 3 else x
        scale = max(1, round(LEAST / max(x.shape[-2:])))
        x = F.interpolate(x, scale_factor=scale, mode="nearest") if scale > 1 else x
        lines.append(torch.cat(list(F.pad(x, (GAP, GAP, GAP, GAP), value=1.0)), -1))
    sheet = (torch.cat(lines, -2).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    Image.fromarray(sheet.numpy()).save(unfinished, format="PNG")
    os.replace(unfinished, path)
    text = f"Each column is a clip; the rows, from the top: {', '.join(rows)}.\n" + (f"Note: {note}.\n" if note else "")
    path.with_name("README.txt").write_text(text, encoding="utf-8")
