"""Quantized activations and weights in ONNX: pairs of QuantizeLinear and DequantizeLinear (QDQ)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dfq_jax.export.onnx.writer import Value, Writer
from dfq_jax.quantizers import QTensor, QuantizerParams, bounds, pack

# Types of activations and weights in the file, named as ONNX Runtime names its integer kernels.
INTEGER_TYPES = {
    "u8u8": (np.dtype(np.uint8), np.dtype(np.uint8)),
    "u8s8": (np.dtype(np.uint8), np.dtype(np.int8)),
    "s8s8": (np.dtype(np.int8), np.dtype(np.int8)),
}


def retyped(codes: np.ndarray | np.generic, dtype: np.dtype) -> np.ndarray | np.generic:
    """8-bit codes, or their zero points, moved by half the range where signedness changes: the same real numbers."""
    codes = np.asarray(codes)
    return (codes.astype(np.int64) + np.iinfo(dtype).min - np.iinfo(codes.dtype).min).astype(dtype)


def quantize_dequantize(
    writer: Writer, value: Value, params: QuantizerParams, axes: Sequence[int], name: str, dtype: np.dtype
) -> Value:
    """An activation rounded to its codes, in an 8-bit type with one scale.

    QuantizeLinear saturates at 8 bits; fewer bits come from clipping to the represented range before it.
    """
    scale, zero = scalar_params(params)
    tensor = writer.arranged(value, axes)
    if params.bits < 8:
        limits = [np.float32(np.float32(scale) * (q - zero)) for q in bounds(params.bits, params.signed)]
        tensor = writer.node("Clip", [tensor, *map(writer.initializer, limits)], name=f"{name}/clipped")
    parameters = [
        writer.initializer(np.float32(scale), f"{name}/scale"),
        writer.initializer(
            retyped(np.array(zero, np.int8 if params.signed else np.uint8), dtype), f"{name}/zero_point"
        ),
    ]
    codes = writer.node("QuantizeLinear", [tensor, *parameters], name=f"{name}/quantized")
    result = writer.node("DequantizeLinear", [codes, *parameters], name=f"{name}/dequantized")
    return dataclasses.replace(value, name=result, axes=tuple(axes), array=None)


def scalar_params(params: QuantizerParams) -> tuple[float, int]:
    """Scale and zero point of an activation quantizer, one for the tensor.

    Raises:
      ValueError: there are several.
    """
    scale = np.asarray(params.scale, np.float32).reshape(-1)
    zero = np.zeros(1) if params.zero_point is None else np.asarray(params.zero_point).reshape(-1)
    if scale.size != 1 or zero.size != 1:
        raise ValueError(f"activations: expected one scale for a tensor, found {scale.size}; use per-tensor ranges.")
    return float(scale[0]), int(zero[0])


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerWeights:
    """Integer weights `[channels, ...]`: real = scale (codes - zero_point).

    Attributes:
      array: int8 or uint8 codes.
      scale: of each channel, `[channels]`, float64.
      zero_point: the same, integers; None for zero.
      bits: width they are stored in, 8 or 4.
      limits: smallest and largest code.
    """

    array: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    limits: tuple[int, int]

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> IntegerWeights:
        """The codes with their axes moved."""
        return dataclasses.replace(self, array=move(self.array))

    def times(self, factor: np.ndarray) -> IntegerWeights | None:
        """The weights times a factor for each channel; None where that takes a code that the type does not have.

        Scales stay positive: where the factor is negative, the codes change sign.
        """
        low, high = self.limits
        codes, zero = self.array.astype(np.int64), self.zero_point
        negative = factor < 0
        mirror = 0 if zero is None else low + high  # with a zero point that moves along, every code has a counterpart
        codes = np.where(_column(negative, codes), mirror - codes, codes)
        zero = None if zero is None else np.where(negative, mirror - zero, zero)
        if codes.size and (codes.min() < low or codes.max() > high):
            return None
        scale = self.scale * np.abs(factor)
        # Channels without any weight: a scale of zero is none, and with a tiny one the bias is no int32.
        base = np.zeros(len(scale), np.int64) if zero is None else zero
        dead = (scale == 0) | np.all(codes == _column(base, codes), axis=tuple(range(1, codes.ndim)))
        codes = np.where(_column(dead, codes), _column(base, codes), codes).astype(self.array.dtype)
        return dataclasses.replace(self, array=codes, scale=np.where(dead, 1.0, scale), zero_point=zero)

    def write(self, writer: Writer, axis: int, name: str, dtype: np.dtype, *, apart: bool = False) -> str:
        """The name of the dequantized weights, with channels on `axis`; 8-bit codes in the type given.

        The scale comes in a multiplication of its own if `apart`: so ONNX Runtime's product with packed weights
        (MatMulNBits), which by default rounds float activations to 8 bits, does not take them.
        """

        def tensor(array: np.ndarray, name: str) -> str:
            array = array.astype(self.array.dtype)
            if self.bits == 8:
                return writer.initializer(retyped(array, dtype), name)
            return writer.four_bits(pack(array, 4), array.shape, array.dtype == np.int8, name)

        scale = writer.initializer(self.scale.astype(np.float32), f"{name}/scale")
        inputs = [tensor(self.array, name), scale]
        if apart:
            inputs[1] = writer.initializer(np.ones(len(self.scale), np.float32), f"{name}/ones")
        zero = np.zeros(len(self.scale), np.int64) if self.zero_point is None else self.zero_point
        inputs.append(tensor(zero, f"{name}/zero_point"))
        if not apart:
            return writer.node("DequantizeLinear", inputs, axis=axis, name=f"{name}/dequantized")
        weights = writer.node("DequantizeLinear", inputs, axis=axis, name=f"{name}/centered")
        trailing = writer.reshape(scale, [-1, *[1] * (self.array.ndim - 1 - axis)])
        return writer.node("Mul", [weights, trailing], name=f"{name}/dequantized")


def _column(vector: np.ndarray, like: np.ndarray) -> np.ndarray:
    return vector.reshape(-1, *[1] * (like.ndim - 1))


def stored_codes(kernel: QTensor, *, four_bit: bool) -> tuple[np.ndarray, np.ndarray | None, int, tuple[int, int]]:
    """Codes of a kernel leaf as they are stored: (codes, zero point in the shape of the scale, width, limits).

    Codes less their zero point fit int8 unless they are asymmetric of 8 bits: so there is no zero point left, which
    is what the integer kernels of runtimes are made for. In four bits they keep it.
    """
    zero = np.zeros(np.shape(kernel.scale)) if kernel.zero_point is None else np.asarray(kernel.zero_point)
    symmetric = kernel.signed and kernel.zero_point is None
    if four_bit and kernel.bits <= 4:
        low = -8 if symmetric else bounds(kernel.bits, kernel.signed)[0]
        high = 7 if symmetric else bounds(kernel.bits, kernel.signed)[1]
        return np.asarray(kernel.qvalue), None if symmetric else zero, 4, (low, high)
    centered = np.asarray(kernel.centered())
    if centered.dtype == np.int8:
        return centered, None, 8, (-128, 127)
    return np.asarray(kernel.qvalue), zero, 8, bounds(kernel.bits, kernel.signed)


def integer_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """A bias in steps of the accumulator, int32; None if it does not fit."""
    codes = np.round(bias / scale)
    return codes.astype(np.int32) if np.all(np.abs(codes) < 2.0**31) else None
