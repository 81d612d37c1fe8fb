"""How layers run where gradients are taken."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dfq_jax.graph.call import LayerCall
from dfq_jax.quantizers import QTensor


def loop_friendly(call: LayerCall) -> jax.Array:
    """The layer as the program has it, with a gradient that XLA:CPU also runs fast inside a loop.

    JAX expresses a convolution's gradient by exchanging the labels of the kernel's input and output features. XLA:CPU
    has fast convolutions for the usual order of labels only, and brings others into it only outside of loops: in
    `lax.scan` such gradients fall to plain loops, tens of times slower. Here the kernel itself is transposed instead.
    Depthwise convolutions have a way of their own (`dfq_jax.graph.depthwise`).
    """
    form = call.form  # the derivative outlives the trace, to which the call's values belong
    if form.shifted or call.layer.kind != "conv" or call.layer.kernel_operand != 1 or isinstance(call.kernel, QTensor):
        return call.default()
    op = form.op

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
        _, to_kernel = jax.vjp(lambda k: op(operand, k)[0], kernel)  # unused, so not compiled, in synthesis
        return *to_operand(gradient), *to_kernel(gradient)

    product.defvjp(forward, backward)
    return product(call.operand, form.rearrange_kernel(call.kernel, cast=True))
