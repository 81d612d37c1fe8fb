"""A compiled network in execution: codes from layer to layer.

`apply_quantized(integer=True)` multiplies in int8 and returns to float after every layer. Here what follows a layer's
sum, `scale_x scale_w (sum - zero) + bias`, BatchNorm, activation and the next quantizer, is

    codes = round(clip(multiplier * sum + offset, low, high))

with one multiplier and one offset per channel, as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877 (with a float32 multiplier, which XLA fuses, in place
of fixed point). Zero points are in the offset, so no layer runs a second product. A tensor that something other than
layers reads in float, such as a residual sum, stays in float for that reader. Where a network computes in bfloat16 or
float16, a layer computes its sum alone and the network's own operations follow: what they round moves codes.

    plan, ivariables = compile_integer(graph, qvariables)
    outputs = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph import Layer, LayerCall, Rules, Tensor, run_leaves
from dfq_jax.quantizers import unpack
from dfq_jax.runtime.plan import IntegerPlan, LayerPlan
from dfq_jax.runtime.policy import FLOAT, INT8, UNQUANTIZED


@dataclasses.dataclass(frozen=True)
class TensorCodes:
    """A quantized tensor on its way: centered codes, and what readers in float get."""

    centered: jax.Array  # code less zero point, integers in float32
    scale: jax.Array
    zero: jax.Array | None  # int8 value of real zero; None: 0
    real: jax.Array | None  # the tensor before quantization, where other readers take that
    narrow: jax.Array | None = None  # the same codes, where int8 is what lies between layers

    def narrowed(self) -> TensorCodes:
        """The same codes, but such that all readers have them from int8.

        Compilers fuse what computes a tensor with its readers. Where those are int8 products and something in float, as
        a residual sum is, they would keep it in both types, and move five bytes in place of one.
        """
        codes = self.int8()
        centered = codes.astype(jnp.float32) if self.zero is None else codes.astype(jnp.float32) - self.zero
        return dataclasses.replace(self, centered=centered, narrow=codes)

    def int8(self) -> jax.Array:
        """The codes as int8."""
        if self.narrow is not None:
            return self.narrow
        shifted = self.centered if self.zero is None else self.centered + self.zero
        return shifted.astype(jnp.int8)

    def astype(self, dtype: Any) -> jax.Array:
        """The tensor in float."""
        return (self.centered * self.scale if self.real is None else self.real).astype(dtype)


def apply_plan(plan: IntegerPlan, ivariables: dict[str, Any], x: Float[Array, "n ..."]) -> Any:
    """Run a compiled network; `jax.jit` with the plan static.

    The outputs are those of `apply_quantized` up to the rounding of folded factors, which moves a code by one step
    where a value lies between two.

    Args:
      plan: from `compile_integer`.
      ivariables: from the same call.
      x: `[N, H, W, C]`; any batch size, and other image sizes where the network takes them.

    Returns:
      What `apply_fn` returns.

    Raises:
      ValueError: x does not fit the network.
    """
    graph = plan.graph.at_input(x)
    fusion = plan.fusion_at(graph)
    quantizers, layers = ivariables["tensors"], ivariables["layers"]

    def quantized(name: str, steps: jax.Array, real: jax.Array | None) -> TensorCodes:
        params = quantizers[name]
        codes = jnp.round(jnp.clip(steps, params["low"], params["high"]))
        found = TensorCodes(codes, params["scale"], params.get("zero"), real)
        return found if plan.policy.backend == "cpu" else found.narrowed()

    def tensor(item: Tensor, value: Any) -> Any:
        if isinstance(value, TensorCodes) or item.name not in quantizers:
            return value
        # Divided as in the simulation: pixels may lie between two codes by the thousand.
        steps = value.astype(jnp.float32) / quantizers[item.name]["scale"]
        return quantized(item.name, steps, None if item.name in plan.for_all else value)

    def layer(call: LayerCall) -> Any:
        own = plan.layer(call.layer.name)
        if own.decision.runs == UNQUANTIZED:
            return call.default()
        arrays = layers[own.name]
        total = _product(plan, own, call, arrays).astype(jnp.float32)
        result = total * arrays["multiplier"] + arrays["offset"]
        if own.requantizes is not None:
            return quantized(own.requantizes, result, None)
        return result.astype(graph.program.avals[fusion.results[own.name]].dtype)

    leaves = [ivariables["leaves"].get(path) for path in graph.leaf_paths]
    return run_leaves(graph, leaves, x, Rules(layer, tensor), live=fusion.live, results=fusion.results)


def _product(plan: IntegerPlan, own: LayerPlan, call: LayerCall, arrays: dict[str, jax.Array]) -> jax.Array:
    """The sum of products of codes."""
    form, source, kernel = call.form, call.source, _kernel(own, call.layer, arrays)
    if own.decision.runs == INT8:
        codes = form.rearrange(source.int8(), 0 if source.zero is None else source.zero.astype(jnp.int8))
        zero = None if source.zero is None else source.zero.astype(jnp.int8)
        kernel = form.rearrange_kernel(kernel.astype(jnp.int8))
        return form.integer_product(codes, kernel, zero, jnp.dtype(plan.policy.accumulator))
    values = source.centered if own.decision.runs == FLOAT else source.astype(jnp.float32)
    return form.float32_product(form.rearrange(values), form.rearrange_kernel(kernel.astype(jnp.float32)))


def _kernel(own: LayerPlan, layer: Layer, arrays: dict[str, jax.Array]) -> jax.Array:
    """Centered codes of a kernel, in the shape of its leaf."""
    kernel = arrays["kernel"]
    if own.packed:
        kernel = unpack(kernel, own.bits, layer.kernel_shape, own.signed)
    return kernel.astype(jnp.int16) - arrays["zero"] if "zero" in arrays else kernel
