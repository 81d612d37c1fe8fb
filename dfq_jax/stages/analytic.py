"""What BatchNorm parameters alone tell about activations: no images, no optimization.

Behind a BatchNorm each channel has mean `bias` and standard deviation `|scale| sqrt(var / (var + epsilon))` by
construction (Nagel et al., DFQ, arXiv 1906.04721, who leave out the epsilon). So the network is run with every
BatchNorm's output replaced by noise of just these moments; what follows up to the next BatchNorm (activations,
residual sums, pooling, gates) acts on the noise as it would on data. Layers in front of a BatchNorm do not matter then,
and the compiler drops them.

The noise is Gaussian, but for ranges of many bits, where it has the tails of a Laplace distribution, which activations
are nearer to (Banner et al., ACIQ, arXiv 1810.05723): Gaussian ranges cut off so much of some tensors that 8 bits are
not lossless, while at 4 bits the finer step is worth more than the tails.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dfq_jax.base import RUN_ONCE, check_kind, cpu_jit, full_precision
from dfq_jax.graph import (
    BatchNorm,
    BatchNormParameters,
    BatchNormRule,
    Graph,
    along_channels,
    apply_quantized,
    batch_norm_parameters,
    normalize,
    run,
)
from dfq_jax.stages.batch_norm import BatchNormConfig, adapt_batch_norm, compile_adaptation, output_moments
from dfq_jax.stages.bias_correction import compile_bias_correction, correct_bias
from dfq_jax.stages.comparison import Comparison, compare_outputs
from dfq_jax.stages.convention import Convention, check_convention
from dfq_jax.stages.ranges import Summary, summarize
from dfq_jax.stages.rounding import GPTQConfig, gptq

# Share of a channel's variance that is common to all pixels of an image: without it, averages over space (global
# pooling) would have no spread. Natural images have some; the exact value matters little.
SPATIAL_CORRELATION = 0.25
# How many samples: each pixel of one tells something, but behind a global pooling one sample is one value. Fewer of
# large inputs tell as much, which cost time and memory: so many values, but no fewer samples than these where
# statistics are measured, and where networks are compared, which get the same noise.
NUM_SAMPLES, NUM_VALUES = 32, 32 * 64 * 64 * 3
LEAST_MEASURED, LEAST_COMPARED = 16, 8
# From so many bits on, ranges are those of heavier tails than Gaussian ones.
HEAVY_TAILED_BITS = 6
# Samples of noise, from which each BatchNorm takes its own by starting at another place: to draw them anew for each
# takes the compiler minutes. The number is prime, so that where samples repeat, they do at other channels.
POOL = 4_194_301


def analytic_summaries(
    graph: Graph, variables: Any, convention: Convention | None = None, *, num_samples: int | None = None
) -> dict[str, Summary]:
    """Tell the summaries of every tensor, for `apply_estimator`, from BatchNorm parameters.

    >>> summaries = dfq_jax.analytic_summaries(graph, variables, num_samples=8)
    >>> sorted(summaries)
    ['dense1', 'dense2']

    Args:
      graph: from `trace`.
      variables: float variables.
      convention: gives the bits of tensors; those of `HEAVY_TAILED_BITS` and more are told with heavier tails, since
        they have codes for them, and those that stay in float are left out. Without it, all are told, with Gaussian
        tails.
      num_samples: samples of noise of the input's shape, as many as tell enough if None; the input itself is taken as
        standard Gaussian, as preprocessed images are on average.

    Returns:
      `{tensor name: Summary}`; the same every time.

    Raises:
      GraphError: the network has no BatchNorm.
      TypeError: `convention` is something else.
    """
    (summaries,) = analytic_summaries_of(graph, variables, [convention], num_samples=num_samples)
    return summaries


def analytic_summaries_of(
    graph: Graph, variables: Any, conventions: Sequence[Convention | None], *, num_samples: int | None = None
) -> list[dict[str, Summary]]:
    """`analytic_summaries` for several conventions at once: noise of each kind is run but once."""
    heavy = [_heavy_tailed(graph, convention) for convention in conventions]
    told = {}
    for tails in {tails for of_tensors in heavy for tails in of_tensors.values()}:
        noise, rule = noise_of_moments(graph, variables, num_samples, heavy_tails=tails)
        told[tails] = summarize(graph, variables, noise, batch_size=len(noise), batch_norm=rule)
    return [{name: told[tails][name] for name, tails in of_tensors.items()} for of_tensors in heavy]


def _heavy_tailed(graph: Graph, convention: Convention | None) -> dict[str, bool]:
    """Whether the tensors that are quantized, or without a convention all, have heavier tails."""
    if convention is None:
        return dict.fromkeys((tensor.name for tensor in graph.tensors), False)
    check_convention(convention)
    bits = {tensor.name: convention.tensor_bits(graph, tensor) for tensor in graph.tensors}
    return {name: b >= HEAVY_TAILED_BITS for name, b in bits.items() if b is not None}


def analytic_correction(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    config: BatchNormConfig = BatchNormConfig(),
    *,
    num_samples: int | None = None,
) -> Any:
    """Correct BatchNorm statistics and biases for what quantization does on average, without images.

    The data-free counterpart of `adapt_batch_norm` and `correct_bias`: float and quantized layers get the same noise of
    the moments that the BatchNorms in front of them promise, and the shift of the mean, `(W' - W) E[x]` and what
    clipping and rounding of x add, and the ratio of variances go into the BatchNorm behind the layer, or the shift into
    the layer's bias where there is none (Nagel et al., DFQ, arXiv 1906.04721, which corrects means).

    Each layer is taken by itself, with inputs as the float network's. Channels of one BatchNorm count as independent,
    and pixels as correlated to `SPATIAL_CORRELATION`: means do not depend on that, ratios of variances do.

    >>> corrected = dfq_jax.analytic_correction(graph, variables, qvariables, num_samples=8)
    >>> bool((corrected["bn1"]["mean"] == qvariables["bn1"]["mean"]).any())
    False

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: from `quantize_params`, with final codes.
      config: as for `adapt_batch_norm`; `max_ratio=1` keeps variances.
      num_samples: samples of noise of the input's shape; as many as tell enough if None.

    Returns:
      `qvariables` with new mean, variance and bias leaves.

    Raises:
      TypeError: `config` is something else.
      GraphError: the network has no BatchNorm.
    """
    check_kind("config", config, BatchNormConfig)
    noise, rule = noise_of_moments(graph, variables, num_samples)
    adapted = adapt_batch_norm(graph, variables, qvariables, noise, config, batch_size=len(noise), batch_norm=rule)
    return correct_bias(graph, variables, adapted, noise, normalized=False, batch_norm=rule)


def gptq_from_noise(
    graph: Graph, variables: Any, qvariables: Any, config: GPTQConfig = GPTQConfig(), *, num_samples: int | None = None
) -> Any:
    """Round weights by GPTQ without images.

    The layers' inputs are noise of the moments that the BatchNorms in front promise.

    >>> rounded = dfq_jax.gptq_from_noise(graph, variables, qvariables, num_samples=8)
    >>> rounded["dense2"]["kernel"].bits
    4

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: from `quantize_params`.
      config: as for `gptq`.
      num_samples: samples of noise of the input's shape; as many as tell enough if None.

    Returns:
      `qvariables` with other codes.

    Raises:
      TypeError: `config` is something else.
      GraphError: the network has no BatchNorm.
      ValueError: as `gptq`.
    """
    check_kind("config", config, GPTQConfig)
    noise, rule = noise_of_moments(graph, variables, num_samples)
    return gptq(graph, variables, qvariables, noise, config, batch_size=len(noise), batch_norm=rule)


@full_precision
def analytic_comparison(graph: Graph, variables: Any, qvariables: Any, *, num_samples: int | None = None) -> Comparison:
    """Compare the quantized network with the float one without images, for who has none.

    Behind each BatchNorm the float network gets noise of the moments that it promises, and the quantized network the
    same noise with its own error up to there added: errors travel to the outputs through activations as they are on
    data, not as they are on noise at the input, which no layer has seen in training.

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: quantized ones of the same function.
      num_samples: samples of noise of the input's shape; as many as tell enough if None.

    Returns:
      As `compare`; the same every time.

    Raises:
      GraphError: the network has no BatchNorm.
    """
    noise, rule = noise_of_moments(graph, variables, num_samples, least=LEAST_COMPARED)
    return compare_outputs(graph, [_apply_both(graph, variables, qvariables, noise, rule)])


@full_precision
def compile_analytic_comparison(graph: Graph, variables: Any, qvariables: Any) -> None:
    """Compile ahead what `analytic_comparison` runs on such variables."""
    noise, rule = noise_of_moments(graph, variables, least=LEAST_COMPARED)
    _apply_both.compile_ahead(graph, variables, qvariables, noise, rule)


def compile_analytic_correction(graph: Graph, variables: Any, qvariables: Any, config: BatchNormConfig) -> None:
    """Compile ahead what `analytic_correction` runs on such variables."""
    noise, rule = noise_of_moments(graph, variables)
    compile_adaptation(graph, variables, qvariables, noise, config, batch_size=len(noise), batch_norm=rule)
    compile_bias_correction(graph, variables, qvariables, noise, normalized=False, batch_norm=rule)


@functools.partial(cpu_jit, static_argnames="graph")
def _apply_both(graph: Graph, variables: Any, qvariables: Any, x: jax.Array, noise: BatchNormRule) -> tuple[Any, Any]:
    normalized: dict[str, jax.Array] = {}

    def reference(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        normalized[bn.name] = normalize(bn, x, parameters)
        return noise(bn, x, parameters)

    def with_error(bn: BatchNorm, x: jax.Array, parameters: BatchNormParameters) -> jax.Array:
        return noise(bn, x, parameters) + normalize(bn, x, parameters) - normalized[bn.name]

    outputs = run(graph, variables, x, batch_norm=reference)
    return outputs, apply_quantized(graph, qvariables, x, batch_norm=with_error)


@full_precision  # as all that run it: the programs are the same then
def noise_of_moments(
    graph: Graph,
    variables: Any,
    num_samples: int | None = None,
    *,
    least: int = LEAST_MEASURED,
    heavy_tails: bool = False,
) -> tuple[jax.Array, Partial]:
    """Noise in place of images, and the rule that puts noise behind BatchNorms; the same every time.

    It is Gaussian, or with heavy tails Laplacian, of the same moments. Without `num_samples` there are as many samples
    as tell enough, of large inputs no fewer than `least`.
    """
    graph.require_batch_norms("so nothing is known of its activations without images.")
    if num_samples is None:
        num_samples = max(least, min(NUM_SAMPLES, NUM_VALUES // math.prod(graph.input.shape[1:])))
    leaves = graph.leaves_by_path(variables)
    paths = {path for bn in graph.batch_norms for path in (bn.mean, bn.var, bn.scale, bn.bias)}
    pool, images = _pool((num_samples, *graph.input.shape[1:]), heavy_tails)
    statistics = [leaf if path in paths else None for path, leaf in leaves.items()]
    return images, Partial(_NoiseOfMoments(tuple(bn.name for bn in graph.batch_norms)), pool, statistics)


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=(0, 1))
def _pool(shape: tuple[int, ...], heavy_tails: bool) -> tuple[Float[Array, " n"], Float[Array, "..."]]:
    """The samples of all noise, and images of Gaussian ones."""
    pool = jax.random.normal(jax.random.key(0), (POOL,), jnp.float32)
    images = _take(pool, 0, shape)
    if heavy_tails:
        pool = jax.random.laplace(jax.random.key(0), (POOL,), jnp.float32) / math.sqrt(2)  # of variance 1
    return pool, images


@dataclasses.dataclass(frozen=True)
class _NoiseOfMoments:
    """A rule: noise of the moments by the float network's leaves, in the float and the quantized network alike.

    Attributes:
      order: names of the BatchNorms as they are executed.
    """

    order: tuple[str, ...]

    def __call__(
        self,
        pool: Float[Array, " n"],
        statistics: list[Any],
        bn: BatchNorm,
        x: Float[Array, "..."],
        parameters: BatchNormParameters,
    ) -> Float[Array, "..."]:
        # The places follow from the order: independent between BatchNorms, the same in every run, for every batch, and
        # whatever the user's tree calls them.
        place = zlib.crc32(f"batch_norm {self.order.index(bn.name)}".encode())
        per_image = tuple(d if a in (0, bn.channel_axis) else 1 for a, d in enumerate(x.shape))
        common, own = _take(pool, place, per_image), _take(pool, place + POOL // 2, x.shape)
        noise = _standardized(jnp.sqrt(SPATIAL_CORRELATION) * common + jnp.sqrt(1 - SPATIAL_CORRELATION) * own, bn)
        moments = output_moments(bn, batch_norm_parameters(bn, statistics))
        center, spread = (along_channels(bn, x, moment) for moment in moments)
        return center + spread * noise


def _standardized(noise: Float[Array, "..."], bn: BatchNorm) -> Float[Array, "..."]:
    """Of mean 0 and variance 1 in each channel: what the samples miss of their moments would pass for an error."""
    axes = tuple(a for a in range(noise.ndim) if a != bn.channel_axis)
    noise = jax.lax.optimization_barrier(noise)  # with its samples within the sums, the compiler takes twice as long
    mean, square = noise.mean(axes, keepdims=True), jnp.square(noise).mean(axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(square - mean**2, 1e-4))  # of one sample, or of equal ones, nothing is left
    mean, scale = jax.lax.optimization_barrier((mean, scale))
    return (noise - mean) * scale


def _take(pool: Float[Array, " n"], place: int, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Samples from a place on, around and around."""
    begin, size = place % POOL, math.prod(shape)
    return jnp.tile(pool, -(-(begin + size) // POOL))[begin : begin + size].reshape(shape)
