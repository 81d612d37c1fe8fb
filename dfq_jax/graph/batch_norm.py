"""BatchNorm: what it computes, and the statistics that it would have."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.graph.tracing.structure import BatchNorm


class BatchNormParameters(NamedTuple):
    """Leaves of one BatchNorm, each `[channels]`; scale and bias are 1 and 0 where the network has none."""

    mean: jax.Array
    var: jax.Array
    scale: jax.Array | float
    bias: jax.Array | float


def batch_norm_parameters(bn: BatchNorm, leaves: list[Any]) -> BatchNormParameters:
    """The parameters of one BatchNorm from the graph's list of leaves."""
    roles = bn.indices

    def leaf(index: int | None, default: float) -> Any:
        return default if index is None else leaves[index].reshape(-1)

    return BatchNormParameters(
        leaf(roles.mean, 0.0), leaf(roles.var, 1.0), leaf(roles.scale, 1.0), leaf(roles.bias, 0.0)
    )


def affine(bn: BatchNorm, parameters: BatchNormParameters, xp: Any = jnp) -> tuple[Any, Any]:
    """The factor and the offset of each channel that the BatchNorm is, `[channels]`.

    Args:
      bn: the BatchNorm.
      parameters: its leaves.
      xp: `jax.numpy` for float32, `numpy` for float64 on the host.
    """
    dtype = np.float64 if xp is np else np.float32
    mean, var, scale, bias = (xp.asarray(leaf, dtype) for leaf in parameters)
    factor = scale / xp.sqrt(var + bn.epsilon)
    return factor, bias - mean * factor


def normalize(bn: BatchNorm, x: Float[Array, "..."], parameters: BatchNormParameters) -> Float[Array, "..."]:
    """The BatchNorm itself, in float32: (x - mean) scale / sqrt(var + epsilon) + bias."""
    factor, offset = affine(bn, parameters)
    return x.astype(jnp.float32) * along_channels(bn, x, factor) + along_channels(bn, x, offset)


def along_channels(bn: BatchNorm, x: jax.Array, vector: jax.Array) -> jax.Array:
    """`[channels]` shaped to broadcast against the BatchNorm's input."""
    shape = [1] * x.ndim
    shape[bn.channel_axis] = -1
    return jnp.reshape(vector, shape)


def apart(x: jax.Array) -> jax.Array:
    """The same float32 array, computed before the sum that reads it and not inside.

    jaxlib 0.10.2 fuses small products into sums over them on CPU, and then some of the sums are other ones
    (jax-ml/jax#39103). What rounds, here to float32 itself, it leaves apart; a barrier it takes away before.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def channel_moments(bn: BatchNorm, x: Float[Array, "..."]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and biased variance per channel over all other axes, in float32."""
    axes = tuple(a for a in range(x.ndim) if a != bn.channel_axis)
    x = apart(x.astype(jnp.float32))
    mean = x.mean(axes)
    return mean, jnp.square(x - along_channels(bn, x, mean)).mean(axes)


def channel_covariance(bn: BatchNorm, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, " c"]:
    """Biased covariance per channel of two inputs of a BatchNorm, value by value, in float32."""
    axes = tuple(a for a in range(x.ndim) if a != bn.channel_axis)
    x, y = (apart(z.astype(jnp.float32)) for z in (x, y))
    x, y = (z - z.mean(axes, keepdims=True) for z in (x, y))
    return (x * y).mean(axes)
