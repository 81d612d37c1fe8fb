"""Soft rounding: a weight between two neighboring codes, in a form that gradients can move.

After AdaRound (arXiv 2004.10568): a quantized kernel becomes

    scale (clip(base + h(v), qmin - z, qmax - z)),    h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1),

with fixed integers `base`, and h between 0 and 1 at first, and 0 or 1 in the end: a regularizer sees to that. The scale
is learned too while the integers stay (GENIE-M, arXiv 2212.04780), as a factor `exp(log_scale)`, so that one learning
rate suits kernels of any size.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.quantizers import QTensor, code_limits

GAMMA, ZETA = -0.1, 1.1  # the stretch of the sigmoid, so that 0 and 1 are reached


class SoftKernel(NamedTuple):
    """What is learned about one kernel."""

    rounding: Float[Array, "..."]  # v, in the shape of the kernel
    log_scale: Float[Array, "..."]  # of the factor on the scale, in the shape of the scale


def base_codes(weight: Float[Array, "..."], kernel: QTensor) -> Float[Array, "..."]:
    """The lower of the two neighboring codes that each weight may take, zero point taken off, in float32.

    The code that the kernel holds is one of the two; the other one is on the weight's side of it. Both are codes that
    exist, so that a clipped weight may come back.
    """
    low, high = code_limits(kernel.params)
    codes = kernel.centered().astype(jnp.float32)
    base = jnp.where(weight.astype(jnp.float32) / kernel.scale < codes, codes - 1, codes)
    return jnp.clip(base, low, high - 1)


def init_soft(weight: Float[Array, "..."], kernel: QTensor, trust: float) -> SoftKernel:
    """Soft rounding that starts from the float weight (`trust` 0), from the code held (1), or between the two."""
    base = base_codes(weight, kernel)
    held = kernel.centered().astype(jnp.float32) - base
    position = jnp.clip(weight.astype(jnp.float32) / kernel.scale - base, 0.0, 1.0)
    # Up to a margin on the other side of the middle, so that `trust` 0 keeps the position, and 1 the code.
    position = (1 - trust) * position + trust * held
    return SoftKernel(_inverse(jnp.clip(position, 0.01, 0.99)), jnp.zeros_like(kernel.scale))


def _inverse(h: jax.Array) -> jax.Array:
    """The inverse of `rectified_sigmoid`."""
    share = (h - GAMMA) / (ZETA - GAMMA)
    return jnp.log(share / (1 - share))


def rectified_sigmoid(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """A sigmoid that reaches 0 and 1 (arXiv 2004.10568)."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def soft_weight(soft: SoftKernel, base: Float[Array, "..."], kernel: QTensor) -> Float[Array, "..."]:
    """The kernel in float32, differentiable in rounding and scale."""
    low, high = code_limits(kernel.params)
    codes = jnp.clip(base + rectified_sigmoid(soft.rounding), low, high)
    return codes * (kernel.scale * jnp.exp(soft.log_scale))


def harden(soft: SoftKernel, base: Float[Array, "..."], kernel: QTensor) -> QTensor:
    """The quantized kernel: each weight at the nearer of its two codes, the learned scale."""
    codes = base + (soft.rounding >= 0).astype(base.dtype)
    return dataclasses.replace(kernel.with_centered(codes), scale=kernel.scale * jnp.exp(soft.log_scale))


def undecided(soft: SoftKernel, beta: Float[Array, ""]) -> Float[Array, ""]:
    """The regularizer, the sum of 1 - |2 h - 1|^beta: 0 where all weights are at a code."""
    # The base of the power is kept off 0, where the derivative of x^beta by way of log x is not finite.
    distance = jnp.maximum(jnp.abs(2 * rectified_sigmoid(soft.rounding) - 1), 1e-6)
    # By log and exp, which XLA:CPU computes eight at a time; powers one by one.
    return jnp.sum(1 - jnp.exp(beta * jnp.log(distance)))
