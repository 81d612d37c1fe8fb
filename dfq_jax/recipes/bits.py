"""Bits layer by layer, for what a call of `quantize` works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.steps import Work
from dfq_jax.stages import Allocation, Budget, allocator, enough_images, sensitivity


def allocator_of(work: Work) -> Callable[[Budget], Allocation]:
    """`allocate` for any budget: by images that steps are fitted to, refined on those held out."""
    graph, images, convention = work.graph, work.images, work.convention
    count, fitted, judging = enough_images(graph), None, None
    if not images.analytic:
        fitted = images.fitted[:count]
        judging = images.held_out[:count] if len(images.held_out) else fitted
    settings: Any = {
        "convention": convention,
        "estimator": work.recipe.estimator,
        "on_progress": work.on_progress,
    }
    found = sensitivity(graph, work.variables, fitted, **settings)
    return allocator(graph, work.variables, found, judging, **settings)


def allocated(work: Work, allocation: Allocation) -> Candidate:
    """What steps begin with, of a network with these bits."""
    decisions = tuple(f"bits by layer: {decision}" for decision in allocation.decisions)
    return Candidate(variables=work.variables, decisions=decisions)
