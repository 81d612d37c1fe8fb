"""What follows a layer and can be computed with it: bias, BatchNorm, activation and the next quantizer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from dfq_jax.graph import Graph, Layer, Tensor

# Activations that a quantizer's clip can do: real bounds.
CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A graph in which layers compute what follows them.

    Attributes:
      results: by layer, the value of the program that it computes: past its bias and BatchNorm, and past an activation
        where it computes a quantized tensor.
      requantizes: by layer, the quantized tensor that it computes, if any.
      bare: layers that compute their product alone: the program rounds it, or what follows it, to a type narrower than
        float32. Then the program's own operations follow, so that what is rounded where is as in the simulation.
      live: indices of the operations that are left to run, layers included.
      leaves: numbers of the leaves that they read.
    """

    results: Mapping[str, int]
    requantizes: Mapping[str, str]
    bare: frozenset[str]
    live: frozenset[int]
    leaves: frozenset[int]


@functools.lru_cache(maxsize=64)
def fuse(graph: Graph, folded: frozenset[str], quantized: frozenset[str]) -> Fusion:
    """Find what layers can compute with their product.

    Args:
      graph: the network.
      folded: names of the layers that take in what follows them.
      quantized: names of the tensors that are quantized for all their readers.
    """
    results: dict[str, int] = {}
    requantizes: dict[str, str] = {}
    bare = frozenset(
        layer.name for layer in graph.layers if layer.name in folded and _narrow(graph, _affine(graph, layer))
    )
    ends = {
        graph.program.ops[layer.op].outputs[0] if layer.name in bare else _affine(graph, layer)[-1]: layer
        for layer in graph.layers
        if layer.name in folded
    }
    results.update({layer.name: end for end, layer in ends.items()})
    for tensor in graph.tensors:
        layer = _producer(graph, tensor, ends) if tensor.name in quantized else None
        if layer is not None:
            results[layer.name] = tensor.value
            requantizes[layer.name] = tensor.name
    live, leaves = _live(graph, results)
    return Fusion(results, requantizes, bare, live, leaves)


def _affine(graph: Graph, layer: Layer) -> list[int]:
    """The values from a layer's product on, past its bias, to the end of its BatchNorm."""
    ops = graph.program.ops
    chain = () if layer.batch_norm is None else graph.batch_norm(layer.batch_norm).chain
    return [ops[layer.op].outputs[0], layer.output, *(ops[i].outputs[0] for i in chain)]


def _narrow(graph: Graph, values: Iterable[int]) -> bool:
    return any(graph.program.avals[value].dtype.itemsize < 4 for value in values)


def _producer(graph: Graph, tensor: Tensor, ends: Mapping[int, Layer]) -> Layer | None:
    """The layer whose result, clipped, is the tensor, and is nothing else besides."""
    program, value = graph.program, tensor.value
    if _narrow(graph, (value,)):
        return None
    if value in ends:
        return ends[value]
    if tensor.activation not in CLIPS:
        return None
    while value not in ends:
        op = program.producer(value)
        data = () if op is None else program.data_inputs(op)
        if len(data) != 1 or program.readers(data[0]) != 1:
            return None
        (value,) = data
        if _narrow(graph, (value,)):
            return None
    layer = ends[value]
    # A BatchNorm or another function may stand between the layer's own activation and one of the same name.
    return layer if (layer.activation, layer.end) == (tensor.activation, tensor.value) else None


def _live(graph: Graph, results: Mapping[str, int]) -> tuple[frozenset[int], frozenset[int]]:
    program = graph.program
    layers = {layer.op: layer for layer in graph.layers if layer.name in results}
    computed = {results[layer.name]: program.ops[index] for index, layer in layers.items()}
    live: set[int] = set()
    leaves: set[int] = set()
    todo, seen = list(program.output_values), set(program.output_values)
    while todo:
        value = todo.pop()
        op = computed.get(value) or program.producer(value)
        if op is None:
            leaves.update({value} - {program.input})
            continue
        live.add(op.index)
        needed = (graph.tensor(layers[op.index].tensor).value,) if op.index in layers else op.value_inputs
        todo.extend(v for v in needed if v not in seen)
        seen.update(needed)
    return frozenset(live), frozenset(leaves)
