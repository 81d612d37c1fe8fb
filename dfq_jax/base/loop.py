"""The loop around compiled steps, the same for images, blocks and whole networks.

Between two compiled calls it does what only the host can do: show progress, notice a loss that is not finite, stop
early, save a checkpoint, and end on Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from dfq_jax.base.checkpoint import Checkpoint, fingerprint, remove_checkpoint
from dfq_jax.base.interrupt import catch_interrupt
from dfq_jax.base.precision import products

CHECKPOINT_EVERY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known between two compiled calls.

    Attributes:
      batch: the batch of images, or the block, that is worked on; from 1.
      num_batches: of batches or blocks.
      step: optimizer steps that it has seen.
      steps: that it will see.
      loss: of the latest step.
      seconds: since the work began, compilation included.
      eta: seconds left, at the speed so far.
      name: of the block; batches of images have none.
    """

    batch: int
    num_batches: int
    step: int
    steps: int
    loss: float
    seconds: float
    eta: float
    name: str = ""


class Turn(NamedTuple):
    """One compiled call: the batch that it works on, and how many steps that has seen before and after."""

    batch: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which batch each compiled call works on, and what happens between calls.

    Attributes:
      num_batches: of batches, one optimized after the other.
      steps: for each.
      chunk: steps in one compiled call, a divisor of `steps`.
      in_turn: go on to the next batch after each call.
      report_every: steps between two reports to the host, which must wait for the device for each of them.
      patience: stop a batch when its loss has not improved by `min_improvement` (relative) in so many steps; 0 never.
      min_improvement: see `patience`.
      settled: steps before which a loss says nothing about a plateau.
      names: of the batches, for reports.

    >>> plan = Plan(num_batches=2, steps=20, chunk=10)
    >>> [plan.turn(i).batch for i in range(len(plan))], plan.turn(3)
    ([0, 0, 1, 1], Turn(batch=1, begin=10, end=20))
    """

    num_batches: int
    steps: int
    chunk: int
    in_turn: bool = False
    report_every: int = 10
    patience: int = 0
    min_improvement: float = 0.0
    settled: int = 0
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_batches * (self.steps // self.chunk)

    def turn(self, position: int) -> Turn:
        """The compiled call at a place in the order."""
        if self.in_turn:
            number, batch = divmod(position, self.num_batches)
        else:
            batch, number = divmod(position, self.steps // self.chunk)
        return Turn(batch, number * self.chunk, (number + 1) * self.chunk)

    def reports(self, turn: Turn) -> bool:
        """Whether a call is followed by a report."""
        return turn.end % self.report_every < self.chunk or turn.end == self.steps


class Loop:
    """One optimization. What is optimized, and by which compiled function, is a subclass's.

    Attributes:
      plan: in which order.
      key: that all keys are folded from.
      work: by batch, what its compiled calls made of it so far: a pytree of arrays.
      position: calls made, among those of the plan.
      best: by batch, its lowest loss and the step of that.
      stopped: batches that reached a plateau.
      started: when, in seconds of `time.perf_counter`.
    """

    def __init__(self, plan: Plan, key: Key[Array, ""]):
        self.plan, self.key, self.started = plan, key, time.perf_counter()
        self.work: dict[int, Any] = {}
        self.position = 0
        self.best: dict[int, tuple[float, int]] = {}
        self.stopped: set[int] = set()

    # --- what a subclass says ---

    def begin(self, batch: int) -> Any:
        """The work on a batch before its first step."""
        raise NotImplementedError

    def advance(self, turn: Turn, work: Any) -> tuple[Any, Array]:
        """The work after one more compiled call, to which `work` may be donated, and the loss of the last step."""
        raise NotImplementedError

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        """What a checkpoint belongs to besides the key: settings, and a tree of arrays."""
        raise NotImplementedError

    def check(self, turn: Turn, loss: float) -> None:
        """Raise an error if the loss is not finite."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds besides `work`, for JSON."""
        return {}

    def resume(self, facts: dict[str, Any]) -> None:
        """Make ready to go on from `facts` and `work`."""

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        """A tree like the saved work on a batch, of arrays or `ShapeDtypeStruct`."""
        return jax.eval_shape(lambda: self.begin(batch))

    # --- the loop ---

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        keep_checkpoint: bool = False,
        precision: str | None = None,
    ) -> bool:
        """Do the work, from where a checkpoint left it; whether all of it was done.

        Ctrl-C ends it after the compiled call in progress, and saves; the second one raises.
        """
        saved = None if checkpoint is None else Checkpoint(checkpoint, self._identity())
        if saved is not None:
            self._restore(saved)
        first, begun = self.position, time.perf_counter()
        last_save = begun
        with products(precision), catch_interrupt() as interrupted:
            while self.position < len(self.plan):
                turn = self.plan.turn(self.position)
                self.position += 1  # a checkpoint written after this call resumes at the next one
                if turn.batch in self.stopped:
                    continue
                latest = self._visit(turn)
                if self.plan.reports(turn):
                    loss = float(latest)
                    self._watch(turn, loss)
                    now = time.perf_counter()
                    eta = (now - begun) / (self.position - first) * (len(self.plan) - self.position)
                    if on_progress is not None:
                        on_progress(self._progress(turn, loss, now - self.started, eta))
                stop = interrupted()
                if saved is not None and (stop or time.perf_counter() - last_save > CHECKPOINT_EVERY_SECONDS):
                    self._save(saved)
                    last_save = time.perf_counter()
                if stop:
                    break
        completed = self.position >= len(self.plan)
        if saved is not None and completed:
            self._save(saved) if keep_checkpoint else remove_checkpoint(saved.path)
        return completed

    def _visit(self, turn: Turn) -> Array:
        if turn.batch not in self.work:
            self.work[turn.batch] = self.begin(turn.batch)
        self.work[turn.batch], loss = self.advance(turn, self.work[turn.batch])
        return loss

    def _watch(self, turn: Turn, loss: float) -> None:
        """Notice a loss that is not finite, and plateaus."""
        self.check(turn, loss)
        if not self.plan.patience or turn.end <= self.plan.settled:
            return
        lowest, at = self.best.get(turn.batch, (math.inf, turn.end))
        if loss < lowest * (1 - self.plan.min_improvement):
            self.best[turn.batch] = (loss, turn.end)
        elif turn.end - at >= self.plan.patience:
            self.stopped.add(turn.batch)

    def _progress(self, turn: Turn, loss: float, seconds: float, eta: float) -> Progress:
        plan = self.plan
        name = plan.names[turn.batch] if plan.names else ""
        return Progress(turn.batch + 1, plan.num_batches, turn.end, plan.steps, loss, seconds, eta, name)

    # --- checkpoints ---

    def _identity(self) -> str:
        settings, arrays = self.origin()
        key = jax.random.key_data(self.key).tolist()
        return " ".join(map(str, (*settings, key, self.plan.chunk, fingerprint(arrays))))

    def _save(self, checkpoint: Checkpoint) -> None:
        facts = {"position": self.position, "best": self.best, "stopped": sorted(self.stopped), **self.facts()}
        checkpoint.save(self.work, **facts)

    def _restore(self, checkpoint: Checkpoint) -> None:
        loaded = checkpoint.load(self.template)
        if loaded is None:
            return
        self.work, facts = loaded
        self.position, self.stopped = facts["position"], set(facts["stopped"])
        self.best = {int(batch): (loss, step) for batch, (loss, step) in facts["best"].items()}
        self.resume(facts)


def largest_divisor(chunk: int, *lengths: int) -> int:
    """The longest chunk, at most `chunk`, that divides every length: each stage compiles once.

    >>> largest_divisor(50, 300), largest_divisor(50, 100, 30)
    (50, 10)
    """
    return max(c for c in range(1, chunk + 1) if all(n % c == 0 for n in lengths))
