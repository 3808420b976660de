"""Picture files to floating point pixels. What a file is, its content decides."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mmssl.files import open_clip
from mmssl.types import BadClip

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's own "L"


def read(source: str | Path | BinaryIO, *, channels: int = 3) -> Tensor:
    """A picture as it is meant to be seen: turned upright, on white where it is transparent, the first of its frames.

    8-bit gray, color, palette, CMYK and 1-bit pictures, and 16-bit gray ones, which keep their depth (65,535 is white).
    Pillow reads 16-bit color as 8-bit.

    Args:
        source: a path, or a seekable binary file.
        channels: 3 (gray is repeated) or 1 (color becomes luma).

    Returns:
        (C, H, W) float32 in [0, 1].

    Raises:
        BadClip: missing, empty, damaged or cut off, no picture at all, or samples without a known range.
        ValueError: another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures are read with 1 or 3 channels, got {channels}")
    from PIL import ImageOps

    with _opened(source) as (image, name):
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            pixels = _deep(np.asarray(image), image.mode, image.format, name)
        elif image.has_transparency_data:
            pixels = np.asarray(image.convert("RGBA"), np.float32) / 255.0
            opaque = pixels[..., 3:]
            pixels = pixels[..., :3] * opaque + (1.0 - opaque)
        elif image.mode in ("1", "L"):
            pixels = np.asarray(image.convert("L"), np.float32)[..., None] / 255.0
        else:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255.0
    if channels == 1 and pixels.shape[-1] == 3:
        pixels = np.minimum(pixels @ np.array(_LUMA, np.float32), 1.0)[..., None]
    picture = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return picture if len(picture) == channels else picture.expand(channels, -1, -1).contiguous()


def probe(source: str | Path | BinaryIO) -> dict[str, Any]:
    """What a manifest says of a picture: `height` and `width`, upright. Only the header is read.

    Raises:
        BadClip: as `read`, but for what only decoding would show.
    """
    with _opened(source) as (image, _):
        width, height = image.size
        if image.format == "TIFF":  # of these alone Pillow may have turned the size already; the tags are as stored
            width, height = image.tag_v2[256], image.tag_v2[257]
        if image.getexif().get(0x0112, 1) >= 5:  # orientations from 5 on lie on their side
            width, height = height, width
    return {"height": height, "width": width}


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[tuple[Any, str]]:
    """Pillow's view of a file, and what to call it; whatever Pillow raises inside becomes a `BadClip`."""
    from PIL import Image, UnidentifiedImageError

    name = str(source if isinstance(source, str | Path) else getattr(source, "name", "picture in memory"))
    with ExitStack() as stack:
        if isinstance(source, str | Path):
            file: Any = stack.enter_context(open_clip(source))
        else:
            file = source
        if not file.seek(0, io.SEEK_END):
            raise BadClip(name, "the file is empty")
        file.seek(0)
        try:
            yield stack.enter_context(Image.open(file)), name
        except BadClip:
            raise
        except UnidentifiedImageError:
            raise BadClip(name, "not a picture that Pillow can read") from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            reason = f"has more than {limit} pixels, Pillow's limit against files that would fill the memory"
            raise BadClip(name, f"{reason}; make it smaller") from None
        except Exception as error:
            # on damaged files its decoders raise nearly anything: OSError, SyntaxError, struct.error, EOFError, ...
            raise BadClip(name, f"damaged or cut off: {str(error) or type(error).__name__}") from error


def _deep(samples: np.ndarray, mode: str, format: str | None, name: str) -> np.ndarray:
    """(H, W) of more than 8 bits -> (H, W, 1) in [0, 1]."""
    if mode.startswith("I;16") or (mode == "I" and format in ("PNG", "PPM")):  # older Pillow calls 16-bit PNG "I"
        return samples.astype(np.float32)[..., None] / 65535.0
    if mode == "F" and samples.size and samples.min() >= 0.0 and samples.max() <= 1.0:
        return samples.astype(np.float32)[..., None]
    kind = "floating point" if mode == "F" else "32-bit integer"
    raise BadClip(
        name,
        f"{kind} samples from {samples.min():g} to {samples.max():g} have no known range; save it as 16-bit gray, or "
        "as floating point from 0 to 1",
    )
