"""The quantizers of a network's activations: a record, and its place beside the user's own variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from dfq_jax.quantizers.qtensor import QTensor, QuantizerParams

# The collection that `quantize_params` adds to the variables, and its two parts: plain dicts, so that whatever saves
# and restores the variables takes them too. All else has them as `ActivationQuantizers`.
QUANTIZATION = "quantization"
TENSORS, OPERANDS = "tensors", "operands"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["for_all", "for_layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ActivationQuantizers:
    """The quantizers of a network's activations, by tensor.

    >>> from dfq_jax.quantizers import params_from_range
    >>> quantizers = ActivationQuantizers(for_all={"conv1": params_from_range(0.0, 6.0, bits=4)})
    >>> {name: params.bits for name, params in quantizers.by_tensor.items()}
    {'conv1': 4}

    Attributes:
      for_all: of tensors that are quantized for all their readers.
      for_layers: of tensors that are quantized for layers alone; residual sums and others read them in float.
    """

    for_all: Mapping[str, QuantizerParams] = dataclasses.field(default_factory=dict)
    for_layers: Mapping[str, QuantizerParams] = dataclasses.field(default_factory=dict)

    @property
    def by_tensor(self) -> dict[str, QuantizerParams]:
        """What layers read each tensor by."""
        return {**self.for_all, **self.for_layers}

    def map(self, change: Callable[[str, QuantizerParams], QuantizerParams]) -> ActivationQuantizers:
        """With each quantizer changed, `(tensor, params) -> params`."""
        parts = (self.for_all, self.for_layers)
        return ActivationQuantizers(*({name: change(name, params) for name, params in part.items()} for part in parts))

    def renamed(self, names: Iterable[tuple[str, str]]) -> ActivationQuantizers:
        """Those of some tensors alone, under other names: pairs of the new name and the one here."""
        names, parts = tuple(names), (self.for_all, self.for_layers)
        return ActivationQuantizers(*({new: part[old] for new, old in names if old in part} for part in parts))

    def updated(self, other: ActivationQuantizers) -> ActivationQuantizers:
        """With the quantizers of another record added, or put in the place of those of the same tensors."""
        return ActivationQuantizers({**self.for_all, **other.for_all}, {**self.for_layers, **other.for_layers})


@functools.partial(jax.tree_util.register_dataclass, data_fields=["variables", "quantization"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizedVariables:
    """Quantized variables whose own tree has no place for one more collection: that tree, and the quantizers.

    Attributes:
      variables: the user's tree with `QTensor` kernels.
      quantization: the collection of activation quantizers, as it stands in other trees.
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


def check_quantized(qvariables: Any) -> None:
    """Refuse variables without activation quantizers.

    Raises:
      ValueError: they have no collection "quantization" of ours.
    """
    if not is_quantized(qvariables):
        raise ValueError(
            "qvariables: expected quantized variables, found no collection 'quantization'. Quantize first."
        )


def quantization(variables: Any) -> ActivationQuantizers:
    """The activation quantizers of quantized variables; none of float variables."""
    if not is_quantized(variables):
        return ActivationQuantizers()
    wrapped = isinstance(variables, QuantizedVariables)
    collection = variables.quantization if wrapped else variables[QUANTIZATION]
    return ActivationQuantizers(*(dict(collection.get(part, {})) for part in (TENSORS, OPERANDS)))


def without_quantization(variables: Any) -> Any:
    """The variables without the collection of activation quantizers."""
    if not is_quantized(variables):
        return variables
    if isinstance(variables, QuantizedVariables):
        return variables.variables
    return type(variables)({k: v for k, v in variables.items() if k != QUANTIZATION})


def with_quantization(variables: Any, quantizers: ActivationQuantizers) -> Any:
    """The variables with the collection of activation quantizers added or replaced.

    Args:
      variables: any pytree, float or quantized.
      quantizers: of the network's activations.

    Returns:
      A mapping of collections with one more of them, "quantization"; `QuantizedVariables` around any other tree.
    """
    return with_collection(variables, {TENSORS: dict(quantizers.for_all), OPERANDS: dict(quantizers.for_layers)})


def with_collection(variables: Any, collection: dict[str, Any]) -> Any:
    """`with_quantization` for a collection as it stands in a tree or a file."""
    own = without_quantization(variables)
    if _has_collections(own):
        return type(own)({**own, QUANTIZATION: collection})
    return QuantizedVariables(own, collection)


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
