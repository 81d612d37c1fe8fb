"""Accuracy on labeled images, and agreement of two networks on any."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dfq_jax.adapters import ApplyFn

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy in percent over `n` images, and agreement with a reference network in percent."""

    top1: float
    n: int
    agreement: float | None = None

    @property
    def margin(self) -> float:
        """Half width of the 95 % confidence interval of `top1`, in percent (Wilson)."""
        p, n, z = self.top1 / 100, self.n, 1.96
        return 100 * z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))


def predict(
    apply_fn: ApplyFn,
    variables: Any,
    images: UInt8[np.ndarray, "n h w c"],
    preprocessing: Callable[[Any], Any],
    *,
    logits: Callable[[Any], jax.Array] = lambda outputs: outputs,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> Int[np.ndarray, " n"]:
    """The predicted class of each image.

    Args:
      apply_fn: `(variables, x) -> outputs`; compiled once, with the last batch padded to the same size.
      variables: its variables.
      images: raw images.
      preprocessing: maps raw images to what the network takes.
      logits: picks the class scores among the outputs (`graph.logits`).
      batch_size: images in one call.
      on_progress: called with (images done, images in all).

    Returns:
      `[N]` class indices.
    """
    if len(images) == 0:
        raise ValueError("images: found none to evaluate on.")
    size = min(batch_size, len(images))
    results = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        missing = size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        classes = _classes(apply_fn, logits, variables, jnp.asarray(preprocessing(batch)))
        results.append(np.asarray(classes)[: size - missing])
        if on_progress is not None:
            on_progress(min(start + size, len(images)), len(images))
    return np.concatenate(results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _classes(apply_fn: ApplyFn, logits: Callable[[Any], jax.Array], variables: Any, x: jax.Array) -> jax.Array:
    return logits(apply_fn(variables, x)).argmax(-1)


def accuracy(
    predicted: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    reference: Int[np.ndarray, " n"] | None = None,
) -> Accuracy:
    """Top-1 against labels, and agreement with the reference's predictions."""
    agreement = None if reference is None else 100.0 * float((predicted == reference).mean())
    return Accuracy(top1=100.0 * float((predicted == np.asarray(labels)).mean()), n=len(labels), agreement=agreement)


def sqnr(reference: Float[Array, "..."], other: Float[Array, "..."]) -> float:
    """Signal-to-quantization-noise ratio in decibel: 10 log10(|reference|^2 / |reference - other|^2)."""
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    noise = float(np.square(reference - other).sum())
    signal = float(np.square(reference).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
