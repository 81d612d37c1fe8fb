"""Integer execution: a quantized network compiled to int8 codes from layer to layer.

`execute.apply_quantized(integer=True)` multiplies in int8 and returns to float after every layer. Here what follows a
layer's sum, `scale_x scale_w (sum - zero) + bias`, BatchNorm, activation and the next quantizer, is

    codes = round(clip(multiplier * sum + offset, low, high))

with one multiplier and one offset per channel, as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877 (with a float32 multiplier, which XLA fuses, in place
of fixed point). Zero points are in the offset, so no layer runs a second product. A tensor that something other than
layers reads in float, such as a residual sum, stays in float for that reader.

    plan, ivariables = compile_integer(graph, qvariables)
    outputs = jax.jit(apply_integer, static_argnums=0)(plan, ivariables, x)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.execute import OPERANDS, TENSORS, LayerCall, run_leaves
from dfq_jax.fusion import Fusion, fuse
from dfq_jax.graph import QUANTIZATION, Graph, Layer, Tensor, is_quantized
from dfq_jax.kernels import self_test
from dfq_jax.policy import FLOAT, INT8, UNQUANTIZED, WEIGHT_ONLY, Decision, Policy, centered, decide, default_policy
from dfq_jax.qtensor import QTensor, QuantizerParams, bounds, pack, storage_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer runs.

    Attributes:
      name: of the layer.
      decision: int8 or float, and why.
      bits, signed: of its kernel's codes.
      packed: its kernel is held in bytes of several codes.
      requantizes: name of the tensor whose codes it computes; None if its result stays in float.
    """

    name: str
    decision: Decision
    bits: int | None = None
    signed: bool = True
    packed: bool = False
    requantizes: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerPlan:
    """The static part of a compiled network: hashable, holds no arrays."""

    graph: Graph
    policy: Policy
    layers: tuple[LayerPlan, ...]
    for_all: tuple[str, ...]  # tensors that are quantized for all readers
    quantizers: tuple[tuple[str, int, bool], ...]  # (tensor, bits, signed)

    @functools.cached_property
    def _layers(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> LayerPlan:
        return self._layers[name]

    @property
    def fusion(self) -> Fusion:
        """What the layers compute, in this plan's own graph."""
        return self.fusion_at(self.graph)

    def fusion_at(self, graph: Graph) -> Fusion:
        """The same for the network traced at another input shape."""
        folded = frozenset(layer.name for layer in self.layers if layer.decision.runs != UNQUANTIZED)
        return fuse(graph, folded, frozenset(self.for_all))


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized tensor on its way: centered codes, and what readers in float get."""

    centered: jax.Array  # code less zero point, integers in float32
    scale: jax.Array
    zero: jax.Array | None  # int8 value of real zero; None: 0
    real: jax.Array | None  # the tensor before quantization, where other readers take that

    def int8(self) -> jax.Array:
        shifted = self.centered if self.zero is None else self.centered + self.zero
        return shifted.astype(jnp.int8)

    def astype(self, dtype: Any) -> jax.Array:
        """The tensor in float."""
        return (self.centered * self.scale if self.real is None else self.real).astype(dtype)


# --- compilation ---


def compile_integer(graph: Graph, qvariables: Any, policy: Policy | None = None) -> tuple[IntegerPlan, dict[str, Any]]:
    """Decide how every layer runs, and fold what follows it.

    Runs on the host, on concrete arrays, once.

    Args:
      graph: from `trace`.
      qvariables: from `quantize_params`, or with learned codes, adapted BatchNorm statistics and so on.
      policy: what runs as int8; by default that of JAX's backend.

    Returns:
      The plan, and the variables for `apply_integer`: kernels as codes, one multiplier and offset for each layer,
      activation quantizers, and the leaves that are still read in float.

    Raises:
      ValueError: `qvariables` are not quantized, or not of this graph.
    """
    if not is_quantized(qvariables):
        raise ValueError(
            "qvariables: expected quantized variables, found no collection 'quantization'. Quantize first."
        )
    policy = default_policy() if policy is None else policy
    leaves = graph.leaves(qvariables)
    collection = qvariables[QUANTIZATION]
    quantizers: dict[str, QuantizerParams] = {**collection.get(TENSORS, {}), **collection.get(OPERANDS, {})}
    decisions = {
        layer.name: decide(policy, graph, layer, leaves[layer.kernel_index], quantizers.get(layer.tensor))
        for layer in graph.layers
    }
    if policy.self_test:
        candidates = [name for name, decision in decisions.items() if decision.runs == INT8]
        for name, passed in self_test(graph, candidates, policy).items():
            if not passed:
                reason = f"the int8 kernel gives wrong sums on this {policy.backend}"
                decisions[name] = dataclasses.replace(decisions[name], runs=FLOAT, reason=reason)

    folded = frozenset(name for name, decision in decisions.items() if decision.runs != UNQUANTIZED)
    fusion = fuse(graph, folded, frozenset(collection.get(TENSORS, {})))
    plans, layer_variables = [], {}
    kernels: dict[Any, jax.Array] = {}  # layers that share a kernel share its buffer
    for layer in graph.layers:
        decision, kernel = decisions[layer.name], leaves[layer.kernel_index]
        if layer.name not in folded:
            plans.append(LayerPlan(name=layer.name, decision=decision))
            continue
        compact = policy.storage == "memory" or decision.runs == WEIGHT_ONLY
        packed = policy.storage == "memory" and storage_bits(kernel.bits) < 8
        form = (layer.kernel, decision.runs, packed)
        if form not in kernels:
            kernels[form] = _stored_kernel(kernel, decision, compact, packed)
        target = fusion.requantizes.get(layer.name)
        plans.append(
            LayerPlan(
                name=layer.name,
                decision=decision,
                bits=kernel.bits,
                signed=kernel.signed,
                packed=packed,
                requantizes=target,
            )
        )
        layer_variables[layer.name] = {
            "kernel": kernels[form],
            **({"zero": _kernel_zero(kernel)} if compact and kernel.zero_point is not None else {}),
            **_fold(graph, layer, decision, leaves, quantizers, target),
        }
    variables = {
        "layers": layer_variables,
        "tensors": {name: _quantizer(graph, name, quantizers[name], fusion) for name in quantizers},
        "leaves": {graph.leaf_paths[i]: _as_float(leaves[i]) for i in sorted(fusion.leaves)},
    }
    plan = IntegerPlan(
        graph=graph,
        policy=policy,
        layers=tuple(plans),
        for_all=tuple(collection.get(TENSORS, {})),
        quantizers=tuple((name, params.bits, params.signed) for name, params in quantizers.items()),
    )
    return plan, variables


def _as_float(leaf: Any) -> Any:
    return leaf.dequantize() if isinstance(leaf, QTensor) else leaf


def _stored_kernel(kernel: QTensor, decision: Decision, compact: bool, packed: bool) -> jax.Array:
    if packed:
        return jnp.asarray(pack(kernel.qvalue, kernel.bits))
    if compact:
        return jnp.asarray(kernel.qvalue)
    return jnp.asarray(centered(kernel).astype(np.int8 if decision.runs == INT8 else np.float32))


def _kernel_zero(kernel: QTensor) -> jax.Array:
    return jnp.asarray(np.asarray(kernel.zero_point).astype(np.int16))


def _int8_zero(params: QuantizerParams) -> int | None:
    """The int8 value of real zero; None where centered codes fit int8, so that it is 0."""
    if (params.signed and params.zero_point is None) or params.bits < 8:
        return None
    zero = 0 if params.zero_point is None else int(params.zero_point)
    return zero if params.signed else zero - 128


def _fold(
    graph: Graph,
    layer: Layer,
    decision: Decision,
    leaves: list[Any],
    quantizers: dict[str, QuantizerParams],
    target: str | None,
) -> dict[str, jax.Array]:
    """Multiplier and offset of a layer's sum, broadcastable against its result; in float64."""
    kernel: QTensor = leaves[layer.kernel_index]
    op = graph.program.ops[layer.op]
    call = LayerCall(layer, op, graph, None, None, kernel)
    shape = graph.program.avals[op.outputs[0]].shape
    channels = [size if axis in call.channel_axes else 1 for axis, size in enumerate(shape)]

    def vector(leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float64).reshape(channels)

    own = [size if axis in layer.channel_axes else 1 for axis, size in enumerate(kernel.shape)]
    multiplier = vector(np.broadcast_to(np.asarray(kernel.scale, np.float64), own))
    offset = np.zeros_like(multiplier)
    if decision.runs != WEIGHT_ONLY:
        params = quantizers[layer.tensor]
        multiplier = multiplier * float(params.scale)
        zero = _int8_zero(params) if decision.runs == INT8 else None
        if zero is not None:
            axes = tuple(a for a in range(kernel.ndim) if a not in layer.channel_axes)
            offset = -zero * multiplier * vector(centered(kernel).astype(np.int64).sum(axes))
    if layer.bias_index is not None:
        offset = offset + vector(leaves[layer.bias_index])
    if layer.batch_norm is not None:
        factor, shift = _affine(graph, layer.batch_norm, leaves, len(shape))
        multiplier, offset = multiplier * factor, offset * factor + shift
    if target is not None:
        step = float(quantizers[target].scale)
        multiplier, offset = multiplier / step, offset / step
    return {"multiplier": jnp.asarray(multiplier, jnp.float32), "offset": jnp.asarray(offset, jnp.float32)}


def _affine(graph: Graph, name: str, leaves: list[Any], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of a BatchNorm."""
    bn = graph.batch_norm(name)
    roles = bn.indices

    def vector(index: int | None, default: float) -> np.ndarray:
        return np.asarray(default if index is None else leaves[index], np.float64).reshape(-1)

    factor = vector(roles.scale, 1.0) / np.sqrt(vector(roles.var, 1.0) + bn.epsilon)
    shift = vector(roles.bias, 0.0) - vector(roles.mean, 0.0) * factor
    along = [1] * rank
    along[bn.channel_axis] = -1
    return factor.reshape(along), shift.reshape(along)


# Activations that are a clip, so that the quantizer's own clip does them: real bounds.
def _quantizer(graph: Graph, name: str, params: QuantizerParams, fusion: Fusion) -> dict[str, jax.Array]:
    """A quantizer's scale, the int8 value of zero, and the range of centered codes, the producer's activation in it."""
    low, high = bounds(params.bits, params.signed)
    zero = 0 if params.zero_point is None else int(params.zero_point)
    low, high = low - zero, high - zero
    if name in fusion.requantizes.values():
        activation = graph.tensor(name).activation
        low = max(low, 0) if activation in ("relu", "relu6") else low
        high = min(high, round(6.0 / float(params.scale))) if activation == "relu6" else high
    result = {"scale": params.scale, "low": jnp.float32(low), "high": jnp.float32(high)}
    shifted = _int8_zero(params)
    return result if shifted is None else {**result, "zero": jnp.float32(shifted)}


# --- execution ---


def apply_integer(plan: IntegerPlan, ivariables: dict[str, Any], x: Float[Array, "n ..."]) -> Any:
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
    graph = plan.graph.at(x.shape, x.dtype)
    fusion = plan.fusion_at(graph)
    quantizers, layers = ivariables["tensors"], ivariables["layers"]

    def quantized(name: str, steps: jax.Array, real: jax.Array | None) -> Codes:
        params = quantizers[name]
        codes = jnp.round(jnp.clip(steps, params["low"], params["high"]))
        return Codes(codes, params["scale"], params.get("zero"), real)

    def tensor(item: Tensor, value: Any) -> Any:
        if isinstance(value, Codes) or item.name not in quantizers:
            return value
        steps = value.astype(jnp.float32) * (1.0 / quantizers[item.name]["scale"])
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
    return run_leaves(graph, leaves, x, layer=layer, tensor=tensor, live=fusion.live, results=fusion.results)


def _product(plan: IntegerPlan, own: LayerPlan, call: LayerCall, arrays: dict[str, jax.Array]) -> jax.Array:
    """The sum of products of codes."""
    source, kernel = call.source, _kernel(own, call.layer, arrays)
    if own.decision.runs == INT8:
        codes = call.rearrange(source.int8(), 0 if source.zero is None else source.zero.astype(jnp.int8))
        zero = None if source.zero is None else source.zero.astype(jnp.int8)
        kernel = call.kernel_operand(kernel.astype(jnp.int8))
        return call.integer_product(codes, kernel, zero, jnp.dtype(plan.policy.accumulator))
    values = source.centered if own.decision.runs == FLOAT else source.astype(jnp.float32)
    return call.float32_product(call.rearrange(values), call.kernel_operand(kernel.astype(jnp.float32)))


def _kernel(own: LayerPlan, layer: Layer, arrays: dict[str, jax.Array]) -> jax.Array:
    """Centered codes of a kernel, in the shape of its leaf."""
    kernel = arrays["kernel"]
    if own.packed:
        kernel = unpack(kernel, storage_bits(own.bits), layer.kernel_shape, own.signed)
    return kernel.astype(jnp.int16) - arrays["zero"] if "zero" in arrays else kernel


def unpack(packed: jax.Array, width: int, shape: tuple[int, ...], signed: bool) -> jax.Array:
    """Codes from the bytes of `qtensor.pack`, inside a compiled function.

    Args:
      packed: uint8 `[bytes]`.
      width: bits of one code, 2 or 4.
      shape: of the codes.
      signed: whether they are two's complement.

    Returns:
      int8 codes.
    """
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    codes = (packed[:, None] >> shifts) & jnp.uint8(2**width - 1)
    codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape).astype(jnp.int8)
    return jnp.where(codes >= 2 ** (width - 1), codes - 2**width, codes) if signed else codes
