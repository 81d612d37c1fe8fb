"""What synthesis cannot work with, refused by name before long work starts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dfq_jax.graph import Graph, GraphError
from dfq_jax.qtensor import QTensor
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
    if config.uses_classes and num_classes(graph) < 2:
        raise GraphError(
            "class, distance and response terms need class scores of shape [N, classes]; set their weights to 0."
        )
    check_variables(graph, variables)


def check_variables(graph: Graph, variables: Any) -> None:
    """Refuse NaN and infinite weights and impossible BatchNorm statistics, by leaf path."""
    leaves = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    for path, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            raise ValueError(f"variables: {path!r} is quantized already; pass the float variables.")
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"variables: {path!r} holds NaN or infinite values; the checkpoint is damaged.")
    for bn in graph.batch_norms:
        var = np.asarray(leaves[bn.var])
        smallest = float(var.min())
        if smallest < 0:
            raise ValueError(
                f"variables: {bn.var!r} has a negative variance ({smallest:.3g}); mean and variance may be swapped."
            )
        if float(var.max()) == 0:
            raise ValueError(
                f"variables: {bn.var!r} is zero in every channel; the BatchNorm statistics were never updated. Load "
                "the trained statistics (the batch_stats collection)."
            )


def num_classes(graph: Graph) -> int:
    """Width of the class scores."""
    output = graph.program.outputs[graph.logits_index]
    shape = graph.program.avals[output].shape if isinstance(output, int) else ()
    return shape[-1] if len(shape) == 2 else 0
