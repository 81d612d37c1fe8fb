"""Ranges and quantization of weights.

An estimator takes a kernel and returns the real range ``(lo, hi)`` to quantize it over, one range for each channel, in
the form that `dfq_jax.quantizers.qtensor.params_from_range` takes::

    lo, hi = mse(w, bits=4, symmetric=True, channel_axes=(3,))
    q = quantize_tensor(w, params_from_range(lo, hi, bits=4, symmetric=True))

which is what `quantize_kernel` does. All estimators can be traced.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.quantizers.qtensor import QTensor, bounds, fake_quant, params_from_range, quantize_tensor

GRID_STEPS = 100  # fractions of the full range: 1.00, 0.99, ..., 0.01
FINE_STEPS = 10  # on either side of the best fraction


def _reduced_axes(w: jax.Array, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of `w` that share a range; checks both arguments."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w: expected a floating array, found dtype {w.dtype}; quantize the float kernel.")
    if w.size == 0:
        raise ValueError(f"w: expected at least one element, found shape {w.shape}; leave empty kernels out.")
    if not isinstance(channel_axes, tuple) or any(type(a) is not int for a in channel_axes):
        raise TypeError(
            f"channel_axes: expected a tuple of ints, found {channel_axes!r}; pass e.g. (3,), or () for one range per "
            "tensor."
        )
    kept = {a % w.ndim for a in channel_axes if -w.ndim <= a < w.ndim}
    if len(kept) != len(channel_axes):
        raise ValueError(
            f"channel_axes: expected distinct axes of w, which has rank {w.ndim}, found {channel_axes}; name each once."
        )
    return tuple(a for a in range(w.ndim) if a not in kept)


def min_max(
    w: Float[Array, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Full range of the weights of each channel, widened to include zero.

    Args:
      w: kernel, floating, not empty.
      bits: code width, 2 to 8 (checked, not used: all estimators share one signature).
      symmetric: whether the quantizer is to be symmetric (not used).
      channel_axes: axes with a range for each index; () for one range over the whole tensor.

    Returns:
      ``(lo, hi)``, float32, ``lo <= 0 <= hi``, in the shape of `w` with size 1 on the axes that share a range.

    Raises:
      TypeError: `w` is not floating, or `channel_axes` is not a tuple of ints.
      ValueError: `bits` is outside 2..8, `w` is empty, or `channel_axes` are not distinct axes of `w`.
    """
    del symmetric
    bounds(bits, signed=False)
    w = jnp.asarray(w)
    axes = _reduced_axes(w, channel_axes)
    w = w.astype(jnp.float32)
    lo, hi = w.min(axes, keepdims=True), w.max(axes, keepdims=True)
    return jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)


def lp(
    w: Float[Array, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...], p: float = 2.4
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Range of least mean ``|w - Q(w)|**p`` in each channel, by search.

    The full range is shrunk, both ends together, by 1.00, 0.99, ..., 0.01, and then by finer steps around the best of
    these fractions, which are taken where they lower the error. This is the initialization of weight scales in BRECQ
    (Li et al., arXiv 2102.05426) and QDrop (arXiv 2203.05740).

    Args:
      w: kernel, floating, finite, not empty.
      bits: code width, 2 to 8.
      symmetric: whether the quantizer is symmetric.
      channel_axes: axes with a range for each index; () for one range over the whole tensor.
      p: exponent, positive; a larger one weighs clipped outliers more.

    Returns:
      ``(lo, hi)`` as from `min_max`, within its range. A channel of zeros has ``lo = hi = 0``.

    Raises:
      TypeError, ValueError: as `min_max`; ValueError if `p` is not positive.
    """
    check_field("p", p, "a positive number", lambda v: v > 0)
    lo, hi = min_max(w, bits=bits, symmetric=symmetric, channel_axes=channel_axes)
    axes = _reduced_axes(jnp.asarray(w), channel_axes)
    return _search(jnp.asarray(w), lo, hi, bits=int(bits), symmetric=bool(symmetric), axes=axes, p=float(p))


def mse(
    w: Float[Array, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Range of least mean squared error in each channel; `lp` with ``p=2``, which see."""
    return lp(w, bits=bits, symmetric=symmetric, channel_axes=channel_axes, p=2.0)


@functools.partial(jax.jit, static_argnames=("bits", "symmetric", "axes", "p"))
def _search(w, lo, hi, *, bits, symmetric, axes, p):
    w = w.astype(jnp.float32)
    # Errors relative to the largest weight, lest the p-th power of a small one underflow.
    peak = jnp.maximum(-lo, hi)
    unit = jnp.where(peak > 0, 1.0 / peak, 1.0)

    def error(fraction):
        params = params_from_range(lo * fraction, hi * fraction, bits=bits, symmetric=symmetric)
        return jnp.mean(jnp.abs((w - fake_quant(w, params)) * unit) ** p, axes, keepdims=True)

    def best(fractions):
        # One fraction at a time, so that memory is that of a few copies of the kernel.
        errors = jax.lax.map(error, fractions)
        index = jnp.argmin(errors, axis=0, keepdims=True)
        fractions = jnp.broadcast_to(fractions, errors.shape)
        return tuple(jnp.take_along_axis(a, index, axis=0)[0] for a in (fractions, errors))

    step = 1.0 / GRID_STEPS
    grid = jnp.arange(GRID_STEPS, 0, -1, dtype=jnp.float32) * step
    coarse, coarse_error = best(grid.reshape(-1, *(1,) * w.ndim))
    offsets = jnp.arange(-FINE_STEPS, FINE_STEPS + 1, dtype=jnp.float32) * (step / FINE_STEPS)
    offsets = offsets.reshape(-1, *(1,) * w.ndim)
    fine, fine_error = best(jnp.clip(coarse[None] + offsets, step / FINE_STEPS, 1.0))
    fraction = jnp.where(fine_error < coarse_error, fine, coarse)
    return lo * fraction, hi * fraction


WEIGHT_RANGES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "min_max": min_max,
    "mse": mse,
    "lp": lp,
}


def quantize_kernel(
    w: Float[Array, "*shape"],
    *,
    bits: int,
    symmetric: bool,
    channel_axes: tuple[int, ...],
    method: str = "lp",
) -> QTensor:
    """Quantize a kernel to nearest over an estimated range.

    Args:
      w: kernel, floating, finite, not empty.
      bits: code width, 2 to 8.
      symmetric: signed codes without a zero point if true, unsigned codes with one if false.
      channel_axes: axes with a scale for each index; () for one scale over the whole tensor.
      method: estimator of the range, a key of `WEIGHT_RANGES`.

    Returns:
      The quantized kernel, its scale in the rank of `w`.

    Raises:
      TypeError, ValueError: as `min_max`; ValueError if `method` is unknown.
    """
    check_field("method", method, f"one of {', '.join(WEIGHT_RANGES)}", lambda v: v in WEIGHT_RANGES)
    w = jnp.asarray(w)
    _reduced_axes(w, channel_axes)
    bounds(bits, signed=False)
    return _quantize_kernel(w, bits=int(bits), symmetric=bool(symmetric), channel_axes=channel_axes, method=method)


# One compilation for each shape: its many small operations, one by one, would take longer.
@functools.partial(jax.jit, static_argnames=("bits", "symmetric", "channel_axes", "method"))
def _quantize_kernel(w, *, bits, symmetric, channel_axes, method):
    lo, hi = WEIGHT_RANGES[method](w, bits=bits, symmetric=symmetric, channel_axes=channel_axes)
    return quantize_tensor(w, params_from_range(lo, hi, bits=bits, symmetric=symmetric))
