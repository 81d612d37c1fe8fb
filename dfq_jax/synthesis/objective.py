"""What synthetic images are asked for: the losses, each a function of what one pass of the network shows.

The main term matches the statistics that BatchNorm layers stored in training (ZeroQ, arXiv 2001.00281; in the
batch-statistics form of GENIE, arXiv 2212.04780, eq. 5): with mu, sigma the mean and standard deviation of a
BatchNorm's input on the images, and m, s those it stored,

    sum over layers of  weight_l ( |mu - m|^2 + |sigma - s|^2 ) / channels_l.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dfq_jax.graph import (
    BatchNorm,
    BatchNormParameters,
    Graph,
    LayerCall,
    along_channels,
    loop_friendly,
    normalize,
    run,
)
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.swing import swing

# Keeps the gradient of a standard deviation finite where a channel is constant.
STD_EPSILON = 1e-6
# The same for the length of a vector (squared), and for a probability near 1.
NORM_EPSILON = 1e-12
PROBABILITY_EPSILON = 1e-6
# The least variance that errors of a channel are divided by, as a share of its layer's average.
LEAST_VARIANCE = 0.1


class OffsetMoments(NamedTuple):
    """First and second moment of a BatchNorm's input around the stored mean, `[channels]`."""

    first: jax.Array
    second: jax.Array


class Targets(NamedTuple):
    """What one batch of images is asked for beyond BatchNorm statistics."""

    labels: Int[Array, " n"]
    # Margin at which the response term is satisfied; minus infinity switches it off.
    response_level: Float[Array, ""]


class ImageLosses(NamedTuple):
    """The loss of a batch, and what one pass of the network showed on the way."""

    loss: Float[Array, ""]
    layer_losses: Float[Array, " layers"]  # BatchNorm term of each layer, unweighted
    moments: dict[str, OffsetMoments]
    margins: Float[Array, " n"]


class Observation(NamedTuple):
    """What one pass of the network shows."""

    layer_losses: Float[Array, " layers"]  # BatchNorm term of each layer, unweighted
    moments: dict[str, OffsetMoments]
    features: Float[Array, "n f"]  # what the last layer reads, averaged over positions
    logits: Float[Array, "n k"]


def evaluate(
    graph: Graph,
    config: SynthesisConfig,
    variables: Any,
    images: Float[Array, "n ..."],
    targets: Targets,
    others: dict[str, OffsetMoments] | None = None,
    share: Float[Array, ""] | float = 1.0,
    key: Key[Array, ""] | None = None,
) -> ImageLosses:
    """Loss of a batch of images (already augmented).

    Args:
      graph: from `trace`.
      config: weights of the terms.
      variables: float variables.
      images: `[N, H, W, C]`.
      targets: labels and response level.
      others: what the other batches of the set add to its moments, to match statistics over all of it.
      share: share of this batch in the moments of the set.
      key: of swing convolutions; without a key convolutions do not swing.
    """
    seen = observe(graph, config, variables, images, others, share, key)
    loss = statistics_loss(config, seen, images)
    if config.total_variation_weight:
        loss = loss + config.total_variation_weight * total_variation(images)
    margins = class_margin(seen.logits, targets.labels) if config.uses_classes else jnp.zeros(images.shape[0])
    if config.class_weight:
        loss = loss + config.class_weight * cross_entropy(seen.logits, targets.labels, config.class_focus)
    if config.distance_weight:
        distance = marginal_distance(seen.features, targets.labels, *config.distance_range)
        loss = loss + config.distance_weight * distance
    if config.response_weight:
        loss = loss + config.response_weight * response(margins, targets.response_level)
    return ImageLosses(loss, seen.layer_losses, seen.moments, margins)


def observe(
    graph: Graph,
    config: SynthesisConfig,
    variables: Any,
    images: Float[Array, "n ..."],
    others: dict[str, OffsetMoments] | None = None,
    share: Float[Array, ""] | float = 1.0,
    key: Key[Array, ""] | None = None,
) -> Observation:
    """Run the float network once; the arguments are those of `evaluate`."""
    moments: dict[str, OffsetMoments] = {}
    losses: dict[str, jax.Array] = {}

    def match(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        x = x.astype(jnp.float32)
        per_image = config.statistics == "image"
        axes = tuple(a for a in range(x.ndim) if a != bn.channel_axis and not (per_image and a == 0))
        # Around the stored mean both moments are small numbers: one pass over x loses no precision.
        offset = x - along_channels(bn, x, parameters.mean)
        own = OffsetMoments(offset.mean(axes), jnp.square(offset).mean(axes))
        moments[bn.name] = own
        total = own if others is None else jax.tree.map(lambda a, b: share * a + b, own, others[bn.name])
        mean_error = total.first
        var = jnp.maximum(total.second - jnp.square(total.first), 0.0)
        std_error = jnp.sqrt(var + STD_EPSILON) - jnp.sqrt(parameters.var + STD_EPSILON)
        terms = config.mean_weight * jnp.square(mean_error) + config.std_weight * jnp.square(std_error)
        losses[bn.name] = (terms * error_scale(config, parameters.var)).sum(-1).mean() / bn.channels
        return normalize(bn, x, parameters)

    rule = swing(key) if config.swing and key is not None else loop_friendly
    features = FeatureReader(graph)
    outputs = run(graph, variables, images, layer=lambda call: features(call, rule(call)), batch_norm=match)
    layer_losses = jnp.stack([losses[bn.name] for bn in graph.batch_norms])
    return Observation(layer_losses, moments, features.value, graph.logits(outputs).astype(jnp.float32))


def error_scale(config: SynthesisConfig, var: Float[Array, " c"]) -> Float[Array, " c"] | float:
    """What the squared errors of a BatchNorm's channels are multiplied by."""
    if config.normalization == "none":
        return 1.0
    average = var.mean()
    unit = average if config.normalization == "layer" else jnp.maximum(var, LEAST_VARIANCE * average)
    return 1 / (unit + STD_EPSILON)


class FeatureReader:
    """Keeps what the last layer reads, averaged over positions, as `value`; a correction that changes no result."""

    def __init__(self, graph: Graph):
        self.layer = graph.last_layer.name
        self.value: jax.Array = jnp.zeros(())

    def __call__(self, call: LayerCall, result: jax.Array) -> jax.Array:
        """Keep the mean features that the layer reads."""
        if call.layer.name == self.layer:
            features = call.source.astype(jnp.float32)
            self.value = features.mean(tuple(range(1, features.ndim - 1)))
        return result


def statistics_loss(config: SynthesisConfig, seen: Observation, images: Float[Array, "n ..."]) -> Float[Array, ""]:
    """The terms that need no labels: BatchNorm statistics and those of the images themselves."""
    loss = jnp.sum(seen.layer_losses * jnp.asarray(config.layer_weights(len(seen.layer_losses))))
    return loss + config.input_weight * input_statistics(images)


def input_statistics(images: Float[Array, "n *s c"]) -> Float[Array, ""]:
    """Distance of each image's channels from mean 0 and standard deviation 1, as of preprocessed images on average."""
    axes = tuple(range(1, images.ndim - 1))
    if not axes:  # vectors: statistics over the batch
        axes = (0,)
    mean = images.mean(axes)
    std = jnp.sqrt(images.var(axes) + STD_EPSILON)
    return (jnp.square(mean) + jnp.square(std - 1.0)).sum(-1).mean()


def total_variation(images: Float[Array, "n *s c"]) -> Float[Array, ""]:
    """Mean squared difference of neighboring pixels over all spatial axes."""
    axes = range(1, images.ndim - 1)
    return sum((jnp.square(jnp.diff(images, axis=a)).mean() for a in axes), start=jnp.zeros(()))


def cross_entropy(logits: Float[Array, "n k"], labels: Int[Array, " n"], focus: float = 0.0) -> Float[Array, ""]:
    """Cross-entropy; with `focus` the hard-sample form of HAST (arXiv 2303.14085), each image's times (1 - p)^focus."""
    log_probabilities = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    if not focus:
        return -log_probabilities.mean()
    # Bounded away from 1: the slope of (1 - p)^focus at p = 1 is infinite for exponents below 1.
    rest = jnp.maximum(-jnp.expm1(log_probabilities), PROBABILITY_EPSILON)
    return -(rest**focus * log_probabilities).mean()


def marginal_distance(
    features: Float[Array, "n f"], labels: Int[Array, " n"], low: float, high: float
) -> Float[Array, ""]:
    """How far the cosine distance of images to the center of their class is outside [low, high], averaged.

    It keeps the images of a class apart from each other, and together (IntraQ, Zhong et al., arXiv 2111.09136). The
    center is the mean over the class's images in this batch, taken as a constant; an image alone in its class is its
    own center, with a gradient of zero.
    """
    same = (labels[:, None] == labels[None]).astype(features.dtype)
    centers = jax.lax.stop_gradient(same @ features / same.sum(1, keepdims=True))
    distance = 1 - cosine(features, centers)
    return (jax.nn.relu(low - distance) + jax.nn.relu(distance - high)).mean()


def cosine(a: Float[Array, "*n f"], b: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """Cosine similarity along the last axis, with a finite gradient at zero."""
    return jnp.vecdot(_unit(a), _unit(b))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + NORM_EPSILON)


def class_margin(logits: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """Log-odds of the label: its logit over the log-sum-exp of all others."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return own - jax.nn.logsumexp(others, axis=1)


def response(margins: Float[Array, " n"], level: Float[Array, ""]) -> Float[Array, ""]:
    """The response term of AAC: raise each image's class margin to `level`, and no further.

    Accurate activation clipping (He et al., arXiv 2204.04215) asks for images that excite the network through their
    class. The raw logit has no optimum: it overshoots every real response and spoils the peaks. The margin, unlike the
    logit, does not move with the other classes, and stops pulling where the network is as sure as `level` says.
    """
    return jax.nn.relu(level - margins).mean()
