"""What is no file is not waited for, and what one process holds no other does."""

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmssl.clips import _captions
from mmssl.data.manifest import read_slice
from mmssl.data.scan import scan, tar_members
from mmssl.files import alone
from mmssl.modalities import MODALITIES
from mmssl.training.resume import held
from mmssl.types import BadClip

RULE = r"is no file but a pipe, a socket or a device; write what it gives to a file, and give that"


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe, held open so that a test fails, and does not wait, where it is opened all the same."""
    path = tmp_path / "clips" / "pipe.wav"
    path.parent.mkdir()
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    yield path
    os.close(held)


@pytest.mark.parametrize("modality", [name for name, kind in MODALITIES.items() if kind.probe is not None])
def test_no_reader_waits_for_a_pipe(pipe: Path, modality: str) -> None:
    probe = MODALITIES[modality].probe
    assert probe is not None
    with pytest.raises(BadClip, match=rf"pipe\.wav: {RULE}$"):
        probe(pipe)


def test_neither_a_slice_nor_a_tar_is_a_pipe(pipe: Path) -> None:
    with pytest.raises(BadClip, match=RULE):
        read_slice(str(pipe), 0, 1)
    with pytest.raises(BadClip, match=RULE):
        list(tar_members(str(pipe)))


def test_a_scan_names_a_pipe_among_the_files_that_cannot_be_read(pipe: Path) -> None:
    probe = MODALITIES["speech"].probe
    assert probe is not None
    found = scan(pipe.parent, media="audio", probe=probe, suffixes={".wav"}, progress=False)
    assert found.rows == []
    assert [path for path, _ in found.bad] == [str(pipe)]
    assert "is no file but a pipe" in found.bad[0][1]


@pytest.mark.parametrize("kind", [str, Path])
def test_captions_are_read_from_no_pipe(
    pipe: Path, kind: type[str] | type[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pipe.rename(pipe.with_suffix(".txt"))
    monkeypatch.setattr(Path, "read_text", lambda *given, **settings: pytest.fail("it was opened"))
    with pytest.raises(BadClip, match=RULE):
        _captions(kind(path), "input 0")


def test_a_file_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError), alone(path):
        pass
    path.touch()
    with alone(path) as first:
        for _ in range(2):  # who comes too late and goes again takes nothing away
            with alone(path) as second:
                assert (first, second) == (True, False)
    with alone(path) as third:
        assert third


def test_a_forked_child_that_lives_longer_holds_nothing(tmp_path: Path) -> None:
    """As the workers of a loader do for some seconds when their parent is killed."""
    path = tmp_path / "lock"
    path.touch()
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def work() -> None:
        begun.set()
        time.sleep(30)

    with alone(path):
        worker = fork.Process(target=work)
        worker.start()
        assert begun.wait(20)
    try:
        with alone(path) as free:
            assert free
    finally:
        worker.kill()
        worker.join()


def test_where_there_are_no_locks_everyone_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with held(tmp_path), held(tmp_path), alone(tmp_path / "lock") as free:
        assert free


def test_a_run_folder_is_held_where_only_what_is_open_for_writing_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def of_nfs(file: Any, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with held(tmp_path), pytest.raises(FileExistsError, match="another run is going on in this folder"), held(tmp_path):
        pass
