"""The quantizers of a network's activations: one more collection beside the user's own variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from dfq_jax.quantizers.qtensor import QTensor, QuantizerParams

# The collection that `quantize_params` adds to the variables: activation quantizers by tensor name.
QUANTIZATION = "quantization"
# Its two parts: tensors quantized for all readers, and for layers alone.
TENSORS, OPERANDS = "tensors", "operands"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["variables", "quantization"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizedVariables:
    """Quantized variables whose own tree has no place for one more collection: that tree, and the quantizers.

    Attributes:
      variables: the user's tree with `QTensor` kernels.
      quantization: the collection of activation quantizers, see `quantization`.
    """

    variables: Any
    quantization: dict[str, dict[str, Any]]


def is_quantized(variables: Any) -> bool:
    """Whether the tree has the collection of activation quantizers."""
    if isinstance(variables, Mapping):
        return QUANTIZATION in variables and _holds_quantizers(variables[QUANTIZATION])
    return isinstance(variables, QuantizedVariables)


def _holds_quantizers(collection: Any) -> bool:
    """Whether a collection called "quantization" is ours, and not one of the user's network."""
    leaves = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, QuantizerParams))
    return isinstance(collection, Mapping) and all(isinstance(leaf, QuantizerParams) for leaf in leaves)


def quantization(variables: Any) -> dict[str, dict[str, Any]]:
    """The activation quantizers of quantized variables by tensor name, in two parts.

    Args:
      variables: from `quantize_params`, or float variables.

    Returns:
      `{"tensors": {name: QuantizerParams}, "operands": {name: QuantizerParams}}`: for all readers of a tensor, and for
      layers alone; empty parts where there are none.
    """
    if not is_quantized(variables):
        return {TENSORS: {}, OPERANDS: {}}
    wrapped = isinstance(variables, QuantizedVariables)
    collection = variables.quantization if wrapped else variables[QUANTIZATION]
    return {TENSORS: {}, OPERANDS: {}, **{kind: dict(part) for kind, part in collection.items()}}


def without_quantization(variables: Any) -> Any:
    """The variables without the collection of activation quantizers."""
    if not is_quantized(variables):
        return variables
    if isinstance(variables, QuantizedVariables):
        return variables.variables
    return type(variables)({k: v for k, v in variables.items() if k != QUANTIZATION})


def with_quantization(variables: Any, quantizers: Mapping[str, Any]) -> Any:
    """The variables with the collection of activation quantizers added or replaced.

    Args:
      variables: any pytree, float or quantized.
      quantizers: `QuantizerParams` by tensor name, in the parts that `quantization` describes.

    Returns:
      A mapping of collections with one more of them, "quantization"; `QuantizedVariables` around any other tree.
    """
    own, quantizers = without_quantization(variables), dict(quantizers)
    if _has_collections(own):
        return type(own)({**own, QUANTIZATION: quantizers})
    return QuantizedVariables(own, quantizers)


def _has_collections(variables: Any) -> bool:
    """Whether one more collection can stand beside the others: a mapping by names, made again from its items."""
    if not isinstance(variables, Mapping) or QUANTIZATION in variables:
        return False
    if not all(isinstance(name, str) for name in variables):
        return False
    try:
        again = type(variables)(dict(variables))
    except TypeError:  # as of collections.defaultdict
        return False
    return jax.tree.structure(again) == jax.tree.structure(variables)


def dequantized(qvariables: Any) -> Any:
    """The float network that quantized variables stand for: weights as dequantized, and no activation quantizers."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf,
        without_quantization(qvariables),
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
