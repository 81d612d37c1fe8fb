"""The static part of a compiled network: how each layer runs."""

from __future__ import annotations

import dataclasses
import functools

from dfq_jax.graph import Graph
from dfq_jax.runtime.fusion import Fusion, fuse
from dfq_jax.runtime.policy import UNQUANTIZED, Decision, Policy


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

    @functools.cached_property
    def _layers(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> LayerPlan:
        """The plan of one layer."""
        return self._layers[name]

    @property
    def fusion(self) -> Fusion:
        """What the layers compute, in this plan's own graph."""
        return self.fusion_at(self.graph)

    def fusion_at(self, graph: Graph) -> Fusion:
        """The same for the network traced at another input shape."""
        folded = frozenset(layer.name for layer in self.layers if layer.decision.runs != UNQUANTIZED)
        return fuse(graph, folded, frozenset(self.for_all))
