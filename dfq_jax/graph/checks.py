"""What no step can work with, refused by name before long work starts, and what looks doubtful."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import RUN_ONCE, cpu_jit
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.tracing.structure import BatchNorm, GraphError
from dfq_jax.quantizers import QTensor


def check_images(graph: Graph, images: Any) -> None:
    """Refuse an image array that the network cannot take, or that is empty or not finite."""
    shape = tuple(getattr(images, "shape", ()))
    expected = f"images: expected an array like [N, {', '.join(map(str, graph.input.shape[1:]))}], found {shape}"
    if len(shape) != len(graph.input.shape) or shape[-1:] != graph.input.shape[-1:]:
        raise ValueError(f"{expected}.")
    if shape[0] == 0:
        raise ValueError("images: found none; pass at least one image, or let synthesize() make them.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images: expected preprocessed floating-point images, found {images.dtype}.")
    if not isinstance(images, jax.core.Tracer) and not bool(_all_finite(images)):
        raise ValueError("images: found NaN or infinite values; preprocess images to finite numbers.")
    if shape[1:] != graph.input.shape[1:]:
        try:
            graph.at(shape)
        except GraphError as error:
            raise GraphError(f"{expected}, which the network does not take: {error}") from error


@functools.partial(cpu_jit, options=RUN_ONCE)
def _all_finite(images: jax.Array) -> jax.Array:
    return jnp.isfinite(images).all()


def check_variables(graph: Graph, variables: Any) -> None:
    """Refuse NaN and infinite weights and impossible BatchNorm statistics, by leaf path.

    A variance of zero is possible: a layer all of whose channels are dead has it. See `doubtful_statistics`.
    """
    leaves = graph.leaves_by_path(variables)
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
    leaves = graph.leaves_by_path(variables)
    kernels = {layer.name: layer.kernel for layer in graph.layers}

    def never_updated(bn: BatchNorm) -> bool:
        mean, var = np.asarray(leaves[bn.mean]), np.asarray(leaves[bn.var])
        dead = bn.layer is not None and not np.asarray(leaves[kernels[bn.layer]]).any()
        return not mean.any() and bool((var == 1).all() or (not var.any() and not dead))

    found = [bn.var for bn in graph.batch_norms if never_updated(bn)]
    if not found:
        return ()
    return (
        f"the statistics of {len(found)} of {len(graph.batch_norms)} BatchNorms look as if they were never updated "
        f"({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}: mean 0 and variance 1 or 0 in every channel). "
        "If they were not folded away, load the trained ones (the batch_stats collection).",
    )
