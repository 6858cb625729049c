"""Progress with the time left, for anything over two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
SHOW_AFTER_S = 2.0
LINE_EVERY_S = 15.0

console = Console(stderr=True)
shown_here = True


def silence() -> None:
    """Show nothing in this process from now on: of several that do one work, one shows it."""
    global shown_here
    shown_here = False


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing a bar with the time left on a terminal, or a line now and then elsewhere.

    Nothing is shown for work that ends within two seconds.
    """
    if not shown_here:
        yield from items
        return
    if total is None:
        items = list(items)
        total = len(items)
    shown = _bar if console.is_terminal else _lines
    yield from shown(items, label, total)


def _bar(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(label, total=total)
    try:
        for item in items:
            if not progress.live.is_started and time.monotonic() - started > SHOW_AFTER_S:
                progress.start()
            yield item
            progress.advance(task)
    finally:
        progress.stop()


def _lines(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    started = said = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said > LINE_EVERY_S and number < total:
            said = now
            left = (now - started) / number * (total - number)
            print(f"{label}: {number}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
