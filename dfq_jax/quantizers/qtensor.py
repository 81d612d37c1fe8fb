"""Uniform affine quantizers and quantized tensors.

A quantizer maps a real number to an integer code and back::

    q    = round(clip(x / scale, qmin - zero_point, qmax - zero_point)) + zero_point
    real = scale * (q - zero_point)

Codes are unsigned, ``[0, 2**bits - 1]``, for an asymmetric quantizer and signed two's complement,
``[-2**(bits - 1), 2**(bits - 1) - 1]``, for a symmetric one, which has no zero point. The zero point is
an integer within the code range, so real zero is always represented exactly (zero padding and ReLU lose
nothing). See Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
arXiv 1806.08342, and Nagel et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int8, Integer

from dfq_jax.base import namespace_of

MIN_BITS, MAX_BITS = 2, 8
AnyArray = Array | np.ndarray | np.number  # on a device, in a trace, or on the host

# Scale of a range of zero width (a dead channel). Its reciprocal square is still finite in float32, so
# gradients through x / scale stay finite too.
SCALE_FLOOR = 2.0**-60


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code.

    Args:
      bits: code width, 2 to 8.
      signed: two's complement codes if true, codes from zero up if false.

    Returns:
      ``(qmin, qmax)``, both inclusive.

    Raises:
      TypeError: `bits` is not an integer.
      ValueError: `bits` is outside 2..8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"bits: expected an int, found {bits!r}; pass e.g. bits=8.")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits: expected {MIN_BITS} to {MAX_BITS}, found {bits}; pass e.g. bits=8 or bits=4.")
    bits = int(bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


# The array fields below are annotated `Any`: JAX rebuilds pytree nodes around tracers, ShapeDtypeStructs,
# shardings, None or plain objects, and a run-time type checker must let all of them pass.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizerParams:
    """Parameters of a uniform affine quantizer; a pytree whose leaves are `scale` and `zero_point`.

    Attributes:
      scale: float32 array, positive, broadcastable against what is quantized: a scalar for one
        quantizer per tensor, size 1 on all but the channel axes for one per channel.
      zero_point: code of real zero, an integer held in float32 (so the node can be differentiated
        and optimized as a whole) in the shape of `scale`; None for a symmetric quantizer.
      bits: code width, 2 to 8 (static).
      signed: whether codes are two's complement (static).
    """

    scale: Any
    zero_point: Any
    bits: int = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(metadata={"static": True})

    @property
    def lo(self) -> Float[AnyArray, "..."]:
        """Smallest real number represented, at most 0; shape of `scale`."""
        return self.scale * code_limits(self)[0]

    @property
    def hi(self) -> Float[AnyArray, "..."]:
        """Largest real number represented, at least 0; shape of `scale`."""
        return self.scale * code_limits(self)[1]


def storage_bits(bits: int) -> int:
    """Bits that one code takes when packed: 2 for 2, 4 for 3 and 4, else 8."""
    bounds(bits, signed=True)
    return 2 if bits == 2 else 4 if bits <= 4 else 8


# --- codes less their zero point ---


def code_limits(params: QuantizerParams) -> tuple[Float[AnyArray, "..."] | float, Float[AnyArray, "..."] | float]:
    """Smallest and largest code less the zero point: what x / scale is clipped to; in the shape of that.

    >>> code_limits(params_from_range(-1.0, 1.0, bits=4, symmetric=True))
    (-8.0, 7.0)
    """
    qmin, qmax = bounds(params.bits, params.signed)
    if params.zero_point is None:
        return float(qmin), float(qmax)
    zero_point = namespace_of(params.zero_point).asarray(params.zero_point, np.float32)
    return qmin - zero_point, qmax - zero_point


def centered_codes(codes: Integer[AnyArray, "..."], params: QuantizerParams) -> Integer[AnyArray, "..."]:
    """Codes less the zero point, int16, as NumPy arrays of NumPy arrays."""
    codes = codes.astype(np.int16)
    return codes if params.zero_point is None else codes - params.zero_point.astype(np.int16)


def int8_zero(params: QuantizerParams) -> Float[AnyArray, "..."] | None:
    """The int8 value of real zero, in float; None where codes less their zero point fit int8, so that it is 0.

    They do not where there are 8 bits and a zero point: then unsigned codes move down by half of their range, and
    signed ones stay what they are.
    """
    if params.bits < MAX_BITS or (params.signed and params.zero_point is None):
        return None
    zero = np.float32(0) * params.scale if params.zero_point is None else params.zero_point
    return zero if params.signed else zero - 128


def int8_codes(
    codes: Integer[AnyArray, "..."], params: QuantizerParams
) -> tuple[Int8[AnyArray, "..."], Float[AnyArray, "..."] | None]:
    """Codes as operands of int8 products, and what stands for real zero among them; see `int8_zero`.

    >>> params = params_from_range(0.0, 255.0, bits=8)
    >>> codes, zero = int8_codes(quantize(jnp.array([0.0, 255.0]), params), params)
    >>> codes.tolist(), float(zero)
    ([-128, 127], -128.0)
    """
    zero, centered = int8_zero(params), centered_codes(codes, params)
    return (centered if zero is None else centered + zero.astype(np.int16)).astype(np.int8), zero


def params_from_range(
    lo: Float[ArrayLike, "..."], hi: Float[ArrayLike, "..."], *, bits: int, symmetric: bool = False
) -> QuantizerParams:
    """Make the quantizer that covers the real range ``[lo, hi]``.

    The range is first widened to include zero. An asymmetric quantizer has unsigned codes,
    ``scale = (hi - lo) / (2**bits - 1)`` and ``zero_point = round(-lo / scale)``, whose rounding shifts
    the represented range by at most half a step. A symmetric one has signed codes and the smallest
    scale that covers both ends, ``max(-lo / 2**(bits - 1), hi / (2**(bits - 1) - 1))``. A range of zero
    width gets a tiny positive scale. Can be traced; finite ends are the caller's to ensure. Arrays of NumPy give arrays
    of NumPy.

    >>> params = params_from_range(-5.0, 10.0, bits=4)
    >>> float(params.scale), float(params.zero_point)
    (1.0, 5.0)

    Args:
      lo: lower end, any shape that broadcasts with `hi`.
      hi: upper end.
      bits: code width, 2 to 8.
      symmetric: leave out the zero point.

    Returns:
      Parameters in the broadcast shape of `lo` and `hi`.

    Raises:
      TypeError, ValueError: see `bounds`; ValueError if `lo` and `hi` do not broadcast.
    """
    qmin, qmax = bounds(bits, signed=symmetric)
    xp = namespace_of(lo, hi)
    lo, hi = xp.asarray(lo, np.float32), xp.asarray(hi, np.float32)
    try:
        lo, hi = xp.broadcast_arrays(lo, hi)
    except ValueError:
        raise ValueError(
            f"lo and hi: expected shapes that broadcast together, found {lo.shape} and {hi.shape}; pass both ends per "
            "tensor or both per channel."
        ) from None
    lo, hi = xp.minimum(lo, 0.0), xp.maximum(hi, 0.0)
    # Multiplied by a reciprocal because XLA does so to a division by a constant: the same bits either way.
    if symmetric:
        scale = xp.maximum(xp.maximum(lo * (1.0 / qmin), hi * (1.0 / qmax)), SCALE_FLOOR)
        return QuantizerParams(scale, None, bits=int(bits), signed=True)
    scale = xp.maximum((hi - lo) * (1.0 / qmax), SCALE_FLOOR)
    zero_point = xp.clip(xp.round(-lo / scale), qmin, qmax)
    return QuantizerParams(scale, zero_point, bits=int(bits), signed=False)


def ste_round(x: Float[AnyArray, "*shape"]) -> Float[AnyArray, "*shape"]:
    """Round half to even, with the gradient of the identity (straight-through estimator).

    Bengio et al., arXiv 1308.3432.
    """
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _clipped(x: ArrayLike, params: QuantizerParams) -> Float[AnyArray, "..."]:
    """The values over their scale, clipped to the code range less the zero point; float32."""
    # By the reciprocal, as XLA compiles division by a broadcast scale anyway: now the bits do not depend on
    # whether the scale is broadcast (per tensor, per channel, under vmap).
    xp = namespace_of(x, params.scale)
    v = xp.asarray(x, np.float32) * (1.0 / params.scale)
    low, high = code_limits(params)
    # Not jnp.clip, which gives half of the gradient to each side of a tie: LSQ's derivative is that of the
    # clipped branch at the ends themselves.
    return xp.where(v <= low, low, xp.where(v >= high, high, v))


def quantize(x: Float[ArrayLike, "..."], params: QuantizerParams) -> Integer[AnyArray, "..."]:
    """Codes of `x`: round to nearest, ties to even, clipped to the code range.

    Args:
      x: finite numbers of any shape that broadcasts with ``params.scale`` (the code of NaN is undefined).
      params: the quantizer.

    Returns:
      int8 codes if ``params.signed``, else uint8; an array of NumPy if both `x` and the scale are.

    Raises:
      TypeError, ValueError: ``params.bits`` is not an integer from 2 to 8.
    """
    q = _clipped(x, params).round()
    if params.zero_point is not None:
        q = q + params.zero_point
    return _as_codes(q, np.int8 if params.signed else np.uint8)


def _as_codes(values: Float[AnyArray, "..."], dtype: Any) -> Integer[AnyArray, "..."]:
    """Whole numbers in the type of codes; NaN has some code, on the host as on a device."""
    with np.errstate(invalid="ignore"):
        return values.astype(dtype)


def dequantize(q: Integer[ArrayLike, "..."], params: QuantizerParams) -> Float[AnyArray, "..."]:
    """Compute the real numbers of codes, ``scale * (q - zero_point)``, in float32, on the host for arrays of NumPy.

    >>> dequantize(jnp.array([0, 5, 15]), params_from_range(-5.0, 10.0, bits=4)).tolist()
    [-5.0, 0.0, 10.0]

    Args:
      q: codes of any shape that broadcasts with ``params.scale``.
      params: the quantizer.
    """
    q = namespace_of(q, params.scale).asarray(q, np.float32)  # exact: codes are small integers
    if params.zero_point is not None:
        q = q - params.zero_point
    return q * params.scale


def fake_quant(x: Float[ArrayLike, "*shape"], params: QuantizerParams) -> Float[AnyArray, "*shape"]:
    """Quantize and dequantize, with learned-step-size gradients.

    The value equals ``dequantize(quantize(x, params), params)``. The gradient to `x` is 1 strictly inside
    the represented range and 0 elsewhere; that to ``params.scale`` is ``round(x / scale) - x / scale``
    inside and the clipped ``q - zero_point`` elsewhere (Esser et al., "Learned Step Size Quantization",
    arXiv 1902.08153, without their gradient scale); that to ``params.zero_point`` is 0 inside and
    ``-scale`` elsewhere (as for the offset of LSQ+, arXiv 2004.09576).

    >>> fake_quant(jnp.array([-9.0, 0.4, 2.6]), params_from_range(-5.0, 10.0, bits=4)).tolist()
    [-5.0, 0.0, 3.0]

    Args:
      x: numbers of any shape against which ``params.scale`` broadcasts.
      params: the quantizer.

    Returns:
      Array in the shape and floating dtype of `x`; the arithmetic is float32.

    Raises:
      TypeError, ValueError: ``params.bits`` is not an integer from 2 to 8.
    """
    dtype = jnp.result_type(x)
    out = ste_round(_clipped(x, params)) * params.scale
    return out.astype(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A tensor held as integer codes; takes the place of an array leaf (a pytree node of its own).

    Attributes:
      qvalue: codes in the shape of the tensor, int8 if signed, else uint8, one code to an element
        (see `pack` for the stored form).
      scale: float32, same rank as `qvalue`, size 1 on all but the channel axes.
      zero_point: integers held in float32, in the shape of `scale`; None if symmetric.
      bits: code width, 2 to 8 (static).
      signed: whether codes are two's complement (static).
      dtype: name of the dtype that `dequantize` returns, that of the original tensor (static).

    Nothing is checked on construction, since JAX rebuilds nodes around all manner of leaves; make one
    with `quantize_tensor`.
    """

    qvalue: Any
    scale: Any
    zero_point: Any
    bits: int = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.qvalue.shape)

    @property
    def ndim(self) -> int:
        """Rank of the tensor."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def params(self) -> QuantizerParams:
        """The quantizer of the codes."""
        return QuantizerParams(self.scale, self.zero_point, bits=self.bits, signed=self.signed)

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the packed codes (see `pack`) and of the scale and zero point."""
        codes = -(-self.size * storage_bits(self.bits) // 8)
        return codes + sum(4 * math.prod(a.shape) for a in (self.scale, self.zero_point) if a is not None)

    def dequantize(self) -> Float[AnyArray, "..."]:
        """The real tensor, in the original dtype."""
        return dequantize(self.qvalue, self.params).astype(self.dtype)

    def centered(self) -> Integer[AnyArray, "..."]:
        """Codes less the zero point: the real tensor is the scale times them.

        Returns:
          int8 if symmetric or of at most 7 bits, where it always fits. Asymmetric 8-bit codes (and unsigned 8-bit codes
          without a zero point) span up to ``[-255, 255]`` and come as int16. A NumPy array if the codes are one.
        """
        return centered_codes(self.qvalue, self.params).astype(np.int8 if int8_zero(self.params) is None else np.int16)

    def with_centered(self, codes: Float[AnyArray, "..."]) -> QTensor:
        """The tensor of other codes, given less the zero point: the inverse of `centered`."""
        codes = codes if self.zero_point is None else codes + self.zero_point
        return dataclasses.replace(self, qvalue=_as_codes(codes.round(), self.qvalue.dtype))

    def __repr__(self) -> str:
        shape = getattr(self.qvalue, "shape", None)
        # A leaf need not be an array (see above), so show what is not one by its type.
        what = f"shape={tuple(shape)}" if shape is not None else f"qvalue={type(self.qvalue).__name__}"
        scale = getattr(self.scale, "shape", None)
        per = tuple(scale) if scale is not None else type(self.scale).__name__
        kind = "symmetric" if self.zero_point is None else "asymmetric"
        sign = "signed" if self.signed else "unsigned"
        return f"QTensor({what}, bits={self.bits}, {kind}, {sign}, scale={per}, dtype={self.dtype})"


def quantize_tensor(w: Float[AnyArray, "*shape"], params: QuantizerParams) -> QTensor:
    """Quantize an array to the nearest codes.

    Args:
      w: floating array.
      params: quantizer whose scale is a scalar, or has the rank of `w` and on each axis size 1 or that
        of `w`.

    Returns:
      The quantized tensor, which remembers the dtype of `w`; of arrays of NumPy if `w` and the scale are.

    Raises:
      TypeError: `w` is not floating.
      ValueError: the shape of ``params.scale`` does not fit `w`.
    """
    xp = namespace_of(w, params.scale)
    w = xp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w: expected a floating array, found dtype {w.dtype}; convert it with w.astype(jnp.float32).")
    scale = xp.asarray(params.scale, np.float32)
    if scale.ndim == 0:
        scale = scale.reshape((1,) * w.ndim)
    if scale.ndim != w.ndim or any(s not in (1, d) for s, d in zip(scale.shape, w.shape, strict=True)):
        raise ValueError(
            f"params.scale: expected a scalar, or rank {w.ndim} with sizes 1 or those of w {w.shape}, found shape "
            f"{scale.shape}; keep reduced axes as size 1 (keepdims=True)."
        )
    zero_point = params.zero_point
    if zero_point is not None:
        zero_point = xp.broadcast_to(xp.asarray(zero_point, np.float32), scale.shape)
    params = dataclasses.replace(params, scale=scale, zero_point=zero_point)
    return QTensor(quantize(w, params), scale, zero_point, bits=params.bits, signed=params.signed, dtype=w.dtype.name)
