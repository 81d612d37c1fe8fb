"""What the student is asked for: the teacher's class probabilities, its channel attention, and labels it is sure of.

With logits t of the teacher and s of the student, temperature T, and F_l the output of block l,

    divergence     T^2 mean_n KL(softmax(t / T) || softmax(s / T))                            (Hinton, arXiv 1503.02531)
    features       mean_l |F_l^teacher - F_l^student|^2 / |F_l^teacher|^2
    attention      mean_l mean_n |a(F_l^teacher) - a(F_l^student)|^2,   a(F) = v / |v|,   v_c = mean over positions F^2
    cross-entropy  mean_n [1 - softmax(t)_y < difficulty] (-log softmax(s)_y)

The alignment of channel attention is that of HAST (arXiv 2303.14085). It asks which channels answer to an image, and so
less than that of whole features (as in FitNets, arXiv 1412.6550), which asks where and how much. That labels are
trusted on easy images alone is SynQ's rule (Kim et al., ICLR 2025): on the others synthetic labels mislead more often
than they help.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dfq_jax.stages.comparison import kl_divergence
from dfq_jax.stages.finetuning.config import FinetuneConfig

# Keeps the direction of a vector of zeros, and its gradient, finite.
NORM_EPSILON = 1e-12


class Outputs(NamedTuple):
    """What a pass of teacher or student gives."""

    scores: Float[Array, "n ..."]  # the outputs that count: class scores where there are any
    features: tuple[Any, ...]  # outputs of the blocks but the last


class DistillationLosses(NamedTuple):
    """Terms of the loss, unweighted but for the total."""

    total: Float[Array, ""]
    divergence: Float[Array, ""]
    features: Float[Array, ""]
    attention: Float[Array, ""]
    cross_entropy: Float[Array, ""]


def distillation_loss(
    config: FinetuneConfig,
    classes: int,
    teacher: Outputs,
    student: Outputs,
    labels: Int[Array, " n"] | None = None,
) -> DistillationLosses:
    """All terms on one batch.

    Args:
      config: the weights; what has weight 0 is left out, and reported as 0.
      classes: number of classes; below 2 outputs are compared by their squared error, and there are no labels.
      teacher: what the float network shows.
      student: what the quantized one shows.
      labels: of the images; the teacher's choice if None.
    """
    zero = jnp.zeros(())
    divergence = features = attention = labeled = zero
    if config.divergence_weight:
        if classes < 2:
            divergence = relative_error(teacher.scores, student.scores)
        else:
            divergence = kl_divergence(teacher.scores, student.scores, config.temperature)
    if config.feature_weight:
        features = _mean(relative_error, teacher.features, student.features)
    if config.attention_weight:
        attention = _mean(attention_distance, teacher.features, student.features)
    if config.label_weight and classes >= 2:
        labels = teacher.scores.argmax(-1) if labels is None else labels
        labeled = restricted_cross_entropy(teacher.scores, student.scores, labels, config.difficulty)
    total = (
        config.divergence_weight * divergence
        + config.feature_weight * features
        + config.attention_weight * attention
        + config.label_weight * labeled
    )
    return DistillationLosses(total, divergence, features, attention, labeled)


def _mean(
    distance: Callable[[jax.Array, jax.Array], jax.Array], teacher: tuple[Any, ...], student: tuple[Any, ...]
) -> jax.Array:
    """Mean distance over blocks; 0 for a network of one block."""
    return sum(map(distance, teacher, student), start=jnp.zeros(())) / max(len(teacher), 1)


def relative_error(teacher: Float[Array, "..."], student: Float[Array, "..."]) -> Float[Array, ""]:
    """Squared error relative to the teacher's squares."""
    teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)
    return jnp.square(student - teacher).sum() / (jnp.square(teacher).sum() + NORM_EPSILON)


def channel_attention(features: Float[Array, "n *s c"]) -> Float[Array, "n c"]:
    """Mean square of each channel (the last axis) over positions, as a unit vector for each image."""
    squares = jnp.square(features.astype(jnp.float32)).mean(tuple(range(1, features.ndim - 1)))
    # The length of squares is taken relative to the largest of them: their own squares overflow early.
    squares = squares / (jax.lax.stop_gradient(squares.max(-1, keepdims=True)) + NORM_EPSILON)
    return squares * jax.lax.rsqrt(jnp.square(squares).sum(-1, keepdims=True) + NORM_EPSILON)


def attention_distance(teacher: Float[Array, "n *s c"], student: Float[Array, "n *s c"]) -> Float[Array, ""]:
    """Squared distance of two channel attentions, averaged over images: 0 alike, 2 with no channel in common."""
    return jnp.square(channel_attention(teacher) - channel_attention(student)).sum(-1).mean()


def restricted_cross_entropy(
    teacher: Float[Array, "n k"], student: Float[Array, "n k"], labels: Int[Array, " n"], difficulty: float
) -> Float[Array, ""]:
    """Cross-entropy of the student on images that are easy for the teacher, over the number of all images."""
    wanted, found = (
        jnp.take_along_axis(jax.nn.log_softmax(s.astype(jnp.float32)), labels[:, None], axis=1)[:, 0]
        for s in (teacher, student)
    )
    return -jnp.where(-jnp.expm1(wanted) < difficulty, found, 0.0).mean()
