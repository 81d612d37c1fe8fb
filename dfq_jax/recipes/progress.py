"""Progress: one line that changes on a terminal (stderr), bars in a notebook, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from dfq_jax import base
from dfq_jax.recipes.steps import STAGES

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_DRAWINGS = 0.2  # in notebooks, where each is a message
BAR = 12  # characters: stages have names of up to 35


@runtime_checkable
class Display(Protocol):
    """Where progress is shown."""

    def stage(self, name: str) -> None:
        """A stage begins, and the one before it ends."""

    def update(self, done: float, total: float, *, detail: str = "", eta: float | None = None) -> None:
        """How far the stage is; `eta` in seconds."""


class Bars:
    """A bar for the stage; those of earlier stages that counted stay where `keep` says so."""

    def __init__(self, progress: Any, *, keep: bool = False, draw: Callable[[], Any] = lambda: None):
        self._progress, self._keep, self._draw = progress, keep, draw  # of rich; on a terminal it draws itself
        self._task: Any = None
        self._drawn = 0.0

    def stage(self, name: str) -> None:
        """Begin a bar."""
        self.close()
        self._task = self._progress.add_task(name, total=None, detail="", eta="")
        self._draw()

    def update(self, done: float, total: float, *, detail: str = "", eta: float | None = None) -> None:
        """Move the bar."""
        if self._task is None:
            self.stage("")
        eta_text = "" if eta is None or done >= total else f"ETA {_duration(eta)}"
        self._progress.update(self._task, completed=done, total=total, detail=detail, eta=eta_text)
        now = time.monotonic()
        if now - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._draw()

    def close(self) -> None:
        """End the bar: its stage is done, if before all of its steps."""
        if self._task is None:
            return
        total = self._progress.tasks[self._progress.task_ids.index(self._task)].total
        if total is None or not self._keep:
            self._progress.remove_task(self._task)
        else:
            self._progress.update(self._task, completed=total, eta="")
            self._progress.stop_task(self._task)
        self._task = None
        self._draw()


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


class Reporter:
    """The callbacks of `quantize` and of other long work, shown on a display.

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


@contextlib.contextmanager
def progress_bar() -> Iterator[Reporter]:
    """Progress shown while something long runs: `pip install 'dfq_jax[cli]'`.

    One line that changes on a terminal, bars in a notebook; elsewhere a line on stderr every few seconds.

    >>> with progress_bar() as bar:
    ...     q = dfq_jax.quantize(
    ...         apply_fn, variables, input_shape=(1, 6), recipe="instant",
    ...         on_progress=bar.on_progress, on_stage=bar.on_stage,
    ...     )

    Yields:
      What has the two callbacks, `on_progress` for everything that takes one.

    Raises:
      ImportError: rich is not installed.
    """
    console = base.require("rich.console", "cli").Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield Reporter(Lines(SECONDS_BETWEEN_LINES))
        return
    rich = base.require("rich.progress", "cli")
    progress = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=BAR),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[detail]}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[eta]}"),
        console=console,
        transient=True,  # what is done is told by the tables that follow
    )
    # Rich's own drawing in notebooks takes widgets, which are not kept in files.
    with contextlib.nullcontext() if console.is_jupyter else progress:
        bars = Bars(progress, keep=True, draw=_in_notebook(progress)) if console.is_jupyter else Bars(progress)
        yield Reporter(bars)
        bars.close()


def _in_notebook(progress: Any) -> Callable[[], Any]:
    """What draws the bars, in the output of the cell that is running."""
    output = importlib.import_module("IPython.display").display(progress, display_id=True)
    return lambda: output.update(progress)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
