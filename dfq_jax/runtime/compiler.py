"""Quantized variables to a plan and the arrays that it runs on: kernels as codes, and what follows folded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import may_transfer, platform_of
from dfq_jax.graph import Graph, Layer, affine, batch_norm_parameters
from dfq_jax.quantizers import (
    ActivationQuantizers,
    QTensor,
    QuantizerParams,
    bounds,
    check_quantized,
    code_limits,
    int8_zero,
    pack,
    quantization,
    storage_bits,
)
from dfq_jax.runtime.fusion import CLIPS, Fusion, fuse
from dfq_jax.runtime.plan import IntegerPlan, LayerPlan
from dfq_jax.runtime.policy import FLOAT, INT8, UNQUANTIZED, WEIGHT_ONLY, Decision, Policy, decide, default_policy
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
      The plan, and the variables for `apply_plan`: kernels as codes, one multiplier and offset for each layer,
      activation quantizers, and the leaves that are still read in float.

    Raises:
      ValueError: `qvariables` are not quantized, or not of this graph.
    """
    check_quantized(qvariables)
    policy = default_policy(platform_of(qvariables)) if policy is None else policy
    leaves = graph.leaves(qvariables)
    quantizers = quantization(qvariables) if policy.activations == "codes" else ActivationQuantizers()
    network = _Network(graph, policy, jax.device_get(leaves), jax.device_get(quantizers.by_tensor))
    decisions = network.decisions()
    folded = frozenset(name for name, decision in decisions.items() if decision.runs != UNQUANTIZED)
    fusion = fuse(graph, folded, frozenset(quantizers.for_all))
    layers = tuple(network.layer_plan(layer, decisions[layer.name], fusion) for layer in graph.layers)
    variables = {
        "layers": network.layer_arrays([own for own in layers if own.name in folded], fusion),
        "tensors": {name: network.quantizer_arrays(name, fusion) for name in network.quantizers},
        "leaves": {graph.leaf_paths[i]: _as_float(leaves[i]) for i in sorted(fusion.leaves)},
    }
    return IntegerPlan(graph=graph, policy=policy, layers=layers, for_all=tuple(quantizers.for_all)), variables


def _as_float(leaf: Any) -> Any:
    return leaf.dequantize() if isinstance(leaf, QTensor) else leaf


@dataclasses.dataclass(frozen=True)
class _Network:
    """What is compiled, on the host."""

    graph: Graph
    policy: Policy
    leaves: list[Any]
    quantizers: dict[str, QuantizerParams]

    def decisions(self) -> dict[str, Decision]:
        """How each layer runs: by the policy, and by the test of int8 kernels where it asks for one."""
        decisions = {
            layer.name: decide(
                self.policy, self.graph, layer, self.leaves[layer.kernel_index], self.quantizers.get(layer.tensor)
            )
            for layer in self.graph.layers
        }
        if self.policy.self_test:
            candidates = [name for name, decision in decisions.items() if decision.runs == INT8]
            for name, passed in self_test(self.graph, candidates, self.policy).items():
                if not passed:
                    reason = f"the int8 kernel gives wrong sums on this {self.policy.backend}"
                    decisions[name] = dataclasses.replace(decisions[name], runs=FLOAT, reason=reason)
        return decisions

    def layer_plan(self, layer: Layer, decision: Decision, fusion: Fusion) -> LayerPlan:
        kernel = self.leaves[layer.kernel_index]
        if decision.runs == UNQUANTIZED:
            return LayerPlan(name=layer.name, decision=decision)
        return LayerPlan(
            name=layer.name,
            decision=decision,
            bits=kernel.bits,
            signed=kernel.signed,
            packed=self.packs(kernel) and not self.as_int4(decision, kernel),
            requantizes=fusion.requantizes.get(layer.name),
        )

    def packs(self, kernel: QTensor) -> bool:
        """Whether memory counts and bytes can hold several of its codes."""
        return self.policy.storage == "memory" and storage_bits(kernel.bits) < 8

    def as_int4(self, decision: Decision, kernel: QTensor) -> bool:
        """Whether a kernel is held as int4."""
        if not self.policy.int4 or decision.runs != INT8 or storage_bits(kernel.bits) != 4:
            return False
        (low, high), codes = bounds(4, signed=True), kernel.centered()
        return bool(low <= codes.min(initial=0) and codes.max(initial=0) <= high)

    def layer_arrays(self, plans: list[LayerPlan], fusion: Fusion) -> dict[str, dict[str, jax.Array]]:
        """What each layer computes with; layers that share a kernel share its buffer."""
        kernels: dict[Any, dict[str, jax.Array]] = {}
        arrays = {}
        for own in plans:
            layer = self.graph.layer(own.name)
            form = (layer.kernel, own.decision.runs)
            if form not in kernels:
                kernels[form] = self._kernel_arrays(own, self.leaves[layer.kernel_index])
            arrays[own.name] = {**kernels[form], **self._fold(layer, own, bare=own.name in fusion.bare)}
        return arrays

    def _kernel_arrays(self, own: LayerPlan, kernel: QTensor) -> dict[str, jax.Array]:
        """A kernel ready to multiply; or, where memory counts, its codes as they are and their zero point."""
        policy, runs = self.policy, own.decision.runs
        if self.as_int4(own.decision, kernel):
            return {"kernel": jnp.asarray(kernel.centered().astype(jnp.int4))}
        if policy.storage == "speed" and not (runs == WEIGHT_ONLY and policy.activations == "codes"):
            return {"kernel": jnp.asarray(kernel.centered().astype(np.int8 if runs == INT8 else np.float32))}
        arrays = {"kernel": jnp.asarray(pack(kernel.qvalue, kernel.bits) if own.packed else kernel.qvalue)}
        if kernel.zero_point is not None:
            arrays["zero"] = jnp.asarray(kernel.zero_point.astype(np.int16))
        return arrays

    def _fold(self, layer: Layer, own: LayerPlan, *, bare: bool) -> dict[str, jax.Array]:
        """Multiplier and offset of a layer's sum, broadcastable against its result; in float64.

        They hold bias, BatchNorm and the step of the tensor that the layer requantizes, unless it is `bare` (see
        `Fusion`).
        """
        graph, kernel = self.graph, self.leaves[layer.kernel_index]
        channels = graph.form(layer).channel_shape

        def vector(leaf: Any) -> np.ndarray:
            return np.asarray(leaf, np.float64).reshape(channels)

        layer.check_scale(np.shape(kernel.scale))
        own_shape = [size if axis in layer.channel_axes else 1 for axis, size in enumerate(kernel.shape)]
        multiplier = vector(np.broadcast_to(np.asarray(kernel.scale, np.float64), own_shape))
        offset = np.zeros_like(multiplier)
        if own.decision.runs != WEIGHT_ONLY:
            params = self.quantizers[layer.tensor]
            multiplier = multiplier * float(params.scale)
            zero = int8_zero(params) if own.decision.runs == INT8 else None
            if zero is not None:
                axes = tuple(a for a in range(kernel.ndim) if a not in layer.channel_axes)
                offset = -float(zero) * multiplier * vector(kernel.centered().astype(np.int64).sum(axes))
        if layer.bias_index is not None and not bare:
            offset = offset + vector(self.leaves[layer.bias_index])
        if layer.batch_norm is not None and not bare:
            bn = graph.batch_norm(layer.batch_norm)
            along = [-1 if axis == bn.channel_axis else 1 for axis in range(len(channels))]
            factor, shift = (v.reshape(along) for v in affine(bn, batch_norm_parameters(bn, self.leaves), np))
            multiplier, offset = multiplier * factor, offset * factor + shift
        if own.requantizes is not None:
            step = float(self.quantizers[own.requantizes].scale)
            multiplier, offset = multiplier / step, offset / step
        return {"multiplier": jnp.asarray(multiplier, jnp.float32), "offset": jnp.asarray(offset, jnp.float32)}

    def quantizer_arrays(self, name: str, fusion: Fusion) -> dict[str, jax.Array]:
        """A quantizer's scale, the int8 value of zero, and the range of codes less the zero point.

        Where a layer computes the codes, its activation is in their range.
        """
        params = self.quantizers[name]
        limits = [float(limit) for limit in code_limits(params)]
        activation = self.graph.tensor(name).activation
        if name in fusion.requantizes.values() and activation in CLIPS:
            low, high = np.round(np.divide(CLIPS[activation], params.scale, dtype=np.float64))
            limits = [max(limits[0], low), min(limits[1], high)]
        arrays = {"scale": params.scale, "low": limits[0], "high": limits[1], "zero": int8_zero(params)}
        return {key: jnp.float32(value) for key, value in arrays.items() if value is not None}
