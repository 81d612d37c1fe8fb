"""Mixed precision against uniform precision, at the same size and at most the same bit operations.

    python benchmarks/mixed.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, by recipe, for uniform bits and for bits chosen layer by layer within the bytes and the bit operations of that
network: the drop of top-1 on `--data`, the agreement with the float network over `--data` and `--more` together, and
the agreement predicted on images made from the network that no recipe has seen, as well as bytes and seconds: means
over keys, and in brackets the spread (largest minus smallest). Bytes are those of all variables as they are stored,
the edges' and what stays in float among them; 3 bits are stored as 4.

With `--sizes 99 98`: the smallest network that reaches an agreement of so many percent by images made from the network,
found by `Target`, against the smallest with the same bits of weights in all layers but the edges that reaches it by the
same images; activations have 8 bits in both. The agreement on real images stands beside the predicted one.
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

from dfq_jax import RECIPES, Budget, Convention, Quantized, Target
from dfq_jax.stages import Comparison, comparer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=["instant", "fast", "best"], choices=sorted(RECIPES))
    parser.add_argument("--bits", default="w4a4", help="of the uniform network")
    parser.add_argument("--edges", default="8", choices=EDGES, help="its first and last layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipes")
    parser.add_argument("--sizes", type=float, nargs="+", metavar="PERCENT", help="smallest sizes at these agreements")
    parser.add_argument("--unseen", type=int, default=128, help="images to predict agreement on, for each key")
    parser.add_argument("--cache", type=Path, help="folder to keep images in")
    arguments = parser.parse_args()

    network = Network(arguments)
    print(network)
    bench = Bench(network, arguments)
    compared = smallest if arguments.sizes else at_one_size
    for name in arguments.recipes:
        print(f"\n{network.name}, {name}, keys {arguments.keys}, edges {arguments.edges}", flush=True)
        rows = compared(bench, name, arguments)
        print(f"{network.name}, {name}: {HEADER}")
        for row, found in rows.items():
            print(f"{row:<20} {cell(np.array(found))}", flush=True)


Rows = dict[str, list[np.ndarray]]


def at_one_size(bench: Bench, name: str, arguments: argparse.Namespace) -> Rows:
    """Uniform bits, and bits by layer within the same bytes and bit operations."""
    convention, rows = Convention.parse(arguments.bits, **EDGES[arguments.edges]), Rows()
    most = operations(bench.network, convention)
    for key in arguments.keys:
        uniform, scores = bench.run(name, convention, key)
        rows.setdefault(f"uniform {arguments.bits}", []).append(scores)
        budget = Budget(weight_bytes=uniform.report.size["quantized"], bit_operations=most)
        mixed, scores = bench.run(name, convention, key, budget=budget)
        rows.setdefault("mixed", []).append(scores)
        share = operations(bench.network, mixed.convention) / most
        print(f"  key {key}: {100 * share:.1f} % of the bit operations, layers by bits: {widths(mixed)}", flush=True)
    return rows


def smallest(bench: Bench, name: str, arguments: argparse.Namespace) -> Rows:
    """The smallest networks that reach an agreement; also all uniform ones."""
    rows = Rows()
    for key in arguments.keys:
        uniform = {}
        for bits in UNIFORM:
            convention = Convention.parse(f"w{bits}a8", **EDGES[arguments.edges])
            _, uniform[bits] = bench.run(name, convention, key)
            rows.setdefault(f"uniform w{bits}a8", []).append(uniform[bits])
        for percent in arguments.sizes:
            reached = [bits for bits in UNIFORM if uniform[bits][PREDICTED] >= percent]
            best = f"w{reached[0]}a8" if reached else "none"
            target = Target(agreement=percent, num_images=arguments.unseen)
            mixed, scores = bench.run(name, Convention.parse("w8a8"), key, target=target)
            rows.setdefault(f"mixed, {percent:g} %", []).append(scores)
            print(f"  key {key}: {mixed.report.target['text']}; {widths(mixed)}; smallest uniform: {best}", flush=True)
    return rows


UNIFORM = (2, 4, 8)  # others are stored in as many bytes as one of these
HEADER = "drop / agreement / predicted agreement in percent, bytes, seconds"
PREDICTED = 2  # its place among these


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
