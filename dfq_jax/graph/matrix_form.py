"""A layer as a matrix product, whatever its kind and the layout of its kernel.

In each group, `result[m, o] = sum_d patches[m, d] kernel[o, d]`: m runs over images and positions, d over the input
channels of the group and the window, channels first. Dense layers have a window of one; a dense layer with batch axes
has a group for each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dfq_jax.graph.execution import LayerCall
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.tracing.program import Op
from dfq_jax.graph.tracing.structure import Layer
from dfq_jax.quantizers import QTensor, bounds


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

    def matrix(self, leaf: Float[Array, "..."]) -> Float[Array, "g o i k"]:
        """The leaf as a matrix."""
        for op in self.chain:
            (leaf,) = op(leaf)
        return leaf.transpose(self.order).reshape(self.sizes)

    def leaf(self, matrix: Float[Array, "g o i k"]) -> Float[Array, "..."]:
        """The inverse of `matrix`, float32."""
        # The way there only rearranges elements, so its transpose is the way back.
        transpose = jax.linear_transpose(self.matrix, jax.ShapeDtypeStruct(self.shape, jnp.float32))
        return transpose(matrix.astype(jnp.float32))[0]


def kernel_form(graph: Graph, layer: Layer) -> KernelForm:
    """The form of a layer's kernel."""
    program = graph.program
    op = program.ops[layer.op]
    chain = tuple(program.ops[i] for i in layer.kernel_chain if program.ops[i].name != "convert_element_type")
    shape = program.avals[op.inputs[layer.kernel_operand]].shape
    if layer.kind == "conv":
        order = tuple(op.params["dimension_numbers"].rhs_spec)
        outputs, inputs, *window = (shape[a] for a in order)
        sizes = layer.groups, outputs // layer.groups, inputs, math.prod(window)
    else:
        contract, batch = (axes[layer.kernel_operand] for axes in op.params["dimension_numbers"])
        free = [a for a in range(len(shape)) if a not in (*contract, *batch)]
        order = (*batch, *free, *contract)
        sizes = *(math.prod(shape[a] for a in axes) for axes in (batch, free, contract)), 1
    return KernelForm(tuple(layer.kernel_shape), chain, order, sizes)


def common_form(graph: Graph, path: str) -> KernelForm | None:
    """The form that a kernel has for all layers that read it; None where they see different matrices.

    Then what makes one layer's errors cancel says nothing about the others.
    """
    first, *others = (kernel_form(graph, layer) for layer in graph.kernels[path])
    if others:
        labels = np.arange(math.prod(first.shape), dtype=np.int32).reshape(first.shape)
        with jax.ensure_compile_time_eval():
            expected = np.asarray(first.matrix(labels))
            if not all(np.array_equal(np.asarray(form.matrix(labels)), expected) for form in others):
                return None
    return first


def patches(call: LayerCall) -> Float[Array, "m g d"]:
    """What a layer's kernel meets at each image and position, `[positions, groups, inputs * window]`, float32."""
    params, x = call.op.params, call.operand.astype(jnp.float32)
    if call.layer.kind == "dense":
        return _dense_operand(call, x)
    numbers = params["dimension_numbers"]
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    spatial = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(0, 0, 0), *((low, high, dilation - 1) for (low, high), dilation in spatial), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    kernel = call.op.inputs[call.layer.kernel_operand]
    shape = call.graph.program.avals[kernel].shape
    window = [shape[a] for a in numbers.rhs_spec[2:]]
    out = call.graph.program.avals[call.op.outputs[0]].shape
    size = [out[a] for a in numbers.out_spec[2:]]
    shifted = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, params["window_strides"], strict=True)]
        shifted.append(
            lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *params["window_strides"], 1))
        )
    stacked = jnp.stack(shifted, axis=-1)  # [images, ..., channels, window]
    groups = call.layer.groups
    return stacked.reshape(-1, groups, stacked.shape[-2] // groups * stacked.shape[-1])


def _dense_operand(call: LayerCall, x: Any) -> Any:
    contract, batch = (axes[1 - call.layer.kernel_operand] for axes in call.op.params["dimension_numbers"])
    free = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (free, batch, contract)]
    return x.transpose(*free, *batch, *contract).reshape(sizes)


def input_channels(graph: Graph, layer: Layer, axis: int) -> Int[np.ndarray, "g i"] | None:
    """For each input of each group, the index along an axis of the tensor that the layer reads.

    None if there is no such index because an input runs over several (a layer of another axis, say).
    """
    call = LayerCall(layer, graph.program.ops[layer.op], graph, *[None] * 3)
    shape = graph.tensor(layer.tensor).shape
    labels = 1 + np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    with jax.ensure_compile_time_eval():
        operand = np.asarray(call.rearrange(jnp.broadcast_to(labels, shape)))  # padding has the label 0
    if layer.kind == "conv":
        operand = np.moveaxis(operand, call.op.params["dimension_numbers"].lhs_spec[1], -1)
        found = operand.reshape(-1, layer.groups, operand.shape[-1] // layer.groups)
    else:
        found = _dense_operand(call, operand)
    largest = found.max(0)
    unique = np.where(found == 0, largest, found).min(0) == largest
    return largest.astype(int) - 1 if unique.all() else None


class Codes(NamedTuple):
    """A kernel's weights in units of their scale, in the form of `kernel_matrix`, float32.

    `codes` are centered (less the zero point), integers from `low` to `high`; the nearest ones are
    `clip(round(values), low, high)`.
    """

    values: Float[Array, "g o i k"]
    codes: Float[Array, "g o i k"]
    low: Float[Array, "g o i k"]
    high: Float[Array, "g o i k"]


@functools.partial(jax.jit, static_argnums=0)
def kernel_codes(form: KernelForm, kernel: QTensor, leaf: Float[Array, "..."]) -> Codes:
    """The quantized kernel of a layer and the float one as `Codes`."""
    qmin, qmax = bounds(kernel.bits, kernel.signed)
    zero = jnp.zeros_like(kernel.scale) if kernel.zero_point is None else kernel.zero_point
    values = leaf.astype(jnp.float32) / kernel.scale
    limits = (jnp.broadcast_to(q - zero, leaf.shape) for q in (qmin, qmax))
    return Codes(*(form.matrix(a) for a in (values, kernel.centered().astype(jnp.float32), *limits)))


@functools.partial(jax.jit, static_argnums=0)
def with_codes(form: KernelForm, kernel: QTensor, codes: Float[Array, "g o i k"]) -> QTensor:
    """The quantized kernel with other centered codes."""
    zero = 0.0 if kernel.zero_point is None else kernel.zero_point
    return dataclasses.replace(kernel, qvalue=(form.leaf(codes) + zero).astype(jnp.asarray(kernel.qvalue).dtype))


def quantized_kernels(
    graph: Graph, variables: Any, qvariables: Any
) -> dict[str, tuple[KernelForm, Float[Array, "..."], QTensor]]:
    """The form, the float leaf and the `QTensor` of each quantized kernel that has one form, by the kernel's path.

    Raises:
      ValueError: no kernel is quantized, or `variables` are not the float ones.
      GraphError: a tree is not the one that was traced.
    """
    floats, quantized = (graph.leaves_by_path(v) for v in (variables, qvariables))
    for path in graph.kernels:
        if isinstance(floats[path], QTensor):
            raise ValueError(f"variables: {path!r} is quantized; pass the float variables first.")
    paths = [path for path in graph.kernels if isinstance(quantized[path], QTensor)]
    if not paths:
        raise ValueError("qvariables: found no quantized kernel; pass what quantize_params returned.")
    forms = {path: common_form(graph, path) for path in paths}
    return {path: (form, floats[path], quantized[path]) for path, form in forms.items() if form is not None}
