"""Ranges x BatchNorm adaptation x bits on a CIFAR-10 ResNet, over several keys.

    python benchmarks/ablation.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, for each way to estimate ranges and each way to adapt BatchNorm, the top-1 accuracy on `--data` and the
agreement with the float network over `--data` and `--more` together: mean over keys, and the spread (largest minus
smallest). Labels are used for the printed top-1 alone: nothing is chosen by them here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from network import Network, add_arguments

from dfq_jax import (
    BatchNormConfig,
    Convention,
    adapt_batch_norm,
    quantize_params,
    summarize,
    synthesize,
)
from dfq_jax.recipes.recipe import RECIPES
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator

# Name of the row, which images, which estimator.
RANGES = (
    ("max, Gaussian noise", "noise", "max"),
    ("max", "matched", "max"),
    ("AAC", "responsive", "mean_peak"),
    ("percentile 99.9", "matched", "percentile"),
    ("L2.4", "matched", "lp"),
    # What each half of AAC does by itself, and what its images do for L2.4.
    ("max, AAC images", "responsive", "max"),
    ("mean of peaks, matched images", "matched", "mean_peak"),
    ("L2.4, AAC images", "responsive", "lp"),
)
ADAPTATIONS = (
    ("none", None),
    ("absolute", BatchNormConfig(method="absolute")),
    ("differential", BatchNormConfig(method="differential")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--shortcuts", default="float", choices=("float", "quantized"))
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    bench = Bench(arguments)
    print(bench)
    results: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for seed in range(arguments.keys):
        for cell, score in bench.cells(jax.random.key(seed)):
            results.setdefault(cell, []).append(score)
    for bits in arguments.bits:
        convention = Convention.parse(bits, shortcuts=arguments.shortcuts)
        print(f"\n{convention.describe()}; {arguments.images} images, {arguments.steps} steps, {arguments.keys} keys")
        print("top-1 / agreement, mean (largest minus smallest)")
        width = max(len(name) for name, _, _ in RANGES)
        print(" | ".join(["ranges".ljust(width), *(f"{name} ABN".ljust(28) for name, _ in ADAPTATIONS)]))
        for row, _, _ in RANGES:
            cells = [format_cell(results[bits, row, column]) for column, _ in ADAPTATIONS]
            print(" | ".join([row.ljust(width), *(cell.ljust(28) for cell in cells)]))
    if arguments.json:
        table = [{"bits": b, "ranges": r, "abn": a, "scores": scores} for (b, r, a), scores in results.items()]
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "cells": table}, indent=1, default=str))


def format_cell(scores: list[tuple[float, float]]) -> str:
    top1, agreement = np.array(scores).T
    return f"{top1.mean():.2f} ({np.ptp(top1):.2f}) / {agreement.mean():.2f} ({np.ptp(agreement):.2f})"


class Bench(Network):
    """The network, and the cells of the table."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.arguments = arguments

    def cells(self, key: jax.Array) -> Iterator[tuple[tuple[str, str, str], tuple[float, float]]]:
        """Scores of all cells of the table for one key."""
        size = {"synthesis_num_images": self.arguments.images, "synthesis_steps": self.arguments.steps}
        started = time.perf_counter()
        images = {
            "noise": jax.random.normal(key, (self.arguments.images, *self.graph.input.shape[1:])),
            "matched": self.synthesize(key, RECIPES["fast"].replace(**size).synthesis),
            "responsive": self.synthesize(key, RECIPES["paper"].replace(**size).synthesis),
        }
        print(f"images of one key: {time.perf_counter() - started:.0f} s", flush=True)
        summaries = {name: summarize(self.graph, self.variables, x) for name, x in images.items()}
        for bits in self.arguments.bits:
            convention = Convention.parse(bits, shortcuts=self.arguments.shortcuts)
            for row, source, estimator in RANGES:
                ranges = apply_estimator(self.graph, summaries[source], convention, ESTIMATORS[estimator])
                qvariables = quantize_params(self.graph, self.variables, ranges, convention)
                # Statistics are adapted on the images that the ranges come from; noise has none worth adapting to.
                for column, config in ADAPTATIONS:
                    adapted = qvariables
                    if config is not None:
                        adapted = adapt_batch_norm(self.graph, self.variables, qvariables, images[source], config)
                    yield (bits, row, column), self.score(adapted)

    def synthesize(self, key: jax.Array, config: Any) -> jax.Array:
        return synthesize(self.graph, self.variables, key, config).images


if __name__ == "__main__":
    main()
