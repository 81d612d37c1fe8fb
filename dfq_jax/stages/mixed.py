"""A network whose kernels and tensors have any bits each, as one compiled program for all of them.

What is quantized to how many bits is no part of the program: kernels are arguments, as the float ones or as quantized
ones dequantized, and a tensor's scale and limits are numbers. So nothing is compiled again however many choices of bits
are compared. The blocks in front of the first change are not run again: what enters each block is recorded once, and
the program takes it from there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.base import (
    RUN_ONCE,
    batches,
    cpu_jit,
    full_precision,
    move_near,
    on_host,
    platform_of,
    side_by_side,
    threads_for,
)
from dfq_jax.graph import (
    BatchNorm,
    BatchNormParameters,
    BatchNormRule,
    Graph,
    LayerCall,
    Rules,
    Tensor,
    check_images,
    check_variables,
    normalize,
    run_block_leaves,
)
from dfq_jax.quantizers import code_limits, params_from_range
from dfq_jax.stages.analytic import analytic_summaries_of, noise_of_moments
from dfq_jax.stages.comparison import compare_outputs
from dfq_jax.stages.convention import Convention, Ranges, quantize_layer
from dfq_jax.stages.parts import Part, Widths, parts_of
from dfq_jax.stages.ranges import apply_estimator, resolve_estimator, summarize

# Of one call on CPU, where those side by side share the cache: two photographs, or more images that are smaller.
_VALUES, _IMAGES = 2 * 224 * 224 * 3, 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A network as it was run, to begin others from that differ in a part of it.

    Attributes:
      widths: what was quantized in it.
      inputs: by batch, what entered each block.
    """

    widths: Widths
    inputs: Sequence[Sequence[Array]]


class MixedNetwork:
    """The quantizers of every part at every width, and the divergence from the float network of any choice of them.

    Attributes:
      graph: from `trace`.
      bits: the widths that there are.
      uniform, weights, inputs: of its `Parts`.
      seen_on: what the divergences are measured on, in words.
    """

    @full_precision
    def __init__(
        self,
        graph: Graph,
        variables: Any,
        images: Float[Array, "n ..."] | None,
        bits: Sequence[int],
        convention: Convention,
        estimator: str,
    ):
        check_variables(graph, variables)
        if images is not None:
            check_images(graph, images)
            graph = graph.at((graph.input.shape[0], *images.shape[1:]))
        self.graph, self.bits = graph, tuple(bits)
        parts = parts_of(graph, convention, self.bits)
        self.uniform, self.weights, self.inputs = parts.uniform, parts.weights, parts.inputs
        self._first = self._first_blocks()
        self._own = frozenset(self._readers_by_themselves())
        self._leaves = graph.leaves_by_path(jax.device_put(variables))
        rule = None
        if images is None:
            x, rule = noise_of_moments(graph, variables)
            self.seen_on, batch_size = f"{len(x)} samples of noise of the moments that BatchNorms promise", len(x)
        else:
            x, self.seen_on = jnp.asarray(images), f"{len(images)} images"
            fit = max(1, min(_IMAGES, _VALUES // math.prod(x.shape[1:])))
            batch_size = fit if platform_of(variables) == "cpu" else len(x)
        self._pieces = list(batches(x, batch_size))
        if images is None:
            told = analytic_summaries_of(graph, variables, [self.uniform[b] for b in self.bits])
        else:
            told = [summarize(graph, variables, x, batch_size=len(x))] * len(self.bits)
        estimate = resolve_estimator(estimator)
        self._rows = {
            b: self._quantizers(b, apply_estimator(graph, summaries, self.uniform[b], estimate))
            for b, summaries in zip(self.bits, told, strict=True)
        }
        threads = threads_for(self._leaves)
        kernels = [(path, b) for b in self.bits for _, path in dict.fromkeys(self.weights.values())]
        quantized = side_by_side(lambda which: self._quantized(*which), kernels, threads)
        self._kernels = dict(zip(kernels, quantized, strict=True))
        self._rule = rule
        self._offsets: list[dict[str, Array]] = [{} for _ in self._pieces]
        self._reference: list[Any] = [None for _ in self._pieces]
        self.float = self.record({})

    def _readers_by_themselves(self) -> Iterator[str]:
        """The layers that quantize what they read, where other readers of the tensor have it in float."""
        for tensor in self.graph.tensors:
            if self.uniform[self.bits[0]].is_for_layers_alone(self.graph, tensor):
                yield from (name for name in tensor.layers if name in self.weights)

    def _first_blocks(self) -> dict[Part, int]:
        """The block in which each part is met first."""
        first: dict[Part, int] = {}
        for place, block in enumerate(self.graph.blocks):
            for name in block.layers:
                for parts in (self.weights, self.inputs):
                    if name in parts:
                        first.setdefault(parts[name], place)
        return first

    def _quantized(self, path: str, bits: int) -> dict[str, Any]:
        """The kernels stored as one at so many bits, dequantized."""
        graph, convention, kernels = self.graph, self.uniform[bits], {}
        for stored in graph.together(path):
            if stored not in graph.kernels:
                continue  # a slice that nothing reads
            quantized = quantize_layer(graph, graph.kernels[stored][0], self._leaves[stored], convention)
            kernels[stored] = move_near(jax.tree.map(np.asarray, quantized).dequantize(), self._leaves[stored])
        return kernels

    def _quantizers(self, bits: int, ranges: Ranges) -> dict[str, tuple[float, ...]]:
        """Of tensors, as numbers: scale, limits of the codes less the zero point, and that it is in use."""
        rows = {}
        for name, range_ in on_host(dict(ranges)).items():
            width = self.uniform[bits].tensor_bits(self.graph, self.graph.tensor(name))
            params = params_from_range(*range_, bits=width)
            rows[name] = float(params.scale), *map(float, code_limits(params)), 1.0
        return rows

    def _arguments(self, widths: Widths) -> tuple[list[Any], Float[np.ndarray, "t 4"]]:
        """Leaves and rows of tensors."""
        leaves = dict(self._leaves)
        rows: dict[str, tuple[float, ...]] = {tensor.name: (1.0, 0.0, 0.0, 0.0) for tensor in self.graph.tensors}
        for (part, name), bits in widths.items():
            if part == "weights":
                leaves |= self._kernels[name, bits]
            else:
                rows[name] = self._rows[bits][name]
        return list(leaves.values()), np.asarray(list(rows.values()), np.float32)

    @full_precision
    def record(self, widths: Widths) -> Recording:
        """Run a network from the input on."""
        fixed = (self.graph, self._own, *self._arguments(widths))
        fresh, inputs = not any(self._offsets), []
        for place, x in enumerate(self._pieces):
            offsets = self._no_offsets(x) if fresh and self._rule is not None else self._offsets[place]
            values, self._offsets[place] = _recorded(*fixed, x, self._rule, offsets, fresh)
            inputs.append(values)
        return Recording(widths=dict(widths), inputs=inputs)

    def _no_offsets(self, x: Array) -> dict[str, Any]:
        """What stands for the offsets of BatchNorms until they are known."""
        graph = self.graph.at_input(x)
        return {bn.name: np.zeros(graph.program.avals[bn.output].shape, np.float32) for bn in graph.batch_norms}

    @full_precision
    def divergences(self, choices: Iterable[Widths], start: Recording | None = None) -> list[float]:
        """Of networks from the float one.

        Args:
          choices: what is quantized in each, to how many bits.
          start: a network that they differ from late, so that what comes before is not run; by default the float one.
        """
        start, choices = start or self.float, list(choices)
        if self._reference[0] is None:
            self._reference = [self._run({}, self.float, place) for place in range(len(self._pieces))]
        work = [(widths, place) for widths in choices for place in range(len(self._pieces))]
        threads = threads_for(self._leaves)
        outputs = iter(side_by_side(lambda item: self._run(item[0], start, item[1]), work, threads))
        pairs = [[(reference, next(outputs)) for reference in self._reference] for _ in choices]
        return [compare_outputs(self.graph, pair).divergence for pair in pairs]

    def _run(self, widths: Widths, start: Recording, place: int) -> Any:
        """Outputs of a network on one batch."""
        changed = {part for part, _ in widths.items() ^ start.widths.items()}
        first = min((self._first[part] for part in changed), default=len(self.graph.blocks) - 1)
        arguments = self._arguments(widths)
        outputs = _outputs(self.graph, self._own, *arguments, start.inputs[place], self._offsets[place], first)
        return jax.block_until_ready(outputs)


# --- the programs ---


def _rules(graph: Graph, own: frozenset[str], rows: Float[Array, "t 4"], batch_norm: BatchNormRule | None) -> Rules:
    """Rules of a network with quantized tensors; layers in `own` quantize what they read by themselves."""
    quantizers = {tensor.name: row for tensor, row in zip(graph.tensors, rows, strict=True)}

    def quantized(name: str, value: Array) -> Array:
        scale, low, high, used = quantizers[name]
        value = value.astype(jnp.float32)
        return jnp.where(used > 0, jnp.round(jnp.clip(value * (1.0 / scale), low, high)) * scale, value)

    def tensor(item: Tensor, value: Array) -> Array:
        return value if own.intersection(item.layers) else quantized(item.name, value)

    def layer(call: LayerCall) -> Array:
        alone = call.layer.name in own
        return (call.reading(quantized(call.layer.tensor, call.source)) if alone else call).default()

    return Rules(layer, tensor, batch_norm)


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=(0, 1))
def _recorded(
    graph: Graph,
    own: frozenset[str],
    leaves: list[Any],
    rows: Float[Array, "t 4"],
    x: Float[Array, "n ..."],
    noise: BatchNormRule | None,
    offsets: dict[str, Array],
    fresh: Any,
) -> tuple[list[Array], dict[str, Array]]:
    """What enters each block; and, where noise takes the place of BatchNorms, by how much it differs from them.

    That is found in the float network, when it is `fresh`: to what a quantized network's BatchNorms give, the same is
    added, so that its errors travel on.
    """
    found: dict[str, Array] = {}

    def batch_norm(bn: BatchNorm, x: Array, parameters: BatchNormParameters) -> Array:
        own = normalize(bn, x, parameters).astype(jnp.float32)
        found[bn.name] = jnp.where(fresh, noise(bn, x, parameters) - own, offsets[bn.name])
        return own + found[bn.name]

    values = []
    rules = _rules(graph, own, rows, None if noise is None else batch_norm)
    for block in graph.blocks:
        values.append(x)
        x = run_block_leaves(graph, block, leaves, x, rules)
    return values, found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    graph: Graph,
    own: frozenset[str],
    leaves: list[Any],
    rows: Float[Array, "t 4"],
    inputs: list[Float[Array, "n ..."]],
    offsets: dict[str, Array],
    first: Any,
) -> Any:
    """Outputs of the network that has these values in front of its blocks up to the one that is `first`."""

    def batch_norm(bn: BatchNorm, x: Array, parameters: BatchNormParameters) -> Array:
        return normalize(bn, x, parameters) + offsets[bn.name]

    rules = _rules(graph, own, rows, batch_norm if offsets else None)
    value, (*blocks, last) = inputs[0], graph.blocks
    for place, block in enumerate(blocks):
        run = functools.partial(run_block_leaves, graph, block, leaves, rules=rules)
        value = lax.cond(place >= first, run, lambda _, known=inputs[place + 1]: known, value)
    return run_block_leaves(graph, last, leaves, value, rules)
