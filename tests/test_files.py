"""Nothing waits for ever for what is no file, nor for a file that another process holds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmssl.clips import _captions
from mmssl.data.manifest import read_slice
from mmssl.data.scan import scan, tar_members
from mmssl.modalities import MODALITIES
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
