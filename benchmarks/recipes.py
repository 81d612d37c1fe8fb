"""Recipes x bits on a CIFAR-10 ResNet, over several keys, through `dfq_jax.quantize`.

    python benchmarks/recipes.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, as they come, the drop of top-1 on `--data`, the agreement with the float network over `--data` and `--more`
together, and the seconds of `quantize`: mean over keys and in brackets the spread (largest minus smallest). Images
depend on the key alone: each recipe makes them once for a key and uses them for all rows, and its seconds count them.
`--cache` keeps them, and the seconds they took, in a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from network import Network, add_arguments

from dfq_jax import RECIPES, Convention, quantize

# The first and the last layer: at 8 bits; at the bits of all layers; at those with their inputs at 8 bits.
EDGES = {"8": {"edge_bits": 8}, "all": {"edge_bits": None}, "weights": {"edge_bits": None, "edge_input_bits": 8}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=["instant", "fast", "best"], choices=sorted(RECIPES))
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4", "w3a3", "w2a4"])
    parser.add_argument("--edges", nargs="+", default=list(EDGES), choices=EDGES, help="first and last layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="fields of the recipes to change")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()

    network = Network(arguments)
    print(network)
    changes = {name: _number(value) for name, value in (change.split("=") for change in arguments.set)}
    for name in arguments.recipes:
        recipe = RECIPES[name].replace(**changes)
        keys = arguments.keys[:1] if recipe.source == "analytic" else arguments.keys  # the same for all keys
        print(f"\n{recipe}\nkeys {keys}: drop of top-1 / agreement, seconds")
        images = Images(arguments.cache and arguments.cache / f"{arguments.model}_{name}")
        for bits in arguments.bits:
            for edges in arguments.edges:
                convention = Convention.parse(bits, **EDGES[edges])
                scores = np.array([_score(network, recipe, convention, key, images) for key in keys])
                print(f"{convention.describe()}: {_cell(scores)}", flush=True)


class Images:
    """The images of each key and the seconds they took to make, in memory and, where there is a path, in files."""

    def __init__(self, path: Path | None):
        self.path, self.known = path, {}

    def get(self, key: int) -> tuple[Any, float]:
        file = self.path and Path(f"{self.path}_{key}.npz")
        if key not in self.known and file and file.exists():
            with np.load(file) as saved:
                self.known[key] = saved["images"], float(saved["seconds"])
        return self.known.get(key, (None, 0.0))

    def put(self, key: int, images: Any, seconds: float) -> None:
        self.known[key] = images, seconds
        if self.path:
            np.savez(f"{self.path}_{key}.npz", images=np.asarray(images), seconds=seconds)


def _score(network: Network, recipe: Any, convention: Convention, key: int, images: Images) -> tuple[float, ...]:
    made, seconds = (None, 0.0) if recipe.source == "analytic" else images.get(key)
    quantized = quantize(
        network.module,
        network.variables,
        input_shape=network.input_shape,
        recipe=recipe,
        convention=convention,
        key=key,
        images=made,
    )
    if recipe.source != "analytic" and made is None:
        images.put(key, quantized.images, quantized.report.seconds["images"])
    top1, agreement = network.score(quantized.variables)
    for step in quantized.report.steps:
        print(f"  key {key}: {step}", flush=True)
    return network.float_top1 - top1, agreement, sum(quantized.report.seconds.values()) + seconds


def _cell(scores: np.ndarray) -> str:
    (drop, agreement, seconds), spread = scores.mean(0), np.ptp(scores, axis=0)
    return f"{drop:.2f} ({spread[0]:.2f}) / {agreement:.2f} ({spread[1]:.2f}), {seconds:.0f} s"


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


if __name__ == "__main__":
    main()
