"""Progress on the terminal: only on a TTY, only on rank 0, on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar

from autopar.planner.solution import Progress


def shows_progress() -> bool:
    """Whether a person watches this process."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line of its own for what takes a while, where a person watches."""
    if shows_progress():
        Console(stderr=True).print(text, highlight=False, markup=False)


@contextmanager
def planning_progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar over configurations, with the best step time so far; nothing where nobody watches."""
    if not shows_progress():
        yield None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def report(progress: Progress) -> None:
            best = "" if progress.best_s is None else f", best {progress.best_s * 1e3:.1f} ms"
            bar.update(task, total=progress.units, completed=progress.solved, description=f"planning{best}")

        yield report
