import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mmssl.training.log import RunLog


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "metrics": {"accuracy": 0.25}, "grad_norm": 2.0, **more}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=10) as log:
        log.line(row(1) | {"loss": math.nan, "metrics": {"accuracy": 0.5, "spread": math.inf}}, rate=1.0, left=1.0)
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (found,) = lines(tmp_path)
    assert found["loss"] is None
    assert found["metrics"] == {"accuracy": 0.5, "spread": None}
    assert found["not_finite"] == ["loss", "spread"]


def test_each_line_is_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=10) as log:
        log.line(row(1), rate=1.0, left=1.0)
        assert [line["step"] for line in lines(tmp_path)] == [1]


def test_without_a_terminal_a_line_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, steps=10) as log:
        log.line(row(4), rate=12.34, left=3725.0)
    printed = capsys.readouterr().err
    assert "update 4/10  loss 1.5  accuracy 0.25  grad_norm 2  12.3 clips/s  1:02:05 left" in printed
    with RunLog(tmp_path / "turns", steps=10) as log:
        log.line(row(4, metrics={"image/loss": 0.5, "image/target_std": 1.0}), rate=12.34, left=3725.0)
    assert "update 4/10  loss 1.5  grad_norm 2  image/loss 0.5  12.3 clips/s" in capsys.readouterr().err


def test_other_processes_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", steps=10, main=False) as log:
        log.line(row(4), rate=1.0, left=1.0)
        log.note(4, "hello")
        log.advance(4, loss=1.0, rate=1.0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_a_resumed_log_drops_what_will_be_written_again_and_a_cut_off_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=10) as log:
        for step in (1, 2, 3):
            log.line(row(step), rate=1.0, left=1.0)
        log.note(2, "something happened")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with RunLog(tmp_path, steps=10, after=2) as log:
        assert [line["step"] for line in log.history] == [1, 2]
        log.line(row(3), rate=1.0, left=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3]


def test_a_full_disk_is_said_once_leaves_whole_lines_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        """Takes half of what it is given, as the last block of a disk does."""

        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2])

    with RunLog(tmp_path, steps=10) as log:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode, buffering: Full(path, "ab"))
            log.line(row(1), rate=1.0, left=1.0)
            log.line(row(2), rate=1.0, left=1.0)
        log.line(row(3), rate=1.0, left=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [3]
    assert capsys.readouterr().err.count("No space left on device, so lines of the log are missing") == 1


def test_without_tensorboard_that_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, steps=10) as log:
        log.line(row(1), rate=1.0, left=1.0)
        log.line(row(2), rate=1.0, left=1.0)
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1


def test_event_files_hold_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorboard")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, steps=10) as log:
        log.line(row(1), rate=1.0, left=1.0)
        log.line(row(2) | {"loss": math.nan}, rate=1.0, left=1.0)
        log.write({"step": 2, "evaluation": {"accuracy": 0.75}})
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("train/accuracy")] == [(1, 0.25), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/accuracy")] == [(2, 0.75)]


def test_on_a_terminal_a_bar_shows_loss_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with RunLog(tmp_path / "my_run", steps=10) as log:
        log.advance(4, loss=1.2345, rate=56.78)
        log.line(row(4), rate=1.0, left=1.0)
    shown = capsys.readouterr().err
    for part in ("my_run", "4/10", "loss 1.234", "56.8 clips/s"):
        assert part in shown
    assert "update 4/10" not in shown
