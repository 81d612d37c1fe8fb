"""What a layer does with whatever values it meets: its product, the layout of its operands, and both as matrices.

As a product of matrices every layer is the same, whatever its kind and the layout of its kernel. In each group,
`result[m, o] = sum_d patches[m, d] kernel[o, d]`: m runs over images and positions, d over the input channels of the
group and the window, channels first. Dense layers have a window of one; a dense layer with batch axes has a group for
each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dfq_jax.graph.batch_norm import apart
from dfq_jax.graph.convolutions import Product, by_platform, cpu_product
from dfq_jax.graph.tracing.axes import Axes, operand_axes, result_axes
from dfq_jax.graph.tracing.layout import LAYOUT, moved_elements
from dfq_jax.graph.tracing.program import PRODUCTS, Op, Program, Shape
from dfq_jax.graph.tracing.structure import Layer
from dfq_jax.quantizers import AnyArray

_CAST = "convert_element_type"


def _rearranged(op: Op, value: AnyArray) -> AnyArray:
    """The result of an operation of a chain: on the host for an array of NumPy, where it compiles nothing."""
    return moved_elements(op, value) if isinstance(value, np.ndarray) and op.name in LAYOUT else op(value)[0]


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """How a kernel leaf becomes a matrix; hashable, and the same for layers of the same kind and shape.

    Attributes:
      shape: of the leaf.
      chain: operations between leaf and layer, other than casts.
      order: of the axes, then.
      sizes: of the matrix, groups, outputs, inputs and window; outputs and inputs of one group.
    """

    shape: tuple[int, ...]
    chain: tuple[Op, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int, int]

    def matrix(self, leaf: Shaped[AnyArray, "..."]) -> Shaped[AnyArray, "g o i k"]:
        """The leaf as a matrix, of NumPy if the leaf is."""
        for op in self.chain:
            leaf = _rearranged(op, leaf)
        return leaf.transpose(self.order).reshape(self.sizes)

    def leaf(self, matrix: Float[AnyArray, "g o i k"]) -> Float[AnyArray, "..."]:
        """The inverse of `matrix`, float32."""
        if isinstance(matrix, np.ndarray):
            places = self.matrix(np.arange(matrix.size).reshape(self.shape))
            leaf = np.empty(matrix.size, np.float32)
            leaf[places] = matrix
            return leaf.reshape(self.shape)
        # The way there only rearranges elements, so its transpose is the way back.
        transpose = jax.linear_transpose(self.matrix, jax.ShapeDtypeStruct(self.shape, jnp.float32))
        return transpose(matrix.astype(jnp.float32))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerForm:
    """What a layer does, whatever values it meets; hashable. `Graph.form` has that of each layer.

    Attributes:
      layer: whose form it is.
      op: its product.
      input_chain: the operations from the tensor that it reads to the product.
      kernel_chain: those from the kernel's leaf to the product.
      source_shape: of the tensor.
      shapes: of the product's operands.
      result_shape: of its result.
    """

    layer: Layer
    op: Op
    input_chain: tuple[Op, ...]
    kernel_chain: tuple[Op, ...]
    source_shape: Shape
    shapes: tuple[Shape, Shape]
    result_shape: Shape

    @classmethod
    def of(cls, layer: Layer, program: Program) -> LayerForm:
        """The form of a program's layer."""
        op = program.ops[layer.op]
        input_chain, kernel_chain = (tuple(program.ops[i] for i in c) for c in (layer.input_chain, layer.kernel_chain))
        source = (*(step.inputs[0] for step in input_chain), op.inputs[1 - layer.kernel_operand])[0]
        return cls(
            layer=layer,
            op=op,
            input_chain=input_chain,
            kernel_chain=kernel_chain,
            source_shape=program.shape(source),
            shapes=(program.shape(op.inputs[0]), program.shape(op.inputs[1])),
            result_shape=program.shape(op.outputs[0]),
        )

    # --- axes ---

    @functools.cached_property
    def input_axes(self) -> Axes:
        """The axes of the operand that depends on x."""
        side = 1 - self.layer.kernel_operand
        return operand_axes(self.op, side, len(self.shapes[side]))

    @functools.cached_property
    def kernel_axes(self) -> Axes:
        """The axes of the kernel operand."""
        side = self.layer.kernel_operand
        return operand_axes(self.op, side, len(self.shapes[side]))

    @functools.cached_property
    def channel_axes(self) -> tuple[int, ...]:
        """Axes of the result that run over the layer's output channels."""
        return result_axes(self.op, self.layer.kernel_operand, self.kernel_axes, len(self.result_shape))

    @functools.cached_property
    def channel_shape(self) -> tuple[int, ...]:
        """The shape of a value for each output channel that broadcasts against the result."""
        return tuple(size if axis in self.channel_axes else 1 for axis, size in enumerate(self.result_shape))

    # --- operands ---

    def rearrange(self, source: AnyArray, pad_value: jax.Array | int | float = 0) -> AnyArray:
        """The operand made from a value of the tensor, casts left out; padding takes `pad_value`."""
        value = source
        for op in self.input_chain:
            if op.name == "pad":
                value = lax.pad(value, jnp.asarray(pad_value, value.dtype), op.params["padding_config"])
            elif op.name != _CAST:
                value = _rearranged(op, value)
        return value

    def rearrange_kernel(self, leaf: AnyArray, *, cast: bool = False) -> AnyArray:
        """The kernel operand made from a value of the leaf, with or without the program's casts."""
        value = leaf
        for op in self.kernel_chain:
            if cast or op.name != _CAST:
                (value,) = op(value)
        return value

    def pad(self, operand: jax.Array, value: jax.Array | int | float) -> jax.Array:
        """A convolution's operand with its padding, and what is between its dilated positions, of a given value."""
        params, config = self.op.params, [(0, 0, 0)] * operand.ndim
        spatial = zip(self.input_axes.free[1:], params["padding"], params["lhs_dilation"], strict=True)
        for axis, (low, high), dilation in spatial:
            config[axis] = (low, high, dilation - 1)
        return lax.pad(operand, jnp.asarray(value, operand.dtype), config)

    # --- matrices ---

    @functools.cached_property
    def kernel(self) -> KernelForm:
        """How the kernel becomes a matrix."""
        chain = tuple(op for op in self.kernel_chain if op.name != _CAST)
        shape = self.shapes[self.layer.kernel_operand]
        batch, free, summed = ([shape[a] for a in axes] for axes in self.kernel_axes)
        if self.layer.kind == "conv":
            (outputs,), (inputs, *window), groups = free, summed, self.layer.groups
            sizes = groups, outputs // groups, inputs, math.prod(window)
        else:
            sizes = math.prod(batch), math.prod(free), math.prod(summed), 1
        return KernelForm(tuple(self.layer.kernel_shape), chain, self.kernel_axes.order, sizes)

    def patches(self, operand: Float[Array, "..."]) -> Float[Array, "m g d"]:
        """What the kernel meets at each image and position, `[positions, groups, inputs * window]`, float32."""
        x = operand.astype(jnp.float32)
        if self.layer.kind == "dense":
            return self._grouped(x)
        params, (images, *positions) = self.op.params, self.input_axes.free
        x = self.pad(x, 0).transpose(images, *positions, *self.input_axes.summed)
        window = [self.shapes[1][a] for a in self.kernel_axes.summed[1:]]
        size = [self.result_shape[a] for a in params["dimension_numbers"].out_spec[2:]]
        shifted = []
        for offset in itertools.product(*map(range, window)):
            start = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
            stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, self.layer.strides, strict=True)]
            shifted.append(lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *self.layer.strides, 1)))
        stacked = jnp.stack(shifted, axis=-1)  # [images, ..., channels, window]
        groups = self.layer.groups
        return stacked.reshape(-1, groups, stacked.shape[-2] // groups * stacked.shape[-1])

    def input_channels(self, axis: int) -> Int[np.ndarray, "g i"] | None:
        """For each input of each group, the index along an axis of the tensor that the layer reads.

        None if there is no such index because an input runs over several (a layer of another axis, say).
        """
        shape = self.source_shape
        labels = np.arange(1, shape[axis] + 1, dtype=np.float32)
        labels = labels.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        with jax.ensure_compile_time_eval():
            operand = np.asarray(self.rearrange(np.broadcast_to(labels, shape)))  # padding has the label 0
        found = self._grouped(operand)
        largest = found.max(0)
        unique = np.where(found == 0, largest, found).min(0) == largest
        return largest.astype(int) - 1 if unique.all() else None

    def _grouped(self, operand: Any) -> Any:
        """`[positions, groups, inputs]` of an operand, the window left out."""
        batch, free, summed = self.input_axes
        groups = self.layer.groups * math.prod(operand.shape[a] for a in batch)
        inputs = math.prod(operand.shape[a] for a in summed) // self.layer.groups
        return operand.transpose(*free, *batch, *summed).reshape(-1, groups, inputs)

    # --- products ---

    def primitive(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """The program's own primitive on other operands of the same types."""
        return self.op(*self._ordered(operand, kernel))[0]

    def product(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """What `primitive` computes, in the way that is fast on the platform."""
        on_cpu = self.on_cpu(self.op.params)
        return (
            self.primitive(operand, kernel) if on_cpu is None else by_platform(on_cpu, self.primitive, operand, kernel)
        )

    def float32_product(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """The product of float32 operands, in full precision."""
        return self._product(operand, kernel, jnp.float32)

    def integer_product(
        self, operand: jax.Array, kernel: jax.Array, pad_value: jax.Array | None, dtype: Any = jnp.int32
    ) -> jax.Array:
        """The product of int8 operands, summed in `dtype`; a convolution's padding takes `pad_value` (None: 0)."""
        if self.layer.kind == "dense" or pad_value is None:
            return self._product(operand, kernel, dtype)
        return self._product(self.pad(operand, pad_value), kernel, dtype, padded=True)

    def on_cpu(self, params: Mapping[str, Any]) -> Product | None:
        """How the layer, with these parameters of its primitive, is computed on CPU; None for as anywhere else."""
        conv = self.layer.kind == "conv" and self.layer.kernel_operand == 1
        return cpu_product(params, *self.shapes) if conv else None

    def _ordered(self, operand: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (kernel, operand) if self.layer.kernel_operand == 0 else (operand, kernel)

    def _product(self, operand: jax.Array, kernel: jax.Array, dtype: Any, padded: bool = False) -> jax.Array:
        precision = lax.Precision.HIGHEST if jnp.issubdtype(operand.dtype, jnp.floating) else None
        params = {**self.op.params, "precision": precision, "preferred_element_type": dtype}
        if padded:
            none = len(params["padding"])
            params.update(padding=((0, 0),) * none, lhs_dilation=(1,) * none)

        def plain(operand: jax.Array, kernel: jax.Array) -> jax.Array:
            return PRODUCTS[self.op.name](*self._ordered(operand, kernel), **params)

        on_cpu = self.on_cpu(params)
        return plain(operand, kernel) if on_cpu is None else by_platform(on_cpu, plain, operand, kernel)

    # --- channels ---

    def channel_vector(self, per_channel: AnyArray) -> AnyArray:
        """A value per channel of the kernel leaf (kept dimensions), shaped to broadcast against the result.

        Raises:
          GraphError: it varies along an axis that the layer sums over.
        """
        self.layer.check_scale(jnp.shape(per_channel))
        kernel = self.rearrange_kernel(jnp.broadcast_to(per_channel, self.layer.kernel_shape))
        first = (..., *[0] * len(self.kernel_axes.summed))
        return kernel.transpose(self.kernel_axes.order)[first].reshape(self.channel_shape)

    def channel_mean(self, result: jax.Array) -> jax.Array:
        """Mean of the result per output channel, in float32, dimensions kept."""
        axes = tuple(a for a in range(result.ndim) if a not in self.channel_axes)
        return apart(result.astype(jnp.float32)).mean(axes, keepdims=True)

    def kernel_sum(self, kernel: jax.Array) -> jax.Array:
        """The sum of a kernel leaf over everything but its channels, shaped to broadcast against the result."""
        axes = tuple(a for a in range(kernel.ndim) if a not in self.layer.channel_axes)
        return self.channel_vector(kernel.astype(jnp.int32).sum(axes, keepdims=True))
