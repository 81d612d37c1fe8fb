"""Ranges x BatchNorm adaptation x bits on a CIFAR-10 ResNet, over several keys.

    python benchmarks/ablation.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, for each way to estimate ranges and each way to adapt BatchNorm, the top-1 accuracy on `--data`, the agreement
with the float network over `--data` and `--more` together, and the divergence from it on other synthetic images: mean
over keys, and the spread (largest minus smallest). The divergence is what there is to choose by without data; labels
are used for the printed top-1 alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from network import EDGES, Network, add_arguments

from dfq_jax import (
    BatchNormConfig,
    Convention,
    adapt_batch_norm,
    analytic_correction,
    analytic_summaries,
    quantize_params,
    summarize,
    synthesize,
)
from dfq_jax.recipes.recipe import RECIPES
from dfq_jax.stages import compare
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator

# Name of the row, which images, which estimator.
RANGES = {
    "max, Gaussian noise": ("noise", "max"),
    "max": ("matched", "max"),
    "AAC": ("responsive", "mean_peak"),
    "percentile 99.9": ("matched", "percentile"),
    "L2.4": ("matched", "lp"),
    # What each half of AAC does by itself, and what its images do for L2.4.
    "max, AAC images": ("responsive", "max"),
    "mean of peaks, matched images": ("matched", "mean_peak"),
    "L2.4, AAC images": ("responsive", "lp"),
    "L2.4, moments": ("analytic", "lp"),
}
METHODS = {
    "absolute": BatchNormConfig(method="absolute"),
    "differential": BatchNormConfig(method="differential"),
    **{f"regression {blend}": BatchNormConfig(method="regression", blend=blend) for blend in (0.0, 0.5, 1.0)},
}
# From the images that the ranges come from, or from noise of the moments that BatchNorms promise.
CORRECTIONS = {f"from moments, {name}": config for name, config in METHODS.items() if name != "absolute"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--edges", default="8", choices=EDGES, help="first and last layer")
    parser.add_argument("--shortcuts", default="float", choices=("float", "quantized"))
    parser.add_argument("--ranges", nargs="+", default=list(RANGES), choices=RANGES, metavar="NAME")
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--cache", type=Path, help="folder that keeps the images")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    bench = Bench(arguments)
    print(bench)
    results: dict[tuple[str, str, str], list[tuple[float, ...]]] = {}
    for seed in range(arguments.keys):
        for cell, score in bench.cells(seed):
            results.setdefault(cell, []).append(score)
            print(f"  key {seed}: {', '.join(cell)}: {format_cell([score])}", flush=True)
    for bits in arguments.bits:
        size = f"{arguments.images} images, {arguments.steps} steps, {arguments.keys} keys"
        print(f"\n{bench.convention(bits).describe()}; {size}")
        print("top-1 / agreement / divergence on synthetic images held out, mean (largest minus smallest)")
        for (at, ranges, adaptation), scores in results.items():
            if at == bits:
                print(f"{ranges.ljust(29)} | {adaptation.ljust(28)} | {format_cell(scores)}")
    if arguments.json:
        table = [{"bits": b, "ranges": r, "abn": a, "scores": scores} for (b, r, a), scores in results.items()]
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "cells": table}, indent=1, default=str))


def format_cell(scores: list[tuple[float, ...]]) -> str:
    columns = zip(np.array(scores).T, (2, 2, 4), strict=True)
    return " / ".join(f"{column.mean():.{digits}f} ({np.ptp(column):.{digits}f})" for column, digits in columns)


class Bench(Network):
    """The network, and the cells of the table."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.arguments = arguments

    def convention(self, bits: str) -> Convention:
        convention = Convention.parse(bits, shortcuts=self.arguments.shortcuts, **EDGES[self.arguments.edges])
        return convention.with_default()

    def cells(self, seed: int) -> Iterator[tuple[tuple[str, str, str], tuple[float, ...]]]:
        """Scores of all cells of the table for one key."""
        graph, variables = self.graph, self.variables
        count = self.arguments.images
        sources = {RANGES[row][0] for row in self.arguments.ranges} - {"analytic"} | {"matched"}
        made = {source: self.images_of(source, seed) for source in sources}
        images, held_out = {source: x[:count] for source, x in made.items()}, made["matched"][count:]
        summaries = {source: summarize(graph, variables, x) for source, x in images.items()}
        # Statistics are adapted on the images that the ranges come from; noise has none worth adapting to.
        images["analytic"], summaries["analytic"] = images["matched"], analytic_summaries(graph, variables)
        for row in self.arguments.ranges:
            source, estimator = RANGES[row]
            for bits in self.arguments.bits:
                ranges = apply_estimator(graph, summaries[source], self.convention(bits), ESTIMATORS[estimator])
                qvariables = quantize_params(graph, variables, ranges, self.convention(bits))
                for column, adapted in self.adapted(qvariables, images[source]):
                    divergence = compare(graph, variables, adapted, held_out).divergence
                    yield (bits, row, column), (*self.score(adapted), divergence)

    def adapted(self, qvariables: Any, images: jax.Array) -> Iterator[tuple[str, Any]]:
        """The same quantized network with statistics of each kind."""
        networks = self.graph, self.variables, qvariables
        yield "none", qvariables
        for name, config in METHODS.items():
            yield name, adapt_batch_norm(*networks, images, config)
        for name, config in CORRECTIONS.items():
            yield name, analytic_correction(*networks, config)

    def images_of(self, source: str, seed: int) -> jax.Array:
        """Images of one kind: those for ranges and statistics, then those held out, in batches of their own."""
        fitted, held_out = self.arguments.images, self.arguments.held_out
        key, count = jax.random.key(seed), fitted + held_out
        if source == "noise":
            return jax.random.normal(key, (count, *self.graph.input.shape[1:]))
        config = RECIPES["paper" if source == "responsive" else "fast"].synthesis
        batch = math.gcd(fitted, held_out)
        config = dataclasses.replace(config, num_images=count, batch_size=batch, steps=self.arguments.steps)
        name = f"{self.arguments.model}_{source}_{seed}_{count}_{batch}_{config.steps}.npy"
        file = self.arguments.cache and self.arguments.cache / name
        if file and file.exists():
            return jax.numpy.asarray(np.load(file))
        started = time.perf_counter()
        images = synthesize(self.graph, self.variables, key, config).images
        if file:
            np.save(file, images)
        print(f"  {count} images: {time.perf_counter() - started:.0f} s", flush=True)
        return images


if __name__ == "__main__":
    main()
