"""Pairs of layers whose channels can take a factor in front and its inverse behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfq_jax.graph import BatchNorm, Graph, Layer, Skipped, Tensor, batch_norm_parameters
from dfq_jax.stages.batch_norm import output_moments
from dfq_jax.stages.folding import layer_operations

# f(s x) = s f(x) for every s > 0. ReLU6 is not one of them: it clips at 6 whatever the scale.
HOMOGENEOUS = frozenset({"none", "relu", "leaky_relu", "leaky_relu_0.1", "leaky_relu_0.2"})
# The least that a range counts as, relative to the largest of its tensor: one code of 8 bits.
LEAST_SIZE = 2.0**-8
TINY = 1e-30  # in place of a zero that is divided by: weights that are all zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A layer and those that alone read its result.

    Attributes:
      first: the layer in front.
      readers: the layers behind.
      tensor: what is between them.
      axis: of the tensor, over channels.
    """

    first: str
    readers: tuple[str, ...]
    tensor: str
    axis: int


def find_pairs(graph: Graph) -> tuple[tuple[Pair, ...], tuple[Skipped, ...]]:
    """Find the pairs that `equalize` treats, and why other layers are in none.

    >>> pairs, skipped = dfq_jax.find_pairs(graph)
    >>> [(pair.first, pair.readers) for pair in pairs]
    [('dense1', ('dense2',))]
    >>> [layer.name for layer in skipped]
    ['dense2']

    Args:
      graph: from `trace`.

    Returns:
      `(pairs, skipped)`, in the order of layers.
    """
    return pairs_through(graph, HOMOGENEOUS)


def pairs_through(graph: Graph, activations: Collection[str]) -> tuple[tuple[Pair, ...], tuple[Skipped, ...]]:
    """`find_pairs` with one of these activations between them."""
    tensors = {tensor.value: tensor for tensor in graph.tensors}
    pairs, skipped = [], []
    for layer in graph.layers:
        found = _pair(graph, layer, tensors.get(layer.end), activations)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            skipped.append(Skipped(layer.name, found))
    return tuple(pairs), tuple(skipped)


def _pair(graph: Graph, layer: Layer, tensor: Tensor | None, activations: Collection[str]) -> Pair | str:
    """The pair that begins with a layer, or why there is none."""
    bn = batch_norm_of(graph, layer)
    if tensor is None:
        return "its result does not go straight to a layer"
    if tensor.shared:
        return "something else than layers reads its result"
    if layer.activation not in activations:
        return f"{layer.activation} does not commute with a scale"
    axes = graph.form(layer).channel_axes if bn is None else ()
    if len(axes) > 1:
        return "its channels have several axes"
    if bn is not None and bn.scale is None:
        return f"BatchNorm {bn.name!r} has no scale"
    own = (*layer_operations(graph, layer), *(() if bn is None else bn.chain))
    if not _serve_only(graph, scaled_leaves(layer, bn), own):
        return "its parameters serve other places too"
    axis = axes[0] if bn is None else bn.channel_axis
    for name in tensor.layers:
        reader = graph.layer(name)
        if not _serve_only(graph, (reader.kernel_index,), (reader.op,)):
            return f"the kernel of {name!r} serves other places too"
        if graph.form(reader).input_channels(axis) is None:
            return f"{name!r} mixes its channels with positions"
    return Pair(first=layer.name, readers=tensor.layers, tensor=tensor.name, axis=axis)


def batch_norm_of(graph: Graph, layer: Layer) -> BatchNorm | None:
    """The BatchNorm behind a layer, if there is one."""
    return None if layer.batch_norm is None else graph.batch_norm(layer.batch_norm)


def scaled_leaves(layer: Layer, bn: BatchNorm | None) -> tuple[int | None, ...]:
    """The leaves that scale with a layer's result: the kernel or the BatchNorm's scale first, then an offset."""
    return (layer.kernel_index, layer.bias_index) if bn is None else (bn.indices.scale, bn.indices.bias)


def _serve_only(graph: Graph, leaves: tuple[int | None, ...], ops: tuple[int, ...]) -> bool:
    """Whether parameters take part in no other operations on x than these."""
    return all(graph.program.served[leaf].issubset(ops) for leaf in leaves if leaf is not None)


# --- what takes the factors ---


def divided(
    graph: Graph, pairs: Iterable[Pair], factors: Mapping[str, Float[Array, " c"]], leaves: list[Any]
) -> dict[str, jax.Array]:
    """The leaves that change where the channels of pairs are divided by factors, by path."""
    new = dict(enumerate(leaves))
    for pair in pairs:
        factor, first = factors[pair.first], graph.layer(pair.first)
        bn = batch_norm_of(graph, first)
        for leaf in scaled_leaves(first, bn):
            if leaf == first.kernel_index:
                form = graph.form(first).kernel
                matrix = form.matrix(new[leaf].astype(jnp.float32))
                new[leaf] = form.leaf(matrix / factor.reshape(*matrix.shape[:2], 1, 1))
            elif leaf is not None:
                new[leaf] = new[leaf] / factor.reshape(new[leaf].shape)
        for reader, channels in readers_of(graph, pair):
            form = graph.form(reader).kernel
            matrix = form.matrix(new[reader.kernel_index].astype(jnp.float32))
            new[reader.kernel_index] = form.leaf(matrix * factor[channels][:, None, :, None])
    paths = graph.leaf_paths
    return {paths[i]: value.astype(leaves[i].dtype) for i, value in new.items() if value is not leaves[i]}


def readers_of(graph: Graph, pair: Pair) -> Iterator[tuple[Layer, Int[np.ndarray, "g i"]]]:
    """The layers behind, and which of the pair's channels is each of their kernels' inputs."""
    for name in pair.readers:
        layer = graph.layer(name)
        yield layer, graph.form(layer).input_channels(pair.axis)


def center_and_spread(graph: Graph, pair: Pair, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel behind the first layer's BatchNorm."""
    bn = graph.batch_norm(graph.layer(pair.first).batch_norm)
    return output_moments(bn, batch_norm_parameters(bn, leaves))
