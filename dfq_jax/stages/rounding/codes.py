"""Kernels as the matrices whose codes rounding chooses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import namespace_of
from dfq_jax.graph import Graph, KernelForm
from dfq_jax.quantizers import QTensor, code_limits


class KernelCodes(NamedTuple):
    """A kernel's weights in units of their scale, in the form of `KernelForm.matrix`, float32.

    `codes` are centered (less the zero point), integers from `low` to `high`; the nearest ones are
    `clip(round(values), low, high)`.
    """

    values: Float[Any, "g o i k"]
    codes: Float[Any, "g o i k"]
    low: Float[Any, "g o i k"]
    high: Float[Any, "g o i k"]


def kernel_codes(form: KernelForm, kernel: QTensor, leaf: Float[Any, "..."]) -> KernelCodes:
    """The quantized kernel of a layer and the float one as `KernelCodes`; of NumPy arrays if they are."""
    xp = namespace_of(leaf)
    values = leaf.astype(np.float32) / kernel.scale
    limits = (xp.broadcast_to(xp.asarray(q, np.float32), leaf.shape) for q in code_limits(kernel.params))
    return KernelCodes(*(form.matrix(a) for a in (values, kernel.centered().astype(np.float32), *limits)))


def with_codes(form: KernelForm, kernel: QTensor, codes: Float[Any, "g o i k"]) -> QTensor:
    """The quantized kernel with other centered codes."""
    return kernel.with_centered(form.leaf(codes))


def quantized_kernels(
    graph: Graph, variables: Any, qvariables: Any
) -> dict[str, tuple[KernelForm, Float[Array, "..."], QTensor]]:
    """The form, the float leaf and the `QTensor` of each quantized kernel that has one form, by the kernel's path.

    Raises:
      ValueError: no kernel is quantized, or `variables` are not the float ones.
      GraphError: a tree is not the one that was traced.
    """
    floats, quantized = (graph.leaves_by_path(v) for v in (variables, qvariables))
    for path in graph.kernels:
        if isinstance(floats[path], QTensor):
            raise ValueError(f"variables: {path!r} is quantized; pass the float variables first.")
    paths = [path for path in graph.kernels if isinstance(quantized[path], QTensor)]
    if not paths:
        raise ValueError("qvariables: found no quantized kernel; pass what quantize_params returned.")
    forms = {path: common_form(graph, path) for path in paths}
    return {path: (form, floats[path], quantized[path]) for path, form in forms.items() if form is not None}


def common_form(graph: Graph, path: str) -> KernelForm | None:
    """The form that a kernel has for all layers that read it; None where they see different matrices.

    Then what makes one layer's errors cancel says nothing about the others.
    """
    first, *others = (graph.form(layer).kernel for layer in graph.kernels[path])
    if others:
        labels = np.arange(math.prod(first.shape), dtype=np.int32).reshape(first.shape)
        if not all(np.array_equal(form.matrix(labels), first.matrix(labels)) for form in others):
            return None
    return first
