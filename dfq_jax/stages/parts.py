"""The parts of a network that have bits of their own: kernels, and tensors that layers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dfq_jax.graph import Graph
from dfq_jax.stages.convention import Convention

Part = tuple[str, str]  # ("weights", path of a kernel) or ("input", name of a tensor)
Widths = Mapping[Part, int]  # bits of each part that is quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a convention quantizes.

    Attributes:
      uniform: by width, the convention that gives it to all that no rule gives another.
      weights: by layer, the part that its weights are, unless they stay in float; layers that share a kernel, or whose
        kernels are stored as one, have one part.
      inputs: by layer, the part that its input is, unless it stays in float; layers that read one tensor have one part.
    """

    uniform: Mapping[int, Convention]
    weights: Mapping[str, Part]
    inputs: Mapping[str, Part]


def parts_of(graph: Graph, convention: Convention, bits: Sequence[int]) -> Parts:
    """The parts of a network, at these widths."""
    uniform = {width: _uniform(convention, width) for width in bits}
    any_width = uniform[bits[0]]
    quantized = [layer for layer in graph.layers if any_width.layer_bits(graph, layer) is not None]
    read = {t.name for t in graph.tensors if any_width.tensor_bits(graph, t) is not None}
    return Parts(
        uniform=uniform,
        weights={layer.name: ("weights", graph.together(layer.kernel)[0]) for layer in quantized},
        inputs={layer.name: ("input", layer.tensor) for layer in quantized if layer.tensor in read},
    )


def _uniform(convention: Convention, bits: int) -> Convention:
    """The convention with so many bits for all weights and activations, edges included; rules stay."""
    same = {"edge_bits": None, "edge_input_bits": None, "second_input_bits": None}
    activation_bits = None if convention.activation_bits is None else bits
    return dataclasses.replace(convention, weight_bits=bits, activation_bits=activation_bits, **same)
