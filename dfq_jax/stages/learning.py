"""What learned rounding and fine-tuning share: how quantizers and biases move, and how layers run meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph import LayerCall, loop_friendly
from dfq_jax.quantizers import QuantizerParams, quantization, with_quantization


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
