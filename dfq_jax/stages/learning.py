"""What learned rounding and fine-tuning share: how quantizers and biases move, and how layers run meanwhile."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph import BatchNorm, BatchNormParameters, Graph, LayerCall, affine, check_images, loop_friendly
from dfq_jax.quantizers import QTensor, QuantizerParams, is_quantized, quantization, with_quantization


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
    call = call.reading(call.source)
    if call.layer.kind != "conv" or call.layer.groups == 1 or isinstance(call.kernel, QTensor):
        return loop_friendly(call)
    # Sums of shifted products: whatever reads them, in the backward pass too, would compute them anew.
    return materialized(loop_friendly(dataclasses.replace(call, kernel=materialized(call.kernel))))


@jax.custom_vjp
def materialized(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same array, which XLA:CPU computes once: an `optimization_barrier` is gone there before operations are fused.

    A loop that copies, along the first axis longer than one, is the cheapest thing that nothing is fused with.
    """
    shape, bits = tuple(itertools.dropwhile(lambda size: size == 1, x.shape)), jnp.finfo(x.dtype)

    def copied(x: jax.Array) -> jax.Array:
        copy = functools.partial(jax.lax.reduce_precision, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)
        return jax.lax.map(copy, x.reshape(shape)).reshape(x.shape) if shape else x

    return jax.lax.platform_dependent(x, cpu=copied, default=lambda x: x)


materialized.defvjp(lambda x: (materialized(x), None), lambda _, gradient: (gradient,))


def learned_batch_norm(bn: BatchNorm, x: Float[Array, "..."], parameters: BatchNormParameters) -> Float[Array, "..."]:
    """A BatchNorm whose scale and bias are learned, in float32, with gradients that XLA:CPU computes fast."""
    return _affine(bn.channel_axis, x.astype(jnp.float32), *affine(bn, parameters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(axis: int, x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    return x * factor.reshape(shape) + offset.reshape(shape)


def _forward(axis: int, x: jax.Array, factor: jax.Array, offset: jax.Array) -> tuple[jax.Array, Any]:
    return _affine(axis, x, factor, offset), (x, factor)


def _backward(axis: int, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, factor = saved
    to_x = _affine(axis, gradient, factor, jnp.zeros_like(factor))
    return to_x, _channel_sums(axis, x * gradient), _channel_sums(axis, gradient)


_affine.defvjp(_forward, _backward)


def _channel_sums(axis: int, x: jax.Array) -> jax.Array:
    """On CPU a product with ones: XLA's own sum computes channel after channel all that it is a sum of."""
    others = tuple(a for a in range(x.ndim) if a != axis)

    def product(x: jax.Array) -> jax.Array:
        return jnp.tensordot(jnp.ones([x.shape[a] for a in others], x.dtype), x, (tuple(range(len(others))), others))

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(others))
