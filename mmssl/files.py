"""How files are opened: that of a clip, to be read, and one that a process holds against all others."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether no other process holds a file. This one then does until this ends, however it ends: by the system.

    Where a file system knows no locks nobody holds anything, and everyone is told to be alone.

    Raises:
        FileNotFoundError: there is no such file.
    """
    # a file and not its folder, and not to be read only: NFS locks only what is open for writing
    with path.open("r+b") as file, _of_this_process(file):
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # it knows no locks
        yield free


_held: set[BinaryIO] = set()


@contextmanager
def _of_this_process(file: BinaryIO) -> Iterator[None]:
    """Forked children close a file: a lock ends with the last of those that hold it open, and they may live longer."""
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


def _let_go() -> None:
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)
