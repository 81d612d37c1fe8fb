"""Who decides between two candidates: their divergence from the float network, on what neither was fitted to.

There are two measures, and each is fooled by its own kind. Images held out flatter what was fitted to images of the
same synthesis. Noise of the moments that BatchNorms promise flatters what was derived from those moments, and knows
nothing of how channels and pixels go together, which adaptation to images makes use of. So of what is not fitted to
outputs on images (equalization, rounding, ranges) both are asked: what lowers one divergence by a share may raise the
other by no more than that. Of what is, images held out alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from dfq_jax.graph import Graph
from dfq_jax.stages import Comparison, Ranges, analytic_comparison, comparer

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
      divergences: from the float network, as far as they are known, by the names of `Judge.measures`.
    """

    variables: Any
    ranges: Ranges | None = None
    quantized: Any = None
    decisions: tuple[str, ...] = ()
    divergences: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def networks(self) -> tuple[Any, Any]:
        """Float and quantized variables."""
        return self.variables, self.quantized

    def moved(self, quantized: Any) -> Candidate:
        """With other quantized variables, not judged yet."""
        return dataclasses.replace(self, quantized=quantized, divergences={})

    def noting(self, decision: str) -> Candidate:
        """With one more decision."""
        return dataclasses.replace(self, decisions=(*self.decisions, decision))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """The lower divergence wins; of several, the lower geometric mean.

    Attributes:
      graph: of the network.
      variables: float ones.
      images: held out of those that steps are fitted to; maybe none.
      analytic: BatchNorm parameters take the place of images.
      batch_size: images in one pass of the network.
      noise: whether noise is asked, too, where there are images.
    """

    graph: Graph
    variables: Any
    images: Any
    analytic: bool
    batch_size: int
    noise: bool = True

    @property
    def has_images(self) -> bool:
        """Whether any are held out."""
        return len(self.images) > 0

    @property
    def measures(self) -> dict[str, Callable[[Candidate], Comparison]]:
        """How a candidate is compared with the float network, by what it is called in reports."""
        known: dict[str, Callable[[Candidate], Comparison]] = {}
        if self.has_images and not self.analytic:
            known["held-out divergence"] = self.on_images
        if self.graph.batch_norms and (self.noise or not known):
            known[f"divergence on {MOMENT_NOISE}"] = self.on_noise
        return known

    def on_images(self, candidate: Candidate) -> Comparison:
        """On the images held out."""
        return self._images(candidate.quantized)

    def on_noise(self, candidate: Candidate) -> Comparison:
        """On noise behind each BatchNorm."""
        return analytic_comparison(self.graph, *candidate.networks)

    def consider(self, name: str, current: Candidate, quantized: Any) -> Candidate:
        """The candidate with other quantized variables, unless they are worse; without images they are taken."""
        other = current.moved(quantized)
        return self.choose(name, current, other) if self.has_images else other.noting(name)

    def choose(self, name: str, current: Candidate, other: Candidate) -> Candidate:
        """The one of less divergence."""
        current, other = self._seen(current), self._seen(other)
        pairs = [(current.divergences[measure], other.divergences[measure]) for measure in self.measures]
        change = math.prod(max(after, LEAST) / max(before, LEAST) for before, after in pairs) ** (1 / len(pairs))
        taken, verdict = (other, "kept") if change <= self._most else (current, "dropped")
        words = [f"{m} {b:.4g} -> {a:.4g}" for m, (b, a) in zip(self.measures, pairs, strict=True)]
        taken = dataclasses.replace(taken, decisions=current.decisions)  # what was tried before, whatever came of it
        return taken.noting(f"{name}: {verdict}, {', '.join(words)}")

    @property
    def _most(self) -> float:
        """The change of divergence that a candidate is taken with."""
        return 1 if self.has_images else 1 - LEAST_GAIN_ON_NOISE

    @functools.cached_property
    def _images(self) -> Callable[[Any], Comparison]:
        return comparer(self.graph, self.variables, self.images, batch_size=self.batch_size)

    def _seen(self, candidate: Candidate) -> Candidate:
        """With the divergences by all measures."""
        found = dict(candidate.divergences)
        for name, measure in self.measures.items():
            if name not in found:
                found[name] = measure(candidate).divergence
        return dataclasses.replace(candidate, divergences=found)
