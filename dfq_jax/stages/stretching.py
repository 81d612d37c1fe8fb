"""Stretching: each channel in front of a depthwise layer fills the range that all of them share."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dfq_jax.base import RUN_ONCE, cpu_jit
from dfq_jax.graph import Graph
from dfq_jax.stages.convention import Convention, check_convention
from dfq_jax.stages.pairs import LEAST_SIZE, TINY, Pair, batch_norm_of, center_and_spread, divided, pairs_through
from dfq_jax.stages.ranges import optimal_clip

CLIPS = {"relu": None, "relu6": 6.0}  # where activations of one sign end


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
      convention: what is quantized, and to how many bits. Kernels without a scale for each channel are left alone, and
        depthwise layers that make several channels of one.

    Returns:
      Variables of the same structure; those given where there is nothing to do.

    Raises:
      TypeError: `convention` is something else.
      GraphError: `variables` are not the traced tree.
    """
    leaves = graph.leaves(variables)
    pairs = find_stretchable(graph, convention)
    return graph.replace(variables, _stretched(graph, pairs, leaves)) if pairs else variables


def find_stretchable(graph: Graph, convention: Convention) -> tuple[tuple[Pair, int], ...]:
    """Find the pairs that `stretch_channels` treats, with the bits of the tensor between.

    >>> find_stretchable(graph, Convention.parse("w4a4"))  # no layer of this network is depthwise
    ()

    Args:
      graph: from `trace`.
      convention: as for `stretch_channels`.

    Returns:
      `((pair, bits), ...)`, in the order of layers.

    Raises:
      TypeError: `convention` is something else.
    """
    check_convention(convention)
    pairs = ((pair, _bits_to_stretch(graph, pair, convention)) for pair in pairs_through(graph, CLIPS)[0])
    return tuple((pair, bits) for pair, bits in pairs if bits is not None)


def _bits_to_stretch(graph: Graph, pair: Pair, convention: Convention) -> int | None:
    """Of the tensor of a pair that has channels to stretch."""
    readers = [graph.layer(name) for name in pair.readers]
    own_scales = all(layer.depthwise and convention.scale_axes(graph, layer) for layer in readers)
    bn = batch_norm_of(graph, graph.layer(pair.first))
    return convention.tensor_bits(graph, graph.tensor(pair.tensor)) if own_scales and bn is not None else None


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=(0, 1))
def _stretched(graph: Graph, pairs: tuple[tuple[Pair, int], ...], leaves: list[Any]) -> dict[str, jax.Array]:
    """The leaves that change, by path."""
    factors = {}
    for pair, bits in pairs:
        center, spread = center_and_spread(graph, pair, leaves)
        high = center + optimal_clip("laplace", bits, True) / math.sqrt(2) * spread  # a Laplace's b is sigma / sqrt(2)
        clip = CLIPS[graph.layer(pair.first).activation]
        whole = high.max() if clip is None else clip
        factors[pair.first] = jnp.clip(high / jnp.maximum(whole, TINY), LEAST_SIZE, 1.0)
    return divided(graph, (pair for pair, _ in pairs), factors, leaves)
