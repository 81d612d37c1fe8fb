"""Convolutions and matrix products in ONNX."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from dfq_jax.export.onnx.batched import Shape
from dfq_jax.export.onnx.operations import Unsupported, spread
from dfq_jax.export.onnx.quantization import INTEGER_TYPES, IntegerWeights, integer_bias, scalar_params, stored_codes
from dfq_jax.export.onnx.writer import Value, Writer, constant, plain
from dfq_jax.graph import LayerForm, Op, operand_axes
from dfq_jax.quantizers import MAX_BITS, QTensor, QuantizerParams


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """The kernel of a product, its output channels first: `[O, I / groups, ...]`, or `[O, I]` of a matrix product.

    Attributes:
      weights: float64 numbers or integer codes.
      bias: added to each channel of the result, `[O]`, float64; None for nothing.
      name: of the weights.
      input_scale: of quantized activations; None for float ones.
      bias_after: whether the bias is added to the result in float; otherwise it is inside the product.
      dtype: in which 8-bit codes are stored.
    """

    weights: np.ndarray | IntegerWeights
    name: str
    bias: np.ndarray | None = None
    input_scale: float | None = None
    bias_after: bool = False
    dtype: np.dtype = INTEGER_TYPES["u8u8"][1]

    def times(self, factor: np.ndarray, offset: np.ndarray) -> Kernel | None:
        """With the result times a factor plus an offset for each channel; None where integer codes cannot have it."""
        weights = self.weights
        if isinstance(weights, IntegerWeights):
            weights = weights.times(factor)
        else:
            weights = weights * factor.reshape(-1, *[1] * (weights.ndim - 1))
        bias = offset if self.bias is None else self.bias * factor + offset
        return None if weights is None else dataclasses.replace(self, weights=weights, bias=bias)

    def write(
        self,
        writer: Writer,
        move: Callable[[np.ndarray], np.ndarray] = np.asarray,
        axis: int = 0,
        *,
        apart: bool = False,
    ) -> str:
        """The tensor of the weights, rearranged so that `axis` holds the channels."""
        if isinstance(self.weights, IntegerWeights):
            return self.weights.moved(move).write(writer, axis, self.name, self.dtype, apart=apart)
        return writer.initializer(move(self.weights), self.name)

    def with_bias_placed(self, *, after: bool, among_codes: bool) -> Kernel:
        """With the bias inside the product where integer kernels take it, and after it elsewhere.

        Integer kernels take it in int32, in steps of their accumulator. Half of such a step moves some results to the
        next code of an activation; with fewer bits than 8, many. There, where the bias does not fit (a dead input has a
        tiny scale), and where the result stays in float, it is added afterwards: ONNX Runtime would turn one in float
        into int32 by itself, and saturate it.

        Args:
          after: whether to add it afterwards in any case.
          among_codes: whether activations of the network are quantized.
        """
        if not isinstance(self.weights, IntegerWeights) and among_codes:
            # Between codes ONNX Runtime quantizes float weights, too, unless something stands after the product.
            bias = np.zeros(len(self.weights)) if self.bias is None else self.bias
            return dataclasses.replace(self, bias=bias, bias_after=True)
        if self.bias is None or self.input_scale is None:
            return self
        after = after or self.bias_after or self._integer_bias() is None
        return dataclasses.replace(self, bias_after=after)

    def _integer_bias(self) -> np.ndarray | None:
        return integer_bias(self.bias, self.weights.scale * self.input_scale)

    def write_bias(self, writer: Writer) -> list[str]:
        """The bias as an optional input of the product; in int32 where both operands are quantized."""
        if self.bias is None or self.bias_after:
            return []
        name = f"{self.name}/bias"
        if self.input_scale is None:
            return [writer.initializer(self.bias.astype(np.float32), name)]
        scale = (self.weights.scale * self.input_scale).astype(np.float32)
        inputs = [writer.initializer(self._integer_bias(), name), writer.initializer(scale, f"{name}/scale")]
        return [writer.node("DequantizeLinear", inputs, axis=0, name=f"{name}/dequantized")]

    def add_bias(self, writer: Writer, result: str, trailing: int = 0) -> str:
        """The product's tensor with a bias that is not inside; so many axes follow that of the channels."""
        if self.bias is None or not self.bias_after:
            return result
        bias = -self.bias.astype(np.float32).reshape(-1, *[1] * trailing)
        # A subtraction, because ONNX Runtime would move an addition into the product and round it there.
        return writer.node("Sub", [result, writer.initializer(bias, f"{self.name}/negative_bias")])


def channels_first(op: Op, kernel: Any, side: int) -> np.ndarray:
    """A kernel operand with its output channels first, those of a matrix product merged as its other axes are."""
    axes = operand_axes(op, side, np.ndim(kernel))
    kernel = np.asarray(kernel).transpose(axes.order)
    if op.name == "conv_general_dilated":
        return kernel
    return kernel.reshape(-1, math.prod(kernel.shape[kernel.ndim - len(axes.summed) :]))


def layer_kernel(
    form: LayerForm, leaf: Any, params: QuantizerParams | None, *, four_bit: bool, dtype: np.dtype
) -> Kernel:
    """The kernel of a layer that reads activations quantized so (None for float), without bias."""
    side, name = form.layer.kernel_operand, form.layer.kernel
    if not isinstance(leaf, QTensor):
        kernel = np.asarray(form.rearrange_kernel(leaf)).astype(np.float64)
        return Kernel(weights=channels_first(form.op, kernel, side), name=name)
    array, zero, bits, limits = stored_codes(leaf, four_bit=four_bit)

    def per_channel(values: Any) -> np.ndarray:
        return np.asarray(form.channel_vector(np.asarray(values, np.float32)), np.float64).reshape(-1)

    weights = IntegerWeights(
        array=channels_first(form.op, form.rearrange_kernel(array), side),
        scale=per_channel(leaf.scale),
        zero_point=None if zero is None else per_channel(zero).astype(np.int64),
        bits=bits,
        limits=limits,
    )
    weights = weights.times(np.ones(len(weights.scale)))  # gives channels without weights a scale
    if params is None:
        return Kernel(weights=weights, name=name, dtype=dtype)
    narrow = min(params.bits, leaf.bits) < MAX_BITS
    return Kernel(weights=weights, name=name, input_scale=scalar_params(params)[0], bias_after=narrow, dtype=dtype)


# --- convolutions ---


def convolution(writer: Writer, op: Op, x: Value, kernel: Kernel, shape: Shape) -> Value:
    """A convolution, or a transposed one where the input is dilated."""
    params = op.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise Unsupported("it groups the batch")
    inputs = [writer.whole(x, numbers.lhs_spec)]
    if any(d != 1 for d in params["lhs_dilation"]):
        if _is_transposed(op, kernel):
            return _transposed_convolution(writer, op, inputs[0], kernel, shape)
        sizes, zero = [x.shape[a] for a in numbers.lhs_spec], writer.initializer(np.float32(0))
        inputs = [spread(writer, inputs[0], sizes, [0, 0, *(d - 1 for d in params["lhs_dilation"])], zero)]
    padding = params["padding"]
    if any(low < 0 or high < 0 for low, high in padding):
        pads = [0, 0, *(low for low, _ in padding), 0, 0, *(high for _, high in padding)]
        inputs = [writer.node("Pad", [inputs[0], writer.integers(pads)])]
        padding = [(0, 0)] * len(padding)
    name = writer.node(
        "Conv",
        [*inputs, kernel.write(writer), *kernel.write_bias(writer)],
        group=params["feature_group_count"],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        pads=[low for low, _ in padding] + [high for _, high in padding],
        kernel_shape=_spatial(kernel),
    )
    name = kernel.add_bias(writer, name, trailing=len(padding))
    return Value(shape=shape, axes=tuple(numbers.out_spec), name=name)


def _spatial(kernel: Kernel) -> list[int]:
    weights = kernel.weights
    return list((weights.array if isinstance(weights, IntegerWeights) else weights).shape[2:])


def _output_padding(op: Op, kernel: Kernel) -> tuple[list[list[int]], list[int]]:
    """Pads (low, high) of the transposed convolution, and what it computes more at the high end."""
    reach = [(k - 1) * d for k, d in zip(_spatial(kernel), op.params["rhs_dilation"], strict=True)]
    low, high = ([r - p for r, p in zip(reach, side, strict=True)] for side in zip(*op.params["padding"], strict=True))
    return [low, [max(h, 0) for h in high]], [max(-h, 0) for h in high]


def _is_transposed(op: Op, kernel: Kernel) -> bool:
    """Whether ONNX's transposed convolution computes a convolution of a dilated input.

    Scales of its weights lie on an axis that groups do not share.
    """
    params, ((low, _), more) = op.params, _output_padding(op, kernel)
    grouped = params["feature_group_count"] > 1 and isinstance(kernel.weights, IntegerWeights)
    fits = min(low) >= 0 and all(m < d for m, d in zip(more, params["lhs_dilation"], strict=True))
    return fits and not grouped and all(s == 1 for s in params["window_strides"])


def _transposed_convolution(writer: Writer, op: Op, x: str, kernel: Kernel, shape: Shape) -> Value:
    """A convolution of a dilated input is the transposed one by the flipped kernel, `[I, O / groups, ...]`."""
    params, (pads, more) = op.params, _output_padding(op, kernel)
    groups, size = params["feature_group_count"], _spatial(kernel)
    flip = (..., *[slice(None, None, -1)] * len(size))
    if groups > 1:

        def move(w: np.ndarray) -> np.ndarray:
            grouped = w[flip].reshape(groups, w.shape[0] // groups, *w.shape[1:])
            return grouped.swapaxes(1, 2).reshape(groups * w.shape[1], -1, *size)
    else:

        def move(w: np.ndarray) -> np.ndarray:
            return w[flip].swapaxes(0, 1)

    name = writer.node(
        "ConvTranspose",
        [x, kernel.write(writer, move, axis=1), *kernel.write_bias(writer)],
        group=groups,
        strides=list(params["lhs_dilation"]),
        dilations=list(params["rhs_dilation"]),
        pads=[*pads[0], *pads[1]],
        output_padding=more,
        kernel_shape=size,
    )
    name = kernel.add_bias(writer, name, trailing=len(size))
    return Value(shape=shape, axes=tuple(params["dimension_numbers"].out_spec), name=name)


# --- matrix products ---


def has_batch_axes(op: Op) -> bool:
    """Whether a product is one of many matrices, with an axis that both operands have."""
    return op.name == "dot_general" and bool(op.params["dimension_numbers"][1][0])


def matrix_product(writer: Writer, op: Op, x: Value, kernel: Kernel, kernel_shape: Shape, side: int, shape: Shape):
    """The product of a value with a kernel that stands on one side of it; MatMul, Gemm for a matrix and a bias."""
    _, outer, inner = operand_axes(op, 1 - side, len(x.shape))
    own_outer = operand_axes(op, side, len(kernel_shape)).free
    order = [a for a in x.axes if a not in inner]  # transposes least
    tensor = writer.whole(x, (*order, *inner))
    if len(inner) != 1:
        size = math.prod(x.shape[a] for a in inner)
        tensor = writer.reshape(tensor, [*(x.shape[a] for a in order), size])
    weights = kernel.write(writer, np.transpose, axis=1, apart=kernel.input_scale is None)
    if len(order) == 1 and not kernel.bias_after:
        result = writer.node("Gemm", [tensor, weights, *kernel.write_bias(writer)])
    else:  # MatMul takes no bias
        kernel = dataclasses.replace(kernel, bias_after=True)
        result = kernel.add_bias(writer, writer.node("MatMul", [tensor, weights]))
    if len(own_outer) != 1:
        result = writer.reshape(result, [*(x.shape[a] for a in order), *(kernel_shape[a] for a in own_outer)])
    # The program's result has the axes of the left operand first.
    first, own_first = (0, len(outer)) if side == 1 else (len(own_outer), 0)
    axes = [first + outer.index(a) for a in order] + [own_first + i for i in range(len(own_outer))]
    return Value(shape=shape, axes=tuple(axes), name=result)


def kernel_operand(writer: Writer, op: Op, kernel: Kernel, kernel_shape: tuple[int, ...], side: int) -> Value:
    """A kernel as a tensor in the layout of the program's operand, for products that `matrix_product` cannot do."""
    axes = operand_axes(op, side, len(kernel_shape)).order
    name = writer.reshape(kernel.write(writer), [kernel_shape[a] for a in axes])
    return Value(shape=kernel_shape, axes=axes, name=name)


def einsum(writer: Writer, op: Op, left: Value, right: Value, shape: Shape) -> Value:
    """Any matrix product."""
    contract, batch = op.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    labels: list[dict[int, str]] = [{}, {}]
    result = ""
    for pairs, kept in ((batch, True), (contract, False)):
        for a, b in zip(*pairs, strict=True):
            labels[0][a] = labels[1][b] = letter = next(letters)
            result += letter if kept else ""
    terms, names = [], []
    for value, own in zip((left, right), labels, strict=True):
        for axis in range(len(value.shape)):
            if axis not in own:
                own[axis] = next(letters)
                result += own[axis]
        axes = value.axes
        terms.append("".join(own[a] for a in axes))
        names.append(writer.whole(value, axes))
    name = writer.node("Einsum", names, equation=f"{','.join(terms)}->{result}")
    return plain(name, shape)


def along_axis(vector: np.ndarray, axis: int, rank: int) -> Value:
    """`[channels]` as a constant that broadcasts along an axis."""
    shape = [1] * rank
    shape[axis] = -1
    return constant(np.asarray(vector, np.float32).reshape(shape))
