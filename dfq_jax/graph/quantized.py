"""Run a quantized network: what is quantized where, in float arithmetic or in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.graph.call import LayerCall
from dfq_jax.graph.execution import BatchNormRule, ProductRule, Rules, run
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.tracing.structure import Tensor
from dfq_jax.quantizers import QTensor, QuantizerParams, fake_quant, int8_codes, quantization, quantize

LayerCorrection = Callable[[LayerCall, jax.Array], jax.Array]


def apply_quantized(
    graph: Graph,
    qvariables: Any,
    x: Float[Array, "n ..."],
    *,
    integer: bool = False,
    batch_norm: BatchNormRule | None = None,
    after_layer: LayerCorrection | None = None,
) -> Any:
    """Run a quantized network.

    >>> simulated, integer = (apply_quantized(graph, qvariables, images, integer=i) for i in (False, True))
    >>> bool(jnp.allclose(simulated, integer, atol=1e-4))
    True

    Both modes compute each quantized layer as `scale_x scale_w (sum of products of integer codes)`: `integer=False`
    holds the codes in float32, where they and their sums are exact up to 2^24, with straight-through gradients;
    `integer=True` holds them in int8 and sums in int32. So the two agree to the rounding of what is between layers.

    Args:
      graph: from `trace`.
      qvariables: from `quantize_params`: `QTensor` kernels, and activation quantizers in the collection
        "quantization". A layer whose tensor has no quantizer multiplies dequantized weights with float activations.
      x: `[N, H, W, C]`.
      integer: real integer products instead of the float simulation.
      batch_norm: as in `run`.
      after_layer: maps each layer's result (without bias), `(call, result) -> result`.

    Returns:
      What `apply_fn` returns.
    """
    product = _integer_layer if integer else simulated_layer
    rules = quantized_rules(qvariables, product=product)

    def corrected(call: LayerCall) -> jax.Array:
        return after_layer(call, rules.layer(call))

    layer = rules.layer if after_layer is None else corrected
    return run(graph, qvariables, x, layer=layer, tensor=rules.tensor, batch_norm=batch_norm)


def quantized_rules(
    qvariables: Any,
    *,
    product: Callable[[LayerCall, QuantizerParams], jax.Array],
    in_float: ProductRule = LayerCall.default,
    fake_quantize: Callable[[str, jax.Array, QuantizerParams], jax.Array] | None = None,
    soft: frozenset[str] = frozenset(),
) -> Rules:
    """What is quantized where in a quantized network, in whatever arithmetic.

    A tensor that is quantized for all its readers is so for every one of them. One that is quantized for layers alone
    is so for those whose kernel is quantized, too; a layer with a float kernel reads it in float, and a layer whose
    tensor has no quantizer multiplies float activations with dequantized weights.

    Args:
      qvariables: quantized variables; only the collection "quantization" is read here.
      product: computes a layer whose kernel and tensor are both quantized; `call.source` is the fake-quantized tensor.
      in_float: computes all other layers.
      fake_quantize: quantizes and dequantizes a value in float32, `(layer, value, params) -> value`, once for each
        tensor that is quantized for all readers (with the first of its layers), else once for each layer.
      soft: paths of kernels that stand for quantized ones though they are arrays, so that gradients can move them.
    """
    quantizers = quantization(qvariables)
    by_tensor = quantizers.by_tensor

    def quantized(layer: str, value: jax.Array, params: QuantizerParams) -> jax.Array:
        value = value.astype(jnp.float32)
        return fake_quant(value, params) if fake_quantize is None else fake_quantize(layer, value, params)

    def tensor(item: Tensor, value: jax.Array) -> jax.Array:
        params = quantizers.for_all.get(item.name)
        return value if params is None else quantized(item.layers[0], value, params)

    def layer(call: LayerCall) -> jax.Array:
        params = by_tensor.get(call.layer.tensor)
        if params is None or not (isinstance(call.kernel, QTensor) or call.layer.kernel in soft):
            return in_float(call)
        if call.layer.tensor not in quantizers.for_all:
            call = dataclasses.replace(call, source=quantized(call.layer.name, call.source, params))
        return product(call, params)

    return Rules(layer, tensor)


def simulated_layer(call: LayerCall, params: QuantizerParams) -> jax.Array:
    """Centered codes in float32: exact sums, and gradients to x through the fake-quantized tensor."""
    form, codes = call.form, _exact_codes(call.source, params)
    kernel = call.kernel.centered().astype(jnp.float32)
    total = form.float32_product(form.rearrange(codes), form.rearrange_kernel(kernel))
    return total * (params.scale * form.channel_vector(call.kernel.scale))


def _exact_codes(x_hat: jax.Array, params: QuantizerParams) -> jax.Array:
    """Centered codes of a fake-quantized tensor: exact integers in value, x_hat / scale for gradients."""
    ratio = x_hat.astype(jnp.float32) / params.scale
    return ratio + lax.stop_gradient(jnp.round(ratio) - ratio)


def _integer_layer(call: LayerCall, params: QuantizerParams) -> jax.Array:
    """int8 x int8 -> int32, zero points taken out afterwards: no second convolution unless weights need one."""
    form = call.form
    codes, zero = int8_codes(quantize(call.source, params), params)
    kernel, kernel_zero = int8_codes(call.kernel.qvalue, call.kernel.params)
    codes = form.rearrange(codes, 0 if zero is None else zero)

    def product(kernel: jax.Array) -> jax.Array:
        total = form.integer_product(codes, form.rearrange_kernel(kernel), zero)
        return total if zero is None else total - zero.astype(jnp.int32) * form.kernel_sum(kernel)

    total = product(kernel)
    if kernel_zero is not None:
        # 8-bit asymmetric weights do not fit int8 once centered; their zero point multiplies the window sums of x.
        window = product(jnp.ones(call.layer.kernel_shape, jnp.int8))
        total = total - form.channel_vector(kernel_zero.astype(jnp.int32)) * window
    return total.astype(jnp.float32) * (params.scale * form.channel_vector(call.kernel.scale))
