"""The student: a quantized network whose codes, steps and biases gradients can move.

A quantized kernel is held as real numbers u in units of its scale, with the straight-through estimator (Bengio et al.,
arXiv 1308.3432):

    scale clip(round(u), qmin - z, qmax - z),    of derivative scale with respect to u.

They start within the cells of the codes that the kernel has, so at first the student is the network it was made of,
however that was rounded. u is kept within the outermost cells (BinaryConnect, arXiv 1511.00363), where all gradients
pass: a clipped weight comes back as soon as it is to.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph import Graph, Rules, loop_friendly, quantized_rules, run_block
from dfq_jax.quantizers import QTensor, code_limits, quantization
from dfq_jax.stages.finetuning.config import FinetuneConfig
from dfq_jax.stages.finetuning.losses import Outputs
from dfq_jax.stages.learning import learned_batch_norm, learned_product, moved, with_scaled_steps

# How far from its code a weight may start; half a unit would round to the next one.
REACH = 0.5 - 2**-10


class StudentParameters(NamedTuple):
    """What is learned; what is to stay as it is has no entry."""

    kernels: dict[str, Float[Array, "..."]]  # by leaf: u, in the shape of the kernel
    scales: dict[str, Float[Array, "..."]]  # by leaf: log of the factor on the scale
    steps: dict[str, Float[Array, ""]]  # by tensor: log of the factor on its quantizer's step
    affine: dict[str, Float[Array, "..."]]  # by leaf: what is added, in units of the leaf's own size


def init_student(graph: Graph, config: FinetuneConfig, variables: Any, qvariables: Any) -> StudentParameters:
    """Parameters with which the student is the network `qvariables`."""
    float_leaves, leaves = (graph.leaves_by_path(v) for v in (variables, qvariables))
    kernels = {layer.kernel: leaves[layer.kernel] for layer in graph.layers}
    quantized = {path: leaf for path, leaf in kernels.items() if isinstance(leaf, QTensor)}
    codes, scales, steps, affine = {}, {}, {}, {}
    if config.weight_rate:
        codes = {path: init_codes(float_leaves[path], leaf, config.trust) for path, leaf in quantized.items()}
    if config.scale_rate:
        scales = {path: jnp.zeros_like(leaf.scale) for path, leaf in quantized.items()}
    if config.step_rate:
        steps = {name: jnp.zeros(()) for name in quantization(qvariables).by_tensor}
    if config.affine_rate:
        paths = [path for bn in graph.batch_norms for path in (bn.scale, bn.bias)]
        paths += [layer.bias for layer in graph.layers if layer.batch_norm is None]  # else the BatchNorm's does it all
        affine = {path: jnp.zeros(leaves[path].shape, jnp.float32) for path in paths if path is not None}
    return StudentParameters(codes, scales, steps, affine)


def init_codes(weight: Float[Array, "..."], kernel: QTensor, trust: float) -> Float[Array, "..."]:
    """Points in the cells of the kernel's codes: as near the float weight as can be (`trust` 0), or at the code (1)."""
    codes = kernel.centered().astype(jnp.float32)
    nearest = jnp.clip(weight.astype(jnp.float32) / kernel.scale, codes - REACH, codes + REACH)
    return nearest + trust * (codes - nearest)


def rounded(u: Float[Array, "..."], kernel: QTensor) -> Float[Array, "..."]:
    """Codes less the zero point; the gradient passes as it is."""
    low, high = code_limits(kernel.params)
    return u + jax.lax.stop_gradient(jnp.clip(jnp.round(u), low, high) - u)


def project(parameters: StudentParameters, graph: Graph, qvariables: Any) -> StudentParameters:
    """Parameters with u within the outermost cells."""
    leaves = graph.leaves_by_path(qvariables)

    def within(path: str, u: jax.Array) -> jax.Array:
        low, high = code_limits(leaves[path].params)
        return jnp.clip(u, low - REACH, high + REACH)

    return parameters._replace(kernels={path: within(path, u) for path, u in parameters.kernels.items()})


def soft_student(graph: Graph, qvariables: Any, parameters: StudentParameters) -> Any:
    """The student's variables with kernels as arrays, differentiable in all parameters."""
    leaves = graph.leaves_by_path(qvariables)
    kernels = {}
    for path in soft_kernels(parameters):
        leaf, u = leaves[path], parameters.kernels.get(path)
        codes = leaf.centered().astype(jnp.float32) if u is None else rounded(u, leaf)
        kernels[path] = (codes * _scale(path, leaf, parameters)).astype(leaf.dtype)
    return _learned(graph, qvariables, leaves, kernels, parameters)


def hard_student(graph: Graph, qvariables: Any, parameters: StudentParameters) -> Any:
    """The student's variables, quantized: of the structure of `qvariables`."""
    leaves = graph.leaves_by_path(qvariables)
    kernels = {}
    for path in soft_kernels(parameters):
        leaf, u = leaves[path], parameters.kernels.get(path)
        kernel = leaf if u is None else leaf.with_centered(rounded(u, leaf))
        kernels[path] = dataclasses.replace(kernel, scale=_scale(path, leaf, parameters))
    return _learned(graph, qvariables, leaves, kernels, parameters)


def soft_kernels(parameters: StudentParameters) -> frozenset[str]:
    """The kernels that are arrays in `soft_student`."""
    return frozenset(parameters.kernels.keys() | parameters.scales.keys())


def _scale(path: str, kernel: QTensor, parameters: StudentParameters) -> jax.Array:
    log_factor = parameters.scales.get(path)
    return kernel.scale if log_factor is None else kernel.scale * jnp.exp(log_factor)


def _learned(
    graph: Graph, qvariables: Any, leaves: dict[str, Any], kernels: dict[str, Any], parameters: StudentParameters
) -> Any:
    affine = {path: moved(leaves[path], change) for path, change in parameters.affine.items()}
    return with_scaled_steps(graph.replace(qvariables, {**kernels, **affine}), parameters.steps)


# --- passes ---


def teacher_outputs(graph: Graph, variables: Any, x: Float[Array, "n ..."]) -> Outputs:
    """The float network, block by block."""
    return _outputs(graph, variables, x, Rules(layer=loop_friendly))


def student_outputs(graph: Graph, variables: Any, x: Float[Array, "n ..."], soft: frozenset[str]) -> Outputs:
    """The network of `soft_student`, block by block: fake-quantized activations, arrays for kernels.

    `soft` are the kernels that are soft; others are float, or quantized and fixed.
    """
    rules = quantized_rules(variables, product=learned_product, in_float=loop_friendly, soft=soft)
    return _outputs(graph, variables, x, rules._replace(batch_norm=learned_batch_norm))


def _outputs(graph: Graph, variables: Any, x: jax.Array, rules: Rules) -> Outputs:
    features = []
    for block in graph.blocks:
        x = run_block(graph, block, variables, x, **rules._asdict())
        features.append(x)
    return Outputs(graph.logits(features.pop()), tuple(features))
