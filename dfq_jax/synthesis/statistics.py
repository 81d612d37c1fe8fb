"""How far images are from the statistics that BatchNorm layers stored in training: whether they can be trusted."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import RUN_ONCE, batches, cpu_jit, full_precision
from dfq_jax.graph import BatchNorm, Graph, check_images
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.objective import STD_EPSILON, OffsetMoments, observe


class StatisticErrors(NamedTuple):
    """Errors of a BatchNorm's input, in units of the stored deviations: lengths of vectors over channels.

    Attributes:
      mean: ``|mu - m| / |s|``, with mu the means on the images, m and s the stored means and standard deviations.
      std: ``|sigma - s| / |s|``, with sigma the standard deviations on the images.
    """

    mean: Float[Array, ""]
    std: Float[Array, ""]


@full_precision
def statistic_errors(
    graph: Graph, variables: Any, images: Float[Array, "n ..."], *, batch_size: int = 64
) -> dict[str, StatisticErrors]:
    """Measure how far images are from the network's BatchNorm statistics, layer by layer.

    Images like those that the network was trained on have small errors in all layers, the smaller the more images
    there are. Where an error is near 1 or above, what a layer computes on them tells little of what it computes in use.
    Channels count as their deviations do, so that those without any, which no image need match, do not hide the others.

    >>> errors = statistic_errors(graph, variables, images)["bn1"]
    >>> errors.mean.shape == errors.std.shape == ()
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      images: `[N, H, W, C]`, preprocessed; real, synthetic or noise.
      batch_size: images in one pass; the errors are those of the whole set whatever it is.

    Returns:
      `{BatchNorm name: StatisticErrors}`, in order of execution.

    Raises:
      GraphError: the network has no BatchNorm.
      ValueError: no images, or images that the network does not take.
    """
    graph.require_batch_norms("so there are no statistics to compare images with.")
    check_images(graph, images)
    parts = list(batches(images, batch_size))
    shares = [len(part) / len(images) for part in parts]
    moments = [_moments(graph, variables, part) for part in parts]
    total = jax.tree.map(lambda *own: sum(map(operator.mul, shares, own)), *moments)
    return relative_errors(graph, variables, total)


@functools.partial(jax.jit, static_argnames="graph")
def _moments(graph: Graph, variables: Any, images: jax.Array) -> dict[str, OffsetMoments]:
    return observe(graph, SynthesisConfig(), variables, images).moments


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnames="graph")
def relative_errors(graph: Graph, variables: Any, moments: dict[str, OffsetMoments]) -> dict[str, StatisticErrors]:
    """The errors of moments around the stored means, `[channels]` each."""
    leaves = graph.leaves_by_path(variables)

    def errors(bn: BatchNorm) -> StatisticErrors:
        first, second = moments[bn.name]
        stored = leaves[bn.var].astype(jnp.float32).reshape(-1)
        std_error = jnp.sqrt(jnp.maximum(second - jnp.square(first), 0.0)) - jnp.sqrt(stored)
        scale = jnp.sqrt(stored.sum() + STD_EPSILON)
        return StatisticErrors(jnp.linalg.norm(first) / scale, jnp.linalg.norm(std_error) / scale)

    return {bn.name: errors(bn) for bn in graph.batch_norms}
