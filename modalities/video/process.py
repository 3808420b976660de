"""The processes that decoders run in: thrown away when they get no further or crash, gone when nobody asks any more.

Decoders loop for ever on some damaged files, holding Python's lock, and end their process on others; neither must cost
more than the one clip. A `multiprocessing.Process` would not do: workers of a loader may not have any.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmssl.modalities.video import decoders

PATIENCE = 10
CLIPS = 1000  # files that one process reads before another takes its place: decord's readers leave memory behind


class Died(Exception):
    """The process ended before it answered: killed at the time limit, or crashed. One sentence."""


class _Watch:
    """Kills a process that nothing is heard of for `limit` seconds.

    On Linux these are seconds in which it waits for something, or computes: one that others leave no core to is given
    more, `PATIENCE` times as many at most.
    """

    def __init__(self, process: subprocess.Popen[bytes], limit: float) -> None:
        self._process, self._limit = process, limit
        self.late = False
        self._ended = threading.Event()
        self.restart()
        threading.Thread(target=self._run, daemon=True).start()

    def restart(self) -> None:
        self._begun, self._had = time.monotonic(), _computed(self._process.pid)[0]
        self._deadline = self._begun + self._limit

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= self._deadline:
                computed, wants_more = _computed(self._process.pid)
                left = self._limit - (computed - self._had)
                if wants_more and left > 0.1 * self._limit and time.monotonic() < self._begun + PATIENCE * self._limit:
                    self._deadline = time.monotonic() + left
                    continue
                self.late = True
                self._process.kill()
                return


def _computed(pid: int) -> tuple[float, bool]:
    """Seconds that a process has computed, and whether it would go on if it had a core, or the disk answered."""
    try:
        # behind the name and its bracket: the state is the first field, times are the 12th and the 13th
        each = [path.read_text().rpartition(")")[2].split() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        seconds = sum(int(fields[11]) + int(fields[12]) for fields in each) / os.sysconf("SC_CLK_TCK")
        return seconds, any(fields[0] in "RD" for fields in each)
    except (OSError, IndexError, ValueError):
        return 0.0, False  # it has ended, or this is no Linux


class Decoder:
    """One such process, which holds one file at a time.

    It ends with its input, so it does not outlive its parent, however that ended.
    """

    def __init__(self) -> None:
        # -P: the modules beside the program must not hide others of their names
        command = [sys.executable, "-P", str(Path(decoders.__file__).resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.opened = 0
        self.answering = False

    def ask(self, request: dict[str, Any], content: bytes = b"", *, limit: float) -> tuple[dict[str, Any], np.ndarray]:
        """The answer to a request of `decoders.serve`, and the pixels that came with it: (T, H, W, 3) uint8.

        Raises:
            Died: for `limit` seconds it neither answers nor gets any further, or ended.
        """
        watch = _Watch(self._process, limit)
        self.answering = True
        try:
            requests, answers = self._pipes()
            said = request | {"size": len(content), "limit": limit, "alarm": PATIENCE * limit + 1}
            requests.write(json.dumps(said).encode() + b"\n" + content)
            requests.flush()
            while "alive" in (answer := json.loads(answers.readline())):
                watch.restart()
            watch.restart()  # pixels are still to come
            pixels = np.empty(answer.get("shape", 0), np.uint8)
            if pixels.size and answers.readinto(pixels.reshape(-1).data) < pixels.nbytes:
                raise EOFError
        except (OSError, EOFError, ValueError):
            self.close()
            if watch.late:
                raise Died(f"no frame within {limit:g} s") from None
            raise Died(f"the decoder crashed (exit code {self._process.returncode})") from None
        finally:
            watch.end()
        self.answering = False
        return answer, pixels

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def forget(self) -> None:
        """Let go of it without ending it: it is another process's."""
        self._process.returncode = 0  # else it is waited for, and warned about
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not yet written can no longer be

    def _pipes(self) -> tuple[IO[bytes], Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


_lock = threading.Lock()
_idle: list[Decoder] = []
_all: set[Decoder] = set()


@contextmanager
def borrowed() -> Iterator[Decoder]:
    """A process for one file: each thread that reads has one of its own, which the next file finds running."""
    with _lock:
        decoder = _idle.pop() if _idle else None
    if decoder is not None and not decoder.alive:
        with _lock:
            _all.discard(decoder)
        decoder.close()
        decoder = None
    if decoder is None:
        decoder = Decoder()
        with _lock:
            _all.add(decoder)
    decoder.opened += 1
    try:
        yield decoder
    finally:
        # one in the middle of an answer would give it to the next who asks
        if decoder.alive and not decoder.answering and decoder.opened < CLIPS:
            with _lock:
                _idle.append(decoder)
        else:
            with _lock:
                _all.discard(decoder)
            decoder.close()


def stop() -> None:
    """End all processes; the next clip starts another."""
    with _lock:
        _idle.clear()
        while _all:
            _all.pop().close()


def _forget() -> None:
    """In a forked worker: its parent's processes are not its own, and would answer both."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()
    while _all:
        _all.pop().forget()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
