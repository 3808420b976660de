"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, count: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, and how to move it."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=count)
        yield lambda done: progress.advance(task, done)
