"""Accuracy on labeled images, and agreement of two networks on any."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from dfq_jax.base import in_pieces, summed
from dfq_jax.graph import ApplyFn

TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy in percent over `n` images, and agreement of the first choices with a reference network in percent.

    Attributes:
      top1: images whose label is the likeliest class.
      n: number of images.
      agreement: images for which the reference network has the same likeliest class; None without a reference.
      top5: images whose label is among the five likeliest classes; None where there are no more classes than that.
    """

    top1: float
    n: int
    agreement: float | None = None
    top5: float | None = None

    @property
    def margin(self) -> float:
        """Half width of the 95 % confidence interval of `top1`, in percent (Wilson)."""
        return wilson_margin(self.top1, self.n)

    @property
    def top5_margin(self) -> float | None:
        """As `margin`, of `top5`."""
        return None if self.top5 is None else wilson_margin(self.top5, self.n)


def wilson_margin(percent: float, n: int) -> float:
    """Half width, in percent, of Wilson's 95 % confidence interval of a share of `n`.

    >>> round(wilson_margin(91.73, 2894), 2)
    1.0
    """
    p, z = percent / 100, 1.96
    return 100 * z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))


def predict(
    apply_fn: ApplyFn,
    variables: Any,
    batches: Iterable[tuple[Float[np.ndarray, "_ ..."], Int[np.ndarray, " _"]]],
    *,
    logits: Callable[[Any], jax.Array] = lambda outputs: outputs,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Int[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    """The likeliest classes of labeled images, beside their labels.

    Args:
      apply_fn: `(variables, x) -> outputs`; compiled once, and run on a CPU for a few images at a time, on all cores.
      variables: its variables.
      batches: preprocessed images and their labels, as from `Dataset.batches`; held one at a time.
      logits: picks the class scores among the outputs (`graph.logits`).
      on_progress: called with the number of images done.

    Returns:
      `[N, 5]` class indices, the likeliest first, or `[N, 1]` where there are no more than five classes; and the labels
      `[N]`.

    Raises:
      ValueError: there are no batches, or a later one is larger than the first.
    """
    found, labels = [], []
    size = done = 0
    for x, label in batches:
        if not size:
            size, classify = len(x), in_pieces(_classes, variables, x, static=(apply_fn, logits))
        if len(x) > size:
            raise ValueError(f"batches: one has {len(x)} images, the first {size}; the first must be the largest.")
        found.append(classify(x))
        labels.append(label)
        done += len(x)
        if on_progress is not None:
            on_progress(done)
    if not found:
        raise ValueError("batches: found none to evaluate on.")
    return np.concatenate(found), np.concatenate(labels)


def _classes(apply_fn: ApplyFn, logits: Callable[[Any], jax.Array], variables: Any, x: jax.Array) -> jax.Array:
    scores = logits(apply_fn(variables, x))
    return jax.lax.top_k(scores, TOP if scores.shape[-1] > TOP else 1)[1]


def accuracy(
    predicted: Int[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    reference: Int[np.ndarray, "n k"] | None = None,
    *,
    over_processes: bool = False,
) -> Accuracy:
    """Top-1 and top-5 against labels, and agreement with the reference's first choices.

    Args:
      predicted: from `predict`, the likeliest class first.
      labels: `[N]`.
      reference: of another network on the same images.
      over_processes: each process of `jax.distributed` has images of its own (`Dataset.part`); all get the accuracy
        over all of them, of counts that are added up exactly.

    Raises:
      ValueError: the shapes do not belong to the same images, or there are none.
    """
    labels = np.asarray(labels)
    if predicted.ndim != 2 or len(predicted) != len(labels):
        raise ValueError(f"predicted: expected [N, k] for {len(labels)} labels, found shape {predicted.shape}.")
    if reference is not None and len(reference) != len(labels):
        raise ValueError(f"reference: expected [N, k] for {len(labels)} labels, found shape {reference.shape}.")
    hits = predicted == labels[:, None]
    same = hits[:0] if reference is None else predicted[:, 0] == reference[:, 0]
    counts = np.array([len(labels), hits[:, 0].sum(), hits.any(1).sum(), same.sum()])
    n, first, any_, agreeing = map(int, summed(counts) if over_processes else counts)
    if n == 0:
        raise ValueError("labels: found none; accuracy is over at least one image.")
    return Accuracy(
        top1=100.0 * (first / n),
        n=n,
        agreement=None if reference is None else 100.0 * (agreeing / n),
        top5=100.0 * (any_ / n) if predicted.shape[1] == TOP else None,
    )
