"""The smallest network that is still as good as asked for."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import check_field, check_fields, is_non_negative
from dfq_jax.graph import Graph
from dfq_jax.recipes.bits import Outcome, allocated, allocator_of
from dfq_jax.recipes.images import TARGET
from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.recipe import Recipe
from dfq_jax.recipes.steps import Around, Work, run_steps
from dfq_jax.report import packed_size
from dfq_jax.stages import Budget, Comparison, Convention, choices_within

SIZES = 25  # from 2 to 8 bits of a weight on average: a quarter of a bit apart
NARROW = 4  # so many sizes below the smallest that is met without them, the steps that learn are tried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """How good a network has to be, on images made from the float one that nothing is fitted to or chosen by.

    >>> Target(agreement=99.0).describe()
    'agreement of at least 99 %'

    Attributes:
      agreement: least percent of the images that keep the class that the float network puts them in.
      divergence: the most, as in `Comparison`; it says more than so few classes do, and is there without classes.
      num_images: how many. They have a key of their own, and the source of those that the recipe judges on. A recipe
        that makes none, as "instant", has them made for this alone. Images that are given to `quantize` take their
        place: those that steps are judged on, or all where there are none.
    """

    agreement: float | None = None
    divergence: float | None = None
    num_images: int = 128

    def __post_init__(self) -> None:
        if (self.agreement is None) == (self.divergence is None):
            raise ValueError(
                f"target: expected an agreement or a divergence, found {self.agreement!r} and {self.divergence!r}."
            )
        if self.agreement is not None:
            wanted = "a percentage above 0 and up to 100"
            check_field("agreement", self.agreement, wanted, lambda v: is_non_negative(v) and 0 < v <= 100)
        else:
            check_fields(self, "a positive number", "divergence")
        check_fields(self, "an integer of at least 1", "num_images")

    def check(self, graph: Graph, images: Any) -> None:
        """Refuse a network that the target means nothing for.

        Raises:
          ValueError: it gives no class scores, or there are neither images nor BatchNorms to make them from.
        """
        if self.agreement is not None and graph.num_classes < 2:
            raise ValueError("agreement: expected a divergence in its place, as the network gives no class scores.")
        if images is None and not graph.batch_norms:
            raise ValueError("target: expected images=..., as the network has no BatchNorm to make images from.")

    def describe(self) -> str:
        """In words."""
        if self.agreement is not None:
            return f"agreement of at least {self.agreement:g} %"
        return f"divergence of at most {self.divergence:g}"

    def shortfall(self, found: Comparison) -> float:
        """By how much a network misses it; it is met by 0 and less."""
        return self.agreement - found.agreement if self.agreement is not None else found.divergence - self.divergence


class Trial(NamedTuple):
    """A network of one size.

    Attributes:
      work: with the convention that has its bits.
      candidate: the network.
      compared: with the float one, on the target's images.
      weight_bytes: of all its variables, as they are stored.
      shortfall: by how much it misses the target.
    """

    work: Work
    candidate: Candidate
    compared: Comparison
    weight_bytes: int
    shortfall: float

    @property
    def met(self) -> bool:
        """Whether it is as good as asked for."""
        return self.shortfall <= 0

    @property
    def rank(self) -> tuple[float, ...]:
        """The least is best: of those that meet the target the smallest, of others the one that misses it by least."""
        return (0, self.weight_bytes, self.shortfall) if self.met else (1, self.shortfall, self.weight_bytes)


def smallest(work: Work, target: Target, given: Float[Array, "n ..."] | None, around: Around) -> Outcome:
    """The smallest network found that meets a target, or else the one that misses it by least.

    Sensitivity is measured once. Sizes are a quarter of a bit of a weight apart, from all weights at 2 bits to all at
    8, and bits are allocated within the bytes of a size; those of activations are the convention's. The first search is
    by the recipe without the steps that learn, by bisection. Where the recipe has such steps, a second one by all of it
    goes through that size and the few below, or through the largest ones if the first found none.

    Args:
      work: what is to be quantized.
      target: how good it has to be.
      given: images that were given to `quantize`, if any.
      around: as for `run_steps`.

    Returns:
      The network.
    """
    search = _Search(work, target, given, around)
    cheap, last = dataclasses.replace(work.recipe, reconstruction=None, finetune=None), len(search.sizes) - 1
    place = search.bisect(cheap, 0, last)
    if cheap != work.recipe:
        if place is not None:
            search.bisect(work.recipe, max(0, place - NARROW), place)
        elif search.attempt(work.recipe, last).met:
            search.bisect(work.recipe, max(0, last - NARROW), last - 1)
    return search.result()


class _Search:
    """Sizes tried, and the best network of them."""

    def __init__(self, work: Work, target: Target, given: Float[Array, "n ..."] | None, around: Around):
        self.work, self.target, self.around = work, target, around
        with around("images"):
            images, self.measured_on = _images(work, target, given)
        self.judge = dataclasses.replace(work.judge, images=images)
        with around("budget"):
            self.costs, self.allocate = allocator_of(work)
        self.sizes = sorted({int(size) for size in np.linspace(*_extremes(work.graph, work.convention), SIZES)})
        self.best: Trial | None = None
        self.tried: list[str] = []

    def bisect(self, recipe: Recipe, low: int, high: int) -> int | None:
        """The smallest place in the sizes that meets the target, if larger networks are better."""
        found = None
        while low <= high:
            middle = (low + high) // 2
            if self.attempt(recipe, middle).met:
                found, high = middle, middle - 1
            else:
                low = middle + 1
        return found

    def attempt(self, recipe: Recipe, place: int) -> Trial:
        """The network of a size by a recipe."""
        with self.around("budget"):
            allocation = self.allocate(Budget(weight_bytes=self.sizes[place]))
        # Blocks are not kept in files: those of one size are of no use for the next.
        work, start = allocated(dataclasses.replace(self.work, recipe=recipe, checkpoint=None), allocation)
        candidate = run_steps(work, start, self.around)
        with self.around("target"):
            compared = self.judge.compare(candidate)
        size = packed_size(work.graph.leaves(candidate.quantized))["quantized"]
        trial = Trial(work, candidate, compared, size, self.target.shortfall(compared))
        how = "" if recipe == self.work.recipe else " without the steps that learn"
        self.tried.append(f"target: {size} bytes{how}: {_measured(compared)}, {'met' if trial.met else 'missed'}")
        self.best = trial if self.best is None else min(self.best, trial, key=lambda t: t.rank)
        return trial

    def result(self) -> Outcome:
        """As `smallest` gives it."""
        best, target = self.best, self.target
        candidate = dataclasses.replace(best.candidate, decisions=(*self.tried, *best.candidate.decisions))
        facts = {
            "asked": {name: value for name, value in dataclasses.asdict(target).items() if value is not None},
            "met": best.met,
            "weight_bytes": best.weight_bytes,
            "found": dataclasses.asdict(best.compared),
            "text": f"{target.describe()}: {'met' if best.met else 'NOT MET'}, {_measured(best.compared)} with "
            f"{best.weight_bytes} bytes (on {self.measured_on})",
        }
        return Outcome(dataclasses.replace(self.work, convention=best.work.convention), candidate, self.costs, facts)


def _measured(compared: Comparison) -> str:
    agreement = "" if compared.agreement is None else f"agreement {compared.agreement:.2f} %, "
    return f"{agreement}divergence {compared.divergence:.3g}"


def _images(work: Work, target: Target, given: Float[Array, "n ..."] | None) -> tuple[Any, str]:
    """The images that a target is measured on, and what they are."""
    if given is not None:
        images = work.images.held_out if work.judge.has_images else work.images.images
        return images, f"{len(images)} of the images given"
    count, source = target.num_images, work.recipe.judge_source or work.recipe.synthesis.source
    return work.make_images(TARGET, count, source), f"{count} images of the source {source!r} of their own"


def _extremes(graph: Graph, convention: Convention) -> tuple[float, float]:
    """Bytes of the smallest and of the largest network."""
    choices = choices_within(graph, Budget(weight_bytes=sys.maxsize), convention)
    (limit,) = choices.limits
    least, most = ({part: end(widths) for part, widths in choices.options.items()} for end in (min, max))
    return limit.used(least), limit.used(most)
