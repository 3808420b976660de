"""How files are opened: that of a clip, to be read, and one that a process holds against all others."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmssl.types import BadClip


def open_clip(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """A file of clips, to be read.

    Args:
        buffering: as of `open`.

    Raises:
        BadClip: missing, not to be read, or no file, see `refuse_special`.
    """
    try:
        refuse_special(path)
        return open(path, "rb", buffering=buffering)
    except OSError as error:
        raise BadClip(path, (error.strerror or str(error)).lower()) from None


def refuse_special(path: str | Path) -> None:
    """See that a path, where it is no folder, is a file: whoever opens a pipe that nobody writes to waits for ever.

    Raises:
        BadClip: it is something else.
        OSError: there is nothing, or it cannot be told.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadClip(path, "is no file but a pipe, a socket or a device; write what it gives to a file, and give that")
