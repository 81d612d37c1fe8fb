"""Where a quantized network loses: what each layer's weights and its input cost, quantized alone or alone in float.

    python benchmarks/layers.py --model mobilenet_v2 --checkpoint mobilenet_v2-b0353104.pth --data folder:imagenet

Prints the divergence from the float network, by default on noise of the moments that BatchNorms promise, for the
quantizers of the nearest codes and of ranges from these moments: of each weight and each input "alone" (everything else
in float), and how much it falls ("without") when it alone is in float; then both for all of a kind, and the sums of the
divergences alone. What errors do together shows in the difference. Each BatchNorm is adapted by least squares first,
since what that mends is no loss; `--raw` leaves them. With `--real` it is measured on some of the images of `--data`
in place of noise, to see whether noise misleads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from network import EDGES, Network, add_arguments

from dfq_jax import Convention, Graph, analytic_summaries, quantize_params
from dfq_jax.graph import (
    BatchNorm,
    Layer,
    LayerCall,
    along_channels,
    channel_covariance,
    channel_moments,
    normalize,
    run,
)
from dfq_jax.quantizers import fake_quant, quantization
from dfq_jax.stages import equalize
from dfq_jax.stages.analytic import noise_of_moments
from dfq_jax.stages.comparison import compare_outputs
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator

PARTS = ("weights", "input")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--edges", default="brecq", choices=EDGES, help="first and last layer")
    parser.add_argument("--estimator", default="lp", choices=sorted(ESTIMATORS))
    parser.add_argument("--equalize", action="store_true", help="weight ranges first")
    parser.add_argument("--raw", action="store_true", help="leave BatchNorms as they are")
    parser.add_argument("--samples", type=int, default=16, help="of noise")
    parser.add_argument("--images", type=Path, help="preprocessed images in place of noise, a .npy file")
    parser.add_argument("--real", type=int, default=0, help="so many images of --data in place of noise")
    arguments = parser.parse_args()

    bench = Bench(arguments)
    every = frozenset(bench.places)
    total = bench.divergence(every)
    print(f"{bench.convention.describe()}; {len(bench.x)} {bench.described}; divergence of all together {total:.4f}")
    alone = {place: bench.divergence({place}) for place in bench.places}
    saved = {place: total - bench.divergence(every - {place}) for place in bench.places}

    print(f"\n{'kind'.ljust(10)} | part    | number | alone  | without | sum of each alone")
    kinds = dict.fromkeys(bench.kinds.values())
    for kind, part in [*((k, p) for p in PARTS for k in (*kinds, None))]:
        group = frozenset(p for p in bench.places if p[1] == part and kind in (None, bench.kinds[p[0]]))
        found = bench.divergence(group), total - bench.divergence(every - group), sum(alone[p] for p in group)
        cells = f"{found[0]:6.4f} | {found[1]:7.4f} | {found[2]:.4f}"
        print(f"{(kind or 'all').ljust(10)} | {part.ljust(7)} | {len(group):6} | {cells}")

    print("\nalone  | without | part    | kind       | range             | layer")
    for place in sorted(bench.places, key=lambda p: -alone[p]):
        name, part = place
        lo_hi = bench.ranges[bench.graph.layer(name).tensor] if part == "input" else ()
        limits = " ".join(f"{float(limit):8.3f}" for limit in lo_hi)
        row = f"{alone[place]:6.4f} | {saved[place]:7.4f} | {part.ljust(7)} | {bench.kinds[name].ljust(10)}"
        print(f"{row} | {limits.ljust(17)} | {name}")


class Bench(Network):
    """The network, its quantizers, and what there is to compare on."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        graph, variables = self.graph, self.variables
        self.convention = Convention.parse(arguments.bits, **EDGES[arguments.edges])
        if arguments.equalize:
            variables = equalize(graph, variables)
        self.x, rule = noise_of_moments(graph, variables, arguments.samples)
        self.described = "samples of noise"
        if arguments.images:
            self.x, rule, self.described = np.load(arguments.images), None, f"images of {arguments.images.name}"
        elif arguments.real:
            step = max(1, len(self.images) // arguments.real)
            self.x, rule, self.described = self.images[::step], None, "real images"
        self.ranges = apply_estimator(
            graph,
            analytic_summaries(graph, variables, self.convention),
            self.convention,
            ESTIMATORS[arguments.estimator],
        )
        qvariables = quantize_params(graph, variables, self.ranges, self.convention)
        kernels = {layer.name: graph.leaf(qvariables, layer.kernel).dequantize() for layer in graph.layers}
        quantizers = quantization(qvariables).by_tensor
        self.reference, seen = jax.block_until_ready(_reference(graph, variables, self.x, rule))
        self.places = [(layer.name, part) for layer in graph.layers for part in PARTS]
        self.kinds = {layer.name: kind_of(graph, layer) for layer in graph.layers}
        self.outputs = functools.partial(
            _switched, graph, not arguments.raw, variables, kernels, quantizers, seen, rule, self.x
        )

    def divergence(self, quantized: Iterable[tuple[str, str]]) -> float:
        """Of the network in which these weights and inputs alone are quantized."""
        places = set(quantized)
        switches = {place: jnp.asarray(place in places) for place in self.places}
        return compare_outputs(self.graph, [(self.reference, self.outputs(switches))]).divergence


def kind_of(graph: Graph, layer: Layer) -> str:
    """What a layer is for, in networks of inverted residuals."""
    if layer.name == graph.first_layer.name:
        return "stem"
    if layer.name == graph.last_layer.name or graph.last_layer.name in layer.consumers:
        return "head"
    if layer.depthwise:
        return "depthwise"
    return "project" if layer.activation == "none" else "expand"


@functools.partial(jax.jit, static_argnames="graph")
def _reference(graph: Graph, variables: Any, x: jax.Array, noise: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Outputs of the float network, and what its BatchNorms give where no noise takes their place."""
    seen: dict[str, jax.Array] = {}

    def rule(bn: BatchNorm, x: jax.Array, parameters: Any) -> jax.Array:
        seen[bn.name] = normalize(bn, x, parameters)
        return seen[bn.name] if noise is None else noise(bn, x, parameters)

    return run(graph, variables, x, batch_norm=rule), seen


@functools.partial(jax.jit, static_argnums=(0, 1))
def _switched(
    graph: Graph,
    adapted: bool,
    variables: Any,
    kernels: dict[str, jax.Array],
    quantizers: Any,
    seen: dict[str, jax.Array],
    noise: Any,
    x: jax.Array,
    switches: dict[tuple[str, str], jax.Array],
) -> Any:
    """Outputs of the network with what is switched on quantized: one program for all choices."""

    def layer(call: LayerCall) -> jax.Array:
        name, params = call.layer.name, quantizers[call.layer.tensor]
        source = call.source.astype(jnp.float32)
        call = call.reading(jnp.where(switches[name, "input"], fake_quant(source, params), source))
        kernel = jnp.where(switches[name, "weights"], kernels[name], call.kernel)
        return dataclasses.replace(call, kernel=kernel).default()

    def rule(bn: BatchNorm, x: jax.Array, parameters: Any) -> jax.Array:
        found, wanted = normalize(bn, x, parameters), seen[bn.name]
        if adapted:  # to the line that comes nearest, as a regression puts it into the statistics
            (mean, var), (wanted_mean, _) = channel_moments(bn, found), channel_moments(bn, wanted)
            slope = (channel_covariance(bn, found, wanted) + 1e-6) / (var + 1e-6)
            mean, wanted_mean, slope = (along_channels(bn, x, vector) for vector in (mean, wanted_mean, slope))
            found = slope * (found - mean) + wanted_mean
        return found if noise is None else noise(bn, x, parameters) + found - wanted

    return run(graph, variables, x, layer=layer, batch_norm=rule)


if __name__ == "__main__":
    main()
