"""Convolutions in forms that XLA:CPU computes faster than its own convolution.

XLA runs a convolution with one group a channel on CPU by plain loops, and its gradients by worse ones. As
`k_h k_w` multiply-adds of whole shifted images the same sums run at the speed of memory; on the layers of
EfficientNet-Lite0 ten to a hundred times faster. A convolution whose window is one pixel is a product of matrices: so
it is up to six times faster, and its gradient to the kernel five to twenty times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

__all__ = ["by_platform", "cpu_product", "depthwise_product", "pointwise_product"]

Product = Callable[[jax.Array, jax.Array], jax.Array]

# Beyond, the unrolled sum takes longer to compile than it saves.
_MAX_TAPS = 81
_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # axes of batch, channels and space in operand, kernel, result


def cpu_product(
    params: Mapping[str, Any], operand_shape: tuple[Any, ...], kernel_shape: tuple[int, ...]
) -> Product | None:
    """How to compute a convolution on CPU, or None for XLA's own way.

    Args:
      params: of the primitive `conv_general_dilated`.
      operand_shape: `[N, H, W, C]`.
      kernel_shape: `[KH, KW, C // groups, O]`.
    """
    groups, padding = params["feature_group_count"], tuple(map(tuple, params["padding"]))
    if (
        tuple(params["dimension_numbers"]) != _NHWC
        or params["batch_group_count"] != 1
        or any(d != 1 for d in (*params["lhs_dilation"], *params["rhs_dilation"]))
        or any(p < 0 for pads in padding for p in pads)
    ):
        return None
    shared = {"strides": tuple(params["window_strides"]), "padding": padding, "dtype": params["preferred_element_type"]}
    if groups == operand_shape[-1] == kernel_shape[-1] > 1 and math.prod(kernel_shape[:2]) <= _MAX_TAPS:
        return functools.partial(depthwise_product, **shared)
    if kernel_shape[:2] == (1, 1):
        return functools.partial(pointwise_product, **shared, groups=groups, precision=params["precision"])
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_platform(on_cpu: Product, elsewhere: Product, operand: jax.Array, kernel: jax.Array) -> jax.Array:
    """One of two ways to compute a product and its gradients, by the platform that the program is lowered for.

    While tracing no platform is known: the same trace may be lowered for another device than the default one, or
    exported for several. Traced, this is a `cond` on `platform_index` within a custom derivative; `elsewhere` is its
    last branch.

    Args:
      on_cpu: computes the product on CPU.
      elsewhere: computes the same on all other platforms.
      operand: of the product.
      kernel: of the product.
    """
    return lax.platform_dependent(operand, kernel, cpu=on_cpu, default=elsewhere)


def _forward_by_platform(on_cpu: Product, elsewhere: Product, operand: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
    return by_platform(on_cpu, elsewhere, operand, kernel), (operand, kernel)


def _backward_by_platform(on_cpu: Product, elsewhere: Product, saved: Any, gradient: jax.Array) -> Any:
    # Each platform's own derivative: that of the choice would hand what both branches save from pass to pass.
    def gradients(product: Product) -> Callable[..., Any]:
        return lambda operand, kernel, gradient: jax.vjp(product, operand, kernel)[1](gradient)

    return lax.platform_dependent(*saved, gradient, cpu=gradients(on_cpu), default=gradients(elsewhere))


by_platform.defvjp(_forward_by_platform, _backward_by_platform)


def pointwise_product(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "1 1 i o"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    *,
    groups: int = 1,
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, "n ho wo o"]:
    """The convolution with a window of one pixel as a product of matrices; so are its gradients.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[1, 1, C // groups, O]`.
      strides: of the window.
      padding: pixels of zero before and after each spatial axis.
      groups: of channels.
      precision: of the product.
      dtype: of the sums and the result; that of x if None.

    Returns:
      `[N, (H + padding - 1) // stride + 1, ..., O]`.
    """
    x = _window(_pad(x, padding), (1, 1), strides, (0, 0))
    shape = (*x.shape[:3], kernel.shape[3])
    matrix, kernel = x.reshape(-1, x.shape[3]), kernel.reshape(kernel.shape[2:])
    dimensions: Any = ((1,), (0,)), ((), ())
    if groups > 1:
        matrix, kernel = (m.reshape(len(m), groups, -1) for m in (matrix, kernel))
        dimensions = ((2,), (0,)), ((1,), (1,))
    product = lax.dot_general(matrix, kernel, dimensions, precision=precision, preferred_element_type=dtype)
    return (product if groups == 1 else product.swapaxes(0, 1)).reshape(shape)


def depthwise_product(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    *,
    dtype: Any = None,
) -> Float[Array, "n ho wo c"]:
    """The depthwise convolution as a sum of shifted products, with gradients of the same kind.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[KH, KW, 1, C]`.
      strides: of the window.
      padding: pixels of zero before and after each spatial axis.
      dtype: of the sums and the result; that of x if None. Sums of float types narrower than float32 are in float32.

    Returns:
      `[N, (H + padding - KH) // stride + 1, ..., C]`.
    """
    dtype = x.dtype if dtype is None else dtype
    sums = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    return _depthwise_product(x.astype(sums), kernel.astype(sums), strides, padding).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_product(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    # The barriers keep XLA from computing the layers before and after once for every shift.
    x = _pad(lax.optimization_barrier(x), padding)
    taps = np.ndindex(*kernel.shape[:2])
    total = sum(_window(x, kernel.shape, strides, tap) * kernel[None, None, *tap] for tap in taps)
    return lax.optimization_barrier(total)


def _forward(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> tuple[jax.Array, Any]:
    return _depthwise_product(x, kernel, strides, padding), (x, kernel)


def _backward(strides: Any, padding: Any, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return (
        _input_gradient(x.shape, kernel, strides, padding, gradient),
        _kernel_gradient(_pad(x, padding), kernel.shape, strides, gradient),
    )


_depthwise_product.defvjp(_forward, _backward)


def _input_gradient(
    shape: tuple[int, ...], kernel: jax.Array, strides: Any, padding: Any, gradient: jax.Array
) -> jax.Array:
    """Pixels of one phase, `p % stride`, see the same taps: each phase is a sum of shifted products, too.

    Tap `i` of output `o` reads padded pixel `stride * o + i`; so pixel `stride * a + phase` gets tap
    `phase + stride * m` of output `a - m`. Gathering costs a fraction of adding up what a strided slice scatters.
    """
    sides = kernel.shape[:2]
    lengths = [-(-(shape[1 + d] + sum(padding[d])) // strides[d]) for d in (0, 1)]  # pixels of a phase
    reach = [(sides[d] - 1) // strides[d] for d in (0, 1)]
    ends = [(reach[d], max(lengths[d] - gradient.shape[1 + d], 0)) for d in (0, 1)]
    padded = lax.optimization_barrier(_pad(lax.optimization_barrier(gradient), ends))

    def phase(row: int, column: int) -> jax.Array:
        total = jnp.zeros((shape[0], *lengths, shape[3]), gradient.dtype)
        for i in range(row, sides[0], strides[0]):
            for j in range(column, sides[1], strides[1]):
                top, left = reach[0] - i // strides[0], reach[1] - j // strides[1]
                total += padded[:, top : top + lengths[0], left : left + lengths[1]] * kernel[None, None, i, j]
        return total

    rows = [jnp.stack([phase(i, j) for j in range(strides[1])], 3) for i in range(strides[0])]
    pixels = jnp.stack(rows, 2).reshape(shape[0], lengths[0] * strides[0], lengths[1] * strides[1], shape[3])
    (top, _), (left, _) = padding
    return lax.optimization_barrier(pixels[:, top : top + shape[1], left : left + shape[2]])


def _kernel_gradient(x: jax.Array, shape: tuple[int, ...], strides: Any, gradient: jax.Array) -> jax.Array:
    """All taps at once, from row to row of the gradient: sums over whole images, tap by tap, run 15 to 40 times longer.

    XLA:CPU computes such a sum channel after channel, and reads all images for each.
    """
    dtype = jnp.promote_types(gradient.dtype, jnp.float32)
    rows, taps = gradient.shape[1], list(np.ndindex(*shape[:2]))

    def add(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        place, row = given
        start = (place // rows, place % rows * strides[0], 0, 0)
        read = lax.dynamic_slice(x, start, (1, shape[0], *x.shape[2:])).astype(dtype)
        products = (_window(read, shape, strides, tap)[0, 0] * row for tap in taps)
        return total + jnp.stack([product.sum(0) for product in products]), None

    given = jnp.arange(gradient.shape[0] * rows), gradient.astype(dtype).reshape(-1, *gradient.shape[2:])
    total, _ = lax.scan(add, jnp.zeros((len(taps), shape[3]), dtype), given)
    return total.reshape(shape).astype(x.dtype)


def _window(x: jax.Array, shape: tuple[int, ...], strides: Any, tap: tuple[int, int]) -> jax.Array:
    """The pixels of padded images that one tap of the kernel meets."""
    (i, j), (rows, columns) = tap, strides
    height, width = ((x.shape[1 + d] - shape[d]) // strides[d] * strides[d] + 1 for d in (0, 1))
    return x[:, i : i + height : rows, j : j + width : columns]


def _pad(x: jax.Array, padding: Any) -> jax.Array:
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))
