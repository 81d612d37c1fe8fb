"""Rules for single layers: which have other bits than the convention's, or stay in float."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dfq_jax.base import check_field
from dfq_jax.graph import Graph, Layer
from dfq_jax.quantizers import MAX_BITS, MIN_BITS

SAME: Literal["same"] = "same"  # what a rule leaves as it is without it
FLOAT_BITS = 16  # "a16" in a name like w4a16: in float
KINDS = ("conv", "depthwise", "dense")
CLOSEST = 3  # names in the message about a rule that matches no layer


def is_bits(value: Any) -> bool:
    """Whether a value is a number of bits that quantizers have."""
    return type(value) is int and MIN_BITS <= value <= MAX_BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRule:
    """What some layers have in place of a convention's bits and kinds of quantizers, in `Convention.rules`.

    A rule says only what it changes. All else is "same": as a later rule for the layer has it, or else the convention.

    >>> LayerRule(pattern="blocks_0/.*", weight_bits=8, activation_bits=8).describe()
    'blocks_0/.*=w8a8'

    Attributes:
      pattern: regular expression that the whole name of a layer matches; names are in `graph.table()`.
      kind: of the layers, too: "conv", "depthwise" or "dense"; None for any. A depthwise convolution is no "conv".
      weight_bits: bits of weights, 2 to 8, or None for float. A layer with float weights reads its input in float.
      activation_bits: bits of the input, 2 to 8, or None for float: then all layers that read the same tensor multiply
        float activations with dequantized weights.
      per_channel: one weight scale per output channel, otherwise one per kernel.
      symmetric: no zero point of weights; those of 8 bits never have one.
    """

    pattern: str = ".*"
    kind: str | None = None
    weight_bits: int | Literal["same"] | None = SAME
    activation_bits: int | Literal["same"] | None = SAME
    per_channel: bool | Literal["same"] = SAME
    symmetric: bool | Literal["same"] = SAME

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern: expected a regular expression, found {self.pattern!r} ({error}).") from None
        check_field("kind", self.kind, f"one of {KINDS} or None", lambda v: v is None or v in KINDS)
        bits = f"an integer from {MIN_BITS} to {MAX_BITS}, None for float or {SAME!r}"
        for name in ("weight_bits", "activation_bits"):
            check_field(name, getattr(self, name), bits, lambda v: v is None or v == SAME or is_bits(v))
        for name in ("per_channel", "symmetric"):
            check_field(name, getattr(self, name), f"True, False or {SAME!r}", lambda v: type(v) is bool or v == SAME)
        if self.weight_bits is None and is_bits(self.activation_bits):
            raise ValueError(f"activation_bits: expected None beside float weights, found {self.activation_bits}.")
        if not self.said:
            raise ValueError(f"rule: expected one that changes something, found {self}.")

    @classmethod
    def parse(cls, text: str) -> LayerRule:
        """From words: a pattern or a kind or both, and bits, of which 16 are float.

        >>> [LayerRule.parse(words).weight_bits for words in ("head=float", "kind:depthwise=w8", "kind:conv:a.*=w2a4")]
        [None, 8, 2]

        Raises:
          ValueError: the words have another form, the pattern does not compile, or bits are outside 2..8.
        """
        layers, _, bits = text.strip().rpartition("=") if isinstance(text, str) else ("", "", "")
        match = re.fullmatch(r"float|(?=.)(?:w(\d+))?(?:a(\d+))?", bits.strip().lower())
        if not layers or match is None:
            raise ValueError(
                "layer bits: expected words like 'head=float', 'blocks_0/.*=w8a8' or 'kind:depthwise=w8', found "
                f"{text!r}."
            )
        kind, _, pattern = layers[5:].partition(":") if layers.startswith("kind:") else (None, "", layers)
        found = (FLOAT_BITS, FLOAT_BITS) if match[0] == "float" else match.groups(SAME)
        weight, activation = (n if n == SAME else from_name(int(n)) for n in found)
        return cls(pattern=pattern or ".*", kind=kind, weight_bits=weight, activation_bits=activation)

    @property
    def said(self) -> dict[str, Any]:
        """The fields that it changes."""
        fields = ("weight_bits", "activation_bits", "per_channel", "symmetric")
        return {name: getattr(self, name) for name in fields if getattr(self, name) != SAME}

    def describe(self) -> str:
        """The words that `parse` takes, and those for what it does not know."""
        kind = "" if self.kind is None else f"kind:{self.kind}"
        pattern = "" if kind and self.pattern == ".*" else self.pattern
        said = self.said
        bits = {letter: said[name] for letter, name in (("w", "weight_bits"), ("a", "activation_bits")) if name in said}
        in_float = "w" in bits and bits["w"] is None
        words = ["float" if in_float else "".join(f"{letter}{n or FLOAT_BITS}" for letter, n in bits.items())]
        if "per_channel" in said:
            words.append("per-channel" if said["per_channel"] else "per-tensor")
        if "symmetric" in said:
            words.append("symmetric" if said["symmetric"] else "asymmetric")
        return f"{':'.join(filter(None, (kind, pattern)))}={' '.join(filter(None, words))}"


def from_name(bits: int) -> int | None:
    """Bits as they stand in a name such as "w4a16": None for float."""
    return None if bits == FLOAT_BITS else bits


def kind_of(layer: Layer) -> str:
    """The kind of a layer by which a rule and the report know it."""
    return "depthwise" if layer.depthwise else layer.kind


def settle(rules: Sequence[LayerRule], graph: Graph, otherwise: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each layer has, by its name: of each field what the first rule for the layer says that says it.

    Args:
      rules: in order.
      graph: whose layers.
      otherwise: what layers have of which no rule says it.

    Raises:
      ValueError: a rule is for no layer of the graph; the closest are named.
    """
    settled = {layer.name: dict(otherwise) for layer in graph.layers}
    for rule in reversed(rules):
        pattern = re.compile(rule.pattern)
        names = [
            layer.name
            for layer in graph.layers
            if rule.kind in (None, kind_of(layer)) and pattern.fullmatch(layer.name)
        ]
        if not names:
            raise ValueError(f"rules: '{rule.describe()}' matches no layer; {_closest(rule, graph)}.")
        for name in names:
            settled[name].update(rule.said)
    return settled


def _closest(rule: LayerRule, graph: Graph) -> str:
    """What a rule that matches no layer may have been meant for."""
    layers = [layer for layer in graph.layers if rule.kind in (None, kind_of(layer))]
    if not layers:
        return f"the network has none but {', '.join(sorted({kind_of(layer) for layer in graph.layers}))}"
    names = difflib.get_close_matches(rule.pattern, [layer.name for layer in layers], CLOSEST, cutoff=0)
    return "the closest are " + ", ".join(f"'{re.escape(name)}'" for name in names)  # as patterns
