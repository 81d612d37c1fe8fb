"""What is quantized to how many bits, and the step that applies it: `quantize_params`.

Published numbers differ more by convention than by method, so the convention is one record that goes into every report
and artifact.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import check_field, check_fields, known_fields, may_transfer, move_near, on_host
from dfq_jax.graph import Graph, Layer, Tensor
from dfq_jax.quantizers import (
    MAX_BITS,
    MIN_BITS,
    WEIGHT_RANGES,
    ActivationQuantizers,
    QTensor,
    QuantizerParams,
    check_quantized,
    params_from_range,
    quantization,
    quantize_kernel,
    with_quantization,
)
from dfq_jax.stages.rules import FLOAT_BITS, LayerRule, from_name, is_bits, settle

Ranges = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
DEFAULT_WEIGHT_RANGE = "lp"
SHORTCUTS = ("float", "quantized")
DESCRIBED_RULES = 3  # by `Convention.describe`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """Bits and quantizer kinds. Activations are always static and per tensor.

    Attributes:
      weight_bits: bits of weights, 2 to 8.
      activation_bits: bits of activations, 2 to 8, or None to keep them in float (weight-only).
      edge_bits: bits of weights and input of the first and the last layer; None for the same as everywhere. Kernels
        that are one leaf of the variables (layers in a scan) have the bits of the one among them that has the most.
      edge_input_bits: bits of the inputs of these two layers, where they differ: with `edge_bits` None and 8 here, all
        weights have the same bits while the image keeps the 8 that it is made of. (Publications that count "all
        layers" at low bits keep the image, and the last layer's input, in float or at 8 bits.)
      second_input_bits: bits of the second layer's input, where they are more than all others': 8 in BRECQ (arXiv
        2102.05426) and what follows it (QDrop, GENIE), which quantize the first layer's output like its weights.
      per_channel: one weight scale per output channel, otherwise one per kernel. A kernel that several layers read has
        the most bits that one of them asks for, and scales along the axes that are output channels to all of them.
      symmetric_weights: no zero point. Weights of 8 bits are always symmetric: their zero point gains nothing and
        would cost integer execution a second product.
      weight_range: how weight ranges are chosen: "min_max", "mse" or "lp" (L2.4). None, as long as nobody has chosen,
        for the recipe's in `quantize`, and "lp" without a recipe.
      shortcuts: a tensor that residual sums read beside layers is quantized for the layers alone ("float"), or for
        all its readers ("quantized"), as integer hardware without a wider shortcut has it.
      rules: what single layers have in place of all this, edges included: of each field what the first rule for a layer
        says that says it. Of layers whose kernels are one leaf, or that read one tensor, the most bits that one asks
        for; float is more than any. Where a layer with float weights reads a tensor, that is quantized for the others
        alone, and for no residual sum.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    edge_bits: int | None = 8
    edge_input_bits: int | None = None
    second_input_bits: int | None = None
    per_channel: bool = True
    symmetric_weights: bool = False
    weight_range: str | None = None
    shortcuts: str = "float"
    rules: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "edge_bits", "edge_input_bits", "second_input_bits"):
            bits, wanted = getattr(self, name), f"an integer from {MIN_BITS} to {MAX_BITS}"
            if bits is not None or name == "weight_bits":
                check_field(name, bits, wanted, is_bits)
        ranges = sorted(WEIGHT_RANGES)
        check_field("weight_range", self.weight_range, f"one of {ranges}", lambda v: v is None or v in WEIGHT_RANGES)
        check_fields(self, SHORTCUTS, "shortcuts")
        check_fields(self, "True or False", "per_channel", "symmetric_weights")
        rules = "a tuple of LayerRule"
        check_field(
            "rules",
            self.rules,
            rules,
            lambda v: isinstance(v, (tuple, list)) and all(isinstance(r, LayerRule) for r in v),
        )
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def parse(cls, bits: str, *, edge_bits: int | None = 8, **fields: Any) -> Convention:
        """From a name such as "w4a4", "w2a4" or "w4a16" (float activations).

        >>> convention = Convention.parse("w2a16", edge_bits=4)
        >>> convention.weight_bits, convention.activation_bits, convention.edge_bits
        (2, None, 4)

        Raises:
          ValueError: the name has another form, or bits are outside 2..8.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", bits.strip().lower()) if isinstance(bits, str) else None
        if match is None:
            raise ValueError(f"bits: expected a name like 'w4a4' or 'w4a16', found {bits!r}.")
        weight, activation = (int(g) for g in match.groups())
        return cls(
            weight_bits=weight,
            activation_bits=from_name(activation),
            edge_bits=edge_bits,
            **fields,
        )

    def with_default(self, weight_range: str = DEFAULT_WEIGHT_RANGE) -> Convention:
        """With `weight_range` as given where this convention names none."""
        return self if self.weight_range else dataclasses.replace(self, weight_range=weight_range)

    @property
    def name(self) -> str:
        """The short name, such as "w8a8"."""
        return f"w{self.weight_bits}a{self.activation_bits or FLOAT_BITS}"

    def describe(self) -> str:
        """One line with everything a reader of a number must know; of weight ranges nothing until they are chosen."""
        edges = "edges as all layers" if self.edge_bits is None else f"first and last layer {self.edge_bits}-bit"
        if self.edge_input_bits is not None and self.activation_bits is not None:
            edges += f" with {self.edge_input_bits}-bit inputs"
        if self.second_input_bits is not None and self.activation_bits is not None:
            edges += f", second layer's input {self.second_input_bits}-bit"
        weights = "per-channel" if self.per_channel else "per-tensor"
        kind = "symmetric" if self.symmetric_weights else "asymmetric"
        activations = "float activations"
        if self.activation_bits is not None:
            activations = f"per-tensor static activations, {self.shortcuts} shortcuts"
        weights += f" {kind} weights" + (f" ({self.weight_range} ranges)" if self.weight_range else "")
        rules = [rule.describe() for rule in self.rules[:DESCRIBED_RULES]]
        if more := self.rules[DESCRIBED_RULES:]:
            rules.append(f"{len(more)} more")
        single = f", but {'; '.join(rules)}" if rules else ""
        return f"{self.name.upper()}, {edges}, {weights}, {activations}{single}"

    # --- of one network ---

    def check(self, graph: Graph) -> None:
        """Refuse rules that are for no layer of a network, or that leave it in float.

        Raises:
          ValueError: there is one, and the message names the closest layers; or no layer is quantized.
        """
        if all(own.weight_bits is None for own in _settled(self, graph).values()):
            raise ValueError("rules: they leave every layer in float, so there is nothing to quantize.")

    def layer_bits(self, graph: Graph, layer: Layer) -> int | None:
        """Bits of a layer's kernel; None for float."""
        return _settled(self, graph)[layer.name].weight_bits

    def scale_axes(self, graph: Graph, layer: Layer) -> tuple[int, ...]:
        """Axes of a layer's kernel with a scale for each index: output channels of all layers whose kernels are one.

        Layers that read one kernel along different axes (`x @ w` and `h @ w.T`) have none in common: a scale for each
        channel of one would vary within the sums of the other.
        """
        return _settled(self, graph)[layer.name].scale_axes

    def is_symmetric(self, graph: Graph, layer: Layer) -> bool:
        """Whether a layer's weights go without a zero point."""
        return _settled(self, graph)[layer.name].symmetric

    def tensor_bits(self, graph: Graph, tensor: Tensor) -> int | None:
        """Bits of a tensor: the most that one of its readers with quantized weights asks for; None for float."""
        readers = [_settled(self, graph)[name] for name in tensor.layers]
        asked = [reader.activation_bits for reader in readers if reader.weight_bits is not None]
        return _most(asked) if asked else None

    def is_for_layers_alone(self, graph: Graph, tensor: Tensor) -> bool:
        """Whether only layers with quantized weights read a tensor quantized, and all else reads it in float."""
        in_float = any(_settled(self, graph)[name].weight_bits is None for name in tensor.layers)
        return in_float or (tensor.shared and self.shortcuts == "float")

    def quantizes_activations(self, graph: Graph) -> bool:
        """Whether any tensor of a network is quantized."""
        return any(self.tensor_bits(graph, tensor) is not None for tensor in graph.tensors)

    def rules_for(self, graph: Graph) -> tuple[LayerRule, ...]:
        """The rules, and what the fields about edges and the second layer's input say of a network, as rules."""
        edges, second = {graph.first_layer.name, graph.last_layer.name}, {layer.name for layer in graph.layers[1:2]}
        edge_input_bits = self.edge_bits if self.edge_input_bits is None else self.edge_input_bits
        own = []
        for name in sorted(edges | second):
            weights, inputs = [self.weight_bits], [self.activation_bits]
            if name in edges:
                weights, inputs = [self.edge_bits, *weights], [edge_input_bits, *inputs]
            if name in second:
                inputs.append(self.second_input_bits)
            own.append(
                LayerRule(
                    pattern=re.escape(name),
                    weight_bits=next(filter(None, weights)),
                    activation_bits=self.activation_bits and max(filter(None, inputs)),
                )
            )
        return (*self.rules, *own)


class _Own(NamedTuple):
    """What is settled for one layer."""

    weight_bits: int | None
    activation_bits: int | None
    scale_axes: tuple[int, ...]
    symmetric: bool


@functools.lru_cache(maxsize=16)
def _settled(convention: Convention, graph: Graph) -> dict[str, _Own]:
    """What each layer has, by its name; layers whose kernels are one leaf of the variables have one kind of weights."""
    otherwise = {
        "weight_bits": convention.weight_bits,
        "activation_bits": convention.activation_bits,
        "per_channel": convention.per_channel,
        "symmetric": convention.symmetric_weights,
    }
    asked, settled = settle(convention.rules_for(graph), graph, otherwise), {}
    for layer in graph.layers:
        paths = graph.together(layer.kernel)  # of kernels in one scan, too
        others = [other for other in graph.layers if other.kernel in paths]
        of_all = [asked[other.name] for other in others]
        bits = _most([own["weight_bits"] for own in of_all])
        axes = [a for a in layer.channel_axes if all(a in other.channel_axes for other in others)]
        settled[layer.name] = _Own(
            weight_bits=bits,
            activation_bits=asked[layer.name]["activation_bits"],
            scale_axes=tuple(axes) if all(own["per_channel"] for own in of_all) else (),
            symmetric=bits == MAX_BITS or any(own["symmetric"] for own in of_all),
        )
    return settled


def _most(bits: Sequence[int | None]) -> int | None:
    """The most of several numbers of bits; float is more than any."""
    return None if None in bits else max(b for b in bits if b is not None)


def convention_from(fields: Mapping[str, Any]) -> Convention:
    """The convention that `dataclasses.asdict` made these fields of.

    Raises:
      ValueError: there are fields that a convention does not have, or that are not as they should be.
    """
    rules = tuple(LayerRule(**known_fields(LayerRule, rule)) for rule in fields.get("rules", ()))
    return Convention(**{**known_fields(Convention, fields), "rules": rules})


def check_convention(convention: Any) -> None:
    """Refuse, before any work, what is no convention.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(convention, Convention):
        raise TypeError(
            f'convention: expected a Convention, found {convention!r}; Convention.parse("w4a4") makes one from a name.'
        )


@may_transfer
def quantize_params(graph: Graph, variables: Any, ranges: Ranges, convention: Convention) -> Any:
    """Quantize the layers' kernels, and add activation quantizers in one more collection.

    Weights are rounded to nearest. Pure and traceable: `jax.jit` with `graph` and `convention` static.

    >>> quantize_params(graph, variables, ranges, convention)["dense2"]["kernel"]
    QTensor(shape=(4, 3), bits=4, asymmetric, unsigned, scale=(1, 3), dtype=float32)

    Args:
      graph: from `trace`.
      variables: float variables.
      ranges: real range `(lo, hi)` of each tensor by name; not used where activations stay in float.
      convention: bits and kinds.

    Returns:
      The same tree with `QTensor` kernels, and the collection "quantization" of `QuantizerParams` (see `quantizers`).

    Raises:
      TypeError: `convention` is something else.
      ValueError: a tensor has no range, or a rule is for no layer.
    """
    check_convention(convention)
    leaves = graph.leaves_by_path(variables)
    kernels: dict[str, Any] = {}
    for path, (layer, *_) in graph.kernels.items():
        if path in kernels:
            continue  # stored with an earlier one
        if convention.layer_bits(graph, layer) is not None:
            for stored in graph.together(path):
                kernels[stored] = quantize_layer(graph, layer, leaves[stored], convention)
    return with_quantization(graph.replace(variables, kernels), _activation_quantizers(graph, ranges, convention))


def quantize_layer(graph: Graph, layer: Layer, kernel: Float[Any, "..."], convention: Convention) -> QTensor:
    """A layer's kernel, rounded to nearest, as a convention has it."""
    return quantize_kernel(
        kernel,
        bits=convention.layer_bits(graph, layer),
        symmetric=convention.is_symmetric(graph, layer),
        channel_axes=convention.scale_axes(graph, layer),
        method=convention.with_default().weight_range,
    )


def _activation_quantizers(graph: Graph, ranges: Ranges, convention: Convention) -> ActivationQuantizers:
    for_all: dict[str, Any] = {}
    for_layers: dict[str, Any] = {}
    for tensor in graph.tensors:
        bits = convention.tensor_bits(graph, tensor)
        if bits is None:
            continue
        if tensor.name not in ranges:
            raise ValueError(f"ranges: no range for tensor {tensor.name!r}; estimate_ranges gives all of them.")
        part = for_layers if convention.is_for_layers_alone(graph, tensor) else for_all
        part[tensor.name] = _quantizer(ranges[tensor.name], bits)
    return ActivationQuantizers(for_all, for_layers)


def with_ranges(qvariables: Any, ranges: Ranges) -> Any:
    """Give quantized variables other ranges of activations, at the same bits.

    >>> narrow = with_ranges(qvariables, {"dense2": (jnp.float32(0), jnp.float32(1))})
    >>> round(float(dfq_jax.quantizers.quantization(narrow).by_tensor["dense2"].hi), 6)
    1.0

    Args:
      qvariables: from `quantize_params`.
      ranges: of some tensors or all, by name.

    Returns:
      `qvariables` with other activation quantizers.

    Raises:
      ValueError: `qvariables` are not quantized, a tensor has no quantizer, or an end is not finite.
    """
    check_quantized(qvariables)
    quantizers = quantization(qvariables)
    if unknown := sorted(set(ranges) - set(quantizers.by_tensor)):
        raise ValueError(
            f"ranges: tensor {unknown[0]!r} has no quantizer; expected some of {list(quantizers.by_tensor)}."
        )
    for name, (lo, hi) in (on_host(dict(ranges)) or {}).items():
        if not (np.isfinite(lo) and np.isfinite(hi)):
            raise ValueError(f"ranges: expected finite ends, found ({lo}, {hi}) for tensor {name!r}.")

    def change(name: str, params: QuantizerParams) -> QuantizerParams:
        return _quantizer(ranges[name], params.bits) if name in ranges else params

    return with_quantization(qvariables, quantizers.map(change))


def _quantizer(range_: tuple[Any, Any], bits: int) -> QuantizerParams:
    """Of a range, on its device; the host computes it where it can, for there are many."""
    known = on_host(range_)
    params = params_from_range(*(range_ if known is None else known), bits=bits)
    return params if known is None else move_near(params, range_[0])
