"""Who decides between two candidates: their divergence from the float network, on what neither was fitted to."""

from __future__ import annotations

import dataclasses
from typing import Any

from dfq_jax.graph import Graph
from dfq_jax.stages import Comparison, Ranges, analytic_comparison, compare

# Noise is not data: where it is the judge, a smaller gain than this share of the divergence decides nothing.
LEAST_GAIN_ON_NOISE = 0.1
MOMENT_NOISE = "noise of the moments that BatchNorms promise"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A network on its way from float to quantized.

    Attributes:
      variables: float ones; once weight ranges are equalized, another tree of the same function.
      ranges: of activations, once they are known.
      quantized: quantized variables, once there are any.
      rival: with the nearest codes, where the candidate's are others and nothing is decided yet.
      decisions: on the way, in the report's words.
      divergence: from the float network, once the judge has found it.
    """

    variables: Any
    ranges: Ranges | None = None
    quantized: Any = None
    rival: Candidate | None = None
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
      images: held out of those that steps are fitted to; maybe none.
      analytic: BatchNorm parameters take the place of images.
      batch_size: images in one pass of the network.
    """

    graph: Graph
    images: Any
    analytic: bool
    batch_size: int

    @property
    def has_images(self) -> bool:
        """Whether any are held out."""
        return len(self.images) > 0

    def consider(self, name: str, current: Candidate, quantized: Any) -> Candidate:
        """The candidate with other quantized variables, unless they are worse on images; without any they are taken."""
        other = current.moved(quantized)
        return self.choose(name, current, other) if self.has_images else other.noting(name)

    def choose(self, name: str, current: Candidate, other: Candidate) -> Candidate:
        """The one of less divergence, on images, or without them on noise of the moments behind BatchNorms."""
        current, other = self._seen(current), self._seen(other)
        most = current.divergence * (1 if self.has_images else 1 - LEAST_GAIN_ON_NOISE)
        taken, verdict = (other, "kept") if other.divergence <= most else (current, "dropped")
        measure = "held-out divergence" if self.has_images else f"divergence on {MOMENT_NOISE}"
        return taken.noting(f"{name}: {verdict}, {measure} {current.divergence:.4g} -> {other.divergence:.4g}")

    def _seen(self, candidate: Candidate) -> Candidate:
        if candidate.divergence is not None:
            return candidate
        return dataclasses.replace(candidate, divergence=self.compare(candidate).divergence)

    def compare(self, candidate: Candidate) -> Comparison:
        """With the float network."""
        if self.analytic or not self.has_images:
            return analytic_comparison(self.graph, *candidate.networks)
        return compare(self.graph, *candidate.networks, self.images, batch_size=self.batch_size)
