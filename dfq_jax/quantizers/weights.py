"""Ranges and quantization of weights.

An estimator takes a kernel and returns the real range ``(lo, hi)`` to quantize it over, one range for each channel, in
the form that `dfq_jax.quantizers.qtensor.params_from_range` takes::

    lo, hi = mse(w, bits=4, symmetric=True, channel_axes=(3,))
    q = quantize_tensor(w, params_from_range(lo, hi, bits=4, symmetric=True))

which is what `quantize_kernel` does. All estimators can be traced. A kernel whose values are known is quantized on the
host, but for the search of its range, which is one program for kernels of all shapes: networks have many shapes, and
each would take longer to compile than to compute.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfq_jax.base import check_field, may_transfer, move_near, namespace_of, on_host
from dfq_jax.quantizers.qtensor import QTensor, bounds, fake_quant, params_from_range, quantize_tensor

GRID_STEPS = 100  # fractions of the full range: 1.00, 0.99, ..., 0.01
FINE_STEPS = 10  # on either side of the best fraction
# On the host a channel is searched in rows of `ROW` weights, so many rows and fractions of all rows at a time.
ROW, ROWS, FRACTIONS = 32, 512, 20


def _reduced_axes(w: Any, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
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
    w: Float[Any, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...]
) -> tuple[Float[Any, "..."], Float[Any, "..."]]:
    """Full range of the weights of each channel, widened to include zero.

    Args:
      w: kernel, floating, not empty.
      bits: code width, 2 to 8 (checked, not used: all estimators share one signature).
      symmetric: whether the quantizer is to be symmetric (not used).
      channel_axes: axes with a range for each index; () for one range over the whole tensor.

    Returns:
      ``(lo, hi)``, float32, ``lo <= 0 <= hi``, in the shape of `w` with size 1 on the axes that share a range;
      arrays of NumPy if `w` is one.

    Raises:
      TypeError: `w` is not floating, or `channel_axes` is not a tuple of ints.
      ValueError: `bits` is outside 2..8, `w` is empty, or `channel_axes` are not distinct axes of `w`.
    """
    del symmetric
    bounds(bits, signed=False)
    xp = namespace_of(w)
    axes = _reduced_axes(w, channel_axes)
    w = xp.asarray(w, np.float32)
    lo, hi = w.min(axes, keepdims=True), w.max(axes, keepdims=True)
    return xp.minimum(lo, 0.0), xp.maximum(hi, 0.0)


def lp(
    w: Float[Any, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...], p: float = 2.4
) -> tuple[Float[Any, "..."], Float[Any, "..."]]:
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
    axes = _reduced_axes(w, channel_axes)
    search = _search_on_host if isinstance(w, np.ndarray) else _search
    return search(w, lo, hi, axes, int(bits), bool(symmetric), float(p))


def mse(
    w: Float[Any, "*shape"], *, bits: int, symmetric: bool, channel_axes: tuple[int, ...]
) -> tuple[Float[Any, "..."], Float[Any, "..."]]:
    """Range of least mean squared error in each channel; `lp` with ``p=2``, which see."""
    return lp(w, bits=bits, symmetric=symmetric, channel_axes=channel_axes, p=2.0)


@functools.partial(jax.jit, static_argnames=("axes", "bits", "symmetric", "p"))
def _search(w, lo, hi, axes, bits, symmetric, p):
    w = w.astype(jnp.float32)

    def errors(fractions):
        # One fraction at a time, so that memory is that of a few copies of the kernel.
        return jax.lax.map(lambda f: _powers(w, lo, hi, f, p, bits, symmetric).sum(axes, keepdims=True), fractions)

    return _least(errors, lo, hi)


def _search_on_host(w, lo, hi, axes, bits, symmetric, p):
    rows, channels = _rows(w, axes)
    starts = np.flatnonzero(np.diff(channels, prepend=-1))
    places = [slice(first, first + ROWS) for first in range(0, len(rows), ROWS)]
    blocks = jax.device_put([(rows[i], *(end.reshape(-1)[channels[i]] for end in (lo, hi))) for i in places])

    def errors(fractions):
        fractions = np.broadcast_to(fractions, (len(fractions), *lo.shape)).reshape(-1, lo.size)[:, channels]
        sums = [
            [_row_sums(*block, some[:, i], p, bits, symmetric) for i, block in zip(places, blocks, strict=True)]
            for some in np.split(fractions, len(fractions) // FRACTIONS)
        ]
        return np.add.reduceat(np.block(sums), starts, axis=1, dtype=np.float64).reshape(-1, *lo.shape)

    return _least(errors, lo, hi)


def _rows(w, axes):
    """Channels, padded with zeros to whole rows, as `[rows, ROW]`, and the channel of each row.

    Zero has no error whatever the range. Rows are padded to whole blocks, as part of the last channel.
    """
    kept = tuple(a for a in range(w.ndim) if a not in axes)
    channels = w.transpose(*kept, *axes).reshape(math.prod(w.shape[a] for a in kept), -1).astype(np.float32)
    count, size = channels.shape
    rows = np.pad(channels, ((0, 0), (0, -size % ROW))).reshape(-1, ROW)
    index = np.repeat(np.arange(count), len(rows) // count)
    padding = -len(rows) % ROWS
    return np.pad(rows, ((0, padding), (0, 0))), np.pad(index, (0, padding), mode="edge")


@functools.partial(jax.jit, static_argnames=("bits", "symmetric"))
def _row_sums(rows, lo, hi, fractions, p, bits, symmetric):
    """The error of each row at each of its fractions, `[fractions, rows]`."""
    lo, hi = lo[None, :, None], hi[None, :, None]
    rows = jnp.broadcast_to(rows, (len(fractions), *rows.shape))
    return _powers(rows, lo, hi, fractions[:, :, None], p, bits, symmetric).sum(-1)


def _powers(w, lo, hi, fraction, p, bits, symmetric):
    """The errors of weights over a fraction of their range, to the power of `p`."""
    params = params_from_range(lo * fraction, hi * fraction, bits=bits, symmetric=symmetric)
    # Relative to the largest weight, lest the p-th power of a small one underflow.
    peak = jnp.maximum(-lo, hi)
    error = jnp.abs((w - fake_quant(w, params)) * jnp.where(peak > 0, 1.0 / peak, 1.0))
    # Logarithm and exponential are vectorized on CPU, general powers are not.
    return jnp.exp(p * jnp.log(error))


def _least(errors, lo, hi):
    """The fraction of each range that has the least error, coarse first and then finer."""
    xp, step = namespace_of(lo), 1.0 / GRID_STEPS

    def best(fractions):
        found = errors(fractions)
        index = xp.argmin(found, axis=0, keepdims=True)
        fractions = xp.broadcast_to(fractions, found.shape)
        return tuple(xp.take_along_axis(a, index, axis=0)[0] for a in (fractions, found))

    def column(values):
        return xp.asarray(values, np.float32).reshape(-1, *(1,) * lo.ndim)

    coarse, coarse_error = best(column(np.arange(GRID_STEPS, 0, -1)) * step)
    offsets = [i for i in range(-FINE_STEPS, FINE_STEPS + 1) if i != 0]
    fine, fine_error = best(xp.clip(coarse[None] + column(offsets) * (step / FINE_STEPS), step / FINE_STEPS, 1.0))
    fraction = xp.where(fine_error < coarse_error, fine, coarse)
    return lo * fraction, hi * fraction


WEIGHT_RANGES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "min_max": min_max,
    "mse": mse,
    "lp": lp,
}


@may_transfer
def quantize_kernel(
    w: Float[Any, "*shape"],
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
    _reduced_axes(w, channel_axes)
    bounds(bits, signed=False)
    settings = {"bits": int(bits), "symmetric": bool(symmetric), "channel_axes": channel_axes, "method": method}
    if (known := on_host(w)) is None:
        return _compiled(w, **settings)
    with jax.ensure_compile_time_eval():  # within the trace of something else, too
        return move_near(_quantize_kernel(known, **settings), w)


def _quantize_kernel(w, *, bits, symmetric, channel_axes, method):
    lo, hi = WEIGHT_RANGES[method](w, bits=bits, symmetric=symmetric, channel_axes=channel_axes)
    return quantize_tensor(w, params_from_range(lo, hi, bits=bits, symmetric=symmetric))


_compiled = jax.jit(_quantize_kernel, static_argnames=("bits", "symmetric", "channel_axes", "method"))
