"""How layers run during synthesis: with gradients that are fast everywhere, and with swing convolution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.graph import LayerCall, ProductRule, loop_friendly


def swing(key: Key[Array, ""]) -> ProductRule:
    """Swing convolution (GENIE, arXiv 2212.04780): strided convolutions read their input shifted by up to a pixel.

    A convolution with stride never sees some pixels through some taps, and the gradient to the image is a checkerboard.
    Each such layer's input is mirrored by one pixel on all sides and cut back at an offset of 0, 1 or 2 along each
    axis, drawn anew in each call, for each layer. Slices with stride, as in shortcuts without parameters, stay.
    """

    def layer(call: LayerCall) -> jax.Array:
        strided = call.layer.kind == "conv" and any(stride != 1 for stride in call.layer.strides)
        if not strided or call.layer.kernel_operand != 1:
            return loop_friendly(call)
        x = call.operand
        axes = call.form.input_axes.free[1:]
        padded = jnp.pad(x, [(int(a in axes),) * 2 for a in range(x.ndim)], mode="reflect")
        offsets = jax.random.randint(jax.random.fold_in(key, call.form.op.index), (len(axes),), 0, 3)
        starts = [0] * x.ndim
        for axis, offset in zip(axes, offsets, strict=True):
            starts[axis] = offset
        return loop_friendly(dataclasses.replace(call, operand=jax.lax.dynamic_slice(padded, starts, x.shape)))

    return layer
