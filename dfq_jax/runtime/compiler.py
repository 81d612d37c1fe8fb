"""Quantized variables to a plan and the arrays that it runs on: kernels as codes, and what follows folded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import may_transfer, platform_of
from dfq_jax.graph import Graph, Layer, LayerCall, activation_quantizers
from dfq_jax.quantizers import TENSORS, QTensor, QuantizerParams, bounds, is_quantized, pack, quantization, storage_bits
from dfq_jax.runtime.fusion import Fusion, fuse
from dfq_jax.runtime.plan import IntegerPlan, LayerPlan
from dfq_jax.runtime.policy import (
    FLOAT,
    INT8,
    UNQUANTIZED,
    WEIGHT_ONLY,
    Decision,
    Policy,
    centered,
    decide,
    default_policy,
)
from dfq_jax.runtime.self_test import self_test


@may_transfer
def compile_integer(graph: Graph, qvariables: Any, policy: Policy | None = None) -> tuple[IntegerPlan, dict[str, Any]]:
    """Decide how every layer runs, and fold what follows it.

    Runs on the host, on concrete arrays, once.

    Args:
      graph: from `trace`.
      qvariables: from `quantize_params`, or with learned codes, adapted BatchNorm statistics and so on.
      policy: what runs as int8; by default that of the device which `qvariables` are on.

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
    policy = default_policy(platform_of(qvariables)) if policy is None else policy
    leaves = graph.leaves(qvariables)
    quantizers = activation_quantizers(qvariables) if policy.activations == "codes" else {}
    for_all = tuple(name for name in quantization(qvariables)[TENSORS] if name in quantizers)
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
    fusion = fuse(graph, folded, frozenset(for_all))
    plans, layer_variables = [], {}
    kernels: dict[Any, jax.Array] = {}  # layers that share a kernel share its buffer
    for layer in graph.layers:
        decision, kernel = decisions[layer.name], leaves[layer.kernel_index]
        if layer.name not in folded:
            plans.append(LayerPlan(name=layer.name, decision=decision))
            continue
        compact = policy.storage == "memory" or (decision.runs == WEIGHT_ONLY and policy.activations == "codes")
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
            **_fold(graph, layer, decision, leaves, quantizers, target, layer.name in fusion.bare),
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
        for_all=for_all,
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
    bare: bool,
) -> dict[str, jax.Array]:
    """Multiplier and offset of a layer's sum, broadcastable against its result; in float64.

    They hold bias, BatchNorm and the step of the tensor `target`, unless the layer is `bare` (see `Fusion`).
    """
    kernel: QTensor = leaves[layer.kernel_index]
    op = graph.program.ops[layer.op]
    call = LayerCall(layer, op, graph, None, None, kernel)
    shape = graph.program.avals[op.outputs[0]].shape
    channels = [size if axis in call.channel_axes else 1 for axis, size in enumerate(shape)]

    def vector(leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float64).reshape(channels)

    layer.check_scale(np.shape(kernel.scale))
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
    if layer.bias_index is not None and not bare:
        offset = offset + vector(leaves[layer.bias_index])
    if layer.batch_norm is not None and not bare:
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
