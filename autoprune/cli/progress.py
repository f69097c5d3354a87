"""Progress on stderr: bars with the time left in a terminal, one line per stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from autoprune.core.launch import launched_rank
from autoprune.core.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import TaskID


def make_progress(stream: TextIO | None = None) -> Progress:
    """Return bars if ``stream`` (stderr by default) is a terminal, else plain lines; of several processes one tells."""
    if launched_rank() > 0:
        return Silent()
    stream = stream or sys.stderr
    return Bars() if stream.isatty() else Lines(stream)


@contextlib.contextmanager
def working() -> Iterator[Progress]:
    """Yield the progress of a command's work; what libraries print meanwhile goes to stderr, not among the results."""
    progress = make_progress()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield progress
    finally:
        progress.finish()


def steps(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Return a callback ``(done, total)`` that shows its work as one stage, started by its first call."""
    seen = -1

    def tell(done: int, total: int) -> None:
        nonlocal seen
        if seen < 0:
            progress.stage(name, total)
            seen = 0
        progress.advance(done - seen)
        seen = done

    return tell


class Bars:
    """A bar per stage, with the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        """Start a bar; a total of None shows one that only moves."""
        self._close_stage()
        self._bars.start()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, n: int = 1) -> None:
        """Move the present bar."""
        if self._task is not None:
            self._bars.advance(self._task, n)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def finish(self) -> None:
        """Stop the last bar where it is and leave all of them standing."""
        self._close_stage()
        self._bars.stop()

    def _close_stage(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            if task.total is None:
                done = max(task.completed, 1)
                self._bars.update(self._task, total=done, completed=done)
            self._bars.stop_task(self._task)
            self._task = None


class Lines:
    """One line when a stage starts and one when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name: str | None = None
        self._total: int | None = None
        self._done = 0
        self._start = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        """Say that a stage starts, and how many steps it has."""
        self.finish()
        self._name, self._total, self._done, self._start = name, total, 0, time.monotonic()
        self._print(f"{name}: started" + (f", {total} steps" if total is not None else ""))

    def advance(self, n: int = 1) -> None:
        """Count, silently."""
        self._done += n

    def note(self, text: str) -> None:
        """Print the line."""
        self._print(text)

    def finish(self) -> None:
        """Say how far the stage came, and how long it took."""
        if self._name is not None:
            # Only the error that is on its way tells that a stage without steps did not reach its end.
            whole = sys.exception() is None if self._total is None else self._done >= self._total
            came = "done" if whole else "stopped" if self._total is None else f"{self._done} of {self._total} steps"
            self._print(f"{self._name}: {came} in {time.monotonic() - self._start:.1f} s")
            self._name = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
