"""Clipping ranges of activations.

Every estimator is a function of one signature, `(summary, bits) -> (lo, hi)`, where a `Summary` holds what the images
(or the BatchNorm parameters alone, see `analytic`) tell about one tensor: the peaks of each image and a histogram.
`estimate_ranges` collects summaries in two passes of constant memory and applies an estimator to each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import batches, full_precision
from dfq_jax.graph import BatchNormRule, Graph, as_argument, check_images, record_tensors
from dfq_jax.quantizers import fake_quant, params_from_range
from dfq_jax.stages.convention import Convention, check_convention

BINS = 4096
# Histograms are taken over at most so many elements of a tensor in each batch; peaks are over all of them.
MAX_SAMPLES = 1 << 19
Range = tuple[Float[Array, ""], Float[Array, ""]]
Peaks = tuple[Float[Array, " n"], Float[Array, " n"]]
Estimator = Callable[..., Range]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known about the values of one tensor.

    Attributes:
      peak_lo: smallest value of each image, `[N]`.
      peak_hi: largest value of each image, `[N]`.
      counts: histogram over `[lo, hi]`, `[BINS]`, any positive total.
      lo: smallest value of all, a scalar.
      hi: largest value of all, a scalar.
    """

    peak_lo: Any
    peak_hi: Any
    counts: Any
    lo: Any
    hi: Any

    @property
    def centers(self) -> Float[Array, " bins"]:
        """Middle of each bin."""
        bins = self.counts.shape[0]
        return self.lo + (jnp.arange(bins, dtype=jnp.float32) + 0.5) * ((self.hi - self.lo) / bins)


# --- estimators ---


def maximum(summary: Summary, *, bits: int) -> Range:
    """The smallest and largest value seen on any image (ZeroQ, arXiv 2001.00281)."""
    return summary.lo, summary.hi


def mean_peak(summary: Summary, *, bits: int) -> Range:
    """The peaks of each image averaged over images: unlike the maximum, it does not grow with their number."""
    return summary.peak_lo.mean(), summary.peak_hi.mean()


def percentile(summary: Summary, *, bits: int, percent: float = 99.9) -> Range:
    """The central range that holds `percent` of the values; a one-sided tensor is clipped on its one side."""
    two_sided = (summary.lo < 0) & (summary.hi > 0)
    tail = (1.0 - percent / 100.0) * jnp.where(two_sided, 0.5, 1.0)
    cumulative = jnp.cumsum(summary.counts) / jnp.maximum(summary.counts.sum(), 1e-30)
    width = (summary.hi - summary.lo) / summary.counts.shape[0]
    below = jnp.sum(cumulative <= tail)
    above = jnp.sum(cumulative < 1.0 - tail) + 1
    lo = jnp.where(summary.lo < 0, summary.lo + below * width, summary.lo)
    hi = jnp.where(summary.hi > 0, summary.lo + above * width, summary.hi)
    return lo, hi


def lp(summary: Summary, *, bits: int, p: float = 2.4) -> Range:
    """The range of least mean |x - Q(x)|^p, from a grid of fractions of the full range.

    p = 2.4 as in the code line of BRECQ and QDrop (arXiv 2102.05426, 2203.05740). Both ends shrink together first;
    then each end is searched by itself, which matters where the two tails differ (swish).
    """
    # The power is an argument, and peaks, as many as there are images, are none: one program for every estimator.
    return _search(dataclasses.replace(summary, peak_lo=None, peak_hi=None), jnp.float32(p), bits)


def mse(summary: Summary, *, bits: int) -> Range:
    """The range of least mean squared quantization error."""
    return lp(summary, bits=bits, p=2.0)


@functools.partial(jax.jit, static_argnames="bits")
def _search(summary: Summary, p: Float[Array, ""], bits: int) -> Range:
    lo, hi, x = summary.lo, summary.hi, summary.centers
    weight = summary.counts / jnp.maximum(summary.counts.sum(), 1e-30)
    fractions = jnp.linspace(0.01, 1.0, 100, dtype=jnp.float32)
    # Errors relative to the peak, lest the p-th power of a large one overflow, or of a small one underflow.
    peak = jnp.maximum(-lo, hi)
    unit = 1.0 / jnp.where(peak > 0, peak, 1.0)

    def error(pair: jax.Array) -> jax.Array:
        params = params_from_range(lo * pair[0], hi * pair[1], bits=bits)
        return jnp.sum(weight * jnp.abs((x - fake_quant(x, params)) * unit) ** p)

    def best(candidates: jax.Array) -> jax.Array:
        return candidates[jnp.argmin(jax.lax.map(error, candidates, batch_size=25))]

    chosen = best(jnp.stack([fractions, fractions], axis=1))
    for _ in range(2):
        for end in (0, 1):
            chosen = best(jnp.concatenate([chosen[None], jnp.tile(chosen, (100, 1)).at[:, end].set(fractions)]))
    return lo * chosen[0], hi * chosen[1]


def aciq_gaussian(summary: Summary, *, bits: int) -> Range:
    """The clip that is optimal for a Gaussian (rectified where the tensor is) of the tensor's variance.

    After Banner et al., "Post training 4-bit quantization of convolutional networks" (ACIQ, arXiv 1810.05723); the
    optimum is computed for quantizers whose end levels sit on the clip.
    """
    return _aciq(summary, bits, "gaussian")


def aciq_laplace(summary: Summary, *, bits: int) -> Range:
    """As `aciq_gaussian` for a Laplace distribution of the tensor's mean absolute deviation."""
    return _aciq(summary, bits, "laplace")


def _aciq(summary: Summary, bits: int, family: str) -> Range:
    x, weight = summary.centers, summary.counts / jnp.maximum(summary.counts.sum(), 1e-30)
    mean = jnp.sum(weight * x)
    # A rectified tensor: half of a symmetric distribution around zero, with the other half set to zero.
    half_spread = jnp.sqrt(2 * jnp.sum(weight * x**2)) if family == "gaussian" else 2 * jnp.sum(weight * jnp.abs(x))
    full_spread = (
        jnp.sqrt(jnp.sum(weight * (x - mean) ** 2)) if family == "gaussian" else jnp.sum(weight * jnp.abs(x - mean))
    )
    half = optimal_clip(family, bits, True) * half_spread
    full = optimal_clip(family, bits, False) * full_spread
    one_sided = summary.lo >= 0
    lo = jnp.where(one_sided, 0.0, jnp.maximum(summary.lo, mean - full))
    hi = jnp.where(one_sided, jnp.minimum(summary.hi, half), jnp.minimum(summary.hi, mean + full))
    return lo, hi


@functools.cache
def optimal_clip(family: str, bits: int, rectified: bool) -> float:
    """The clip of least squared error in units of sigma ("gaussian") or b ("laplace"), found numerically."""
    x = np.linspace(0.0, 24.0, 48001)
    density = np.exp(-0.5 * x**2) if family == "gaussian" else np.exp(-x)
    # Signed: 2^bits levels from -clip to clip, seen from the positive half; rectified: 2^bits levels from 0 to clip.
    intervals = (2**bits - 1) * (1 if rectified else 0.5)

    def error(clip: float) -> float:
        step = clip / intervals
        offset = 0.0 if rectified else 0.5 * step
        level = np.clip(np.round((x - offset) / step) * step + offset, 0.0 if rectified else offset, clip)
        return float(np.sum(density * (x - level) ** 2))

    grid = np.linspace(1.0, 13.0, 601)
    return float(grid[np.argmin([error(c) for c in grid])])


ESTIMATORS: dict[str, Estimator] = {
    "max": maximum,
    "mean_peak": mean_peak,
    "percentile": percentile,
    "mse": mse,
    "lp": lp,
    "l1.5": functools.partial(lp, p=1.5),
    "aciq_gaussian": aciq_gaussian,
    "aciq_laplace": aciq_laplace,
}


def estimate_ranges(
    graph: Graph,
    variables: Any,
    images: Float[Array, "n ..."],
    convention: Convention,
    *,
    estimator: str | Estimator = "lp",
    batch_size: int = 64,
) -> dict[str, Range]:
    """Estimate the clipping range of every tensor that layers read.

    >>> ranges = dfq_jax.estimate_ranges(graph, variables, images, convention, estimator="mean_peak")
    >>> sorted(ranges)
    ['dense1', 'dense2']

    Args:
      graph: from `trace`.
      variables: float variables.
      images: `[N, H, W, C]`, preprocessed as the network takes them (synthetic ones, or real).
      convention: gives the bits that an estimator optimizes for.
      estimator: a name in `ESTIMATORS`, or a function `(summary, bits=...) -> (lo, hi)`.
      batch_size: images in one pass of the network.

    Returns:
      `{tensor name: (lo, hi)}`, float32 scalars.

    Raises:
      TypeError: `convention` is something else.
      ValueError: no images, images with NaN or infinity, an unknown estimator.
    """
    check_convention(convention)
    function = resolve_estimator(estimator)
    return apply_estimator(graph, summarize(graph, variables, images, batch_size=batch_size), convention, function)


def resolve_estimator(estimator: str | Estimator) -> Estimator:
    """An estimator as given, or that of a name."""
    if callable(estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected a function or one of {sorted(ESTIMATORS)}, found {estimator!r}.")
    return ESTIMATORS[estimator]


def apply_estimator(
    graph: Graph, summaries: dict[str, Summary], convention: Convention, estimator: Estimator
) -> dict[str, Range]:
    """An estimator over summaries; tensors that stay in float need no range.

    Raises:
      TypeError: `convention` is something else.
    """
    check_convention(convention)
    ranges = {}
    for tensor in graph.tensors:
        bits = convention.tensor_bits(graph, tensor)
        if bits is not None:
            lo, hi = estimator(summaries[tensor.name], bits=bits)
            ranges[tensor.name] = (jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32))
    return ranges


# --- summaries ---


@full_precision
def summarize(
    graph: Graph,
    variables: Any,
    images: Float[Array, "n ..."],
    *,
    batch_size: int = 64,
    batch_norm: BatchNormRule | None = None,
) -> dict[str, Summary]:
    """Collect peaks and histograms of every tensor, by name, in two passes over the images.

    >>> summaries = dfq_jax.summarize(graph, variables, images)
    >>> summaries["dense1"].peak_hi.shape == (len(images),)
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      images: `[N, H, W, C]`.
      batch_size: images in one pass of the network.
      batch_norm: what each BatchNorm computes in place of itself.

    Raises:
      ValueError: no images, or images with NaN or infinity.
    """
    check_images(graph, images)
    rule = as_argument(batch_norm)
    if len(images) <= batch_size:
        return _summaries(graph, variables, images, rule)
    parts = [_peaks(graph, variables, batch, rule) for batch in batches(images, batch_size)]
    peaks = jax.tree.map(lambda *p: jnp.concatenate(p), *parts)
    limits = {name: (lo.min(), hi.max()) for name, (lo, hi) in peaks.items()}
    histograms = (_histograms(graph, variables, batch, limits, rule) for batch in batches(images, batch_size))
    counts = functools.reduce(functools.partial(jax.tree.map, jnp.add), histograms)
    return {name: _summary(peaks[name], counts[name], limits[name]) for name in peaks}


def _summary(peaks: Peaks, counts: Float[Array, " bins"], limits: Range) -> Summary:
    return Summary(peak_lo=peaks[0], peak_hi=peaks[1], counts=counts, lo=limits[0], hi=limits[1])


@functools.partial(jax.jit, static_argnames="graph")
def _summaries(graph: Graph, variables: Any, images: jax.Array, batch_norm: BatchNormRule | None) -> dict[str, Summary]:
    """Of a single batch: one program where several batches take two, since limits come before histograms."""
    _, tensors = record_tensors(graph, variables, images, batch_norm=batch_norm)
    peaks = {name: _peaks_of(x) for name, x in tensors.items()}
    limits = {name: (lo.min(), hi.max()) for name, (lo, hi) in peaks.items()}
    return {name: _summary(peaks[name], _counts(x, *limits[name]), limits[name]) for name, x in tensors.items()}


@functools.partial(jax.jit, static_argnames="graph")
def _peaks(graph: Graph, variables: Any, images: jax.Array, batch_norm: BatchNormRule | None) -> dict[str, Peaks]:
    _, tensors = record_tensors(graph, variables, images, batch_norm=batch_norm)
    return {name: _peaks_of(x) for name, x in tensors.items()}


def _peaks_of(x: Float[Array, "n ..."]) -> Peaks:
    flat = x.astype(jnp.float32).reshape(x.shape[0], -1)
    return flat.min(1), flat.max(1)


@functools.partial(jax.jit, static_argnames="graph")
def _histograms(
    graph: Graph, variables: Any, images: jax.Array, limits: dict[str, Range], batch_norm: BatchNormRule | None
) -> dict[str, jax.Array]:
    _, tensors = record_tensors(graph, variables, images, batch_norm=batch_norm)
    return {name: _counts(x, *limits[name]) for name, x in tensors.items()}


def _counts(x: Float[Array, "n ..."], lo: jax.Array, hi: jax.Array) -> Float[Array, " bins"]:
    stride = _stride(x.shape)
    # Each sample stands for `stride` elements, so that a small last batch weighs no more than its share.
    return stride * _histogram(x.reshape(-1)[::stride], lo, hi)


def _stride(shape: tuple[int, ...]) -> int:
    """Thins to at most MAX_SAMPLES elements, and visits every channel and position."""
    stride = -(-math.prod(shape) // MAX_SAMPLES)
    while stride > 1 and any(math.gcd(stride, d) > 1 for d in shape[1:] if d > 1):
        stride += 1
    return stride


def _histogram(x: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    width = jnp.maximum((hi - lo) / BINS, 1e-30)
    index = jnp.clip(((x.astype(jnp.float32) - lo) / width).astype(jnp.int32), 0, BINS - 1)
    return jnp.zeros(BINS, jnp.float32).at[index].add(1.0)
