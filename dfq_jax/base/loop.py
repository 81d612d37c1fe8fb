"""The loop around compiled steps, the same for images, blocks and whole networks.

Between two compiled calls it does what only the host can do: show progress, notice a loss that is not finite, stop
early, save a checkpoint, and end on Ctrl-C. The device does not wait for it: a loss is read when the next call is on
its way already, and what all calls have in common is on the device before the first one. Batches that do not need each
other may take their calls side by side: on CPU one call leaves much of a second core idle, and calls from two threads
overlap. Threads only call what is compiled: they meet after each call, and all else happens in the caller's thread.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from dfq_jax.base.checkpoint import Checkpoint, fingerprint
from dfq_jax.base.devices import agreed, on_all, spans_processes
from dfq_jax.base.interrupt import catch_interrupt
from dfq_jax.base.precision import products
from dfq_jax.base.threads import side_by_side

CHECKPOINT_EVERY_SECONDS = 15.0
CALL_SECONDS = 0.5  # of a compiled call on accelerators: long against its dispatch, short for who waits for a report


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
      done: steps that all batches have seen together, of `num_batches * steps`; those left out count as seen.
      name: of the block; batches of images have none.
    """

    batch: int
    num_batches: int
    step: int
    steps: int
    loss: float
    seconds: float
    eta: float
    done: int
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
      chunk: steps in one compiled call; the last one takes what is left.
      seconds: that a call is to take: after the first ones their number of steps follows from the time that they took.
        For work that comes out the same wherever calls end, in one process; 0 for `chunk` steps in each.
      boundary: a step at which something else begins to be optimized: a call ends there, and what came before says
        nothing about a plateau.
      in_turn: go on to the next batch after each call.
      lanes: batches that take their calls side by side, in threads; for those that do not need each other. With a mesh
        they take them one after the other: programs of several devices have to begin everywhere in the same order.
      report_every: steps between two reports to the host, which must wait for the device for each of them.
      patience: stop a batch when its loss has not improved by `min_improvement` (relative) in so many steps; 0 never.
        Then each call waits for the loss of the one before it.
      min_improvement: see `patience`.
      names: of the batches, for reports.

    >>> plan = Plan(num_batches=2, steps=25, chunk=10, boundary=12)
    >>> [plan.turn(1, begin).end for begin in (0, 10, 12, 22)]
    [10, 12, 22, 25]
    """

    num_batches: int
    steps: int
    chunk: int
    seconds: float = 0.0
    boundary: int = 0
    in_turn: bool = False
    lanes: int = 1
    report_every: int = 10
    patience: int = 0
    min_improvement: float = 0.0
    names: tuple[str, ...] = ()

    def turn(self, batch: int, begin: int, chunk: int | None = None) -> Turn:
        """The compiled call of a batch that has seen `begin` steps; `chunk` in place of the plan's if given."""
        end = min(begin + (self.chunk if chunk is None else chunk), self.steps)
        return Turn(batch, begin, self.boundary if begin < self.boundary < end else end)

    def reports(self, turn: Turn) -> bool:
        """Whether a call is followed by a report."""
        return turn.begin // self.report_every < turn.end // self.report_every or turn.end == self.steps


class _Read(NamedTuple):
    """A loss that was read."""

    batch: int
    step: int
    at: float  # in seconds of `time.perf_counter`


class Loop:
    """One optimization. What is optimized, and by which compiled function, is a subclass's.

    Attributes:
      plan: in which order.
      key: that all keys are folded from.
      work: by batch, what its compiled calls made of it so far: a pytree of arrays.
      compiled: the programs that threads find compiled.
      seen: by batch, the steps that it has seen.
      best: by batch, its lowest loss and the step of that.
      stopped: batches that reached a plateau.
      chunk: steps in the next compiled call.
      mesh: of the devices that the work lies on; None for one device.
      started: when, in seconds of `time.perf_counter`.
    """

    def __init__(self, plan: Plan, key: Key[Array, ""], mesh: Mesh | None = None):
        self.plan, self.key, self.mesh, self.started = plan, key, mesh, time.perf_counter()
        self.work: dict[int, Any] = {}
        self.compiled: set[Hashable] = set()
        self.seen = dict.fromkeys(range(plan.num_batches), 0)
        self.best: dict[int, tuple[float, int]] = {}
        self.stopped: set[int] = set()
        self.chunk = plan.chunk
        self._lengths: dict[int, Array] = {}

    # --- what a subclass says ---

    def begin(self, batch: int) -> Any:
        """The work on a batch before its first step."""
        raise NotImplementedError

    def place(self, batch: int, work: Any) -> Any:
        """The work on a batch, as it was saved, on the devices that it lies on."""
        return on_all(work, self.mesh)

    def prepare(self, turn: Turn, work: Any) -> Any:
        """The work on a batch with what is known only when a compiled call is about to begin."""
        return work

    def advance(self, turn: Turn, work: Any) -> tuple[Any, Array]:
        """The work after one more compiled call, to which `work` may be donated, and the loss of the last step.

        Where the plan has several lanes it runs in threads, and must take a call of no steps: that compiles.
        """
        raise NotImplementedError

    def program(self, batch: int) -> Hashable:
        """What tells the compiled function that works on a batch from others; by default it is one for all."""
        return None

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

    def turn(self, batch: int, begin: int) -> Turn:
        """The compiled call of a batch that has seen `begin` steps."""
        return self.plan.turn(batch, begin, self.chunk)

    def timed(self, batch: int, steps: int, seconds: float) -> None:
        """So many steps of a batch took so long: the next calls have the number that the plan has time for."""
        if self.plan.seconds and not spans_processes(self.mesh):  # of several processes all have to choose the same
            fitting = round(steps * self.plan.seconds / max(seconds, 1e-6))
            self.chunk = max(min(fitting, 2 * self.chunk), self.chunk // 2, 1)

    def length(self, turn: Turn) -> Int[Array, ""]:
        """The steps of a call, on the devices: a number of the host's would travel there at each call."""
        steps = turn.end - turn.begin
        if steps not in self._lengths:
            with jax.ensure_compile_time_eval():  # also where only shapes are asked for
                self._lengths[steps] = on_all(jnp.int32(steps), self.mesh)
        return self._lengths[steps]

    # --- the loop ---

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        checkpoint: str | Path | None = None,
        keep_checkpoint: bool = False,
        precision: str | None = None,
    ) -> bool:
        """Do the work, from where a checkpoint left it; whether it came to its end.

        Ctrl-C ends it after the compiled calls in progress, and saves; the second one raises. If these were the last
        ones, it has not come to its end either: who goes on after it has to know.
        """
        saved = None if checkpoint is None else Checkpoint(checkpoint, self.identity(), self.mesh)
        if saved is not None:
            self._restore(saved)
        first, begun = self.done, time.perf_counter()
        last_save, last_read, unread = begun, _Read(-1, 0, begun), list[tuple[Turn, Array]]()

        def read(ahead: int = 0, *, shown: bool = True) -> list[Turn]:
            """Read and report what calls ended with, while steps ahead of them are on their way; those reported."""
            nonlocal last_read
            ended, reported = [*unread], list[Turn]()
            unread.clear()
            for turn, latest in ended:
                if not self.plan.reports(turn):
                    continue
                loss = float(latest)
                last, last_read = last_read, _Read(turn.batch, turn.end, time.perf_counter())
                if last.batch == turn.batch:  # what is between two batches takes other time
                    self.timed(turn.batch, turn.end - last.step, last_read.at - last.at)
                self._watch(turn, loss)
                reported.append(turn)
                done = self.done - ahead
                eta = (last_read.at - begun) / (done - first) * (self.plan.num_batches * self.plan.steps - done)
                if on_progress is not None and shown:
                    on_progress(self._progress(turn, loss, last_read.at - self.started, eta, done))
            return reported

        stop = False
        with products(precision), catch_interrupt() as interrupted:
            while waiting := self.waiting():
                lanes = self.plan.lanes if self.mesh is None else 1
                turns = [self.turn(batch, self.seen[batch]) for batch in waiting[:lanes]]
                losses = self._visit(turns)
                self.seen.update({turn.batch: turn.end for turn in turns})
                reported = read(ahead=sum(turn.end - turn.begin for turn in turns))
                unread += zip(turns, losses, strict=True)
                if len(turns) > 1 or self.plan.patience:  # threads have waited, and a plateau is an end
                    reported += read()
                due = saved is not None and time.perf_counter() - last_save > CHECKPOINT_EVERY_SECONDS
                stop, due = self._agreed(reported, interrupted(), due)
                if saved is not None and (stop or due):
                    read(shown=not stop)  # who has pressed Ctrl-C waits for the file alone
                    self._save(saved)
                    last_save = time.perf_counter()
                    last_read = last_read._replace(batch=-1)  # and this is no part of the next call's time
                if stop:
                    break
            read(shown=not stop)
        completed = not stop
        if saved is not None and completed:
            self._save(saved) if keep_checkpoint else saved.remove()
        return completed

    def waiting(self) -> list[int]:
        """The batches that are not finished, that whose turn it is first."""
        batches = [b for b, seen in self.seen.items() if seen < self.plan.steps and b not in self.stopped]
        return sorted(batches, key=self.seen.__getitem__) if self.plan.in_turn else batches

    @property
    def done(self) -> int:
        """Steps that all batches have seen together; those of a batch that stopped count as seen."""
        return sum(self.plan.steps if batch in self.stopped else seen for batch, seen in self.seen.items())

    def _visit(self, turns: list[Turn]) -> list[Array]:
        """Make calls side by side; the losses of their last steps."""
        for turn in turns:
            if turn.batch not in self.work:
                self.work[turn.batch] = self.begin(turn.batch)
            self.work[turn.batch] = self.prepare(turn, self.work[turn.batch])
        if len(turns) == 1:
            return list(map(self._call, turns))
        # Once, for all threads: two of them may not compile the same program at once.
        new = {self.program(turn.batch): turn._replace(end=turn.begin) for turn in turns}
        new = {program: turn for program, turn in new.items() if program not in self.compiled}
        side_by_side(self._call, list(new.values()), self.plan.lanes)
        self.compiled.update(new)
        return side_by_side(lambda turn: jax.block_until_ready(self._call(turn)), turns, self.plan.lanes)

    def _call(self, turn: Turn) -> Array:
        self.work[turn.batch], loss = self.advance(turn, self.work[turn.batch])
        return loss

    def _watch(self, turn: Turn, loss: float) -> None:
        """Notice a loss that is not finite, and plateaus."""
        self.check(turn, loss)
        if not self.plan.patience or turn.end <= self.plan.boundary:
            return
        lowest, at = self.best.get(turn.batch, (math.inf, turn.end))
        if loss < lowest * (1 - self.plan.min_improvement):
            self.best[turn.batch] = (loss, turn.end)
        elif turn.end - at >= self.plan.patience:
            self.stopped.add(turn.batch)

    def _progress(self, turn: Turn, loss: float, seconds: float, eta: float, done: int) -> Progress:
        plan = self.plan
        name = plan.names[turn.batch] if plan.names else ""
        return Progress(turn.batch + 1, plan.num_batches, turn.end, plan.steps, loss, seconds, eta, done, name)

    def _agreed(self, reported: list[Turn], *flags: bool) -> tuple[bool, ...]:
        """Flags that any process has set; several processes ask each other only when they waited for the device anyway.

        A flag that is set between two reports is still set at the next one.
        """
        if not spans_processes(self.mesh):
            return flags
        return agreed(flags, self.mesh) if reported else (False,) * len(flags)

    # --- checkpoints ---

    def identity(self) -> str:
        """What a checkpoint must have been made for."""
        settings, arrays = self.origin()
        key = jax.random.key_data(self.key).tolist()
        return " ".join(map(str, (*settings, key, self.plan.chunk, fingerprint(arrays))))

    def _save(self, checkpoint: Checkpoint) -> None:
        facts = {"seen": self.seen, "best": self.best, "stopped": sorted(self.stopped), **self.facts()}
        checkpoint.save(self.work, **facts)

    def _restore(self, checkpoint: Checkpoint) -> None:
        loaded = checkpoint.load(self.template)
        if loaded is None:
            return
        work, facts = loaded
        self.work = {batch: self.place(batch, saved) for batch, saved in work.items()}
        self.seen = {int(batch): steps for batch, steps in facts["seen"].items()}
        self.stopped = set(facts["stopped"])
        self.best = {int(batch): (loss, step) for batch, (loss, step) in facts["best"].items()}
        self.resume(facts)
