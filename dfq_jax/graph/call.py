"""One execution of a layer, as rules see it, and how it runs where gradients are taken."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfq_jax.graph.form import LayerForm
from dfq_jax.graph.tracing.program import Op
from dfq_jax.graph.tracing.structure import Layer
from dfq_jax.quantizers import QTensor


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer and its operands, handed to a rule.

    Attributes:
      form: of the layer.
      source: the tensor that the layer reads, before padding, transposition and casts, as the rule for tensors left it.
      operand: that of the product, as the program computes it.
      kernel: the leaf, an array or a `QTensor`.
    """

    form: LayerForm
    source: Any
    operand: jax.Array
    kernel: Any

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.form.layer

    def default(self) -> jax.Array:
        """What the layer computes in the program."""
        kernel = self.kernel.dequantize() if isinstance(self.kernel, QTensor) else self.kernel
        return self.form.product(self.operand, self.form.rearrange_kernel(kernel, cast=True))

    def verbatim(self) -> jax.Array:
        """The same by the program's own primitive, for who traces the layer and is to find it."""
        return self.form.primitive(self.operand, self.form.rearrange_kernel(self.kernel, cast=True))

    def reading(self, source: jax.Array) -> LayerCall:
        """The call on another value of the tensor."""
        operand = self.form.rearrange(source).astype(self.operand.dtype)
        return dataclasses.replace(self, source=source, operand=operand)


def loop_friendly(call: LayerCall) -> jax.Array:
    """The layer as the program has it, with a gradient that XLA:CPU also runs fast inside a loop.

    JAX expresses a convolution's gradient by exchanging the labels of the kernel's input and output features. XLA:CPU
    has fast convolutions for the usual order of labels only, and brings others into it only outside of loops: in
    `lax.scan` such gradients fall to plain loops, tens of times slower. Here the kernel itself is transposed instead.
    Some convolutions have a way of their own (`dfq_jax.graph.convolutions`).
    """
    form = call.form  # the derivative outlives the trace, to which the call's values belong
    op = form.op
    plain = call.layer.kind == "conv" and call.layer.kernel_operand == 1 and not isinstance(call.kernel, QTensor)
    if not plain or form.on_cpu(op.params) is not None:
        return call.default()

    @jax.custom_vjp
    def product(operand: jax.Array, kernel: jax.Array) -> jax.Array:
        return op(operand, kernel)[0]

    def forward(operand: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return product(operand, kernel), (operand, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        operand, kernel = saved
        numbers = op.params["dimension_numbers"]
        out_axis, in_axis, *spatial = numbers.rhs_spec
        # The same convolution of a transposed kernel: its labels are unusual, those of its gradient are not.
        numbers = numbers._replace(rhs_spec=(in_axis, out_axis, *spatial))
        same = dataclasses.replace(op, params={**op.params, "dimension_numbers": numbers})
        transposed = jnp.swapaxes(kernel, out_axis, in_axis)
        _, to_operand = jax.vjp(lambda x: same(x, transposed)[0], operand)
        to_kernel = lax.platform_dependent(  # unused, so not compiled, in synthesis
            operand, kernel, gradient, cpu=functools.partial(_ordered_kernel_gradient, op), default=kernel_gradient
        )
        return *to_operand(gradient), to_kernel

    def kernel_gradient(operand: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda k: op(operand, k)[0], kernel)[1](gradient)[0]

    product.defvjp(forward, backward)
    return product(call.operand, form.rearrange_kernel(call.kernel, cast=True))


def _ordered_kernel_gradient(op: Op, operand: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """A convolution's gradient to its kernel, as a convolution in XLA:CPU's usual order of labels.

    There the images take the place of input channels, and the gradient that of the kernel; all three are transposed to
    the order in which that is usual.
    """
    numbers = op.params["dimension_numbers"]
    (images, channels, *places), (outputs, inputs, *window) = numbers.lhs_spec, numbers.rhs_spec
    order = inputs, *window, outputs
    axes, last = tuple(range(1, operand.ndim - 1)), operand.ndim - 1
    labels = (last, 0, *axes), (last, 0, *axes), (last - 1, last, *(a - 1 for a in axes))
    params = {**op.params, "dimension_numbers": type(numbers)(*labels)}
    same = dataclasses.replace(op, params=params)
    x, k = operand.transpose(channels, *places, images), kernel.transpose(order)
    out_images, out_channels, *out_places = numbers.out_spec
    (found,) = jax.vjp(lambda k: same(x, k)[0], k)[1](gradient.transpose(*out_places, out_images, out_channels))
    return found.transpose(np.argsort(order))
