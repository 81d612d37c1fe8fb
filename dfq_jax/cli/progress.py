"""Progress on stderr: one line that changes on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dfq_jax import base
from dfq_jax.recipes import STAGES

SECONDS_BETWEEN_LINES = 5.0
BAR = 12  # characters: stages have names of up to 35


@runtime_checkable
class Display(Protocol):
    """Where progress is shown."""

    def stage(self, name: str) -> None:
        """A stage begins, and the one before it ends."""

    def update(self, done: float, total: float, *, detail: str = "", eta: float | None = None) -> None:
        """How far the stage is; `eta` in seconds."""


class Bar:
    """One line that changes: the stage, and how far it is where it counts."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        """Begin anew."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=None, detail="", eta="")

    def update(self, done: float, total: float, *, detail: str = "", eta: float | None = None) -> None:
        """Move the bar."""
        eta_text = "" if eta is None or done >= total else f"ETA {_duration(eta)}"
        self._progress.update(self._task, completed=done, total=total, detail=detail, eta=eta_text)


class Lines:
    """At most one line every few seconds, for logs."""

    def __init__(self, every: float):
        self._every = every
        self._stage = ""
        self._last = time.monotonic()

    def stage(self, name: str) -> None:
        """Print a stage's name."""
        self._stage = name
        self._print(name)

    def update(self, done: float, total: float, *, detail: str = "", eta: float | None = None) -> None:
        """Print how far the stage is."""
        facts = [f"{100 * done / total:.0f} %"]
        if detail:
            facts.append(detail)
        if eta is not None:
            facts.append(f"ETA {_duration(eta)}")
        self._print(f"{self._stage}: {', '.join(facts)}")

    def _print(self, line: str) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def open_display() -> Iterator[Display]:
    """The display that suits stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(SECONDS_BETWEEN_LINES)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    # What is done is told by the tables that follow.
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)


class Reporter:
    """The callbacks of the library, shown on a display.

    Attributes:
      display: where.
      label: before the name of each stage, where there are several networks.
    """

    def __init__(self, display: Display, label: str = ""):
        self.display = display
        self.label = f"{label}: " if label else ""

    def on_stage(self, name: str) -> None:
        """Show that a stage of `quantize` begins."""
        self.display.stage(self.label + STAGES.get(name, name))

    def on_progress(self, progress: base.Progress) -> None:
        """Show how far the work is."""
        total = progress.num_batches * progress.steps
        self.display.update(progress.done, total, detail=f"loss {progress.loss:.4g}", eta=progress.eta)

    def timed(self, name: str, work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        """`work(*args, on_progress=...)` as a stage that counts images, and its seconds."""
        self.on_stage(name)
        began = time.perf_counter()
        result = work(*args, on_progress=_Counter(self.display))
        return result, round(time.perf_counter() - began, 3)


class _Counter:
    """`(done, total)` with an estimate of the time left."""

    def __init__(self, display: Display):
        self._display = display
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = now, done  # from the first batch on: its time is compilation
        began, first = self._began
        eta = None if done == first else (now - began) / (done - first) * (total - done)
        self._display.update(done, total, detail=f"{done} of {total} images", eta=eta)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
