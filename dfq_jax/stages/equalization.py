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

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import RUN_ONCE, cpu_jit
from dfq_jax.graph import Graph, Layer, affine, batch_norm_parameters
from dfq_jax.stages.bias_correction import offset_leaves
from dfq_jax.stages.pairs import (
    LEAST_SIZE,
    TINY,
    Pair,
    batch_norm_of,
    center_and_spread,
    divided,
    find_pairs,
    readers_of,
)

BALANCES = ("weights", "activations")
SWEEPS = 30  # each brings ranges closer by a constant factor; a chain of three is done after about ten


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
    return divided(graph, pairs, _factors(graph, pairs, balance, leaves), leaves)


def _factors(graph: Graph, pairs: tuple[Pair, ...], balance: str, leaves: list[Any]) -> dict[str, Float[Array, " c"]]:
    """What each pair's channels are divided by, by first layer."""
    names = dict.fromkeys(name for pair in pairs for name in (pair.first, *pair.readers))
    # Largest weight of each pair of output and input channels, [G, O, I]: all that ranges depend on.
    sizes = {name: _bounded(_sizes(graph, graph.layer(name), leaves)) for name in names}
    peaks = {pair.first: _peaks(graph, pair, leaves) for pair in pairs}
    lowest = {name: peak / jnp.maximum(peak.max(), TINY) for name, peak in peaks.items()}
    ones = {pair.first: jnp.ones(graph.tensor(pair.tensor).shape[pair.axis]) for pair in pairs}
    channels = {(pair.first, layer.name): c for pair in pairs for layer, c in readers_of(graph, pair)}

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
    bn = batch_norm_of(graph, layer)
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
        center, spread = center_and_spread(graph, pair, leaves)
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
        center, spread = center_and_spread(graph, pair, list(leaves.values()))
        constant = jnp.maximum(center - sigmas * spread, 0.0)
        updates[path] = updates.get(path, leaves[path]) - constant.reshape(leaves[path].shape)
        for reader, channels in readers_of(graph, pair):
            matrix = graph.form(reader).kernel.matrix(leaves[reader.kernel].astype(jnp.float32))
            shift = jnp.einsum("goik,gi->go", matrix, constant[channels], precision=jax.lax.Precision.HIGHEST)
            target, sign = offsets[reader.name]
            updates[target] = updates.get(target, leaves[target]) - sign * shift.reshape(leaves[target].shape)
    return graph.replace(variables, {path: value.astype(leaves[path].dtype) for path, value in updates.items()})


def _absorbable(graph: Graph, pair: Pair, offsets: Mapping[str, tuple[str, float]]) -> bool:
    bn = batch_norm_of(graph, graph.layer(pair.first))
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
