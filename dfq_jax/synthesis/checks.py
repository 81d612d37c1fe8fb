"""What synthesis cannot work with, refused by name before long work starts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dfq_jax.graph import BatchNorm, Graph, GraphError
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
    """Refuse NaN and infinite weights and impossible BatchNorm statistics, by leaf path.

    A variance of zero is possible: a layer all of whose channels are dead has it. See `doubtful_statistics`.
    """
    leaves = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    for path, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            raise ValueError(f"variables: {path!r} is quantized already; pass the float variables.")
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"variables: {path!r} holds NaN or infinite values; the checkpoint is damaged.")
    for bn in graph.batch_norms:
        smallest = float(np.asarray(leaves[bn.var]).min())
        if smallest < 0:
            raise ValueError(
                f"variables: {bn.var!r} has a negative variance ({smallest:.3g}); mean and variance may be swapped."
            )


def doubtful_statistics(graph: Graph, variables: Any) -> tuple[str, ...]:
    """What looks like BatchNorm statistics that training never updated, in words; none where all looks well.

    That is a mean of 0 with a variance of 1 in every channel, as initialized, or with a variance of 0, as in a template
    of zeros, unless the kernel in front is zero. None of it is proof: a BatchNorm folded into its layer by hand has
    the former, a layer that only ever reads zeros the latter.
    """
    leaves = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    kernels = {layer.name: layer.kernel for layer in graph.layers}

    def never_updated(bn: BatchNorm) -> bool:
        mean, var = np.asarray(leaves[bn.mean]), np.asarray(leaves[bn.var])
        dead = bn.layer is not None and not np.any(leaves[kernels[bn.layer]])
        return not mean.any() and bool((var == 1).all() or (not var.any() and not dead))

    found = [bn.var for bn in graph.batch_norms if never_updated(bn)]
    if not found:
        return ()
    return (
        f"the statistics of {len(found)} of {len(graph.batch_norms)} BatchNorms look as if they were never updated "
        f"({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}: mean 0 and variance 1 or 0 in every channel). "
        "If they were not folded away, load the trained ones (the batch_stats collection).",
    )


def num_classes(graph: Graph) -> int:
    """Width of the class scores."""
    output = graph.program.outputs[graph.logits_index]
    shape = graph.program.avals[output].shape if isinstance(output, int) else ()
    return shape[-1] if len(shape) == 2 else 0
