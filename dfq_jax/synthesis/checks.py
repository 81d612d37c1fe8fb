"""What synthesis cannot work with, refused by name before long work starts."""

from __future__ import annotations

from typing import Any

from dfq_jax.graph import Graph, GraphError, check_variables
from dfq_jax.synthesis.config import SynthesisConfig


def check_synthesizable(graph: Graph, variables: Any, config: SynthesisConfig) -> None:
    """Refuse, by name, what synthesis cannot work with."""
    graph.require_batch_norms(
        "so there are no statistics to synthesize images from. Quantize weights only (bits 'w4a16' or 'w8a16'), take "
        "ranges from noise (recipe 'noise'), or pass images of your own (images=...)."
    )
    channels = graph.input.shape[-1]
    if config.pixel_range is not None and len(config.pixel_range[0]) not in (1, channels):
        raise ValueError(
            f"pixel_range: has {len(config.pixel_range[0])} channels, the network's input {graph.input.shape} has "
            f"{channels}."
        )
    if config.uses_classes and graph.num_classes < 2:
        raise GraphError(
            "class, distance and response terms need class scores of shape [N, classes]; set their weights to 0."
        )
    check_variables(graph, variables)
