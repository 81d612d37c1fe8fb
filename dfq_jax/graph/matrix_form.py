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

from dfq_jax.graph.form import KernelForm, LayerForm
from dfq_jax.graph.graph import Graph
from dfq_jax.quantizers import QTensor, bounds


def common_form(graph: Graph, path: str) -> KernelForm | None:
    """The form that a kernel has for all layers that read it; None where they see different matrices.

    Then what makes one layer's errors cancel says nothing about the others.
    """
    first, *others = (graph.form(layer).kernel for layer in graph.kernels[path])
    if others:
        labels = np.arange(math.prod(first.shape), dtype=np.int32).reshape(first.shape)
        with jax.ensure_compile_time_eval():
            expected = np.asarray(first.matrix(labels))
            if not all(np.array_equal(np.asarray(form.matrix(labels)), expected) for form in others):
                return None
    return first


def patches(form: LayerForm, operand: Float[Array, "..."]) -> Float[Array, "m g d"]:
    """What a layer's kernel meets at each image and position, `[positions, groups, inputs * window]`, float32."""
    x = operand.astype(jnp.float32)
    if form.layer.kind == "dense":
        return _dense_operand(form, x)
    params, (images, *positions) = form.op.params, form.input_axes.free
    x = form.pad(x, 0).transpose(images, *positions, *form.input_axes.summed)
    window = [form.shapes[1][a] for a in form.kernel_axes.summed[1:]]
    size = [form.result_shape[a] for a in params["dimension_numbers"].out_spec[2:]]
    shifted = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, params["window_strides"], strict=True)]
        shifted.append(
            lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *params["window_strides"], 1))
        )
    stacked = jnp.stack(shifted, axis=-1)  # [images, ..., channels, window]
    groups = form.layer.groups
    return stacked.reshape(-1, groups, stacked.shape[-2] // groups * stacked.shape[-1])


def _dense_operand(form: LayerForm, x: Any) -> Any:
    batch, free, summed = form.input_axes
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (free, batch, summed)]
    return x.transpose(*free, *batch, *summed).reshape(sizes)


def input_channels(form: LayerForm, axis: int) -> Int[np.ndarray, "g i"] | None:
    """For each input of each group, the index along an axis of the tensor that the layer reads.

    None if there is no such index because an input runs over several (a layer of another axis, say).
    """
    shape = form.source_shape
    labels = 1 + np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    with jax.ensure_compile_time_eval():
        operand = np.asarray(form.rearrange(jnp.broadcast_to(labels, shape)))  # padding has the label 0
    if form.layer.kind == "conv":
        operand = np.moveaxis(operand, form.input_axes.summed, [-1])
        found = operand.reshape(-1, form.layer.groups, operand.shape[-1] // form.layer.groups)
    else:
        found = _dense_operand(form, operand)
    largest = found.max(0)
    unique = np.where(found == 0, largest, found).min(0) == largest
    return largest.astype(int) - 1 if unique.all() else None


class Codes(NamedTuple):
    """A kernel's weights in units of their scale, in the form of `KernelForm.matrix`, float32.

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
