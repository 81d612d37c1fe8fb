"""Several optimizations as one: their batches side by side where cores are idle, one progress, one checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from jaxtyping import Array

from dfq_jax.base.loop import Loop, Turn

__all__ = ["Together"]


class Together(Loop):
    """The batches of several loops, which do not need each other: those of the first loop first.

    What each loop makes of its batches is the same, bit for bit, as if it ran alone; its `work` says what that is.

    Attributes:
      parts: the loops, of as many steps each; how they watch for plateaus is the first one's.
    """

    def __init__(self, parts: Sequence[Loop], *, lanes: int = 1):
        plans = [part.plan for part in parts]
        total = sum(plan.num_batches for plan in plans)
        super().__init__(dataclasses.replace(plans[0], num_batches=total, lanes=lanes), parts[0].key, parts[0].mesh)
        self.parts = tuple(parts)
        self._places = [(i, batch) for i, plan in enumerate(plans) for batch in range(plan.num_batches)]

    def program(self, batch: int) -> Hashable:
        """By the batch's own loop."""
        part, own = self._own(batch)
        return part.program(own)

    def turn(self, batch: int, begin: int) -> Turn:
        """By the batch's own loop."""
        part, own = self._own(batch)
        return part.turn(own, begin)._replace(batch=batch)

    def timed(self, batch: int, steps: int, seconds: float) -> None:
        """By the batch's own loop."""
        part, own = self._own(batch)
        part.timed(own, steps, seconds)

    def begin(self, batch: int) -> Any:
        """By the batch's own loop."""
        part, own = self._own(batch)
        part.work[own] = part.begin(own)
        return part.work[own]

    def place(self, batch: int, work: Any) -> Any:
        """By the batch's own loop."""
        part, own = self._own(batch)
        return part.place(own, work)

    def prepare(self, turn: Turn, work: Any) -> Any:
        """By the batch's own loop."""
        part, own = self._own(turn.batch)
        part.work[own] = part.prepare(turn._replace(batch=own), work)
        return part.work[own]

    def advance(self, turn: Turn, work: Any) -> tuple[Any, Array]:
        """By the batch's own loop."""
        part, own = self._own(turn.batch)
        part.work[own], loss = part.advance(turn._replace(batch=own), work)
        return part.work[own], loss

    def check(self, turn: Turn, loss: float) -> None:
        """By the batch's own loop."""
        part, own = self._own(turn.batch)
        part.check(turn._replace(batch=own), loss)

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        """Those of all loops."""
        return tuple(part.identity() for part in self.parts), ()

    def resume(self, facts: dict[str, Any]) -> None:
        """Give each loop its work."""
        for batch, work in self.work.items():
            part, own = self._own(batch)
            part.work[own] = work

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        """By the batch's own loop."""
        part, own = self._own(batch)
        return part.template(own, facts)

    def _own(self, batch: int) -> tuple[Loop, int]:
        """The loop that a batch is of, and its number there."""
        place, own = self._places[batch]
        return self.parts[place], own
