"""Bits layer by layer, for what a call of `quantize` works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from dfq_jax.recipes.images import BITS
from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.steps import Work
from dfq_jax.stages import Allocation, Budget, Sensitivity, allocator, enough_images, sensitivity


class Outcome(NamedTuple):
    """A quantized network, and how it came about.

    Attributes:
      work: with the convention that has its bits.
      network: the network.
      costs: what layers cost, if bits were chosen.
      target: what the report says of a target, if there was one.
    """

    work: Work
    network: Candidate
    costs: Sensitivity | None = None
    target: dict[str, Any] | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is to be warned of."""
        if self.target is None or self.target["met"]:
            return ()
        return (f"the target is out of reach of all sizes that were tried: {self.target['text']}.",)


def allocator_of(work: Work) -> tuple[Sensitivity, Callable[[Budget], Allocation]]:
    """What layers cost, by images that steps are fitted to, and `allocate`, refined on those held out.

    A recipe that makes no images has some made for this: by noise of the moments that BatchNorms promise alone, bits
    are chosen that are worse than uniform ones (a CIFAR ResNet-20, `benchmarks/mixed.py`).
    """
    graph, images, convention = work.graph, work.images, work.convention
    count = enough_images(graph)
    if images.analytic:
        made = work.make_images(BITS, 2 * count, work.recipe.synthesis.source)
        fitted, judging = made[:count], made[count:]
    else:
        fitted = images.fitted[:count]
        judging = images.held_out[:count] if len(images.held_out) else fitted
    settings: Any = {
        "convention": convention,
        "estimator": work.recipe.estimator,
        "on_progress": work.on_progress,
    }
    found = sensitivity(graph, work.variables, fitted, **settings)
    return found, allocator(graph, work.variables, found, judging, **settings)


def allocated(work: Work, allocation: Allocation) -> tuple[Work, Candidate]:
    """The work with these bits, and what its steps begin with."""
    decisions = tuple(f"bits by layer: {decision}" for decision in allocation.decisions)
    start = Candidate(variables=work.variables, decisions=decisions)
    return dataclasses.replace(work, convention=allocation.convention, begun={}), start
