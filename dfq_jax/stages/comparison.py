"""The quantized network against the float one, on images without labels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dfq_jax.base import batches, cpu_jit, fetched, full_precision
from dfq_jax.graph import Graph, apply_quantized, check_images, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a quantized network's outputs compare with the float network's on the same images.

    Attributes:
      agreement: percent of the images that both put in the same class; None without class scores.
      sqnr: of the outputs, in decibel.
      divergence: mean Kullback-Leibler divergence of the quantized from the float class probabilities, in nats;
        without class scores, squared error relative to the outputs' squares.
    """

    agreement: float | None
    sqnr: float
    divergence: float


@full_precision
def compare(
    graph: Graph, variables: Any, qvariables: Any, images: Float[Array, "n ..."], *, batch_size: int = 64
) -> Comparison:
    """Compare a quantized network with the float one; no labels are needed.

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: from `quantize_params`.
      images: `[N, H, W, C]`, preprocessed.
      batch_size: images in one pass.

    Raises:
      ValueError: no images, images that the network does not take, or outputs that are not finite.
    """
    return comparer(graph, variables, images, batch_size=batch_size)(qvariables)


@full_precision
def comparer(
    graph: Graph, variables: Any, images: Float[Array, "n ..."], *, batch_size: int = 64
) -> Callable[[Any], Comparison]:
    """`compare` for many quantized networks and one float network, whose outputs are found once.

    >>> found = comparer(graph, variables, images)
    >>> found(qvariables) == dfq_jax.stages.compare(graph, variables, qvariables, images)
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      images: `[N, H, W, C]`, preprocessed.
      batch_size: images in one pass.

    Returns:
      A function of quantized variables.

    Raises:
      ValueError: no images, or images that the network does not take; the function, if outputs are not finite.
    """
    check_images(graph, images)
    reference = [apply_float(graph, variables, x) for x in batches(images, batch_size)]

    @full_precision
    def found(qvariables: Any) -> Comparison:
        others = (apply_jitted(graph, qvariables, x) for x in batches(images, batch_size))
        return compare_outputs(graph, zip(reference, others, strict=True))

    return found


@full_precision
def compile_comparison(graph: Graph, qvariables: Any, images: Float[Array, "n ..."], *, batch_size: int = 64) -> None:
    """Compile ahead what `compare` runs on such quantized variables; shapes of them are enough."""
    for batch in batches(images, batch_size):
        apply_jitted.compile_ahead(graph, qvariables, batch)


def compare_outputs(graph: Graph, outputs: Iterable[tuple[Any, Any]]) -> Comparison:
    """The comparison from outputs of the float and the quantized network, batch by batch.

    Raises:
      ValueError: outputs are not finite.
    """
    classes = graph.num_classes

    def scores(outputs: Any) -> np.ndarray:
        return fetched(graph.logits(outputs)).astype(np.float64).reshape(-1, max(classes, 1))

    pairs = [(scores(reference), scores(other)) for reference, other in outputs]
    reference, other = map(np.concatenate, zip(*pairs, strict=True))
    for name, values in (("float", reference), ("quantized", other)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"variables: the outputs of the {name} network hold NaN or infinite values; its weights or BatchNorm "
                "statistics are too large or damaged."
            )
    if classes < 2:
        error = float(np.square(reference - other).sum() / max(np.square(reference).sum(), 1e-300))
        return Comparison(agreement=None, sqnr=sqnr(reference, other), divergence=error)
    agreement = 100.0 * float((reference.argmax(1) == other.argmax(1)).mean())
    wanted, found = map(_log_softmax, (reference, other))
    divergence = max(0.0, float((np.exp(wanted) * (wanted - found)).sum(1).mean()))  # rounding goes below
    return Comparison(agreement=agreement, sqnr=sqnr(reference, other), divergence=divergence)


def _log_softmax(scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


@functools.partial(cpu_jit, static_argnames="graph")
def apply_jitted(graph: Graph, variables: Any, x: Float[Array, "n ..."]) -> Any:
    """`apply_quantized`, compiled once for each graph and shape of x."""
    return apply_quantized(graph, variables, x)


@functools.partial(jax.jit, static_argnames="graph")
def apply_float(graph: Graph, variables: Any, x: Float[Array, "n ..."]) -> Any:
    """The float network, compiled so; depthwise layers have a faster way than the function's own."""
    return run(graph, variables, x)


def sqnr(reference: Float[ArrayLike, "..."], other: Float[ArrayLike, "..."]) -> float:
    """Signal-to-quantization-noise ratio in decibel: ``10 log10(|reference|^2 / |reference - other|^2)``.

    >>> round(dfq_jax.stages.sqnr(np.array([1.0, 2.0]), np.array([1.0, 1.5])), 2)
    13.01
    """
    wanted, found = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return decibel(float(np.square(wanted).sum()), float(np.square(wanted - found).sum()))


def decibel(signal: float, noise: float) -> float:
    """How many times a power is another one; infinite where there is no noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def kl_divergence(
    expected: Float[Array, "n k"], found: Float[Array, "n k"], temperature: float = 1.0
) -> Float[Array, ""]:
    """Divergence of class probabilities from those expected, by logits, times the squared temperature.

    The factor keeps the size of gradients whatever the temperature; at a high one it becomes the squared error of
    centered logits over twice the number of classes.
    """
    log_expected, log_found = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (expected, found))
    divergence = (jnp.exp(log_expected) * (log_expected - log_found)).sum(-1).mean()
    return temperature**2 * jnp.maximum(divergence, 0.0)  # rounding goes below
