"""Bits layer by layer, for what a call of `quantize` works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.steps import Work
from dfq_jax.stages import Allocation, Budget, allocator, enough_images, sensitivity


def with_costs(work: Work) -> Work:
    """The work with what each layer costs at each width, on images that steps are fitted to."""
    fitted = None if work.images.analytic else work.images.fitted[: enough_images(work.graph)]
    found = sensitivity(work.graph, work.variables, fitted, **_settings(work))
    return dataclasses.replace(work, costs=found)


def allocator_of(work: Work) -> Callable[[Budget], Allocation]:
    """`allocate` for any budget: by the costs that the work has, refined on images held out, if there are any."""
    images, count = work.images, enough_images(work.graph)
    judging = None
    if not images.analytic:
        judging = images.held_out[:count] if len(images.held_out) else images.fitted[:count]
    return allocator(work.graph, work.variables, work.costs, judging, **_settings(work))


def _settings(work: Work) -> dict[str, Any]:
    return {"convention": work.convention, "estimator": work.recipe.estimator, "on_progress": work.on_progress}


def allocated(work: Work, allocation: Allocation) -> Candidate:
    """What steps begin with, of a network with these bits."""
    decisions = tuple(f"bits by layer: {decision}" for decision in allocation.decisions)
    return Candidate(variables=work.variables, decisions=decisions)
