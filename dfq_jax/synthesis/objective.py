"""What synthetic images are asked for: the losses, each a function of what one pass of the network shows.

The main term matches the statistics that BatchNorm layers stored in training (ZeroQ, arXiv 2001.00281; in the
batch-statistics form of GENIE, arXiv 2212.04780, eq. 5): with mu, sigma the mean and standard deviation of a
BatchNorm's input on the images, and m, s those it stored,

    sum over layers of  weight_l ( |mu - m|^2 + |sigma - s|^2 ) / channels_l.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dfq_jax.execute import BatchNormParameters, LayerCall, along_channels, normalize, run
from dfq_jax.graph import BatchNorm, Graph
from dfq_jax.qtensor import QTensor
from dfq_jax.synthesis.config import SynthesisConfig

# Keeps the gradient of a standard deviation finite where a channel is constant.
STD_EPSILON = 1e-6


class Moments(NamedTuple):
    """First and second moment of a BatchNorm's input around the stored mean, `[channels]`."""

    first: jax.Array
    second: jax.Array


class Targets(NamedTuple):
    """What one batch of images is asked for beyond BatchNorm statistics."""

    labels: Int[Array, " n"]
    # Margin at which the response term is satisfied; minus infinity switches it off.
    response_level: Float[Array, ""]


class Evaluation(NamedTuple):
    loss: Float[Array, ""]
    layer_losses: Float[Array, " layers"]  # BatchNorm term of each layer, unweighted
    moments: dict[str, Moments]
    margins: Float[Array, " n"]


def evaluate(
    graph: Graph,
    config: SynthesisConfig,
    variables: Any,
    images: Float[Array, "n ..."],
    targets: Targets,
    others: dict[str, Moments] | None = None,
    share: Float[Array, ""] | float = 1.0,
) -> Evaluation:
    """Loss of a batch of images (already augmented).

    Args:
      graph: from `trace`.
      config: weights of the terms.
      variables: float variables.
      images: `[N, H, W, C]`.
      targets: labels and response level.
      others: what the other batches of the set add to its moments, to match statistics over all of it.
      share: share of this batch in the moments of the set.
    """
    moments: dict[str, Moments] = {}
    losses: dict[str, jax.Array] = {}

    def match(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        x = x.astype(jnp.float32)
        per_image = config.statistics == "image"
        axes = tuple(a for a in range(x.ndim) if a != bn.channel_axis and not (per_image and a == 0))
        # Around the stored mean both moments are small numbers: one pass over x loses no precision.
        offset = x - along_channels(bn, x, parameters.mean)
        own = Moments(offset.mean(axes), jnp.square(offset).mean(axes))
        moments[bn.name] = own
        total = own if others is None else jax.tree.map(lambda a, b: share * a + b, own, others[bn.name])
        mean_error = total.first
        var = jnp.maximum(total.second - jnp.square(total.first), 0.0)
        std_error = jnp.sqrt(var + STD_EPSILON) - jnp.sqrt(parameters.var + STD_EPSILON)
        terms = config.mean_weight * jnp.square(mean_error) + config.std_weight * jnp.square(std_error)
        losses[bn.name] = terms.sum(-1).mean() / bn.channels
        return normalize(bn, x, parameters)

    outputs = run(graph, variables, images, layer=loop_friendly, batch_norm=match)
    logits = graph.logits(outputs).astype(jnp.float32)
    layer_losses = jnp.stack([losses[bn.name] for bn in graph.batch_norms])
    loss = jnp.sum(layer_losses * jnp.asarray(config.layer_weights(len(graph.batch_norms))))
    loss = loss + config.input_weight * input_statistics(images)
    if config.total_variation_weight:
        loss = loss + config.total_variation_weight * total_variation(images)
    margins = class_margin(logits, targets.labels) if config.uses_classes else jnp.zeros(images.shape[0])
    if config.class_weight:
        loss = loss + config.class_weight * cross_entropy(logits, targets.labels)
    if config.response_weight:
        loss = loss + config.response_weight * response(margins, targets.response_level)
    return Evaluation(loss, layer_losses, moments, margins)


def loop_friendly(call: LayerCall) -> jax.Array:
    """The layer as the program has it, with a gradient that XLA:CPU also runs fast inside a loop.

    JAX expresses a convolution's gradient by exchanging the labels of the kernel's input and output features. XLA:CPU
    has fast convolutions for the usual order of labels only, and brings others into it only outside of loops: in
    `lax.scan` such gradients fall to plain loops, tens of times slower. Here the kernel itself is transposed instead.
    Depthwise convolutions have a way of their own (`dfq_jax/depthwise.py`).
    """
    if call.shifted or call.layer.kind != "conv" or call.layer.kernel_operand != 1 or isinstance(call.kernel, QTensor):
        return call.default()

    @jax.custom_vjp
    def product(operand: jax.Array, kernel: jax.Array) -> jax.Array:
        return call.op(operand, kernel)[0]

    def forward(operand: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return product(operand, kernel), (operand, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        operand, kernel = saved
        numbers = call.op.params["dimension_numbers"]
        out_axis, in_axis, *spatial = numbers.rhs_spec
        # The same convolution of a transposed kernel: its labels are unusual, those of its gradient are not.
        numbers = numbers._replace(rhs_spec=(in_axis, out_axis, *spatial))
        same = dataclasses.replace(call.op, params={**call.op.params, "dimension_numbers": numbers})
        transposed = jnp.swapaxes(kernel, out_axis, in_axis)
        _, to_operand = jax.vjp(lambda x: same(x, transposed)[0], operand)
        _, to_kernel = jax.vjp(lambda k: call.op(operand, k)[0], kernel)  # unused, so not compiled, in synthesis
        return *to_operand(gradient), *to_kernel(gradient)

    product.defvjp(forward, backward)
    return product(call.operand, call.kernel_operand(call.kernel, cast=True))


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


def cross_entropy(logits: Float[Array, "n k"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()


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
