"""Who decides between two candidates: their divergence from the float network, on what neither was fitted to.

Those are images of another key and another source: images of the same batch flatter what was fitted to it
(`benchmarks/judge.txt`). Where there are none, it is noise of the moments that BatchNorms promise, which flatters what
was derived from those moments, and knows nothing of how channels and pixels go together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from dfq_jax.graph import Graph
from dfq_jax.stages import Comparison, Ranges, ahead, analytic_comparison, comparer

# Noise is not data: where it is the judge, a smaller gain than this share of the divergence decides nothing.
LEAST_GAIN_ON_NOISE = 0.1
LEAST = 1e-9  # divergences below it are rounding
MOMENT_NOISE = "noise of the moments that BatchNorms promise"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A network on its way from float to quantized.

    Attributes:
      variables: float ones; once weight ranges are equalized, another tree of the same function.
      ranges: of activations, once they are known.
      quantized: quantized variables, once there are any.
      decisions: on the way, in the report's words.
      divergence: from the float network, once a judge has asked.
    """

    variables: Any
    ranges: Ranges | None = None
    quantized: Any = None
    decisions: tuple[str, ...] = ()
    divergence: float | None = None

    @property
    def networks(self) -> tuple[Any, Any]:
        """Float and quantized variables."""
        return self.variables, self.quantized

    def moved(self, quantized: Any) -> Candidate:
        """With other quantized variables, not judged yet."""
        return dataclasses.replace(self, quantized=quantized, divergence=None)

    def noting(self, decision: str) -> Candidate:
        """With one more decision."""
        return dataclasses.replace(self, decisions=(*self.decisions, decision))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """The lower divergence wins.

    Attributes:
      graph: of the network.
      variables: float ones.
      images: held out of those that steps are fitted to; maybe none.
      batch_size: images in one pass of the network.
    """

    graph: Graph
    variables: Any
    images: Any
    batch_size: int

    @property
    def has_images(self) -> bool:
        """Whether any are held out."""
        return len(self.images) > 0

    @property
    def can_judge(self) -> bool:
        """Whether there is anything to judge on."""
        return self.has_images or bool(self.graph.batch_norms)

    def compare(self, candidate: Candidate) -> Comparison:
        """With the float network, on the images held out, or on noise behind each BatchNorm."""
        if self.has_images:
            return self._compared(candidate.quantized)
        return analytic_comparison(self.graph, *candidate.networks)

    def compile_ahead(self, candidate: Candidate) -> None:
        """Compile what `compare` runs on such a candidate while the caller does something else."""
        if self.has_images:
            ahead.compare(self.graph, candidate.quantized, self.images, batch_size=self.batch_size)
        elif self.can_judge:
            ahead.analytic_comparison(self.graph, *candidate.networks)

    def consider(self, name: str, current: Candidate, quantized: Any) -> Candidate:
        """The candidate with other quantized variables, unless they are worse; without images they are taken."""
        other = current.moved(quantized)
        return self.choose(name, current, other) if self.has_images else other.noting(name)

    def choose(self, name: str, current: Candidate, other: Candidate) -> Candidate:
        """The one of less divergence; where noise is the judge, less by a share of it."""
        current, other = self._seen(current), self._seen(other)
        before, after = current.divergence, other.divergence
        most = 1 if self.has_images else 1 - LEAST_GAIN_ON_NOISE
        taken, verdict = (other, "kept") if after <= most * before + LEAST else (current, "dropped")
        measure = "held-out divergence" if self.has_images else f"divergence on {MOMENT_NOISE}"
        taken = dataclasses.replace(taken, decisions=current.decisions)  # what was tried before, whatever came of it
        return taken.noting(f"{name}: {verdict}, {measure} {before:.4g} -> {after:.4g}")

    @functools.cached_property
    def _compared(self) -> Callable[[Any], Comparison]:
        return comparer(self.graph, self.variables, self.images, batch_size=self.batch_size)

    def _seen(self, candidate: Candidate) -> Candidate:
        if candidate.divergence is not None:
            return candidate
        return dataclasses.replace(candidate, divergence=self.compare(candidate).divergence)
