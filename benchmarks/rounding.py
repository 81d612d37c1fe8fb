"""Rounding x bits on a CIFAR-10 ResNet: nearest, SQuant and GPTQ, without images and with synthetic ones.

    python benchmarks/rounding.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Two tables, of the drop of top-1 on `--data` and the agreement with the float network over `--data` and `--more`
together: `instant`, which sees no image (ranges, GPTQ's inputs and the correction of BatchNorm come from BatchNorm
parameters), and `fast`, mean over keys and in brackets the spread (largest minus smallest). Labels are used for the
printed drop alone: nothing is chosen by them here. `--cache` keeps the images of each key in a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from network import Network, add_arguments

from dfq_jax import (
    ESTIMATORS,
    Convention,
    adapt_batch_norm,
    analytic_correction,
    analytic_summaries,
    correct_bias,
    gptq,
    gptq_from_noise,
    quantize_params,
    squant,
    summarize,
    synthesize,
)
from dfq_jax.recipes.recipe import RECIPES
from dfq_jax.stages.ranges import apply_estimator

ROUNDINGS = ("nearest", "squant", "gptq")
Score = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4", "w3a3", "w2a4"])
    parser.add_argument("--edges", nargs="+", default=["8", "all"], help="edge bits; all: as every layer")
    parser.add_argument("--keys", type=int, nargs="*", default=[0, 1, 2], help="of the synthetic images; none: instant")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--no-instant", action="store_true")
    arguments = parser.parse_args()

    bench = Bench(arguments)
    print(bench)
    rows = [
        Convention.parse(bits, edge_bits=None if edge == "all" else int(edge))
        for bits in arguments.bits
        for edge in arguments.edges
        if (bits, edge) != ("w8a8", "all")  # all bits are 8 in either row
    ]
    if not arguments.no_instant:
        table("instant", rows, bench.instant)
    if arguments.keys:
        images = {key: bench.synthesize(key) for key in arguments.keys}
        summaries = {key: summarize(bench.graph, bench.variables, x) for key, x in images.items()}
        print(f"\n{arguments.images} images, {arguments.steps} steps, keys {arguments.keys}")
        table("fast", rows, lambda c: np.stack([bench.fast(c, images[k], summaries[k]) for k in images]))


def table(title: str, rows: list[Convention], scores: Callable[[Convention], np.ndarray]) -> None:
    """Rows are printed as they come."""
    print(f"\n{title}: drop of top-1 / agreement")
    print(" | ".join([" " * 14, *(name.ljust(28) for name in ROUNDINGS)]))
    for convention in rows:
        found = np.asarray(scores(convention)).reshape(-1, len(ROUNDINGS), 2)
        name = f"{convention.name} edges {convention.edge_bits or 'all'}"
        cells = [format_cell(found[:, column]).ljust(28) for column in range(len(ROUNDINGS))]
        print(" | ".join([name.ljust(14), *cells]), flush=True)


def format_cell(scores: np.ndarray) -> str:
    (drop, agreement), spread = scores.mean(0), np.ptp(scores, axis=0)
    if len(scores) == 1:
        return f"{drop:.2f} / {agreement:.2f}"
    return f"{drop:.2f} ({spread[0]:.2f}) / {agreement:.2f} ({spread[1]:.2f})"


class Bench(Network):
    """The network, and what the two tables do to it."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.arguments = arguments

    def drop(self, qvariables: Any) -> Score:
        top1, agreement = self.score(qvariables)
        return self.float_top1 - top1, agreement

    def synthesize(self, key: int) -> jax.Array:
        size = {"synthesis_num_images": self.arguments.images, "synthesis_steps": self.arguments.steps}
        cache = self.arguments.cache and self.arguments.cache / f"{self.arguments.model}_{key}.npy"
        if cache and cache.exists():
            return jnp.asarray(np.load(cache))
        config = RECIPES["fast"].replace(**size).synthesis
        images = synthesize(self.graph, self.variables, jax.random.key(key), config).images
        if cache:
            np.save(cache, np.asarray(images))
        return images

    def round(self, qvariables: Any, through: Callable[[Any], Any]) -> dict[str, Any]:
        """The roundings; GPTQ as given."""
        better = squant(self.graph, self.variables, qvariables)
        return dict(zip(ROUNDINGS, (qvariables, better, through(qvariables)), strict=True))

    def quantize(self, convention: Convention, summaries: Any) -> Any:
        ranges = apply_estimator(self.graph, summaries, convention, ESTIMATORS["lp"])
        return quantize_params(self.graph, self.variables, ranges, convention)

    def instant(self, convention: Convention) -> list[Score]:
        qvariables = self.quantize(convention, analytic_summaries(self.graph, self.variables, convention))
        rounded = self.round(qvariables, lambda q: gptq_from_noise(self.graph, self.variables, q))
        return [self.drop(analytic_correction(self.graph, self.variables, q)) for q in rounded.values()]

    def fast(self, convention: Convention, images: jax.Array, summaries: Any) -> list[Score]:
        rounded = self.round(
            self.quantize(convention, summaries), lambda q: gptq(self.graph, self.variables, q, images)
        )
        scores = []
        for qvariables in rounded.values():
            adapted = adapt_batch_norm(self.graph, self.variables, qvariables, images)
            scores.append(self.drop(correct_bias(self.graph, self.variables, adapted, images, normalized=False)))
        return scores


if __name__ == "__main__":
    main()
