"""What learned rounding and fine-tuning share: how quantizers and biases move, and how layers run meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph import Graph, LayerCall, check_images, loop_friendly
from dfq_jax.quantizers import QuantizerParams, is_quantized, quantization, with_quantization


def check_learning(graph: Graph, variables: Any, qvariables: Any, images: Any) -> None:
    """Refuse, by name, what cannot be learned from."""
    check_images(graph, images)
    if not is_quantized(qvariables):
        raise ValueError("qvariables: found float variables; quantize_params makes quantized ones to start from.")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, one to learn from and one held out, found {len(images)}.")
    graph.leaves(variables)  # refuses other trees


def held_out_count(share: float, images: int) -> int:
    """How many images are held out: at least one, and one is left."""
    return min(max(round(share * images), 1), images - 1)


def moved(leaf: Float[Array, "*s"], change: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """A bias or scale with a change added that is in units of the leaf's own size: one learning rate suits all."""
    unit = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))) + 1e-6)
    return (leaf + unit * change).astype(leaf.dtype)


def with_scaled_steps(variables: Any, log_factors: Mapping[str, Float[Array, ""]]) -> Any:
    """Quantized variables with the steps of activation quantizers multiplied by `exp(log_factor)`, where there is one.

    Zero points stay integers.
    """

    def scaled(name: str, params: QuantizerParams) -> QuantizerParams:
        if name not in log_factors:
            return params
        return dataclasses.replace(params, scale=params.scale * jnp.exp(log_factors[name]))

    return with_quantization(variables, quantization(variables).map(scaled))


def learned_product(call: LayerCall, params: QuantizerParams) -> jax.Array:
    """A quantized layer while it is learned: fake-quantized operands, multiplied as the network multiplies."""
    del params  # they are in the fake-quantized tensor
    return loop_friendly(call.reading(call.source))
