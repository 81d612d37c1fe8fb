"""Cross-layer equalization: the same function with kinder ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ, arXiv 1906.04721). Between
two layers with nothing but a ReLU in between, each channel can be divided by a positive number in the first and
multiplied by it in the second. Numbers that give both the same range help where a range serves several channels:
weights with one scale per tensor, and activations always. Chains of pairs (the three convolutions of an inverted
bottleneck, with the depthwise one in the middle) are equalized together, by turns until they agree.

What counts is the range of a channel relative to the largest of its tensor, so factors common to all channels are left
out. They are bounded: a channel that hardly any weight feeds, or that hardly any reads, would be scaled without end,
and what it is left with (its BatchNorm's bias) would take the range of the whole tensor. So a range counts as no less
than a certain share of its tensor's largest, and no channel's activations grow beyond those of the largest channel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfq_jax.base import RUN_ONCE, cpu_jit
from dfq_jax.graph import BatchNorm, Graph, Layer, Skipped, Tensor, affine, batch_norm_parameters
from dfq_jax.stages.batch_norm import offset_leaves, output_moments
from dfq_jax.stages.convention import Convention
from dfq_jax.stages.folding import layer_operations
from dfq_jax.stages.ranges import optimal_clip

# f(s x) = s f(x) for every s > 0. ReLU6 is not one of them: it clips at 6 whatever the scale.
HOMOGENEOUS = frozenset({"none", "relu", "leaky_relu", "leaky_relu_0.1", "leaky_relu_0.2"})
BALANCES = ("weights", "activations")
CLIPS = {"relu": None, "relu6": 6.0}  # where activations of one sign end
# The least that a range counts as, relative to the largest of its tensor: one code of 8 bits.
LEAST_SIZE = 2.0**-8
TINY = 1e-30  # in place of a zero that is divided by: weights that are all zero
SWEEPS = 30  # each brings ranges closer by a constant factor; a chain of three is done after about ten


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
    return _pairs(graph, HOMOGENEOUS)


def _pairs(graph: Graph, activations: Collection[str]) -> tuple[tuple[Pair, ...], tuple[Skipped, ...]]:
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
    bn = _batch_norm(graph, layer)
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
    if not _serve_only(graph, _scaled(layer, bn), own):
        return "its parameters serve other places too"
    axis = axes[0] if bn is None else bn.channel_axis
    for name in tensor.layers:
        reader = graph.layer(name)
        if not _serve_only(graph, (reader.kernel_index,), (reader.op,)):
            return f"the kernel of {name!r} serves other places too"
        if graph.form(reader).input_channels(axis) is None:
            return f"{name!r} mixes its channels with positions"
    return Pair(first=layer.name, readers=tensor.layers, tensor=tensor.name, axis=axis)


def _batch_norm(graph: Graph, layer: Layer) -> BatchNorm | None:
    return None if layer.batch_norm is None else graph.batch_norm(layer.batch_norm)


def _scaled(layer: Layer, bn: BatchNorm | None) -> tuple[int | None, ...]:
    """The leaves that scale with a layer's result: the kernel or the BatchNorm's scale first, then an offset."""
    return (layer.kernel_index, layer.bias_index) if bn is None else (bn.indices.scale, bn.indices.bias)


def _serve_only(graph: Graph, leaves: tuple[int | None, ...], ops: tuple[int, ...]) -> bool:
    """Whether parameters take part in no other operations on x than these."""
    return all(graph.program.served[leaf].issubset(ops) for leaf in leaves if leaf is not None)


# --- equalization ---


def equalize(graph: Graph, variables: Any, *, balance: str = "weights") -> Any:
    """Equalize the ranges of channels between layers, with the function kept.

    Where a BatchNorm follows the first layer, its scale and bias take the factor, otherwise the kernel and bias do;
    `fold_batch_norm` afterwards moves it into the kernel. Pure and traceable. See `find_pairs` for what is equalized.

    >>> equalized = dfq_jax.equalize(graph, variables)
    >>> bool(jnp.allclose(apply_fn(equalized, images), apply_fn(variables, images), atol=1e-4))
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      balance: what is equalized with the second layer's weights, channel by channel and up to a factor common to all
        channels: the first layer's "weights" (DFQ), BatchNorm included, or its "activations", by their BatchNorm up to
        three standard deviations. The latter is for weights with a scale per channel, whose ranges need no help; it
        leaves pairs without BatchNorm alone.

    Returns:
      Variables of the same structure, computing the same function to rounding.

    Raises:
      ValueError: `balance` is unknown.
      GraphError: `variables` are not the traced tree.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {BALANCES}, found {balance!r}.")
    return graph.replace(variables, _equalized(graph, balance, graph.leaves(variables)))


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=(0, 1))
def _equalized(graph: Graph, balance: str, leaves: list[Any]) -> dict[str, jax.Array]:
    """The leaves that change, by path."""
    pairs, _ = find_pairs(graph)
    if balance == "activations":
        pairs = tuple(pair for pair in pairs if graph.layer(pair.first).batch_norm is not None)
    return _divided(graph, pairs, _factors(graph, pairs, balance, leaves), leaves)


def _divided(
    graph: Graph, pairs: Iterable[Pair], factors: Mapping[str, Float[Array, " c"]], leaves: list[Any]
) -> dict[str, jax.Array]:
    """The leaves that change where the channels of pairs are divided by factors, by path."""
    new = dict(enumerate(leaves))
    for pair in pairs:
        factor, first = factors[pair.first], graph.layer(pair.first)
        bn = _batch_norm(graph, first)
        for leaf in _scaled(first, bn):
            if leaf == first.kernel_index:
                form = graph.form(first).kernel
                matrix = form.matrix(new[leaf].astype(jnp.float32))
                new[leaf] = form.leaf(matrix / factor.reshape(*matrix.shape[:2], 1, 1))
            elif leaf is not None:
                new[leaf] = new[leaf] / factor.reshape(new[leaf].shape)
        for reader, channels in _readers(graph, pair):
            form = graph.form(reader).kernel
            matrix = form.matrix(new[reader.kernel_index].astype(jnp.float32))
            new[reader.kernel_index] = form.leaf(matrix * factor[channels][:, None, :, None])
    paths = graph.leaf_paths
    return {paths[i]: value.astype(leaves[i].dtype) for i, value in new.items() if value is not leaves[i]}


def _readers(graph: Graph, pair: Pair) -> Iterator[tuple[Layer, Int[np.ndarray, "g i"]]]:
    for name in pair.readers:
        layer = graph.layer(name)
        yield layer, graph.form(layer).input_channels(pair.axis)


def _factors(graph: Graph, pairs: tuple[Pair, ...], balance: str, leaves: list[Any]) -> dict[str, Float[Array, " c"]]:
    """What each pair's channels are divided by, by first layer."""
    names = dict.fromkeys(name for pair in pairs for name in (pair.first, *pair.readers))
    # Largest weight of each pair of output and input channels, [G, O, I]: all that ranges depend on.
    sizes = {name: _bounded(_sizes(graph, graph.layer(name), leaves)) for name in names}
    peaks = {pair.first: _peaks(graph, pair, leaves) for pair in pairs}
    lowest = {name: peak / jnp.maximum(peak.max(), TINY) for name, peak in peaks.items()}
    ones = {pair.first: jnp.ones(graph.tensor(pair.tensor).shape[pair.axis]) for pair in pairs}
    channels = {(pair.first, layer.name): c for pair in pairs for layer, c in _readers(graph, pair)}

    def sweep(_: jax.Array, state: tuple[dict[str, jax.Array], dict[str, jax.Array]]) -> tuple[Any, Any]:
        sizes, factors = map(dict, state)
        for pair in pairs:
            own, first = factors[pair.first], sizes[pair.first]
            front = first.max(-1).reshape(-1)
            if balance == "activations":
                front = _bounded(peaks[pair.first]) / own
            behind = jnp.zeros_like(own)
            for name in pair.readers:
                behind = behind.at[channels[pair.first, name]].max(sizes[name].max(1))
            step = jnp.sqrt(front / front.max() * (behind.max() / behind))
            factors[pair.first] = jnp.maximum(own * step, lowest[pair.first])
            step = factors[pair.first] / own
            sizes[pair.first] = first / step.reshape(*first.shape[:2], 1)
            for name in pair.readers:
                sizes[name] = sizes[name] * step[channels[pair.first, name]][:, None, :]
        return sizes, factors

    return jax.lax.fori_loop(0, SWEEPS, sweep, (sizes, ones))[1] if pairs else {}


def _bounded(sizes: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sizes of which none is zero, nor almost zero beside the largest."""
    return jnp.maximum(sizes, jnp.maximum(LEAST_SIZE * sizes.max(), TINY))


def _sizes(graph: Graph, layer: Layer, leaves: list[Any]) -> Float[Array, "g o i"]:
    matrix = graph.form(layer).kernel.matrix(leaves[layer.kernel_index].astype(jnp.float32))
    sizes = jnp.abs(matrix).max(-1)
    bn = _batch_norm(graph, layer)
    if bn is None:
        return sizes
    factor, _ = affine(bn, batch_norm_parameters(bn, leaves))
    return sizes * jnp.abs(factor).reshape(*sizes.shape[:2], 1)


def _peaks(graph: Graph, pair: Pair, leaves: list[Any]) -> Float[Array, " c"]:
    """Size of each channel between the pair, three standard deviations out.

    Without a BatchNorm it is that on independent inputs of variance 1, which tells little but what a bias alone makes.
    """
    layer = graph.layer(pair.first)
    if layer.batch_norm is not None:
        center, spread = _center_and_spread(graph, pair, leaves)
    else:
        form = graph.form(layer).kernel
        spread = jnp.sqrt(jnp.square(form.matrix(leaves[layer.kernel_index].astype(jnp.float32))).sum((2, 3)))
        spread = spread.reshape(-1)
        center = jnp.zeros_like(spread)
        if layer.bias_index is not None:
            center = leaves[layer.bias_index].reshape(-1).astype(jnp.float32)
    high = center + 3 * spread
    one_sided = graph.tensor(pair.tensor).activation == "relu"
    return jnp.maximum(high, 0.0) if one_sided else jnp.maximum(jnp.abs(high), jnp.abs(center - 3 * spread))


def _center_and_spread(graph: Graph, pair: Pair, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel behind the first layer's BatchNorm."""
    bn = graph.batch_norm(graph.layer(pair.first).batch_norm)
    return output_moments(bn, batch_norm_parameters(bn, leaves))


# --- channels of depthwise layers ---


def stretch_channels(graph: Graph, variables: Any, convention: Convention) -> Any:
    """Let each channel that depthwise layers alone read fill the range that it shares with the others.

    One range serves all channels of an activation, so that small ones have few of its codes. A depthwise layer has a
    kernel for each channel, with a scale of its own, which takes a factor at no cost; so in front of it channels are
    stretched until what is expected of each, by its BatchNorm, ends where that of the largest does, or where ReLU6
    clips. Expected is what ACIQ's clipping for a Laplace distribution keeps (`optimal_clip`): at a ReLU6, what lies
    beyond is clipped, in the network of these variables already. With a ReLU the function is kept.

    >>> stretched = dfq_jax.stretch_channels(graph, variables, Convention.parse("w4a4"))
    >>> bool(jnp.allclose(apply_fn(stretched, images), apply_fn(variables, images), atol=1e-4))
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      convention: what is quantized, and to how many bits. Kernels without a scale for each channel are left alone.

    Returns:
      Variables of the same structure; those given where there is nothing to do.

    Raises:
      GraphError: `variables` are not the traced tree.
    """
    leaves = graph.leaves(variables)
    pairs = find_stretchable(graph, convention)
    return graph.replace(variables, _stretched(graph, pairs, leaves)) if pairs else variables


def find_stretchable(graph: Graph, convention: Convention) -> tuple[tuple[Pair, int], ...]:
    """The pairs that `stretch_channels` treats, with the bits of the tensor between."""
    pairs = ((pair, _bits_to_stretch(graph, pair, convention)) for pair in _pairs(graph, CLIPS)[0])
    return tuple((pair, bits) for pair, bits in pairs if bits is not None)


def _bits_to_stretch(graph: Graph, pair: Pair, convention: Convention) -> int | None:
    """Of the tensor of a pair that has channels to stretch."""
    readers = [graph.layer(name) for name in pair.readers]
    own_scales = all(layer.depthwise and convention.scale_axes(graph, layer) for layer in readers)
    bn = _batch_norm(graph, graph.layer(pair.first))
    return convention.tensor_bits(graph, graph.tensor(pair.tensor)) if own_scales and bn is not None else None


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=(0, 1))
def _stretched(graph: Graph, pairs: tuple[tuple[Pair, int], ...], leaves: list[Any]) -> dict[str, jax.Array]:
    """The leaves that change, by path."""
    factors = {}
    for pair, bits in pairs:
        center, spread = _center_and_spread(graph, pair, leaves)
        high = center + optimal_clip("laplace", bits, True) / math.sqrt(2) * spread  # a Laplace's b is sigma / sqrt(2)
        clip = CLIPS[graph.layer(pair.first).activation]
        whole = high.max() if clip is None else clip
        factors[pair.first] = jnp.clip(high / jnp.maximum(whole, TINY), LEAST_SIZE, 1.0)
    return _divided(graph, (pair for pair, _ in pairs), factors, leaves)


# --- high biases ---


def absorb_high_bias(graph: Graph, variables: Any, *, sigmas: float = 3.0) -> Any:
    """Move large constants across a ReLU into the next layer's offset, which narrows the range between.

    A channel whose mean is more than `sigmas` standard deviations above zero hardly ever meets the ReLU, so what it
    exceeds them by is a constant that the next layer can add itself (DFQ, section 4.1.3). This changes the function,
    by what the ReLU cuts off farther out; run `equalize` first. Layers behind that pad are left out: their borders
    would lack the constant.

    >>> absorbed = dfq_jax.absorb_high_bias(graph, variables, sigmas=1.0)
    >>> bool((absorbed["bn1"]["bias"] < variables["bn1"]["bias"]).any())
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      sigmas: how far out.

    Returns:
      Variables of the same structure.

    Raises:
      ValueError: `sigmas` is not positive.
      GraphError: `variables` are not the traced tree.
    """
    if not (isinstance(sigmas, (int, float)) and math.isfinite(sigmas) and sigmas > 0):
        raise ValueError(f"sigmas: expected a positive number such as 3.0, found {sigmas!r}.")
    offsets = offset_leaves(graph, normalized=True)
    leaves = graph.leaves_by_path(variables)
    updates: dict[str, jax.Array] = {}
    for pair in find_pairs(graph)[0]:
        if not _absorbable(graph, pair, offsets):
            continue
        path = graph.batch_norm(graph.layer(pair.first).batch_norm).bias
        center, spread = _center_and_spread(graph, pair, list(leaves.values()))
        constant = jnp.maximum(center - sigmas * spread, 0.0)
        updates[path] = updates.get(path, leaves[path]) - constant.reshape(leaves[path].shape)
        for reader, channels in _readers(graph, pair):
            matrix = graph.form(reader).kernel.matrix(leaves[reader.kernel].astype(jnp.float32))
            shift = jnp.einsum("goik,gi->go", matrix, constant[channels], precision=jax.lax.Precision.HIGHEST)
            target, sign = offsets[reader.name]
            updates[target] = updates.get(target, leaves[target]) - sign * shift.reshape(leaves[target].shape)
    return graph.replace(variables, {path: value.astype(leaves[path].dtype) for path, value in updates.items()})


def _absorbable(graph: Graph, pair: Pair, offsets: Mapping[str, tuple[str, float]]) -> bool:
    bn = _batch_norm(graph, graph.layer(pair.first))
    if bn is None or bn.bias is None or graph.tensor(pair.tensor).activation != "relu":
        return False
    readers = [graph.layer(name) for name in pair.readers]
    return all(reader.name in offsets and not _pads(graph, reader) for reader in readers)


def _pads(graph: Graph, layer: Layer) -> bool:
    """Whether a layer's result at borders, or anywhere if it is transposed, leaves weights out."""
    ops = graph.program.ops
    params = ops[layer.op].params
    own = layer.kind == "conv" and (any(low or high for low, high in params["padding"]) or layer.transposed)
    return own or any(ops[i].name == "pad" for i in layer.input_chain)
