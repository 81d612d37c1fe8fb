"""Adapting a quantized network without training: its BatchNorm statistics.

Quantization shifts and stretches the result of every layer, so the BatchNorm behind it normalizes by the wrong
statistics. Adaptive BatchNorm (ABN; He et al., arXiv 2204.04215) measures them anew on synthetic images. *Absolute*
adaptation stores what the quantized network shows. *Differential* adaptation measures the float and the quantized
network on the same images and moves the stored statistics by the difference of means and the ratio of variances, so
that the error of the images cancels to first order; it equals the absolute form when the images are perfect.
*Regression* looks at values in place of moments: for each channel the line `a q + b` through the quantized network's
values q that comes nearest to the float network's at the same places of the same images, which is what minimizes the
layer's error (as the affine compensation of QwT-v2 does, Tang et al., arXiv 2505.20932), put into the statistics.

Statistics change a per-channel scale and offset only: integer weights stay as they are, inference costs nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dfq_jax.base import batches, check_fields, check_kind, cpu_jit, full_precision
from dfq_jax.graph import (
    BatchNorm,
    BatchNormParameters,
    BatchNormRule,
    Graph,
    apply_quantized,
    as_argument,
    channel_covariance,
    channel_moments,
    check_images,
    normalize,
    run,
)

ORDERS = ("layer_by_layer", "all_at_once")
Statistics = tuple[Float[Array, " c"], Float[Array, " c"]]
Moments = dict[str, Statistics]


class _Settings(NamedTuple):
    """Numbers as arguments, so that others of them need no other compilation."""

    share: Float[ArrayLike, ""]  # of a batch in all images
    trust: Float[ArrayLike, ""]  # in what is measured, against what is stored
    max_ratio: Float[ArrayLike, ""]
    blend: Float[ArrayLike, ""]


# --- methods: new mean and variance of one BatchNorm ---


def _absolute(bn: BatchNorm, stored: Statistics, reference: jax.Array, x: jax.Array, settings: _Settings) -> Statistics:
    del reference
    mean, var = channel_moments(bn, x)
    return stored[0] + settings.trust * (mean - stored[0]), stored[1] + settings.trust * (var - stored[1])


def _differential(
    bn: BatchNorm, stored: Statistics, reference: jax.Array, x: jax.Array, settings: _Settings
) -> Statistics:
    (wanted_mean, wanted_var), (mean, var) = channel_moments(bn, reference), channel_moments(bn, x)
    # The epsilon keeps the ratio of two vanishing variances (dead channels) at 1.
    ratio = jnp.clip((var + bn.epsilon) / (wanted_var + bn.epsilon), 1 / settings.max_ratio, settings.max_ratio)
    ratio **= settings.trust
    return stored[0] + settings.trust * (mean - wanted_mean), _scaled(bn, stored[1], ratio)


def _regression(
    bn: BatchNorm, stored: Statistics, reference: jax.Array, x: jax.Array, settings: _Settings
) -> Statistics:
    (wanted_mean, wanted_var), (mean, var) = channel_moments(bn, reference), channel_moments(bn, x)
    # The epsilon is a ridge about slope 1, and keeps that of dead channels there.
    least_squares = (channel_covariance(bn, reference, x) + bn.epsilon) / (var + bn.epsilon)
    equal_variances = jnp.sqrt((wanted_var + bn.epsilon) / (var + bn.epsilon))
    slope = least_squares + settings.blend * (equal_variances - least_squares)
    largest = jnp.sqrt(settings.max_ratio)
    slope = jnp.clip(slope, 1 / largest, largest) ** settings.trust
    # What the quantized network has where the float one, by the line through both means, has the stored mean.
    place = mean + (stored[0] - wanted_mean) / slope
    return stored[0] + settings.trust * (place - stored[0]), _scaled(bn, stored[1], 1 / jnp.square(slope))


def _scaled(bn: BatchNorm, var: jax.Array, ratio: jax.Array) -> jax.Array:
    """The variance that makes what the BatchNorm divides by larger by this ratio's root."""
    return jnp.maximum((var + bn.epsilon) * ratio - bn.epsilon, 0.0)


METHODS = {"absolute": _absolute, "differential": _differential, "regression": _regression}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    """How statistics are adapted.

    Attributes:
      method: "differential", "absolute" or "regression".
      order: "layer_by_layer" measures each BatchNorm on all images together, behind those already adapted (a
        regression keeps the float network's inputs of all BatchNorms for it); "all_at_once" does so within each batch
        by itself and averages the batches, in constant memory.
      prior_images: weight of the stored statistics, in images: with n images the change is shrunk by n / (n + prior).
      max_ratio: the variance changes by at most this factor either way (differential, regression).
      blend: the slope of a regression is this share that which keeps the float network's variance, for the rest that
        of least squares. Least squares (0) takes what is noise in a channel out of it by making the channel smaller;
        equal variances (1) keep the noise, and the size that what follows was trained on.
    """

    method: str = "differential"
    order: str = "layer_by_layer"
    prior_images: float = 0.0
    max_ratio: float = 4.0
    blend: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, tuple(METHODS), "method")
        check_fields(self, ORDERS, "order")
        check_fields(self, "a finite number of at least 0", "prior_images")
        check_fields(self, "a finite number of at least 1", "max_ratio")
        check_fields(self, "a number from 0 to 1", "blend")


@full_precision
def adapt_batch_norm(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    config: BatchNormConfig = BatchNormConfig(),
    *,
    batch_size: int = 64,
    batch_norm: BatchNormRule = normalize,
) -> Any:
    """Adapt the BatchNorm statistics of a quantized network to what its layers compute.

    Pure and traceable: `jax.jit` with `graph` and `config` static. Statistics are over the whole set of images, also
    when it is sharded over devices.

    >>> adapted = dfq_jax.adapt_batch_norm(graph, variables, qvariables, images)
    >>> bool((adapted["bn1"]["mean"] == qvariables["bn1"]["mean"]).any())
    False

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: from `quantize_params`.
      images: `[N, H, W, C]`, preprocessed.
      config: by which method, and how.
      batch_size: images in one pass, for the order "all_at_once".
      batch_norm: what each BatchNorm computes once its input is measured; `analytic_correction` puts noise there.

    Returns:
      `qvariables` with new mean and variance leaves; everything else is kept.

    Raises:
      TypeError: `config` is something else.
      ValueError: no images, or images with NaN or infinity.
    """
    check_kind("config", config, BatchNormConfig)
    check_images(graph, images)
    passes = _passes(graph, variables, qvariables, images, config, batch_size, batch_norm)
    parts = [_adapt(*arguments) for arguments in passes]
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    updates = {path: value.astype(graph.shapes_by_path[path].dtype) for path, value in total.items()}
    return graph.replace(qvariables, updates)


@full_precision
def compile_adaptation(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    config: BatchNormConfig = BatchNormConfig(),
    *,
    batch_size: int = 64,
    batch_norm: BatchNormRule = normalize,
) -> None:
    """Compile ahead what `adapt_batch_norm` runs on such arguments."""
    for arguments in _passes(graph, variables, qvariables, images, config, batch_size, batch_norm):
        _adapt.compile_ahead(*arguments)


def _passes(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: jax.Array,
    config: BatchNormConfig,
    batch_size: int,
    batch_norm: BatchNormRule,
) -> Iterator[tuple[Any, ...]]:
    """The arguments of `_adapt`, for each batch of the images."""
    size = images.shape[0] if config.order == "layer_by_layer" else batch_size
    rule = as_argument(batch_norm)
    trust = images.shape[0] / (images.shape[0] + config.prior_images)
    for batch in batches(images, size):
        numbers = (batch.shape[0] / images.shape[0], trust, config.max_ratio, config.blend)
        settings = _Settings(*map(jnp.float32, numbers))
        yield graph, variables, qvariables, batch, config.method, settings, rule


@functools.partial(cpu_jit, static_argnames=("graph", "method"))
def _adapt(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: jax.Array,
    method: str,
    settings: _Settings,
    batch_norm: BatchNormRule,
) -> dict[str, jax.Array]:
    """A batch's share of new mean and variance leaves, float32 by path, from one pass of each network."""
    reference: dict[str, jax.Array] = {}

    def note(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        reference[bn.name] = x
        return batch_norm(bn, x, parameters)

    run(graph, variables, images, batch_norm=note)  # the compiler drops it where only the quantized network matters
    stored = _stored(graph, variables)
    updates: dict[str, list[Any]] = collections.defaultdict(list)

    def adapt(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        mean, var = METHODS[method](bn, stored[bn.name], reference[bn.name], x, settings)
        updates[bn.mean].append(mean)
        updates[bn.var].append(var)
        return batch_norm(bn, x, parameters._replace(mean=mean, var=var))

    apply_quantized(graph, qvariables, images, batch_norm=adapt)
    # Statistics that several places of the network share serve all of them alike.
    shapes = graph.shapes_by_path
    return {path: (settings.share * sum(v) / len(v)).reshape(shapes[path].shape) for path, v in updates.items()}


def _stored(graph: Graph, variables: Any) -> Moments:
    leaves = graph.leaves_by_path(variables)
    return {
        bn.name: (
            leaves[bn.mean].astype(jnp.float32).reshape(-1),
            leaves[bn.var].astype(jnp.float32).reshape(-1),
        )
        for bn in graph.batch_norms
    }


@full_precision
def batch_norm_moments(graph: Graph, variables: Any, images: Float[Array, "n ..."], *, batch_size: int = 64) -> Moments:
    """Measure mean and variance of every BatchNorm's input over all images, in inference mode.

    >>> mean, variance = dfq_jax.batch_norm_moments(graph, variables, images)["bn1"]
    >>> mean.shape == variance.shape == variables["bn1"]["mean"].shape
    True

    Args:
      graph: from `trace`.
      variables: float or quantized variables.
      images: `[N, H, W, C]`.
      batch_size: images in one pass; the moments are those of the whole set whatever it is.

    Returns:
      `{BatchNorm name: (mean [channels], variance [channels])}`, float32, biased variance.
    """
    total: dict[str, tuple[jax.Array, jax.Array]] = {}
    for batch in batches(images, batch_size):
        share = batch.shape[0] / images.shape[0]
        for name, (mean, var) in _moments(graph, variables, batch).items():
            # Means and second moments add up over batches; the variance follows from them at the end.
            first, second = total.get(name, (0.0, 0.0))
            total[name] = (first + share * mean, second + share * (var + mean**2))
    return {name: (first, jnp.maximum(second - first**2, 0.0)) for name, (first, second) in total.items()}


@functools.partial(jax.jit, static_argnames="graph")
def _moments(graph: Graph, variables: Any, images: jax.Array) -> Moments:
    moments: Moments = {}

    def measure(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        moments[bn.name] = channel_moments(bn, x)
        return normalize(bn, x, parameters)

    apply_quantized(graph, variables, images, batch_norm=measure)
    return moments


def output_moments(bn: BatchNorm, parameters: BatchNormParameters) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and standard deviation of each channel behind a BatchNorm whose input has the stored statistics.

    The deviation is `|scale| sqrt(var / (var + epsilon))`: well below `|scale|` where a channel is nearly dead.

    Args:
      bn: the BatchNorm.
      parameters: its leaves.

    Returns:
      `(mean [channels], deviation [channels])`, float32.
    """
    var = parameters.var.astype(jnp.float32)
    scale, bias = (jnp.asarray(leaf, jnp.float32) for leaf in (parameters.scale, parameters.bias))
    return jnp.broadcast_to(bias, var.shape), jnp.abs(scale) * jnp.sqrt(var / (var + bn.epsilon))
