"""Mixed precision against uniform precision, at the same size and at most the same bit operations.

    python benchmarks/mixed.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, by recipe, for uniform bits and for bits chosen layer by layer within the bytes and the bit operations of that
network: the drop of top-1 on `--data`, the agreement with the float network over `--data` and `--more` together, and
the agreement predicted on images made from the network that no recipe has seen, as well as bytes and seconds: means
over keys, and in brackets the spread (largest minus smallest). Bytes are those of all variables as they are stored,
the edges' and what stays in float among them; 3 bits are stored as 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from network import EDGES, Network, add_arguments
from recipes import Images, field, run, unseen

from dfq_jax import RECIPES, Budget, Convention, Quantized
from dfq_jax.stages import Comparison, comparer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=["instant", "fast", "best"], choices=sorted(RECIPES))
    parser.add_argument("--bits", default="w4a4", help="of the uniform network")
    parser.add_argument("--edges", default="8", choices=EDGES, help="its first and last layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipes")
    parser.add_argument("--unseen", type=int, default=128, help="images to predict agreement on, for each key")
    parser.add_argument("--cache", type=Path, help="folder to keep images in")
    arguments = parser.parse_args()

    network = Network(arguments)
    print(network)
    bench = Bench(network, arguments)
    convention = Convention.parse(arguments.bits, **EDGES[arguments.edges])
    print(f"{network.name}, {convention.describe()}")
    for name in arguments.recipes:
        rows: dict[str, list[np.ndarray]] = {"uniform": [], "mixed": []}
        for key in arguments.keys:
            uniform, scores = bench.run(name, convention, key)
            rows["uniform"].append(scores)
            most = operations(network, convention)
            budget = Budget(weight_bytes=uniform.report.size["quantized"], bit_operations=most)
            mixed, scores = bench.run(name, convention, key, budget=budget)
            rows["mixed"].append(scores)
            share = operations(network, mixed.convention) / most
            print(
                f"  key {key}: {100 * share:.1f} % of the bit operations, layers by bits: {widths(mixed)}", flush=True
            )
        print(f"\n{name}, keys {arguments.keys}: {HEADER}")
        for row, found in rows.items():
            print(f"{row:<8} {cell(np.array(found))}", flush=True)
        print(flush=True)


HEADER = "drop / agreement / predicted agreement in percent, bytes, seconds"


class Bench:
    """What all rows share: the network, images by recipe and key, and those that predict agreement."""

    def __init__(self, network: Network, arguments: argparse.Namespace):
        self.network, self.changes = network, dict(map(field, arguments.set))
        self.images = Images(network, arguments.cache)
        config, count = RECIPES["fast"].synthesis, arguments.unseen
        self.judge = functools.cache(self._judge)
        self.config = dataclasses.replace(config, num_images=count, batch_size=min(count, config.batch_size))

    def run(self, name: str, convention: Convention, key: int, **options: Any) -> tuple[Quantized, np.ndarray]:
        """The quantized network, and the numbers of `HEADER`."""
        recipe = RECIPES[name].replace(**self.changes)
        quantized, (drop, agreement, seconds) = run(self.network, recipe, convention, key, self.images, **options)
        predicted = self.judge(key)(quantized.variables).agreement
        return quantized, np.array([drop, agreement, predicted, quantized.report.size["quantized"], seconds])

    def _judge(self, key: int) -> Callable[[Any], Comparison]:
        """Compares with the float network on images that no recipe has seen."""
        network = self.network
        return comparer(network.graph, network.variables, unseen(network, self.config, key), batch_size=32)


def operations(network: Network, convention: Convention) -> int:
    """Multiply-accumulates of one example times the bits of both operands, as a `Budget` counts them."""
    graph = network.graph
    return sum(
        layer.macs * convention.layer_bits(graph, layer) * convention.tensor_bits(graph, graph.tensor(layer.tensor))
        for layer in graph.layers
    )


def widths(quantized: Quantized) -> str:
    """How many layers have which bits."""
    counts = Counter((layer.weight_bits, layer.activation_bits) for layer in quantized.report.layers)
    return ", ".join(f"{count} w{weights}a{read}" for (weights, read), count in sorted(counts.items()))


def cell(scores: np.ndarray) -> str:
    mean, spread = scores.mean(0), np.ptp(scores, axis=0)
    percents = " / ".join(f"{m:.2f} ({s:.2f})" for m, s in zip(mean[:3], spread[:3], strict=True))
    return f"{percents}, {mean[3]:,.0f} bytes, {mean[4]:.0f} s"


if __name__ == "__main__":
    main()
