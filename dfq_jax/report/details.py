"""What a page shows beyond the report itself: each layer's errors, its values against its steps, and pictures."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import RUN_ONCE, batches, cpu_jit, full_precision, known_fields, mesh_of, on_all
from dfq_jax.graph import Graph, Tensor, check_images, run
from dfq_jax.quantizers import QTensor, QuantizerParams, bounds, check_quantized, fake_quant, quantization
from dfq_jax.report.pictures import pictures, png
from dfq_jax.stages import apply_float, apply_jitted, compare_layers, enough_images, sqnr

BINS = 96  # of a histogram; two thirds of them lie within the clipping range
BATCH = 8
PICTURES = 12  # the best and the worst
LARGEST_SIDE = 112  # of a picture; larger images are made smaller, so that a page stays small


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Values against the quantizer that they meet.

    Attributes:
      counts: of values in equal bins from `first` to `last`; those beyond are counted in the outermost.
      first, last: the outer edges.
      low, high: the clipping range.
      step: from one level to the next.
      clipped: share of the values outside of the range by more than half a step.
      sqnr: of the values as quantized, decibel.
    """

    counts: tuple[int, ...]
    first: float
    last: float
    low: float
    high: float
    step: float
    clipped: float
    sqnr: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDetails:
    """One layer.

    Attributes:
      name: of the layer.
      sqnr, own, carried: as in `LayerError`, decibel.
      weights: of the float network, in steps of their channel; None where they stay in float.
      scales: the smallest and the largest step of the weights.
      inputs: of the float network; None where they stay in float.
    """

    name: str
    sqnr: float | None
    own: float | None
    carried: float | None
    weights: Spread | None
    scales: tuple[float, float] | None
    inputs: Spread | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that both networks have seen.

    Attributes:
      png: content of a PNG file, in base64.
      divergence: of the quantized network's outputs from the float network's.
      classes: where the float and the quantized network put it; None without classes.
    """

    png: str
    divergence: float
    classes: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Details:
    """What `examine` found.

    Attributes:
      measured_on: the images, in words.
      layers: one entry each, in the order they run.
      pictures: of the largest divergences first; none where the network takes no images.
      sensitivity: what `Sensitivity.to_json` gives, read, where bits were chosen by it.
    """

    measured_on: str
    layers: tuple[LayerDetails, ...]
    pictures: tuple[Picture, ...] = ()
    sensitivity: dict[str, Any] | None = None


@full_precision
def examine(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    *,
    kind: str = "images",
    preprocessing: Callable[[np.ndarray], Any] | None = None,
) -> Details:
    """Find what a page shows of a quantized network, on some of the images.

    >>> found = examine(graph, variables, qvariables, images)
    >>> [(layer.name, sum(layer.inputs.counts)) for layer in found.layers]
    [('dense1', 48), ('dense2', 32)]

    Args:
      graph: from `trace`.
      variables: float variables; those that were quantized, so equalized ones where weight ranges were equalized.
      qvariables: quantized ones of the same function.
      images: `[N, H, W, C]`, preprocessed; no more than `enough_images` of them are taken, evenly.
      kind: what they are, in words.
      preprocessing: undone for the pictures, as in `image_grid`.

    Raises:
      ValueError: unusable images, or variables that are not quantized.
      ImportError: pillow, which pictures take, is not installed.
    """
    check_images(graph, images)
    check_quantized(qvariables)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(enough_images(graph), len(images))).astype(int))
    images = jnp.asarray(images)
    seen = on_all(images[chosen], mesh_of(images))
    errors = compare_layers(graph, variables, qvariables, seen, batch_size=BATCH)
    inputs = _inputs(graph, variables, quantization(qvariables).by_tensor, seen)
    kernels, qkernels = graph.leaves_by_path(variables), graph.leaves_by_path(qvariables)
    layers = []
    for layer, error in zip(graph.layers, errors.layers, strict=True):
        weights, scales = _weights(kernels[layer.kernel], qkernels[layer.kernel])
        read = inputs.get(layer.tensor)
        levels: dict[str, Any] = {"weights": weights, "scales": scales, "inputs": read}
        layers.append(LayerDetails(**dataclasses.asdict(error), **levels))
    shown = _pictures(graph, variables, qvariables, seen, preprocessing) if seen.ndim == 4 else ()
    return Details(measured_on=f"{len(seen)} {kind}", layers=tuple(layers), pictures=shown)


def details_from(fields: Mapping[str, Any]) -> Details:
    """The details that `dataclasses.asdict` and JSON made these fields of.

    Raises:
      ValueError: there are fields that details do not have.
    """
    fields = known_fields(Details, fields)

    def spread(found: Mapping[str, Any] | None) -> Spread | None:
        if found is None:
            return None
        return Spread(**{**known_fields(Spread, found), "counts": tuple(found["counts"])})

    layers = []
    for layer in fields["layers"]:
        scales = None if layer["scales"] is None else tuple(layer["scales"])
        spreads = {name: spread(layer[name]) for name in ("weights", "inputs")}
        layers.append(LayerDetails(**{**known_fields(LayerDetails, layer), **spreads, "scales": scales}))
    shown = []
    for picture in fields["pictures"]:
        classes = None if picture["classes"] is None else tuple(picture["classes"])
        shown.append(Picture(**{**known_fields(Picture, picture), "classes": classes}))
    return Details(**{**fields, "layers": tuple(layers), "pictures": tuple(shown)})


# --- values and steps ---


class _Bins(NamedTuple):
    """Equal bins of codes, a quarter of the clipping range beyond each end of it."""

    first: float
    width: float

    @classmethod
    def of(cls, qmin: int, qmax: int) -> _Bins:
        levels = qmax - qmin + 1
        return cls(qmin - 0.5 - levels / 4, 1.5 * levels / BINS)

    def spread(self, counts: Any, scale: float, zero: float, qmin: int, qmax: int, **facts: Any) -> Spread:
        """With codes as what they stand for."""
        first, last, low, high = (
            scale * (code - zero) for code in (self.first, self.first + BINS * self.width, qmin, qmax)
        )
        edges = {"first": first, "last": last, "low": low, "high": high, "step": scale}
        return Spread(counts=tuple(int(count) for count in counts), **edges, **facts)


def _weights(kernel: Any, codes: Any) -> tuple[Spread | None, tuple[float, float] | None]:
    """Of float weights, in steps of their channel."""
    if not isinstance(codes, QTensor):
        return None, None
    codes = jax.tree.map(np.asarray, codes)
    qmin, qmax = bounds(codes.bits, codes.signed)
    bins, kernel = _Bins.of(qmin, qmax), np.asarray(kernel, np.float32)
    zero = 0 if codes.zero_point is None else codes.zero_point
    values = np.clip(kernel / codes.scale + zero, -1e6, 1e6)  # of a dead channel, any
    places = np.clip((values - bins.first) / bins.width, 0, BINS - 1).astype(np.int64)
    clipped = float(((values < qmin - 0.5) | (values > qmax + 0.5)).mean())
    facts = {"clipped": clipped, "sqnr": sqnr(kernel, codes.dequantize())}
    counts = np.bincount(places.reshape(-1), minlength=BINS)
    scales = (float(codes.scale.min()), float(codes.scale.max()))
    return bins.spread(counts, 1.0, 0.0, qmin, qmax, **facts), scales


def _inputs(
    graph: Graph, variables: Any, quantizers: Mapping[str, QuantizerParams], images: Array
) -> dict[str, Spread]:
    """Of the float network's tensors, by name, against their quantizers."""
    found = [_measure(graph, variables, dict(quantizers), x) for x in batches(images, BATCH)]
    totals = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *found)
    spreads = {}
    for name, (counts, outside, signal, noise) in totals.items():
        params = jax.tree.map(np.asarray, quantizers[name])
        qmin, qmax = bounds(params.bits, params.signed)
        zero = 0.0 if params.zero_point is None else float(params.zero_point)
        ratio = None if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
        facts = {"clipped": float(outside / counts.sum()), "sqnr": ratio}
        spreads[name] = _Bins.of(qmin, qmax).spread(counts, float(params.scale), zero, qmin, qmax, **facts)
    return spreads


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnames="graph")
def _measure(
    graph: Graph, variables: Any, quantizers: dict[str, QuantizerParams], x: Array
) -> dict[str, tuple[Array, Array, Array, Array]]:
    """Of each tensor: counts in bins, how many are clipped, and the powers of its values and of their error."""
    found: dict[str, tuple[Array, Array, Array, Array]] = {}

    def count(item: Tensor, value: Array) -> Array:
        if (params := quantizers.get(item.name)) is not None:
            qmin, qmax = bounds(params.bits, params.signed)
            bins, exact = _Bins.of(qmin, qmax), value.astype(jnp.float32)
            codes = exact / params.scale + (0 if params.zero_point is None else params.zero_point)
            places = jnp.clip((codes - bins.first) / bins.width, 0, BINS - 1).astype(jnp.int32)
            outside = ((codes < qmin - 0.5) | (codes > qmax + 0.5)).sum()
            powers = jnp.square(exact).sum(), jnp.square(exact - fake_quant(exact, params)).sum()
            found[item.name] = (jnp.bincount(places.reshape(-1), length=BINS), outside, *powers)
        return value

    run(graph, variables, x, tensor=count)
    return found


# --- pictures ---


def _pictures(
    graph: Graph, variables: Any, qvariables: Any, images: Array, preprocessing: Callable[[np.ndarray], Any] | None
) -> tuple[Picture, ...]:
    """The images of the largest and of the smallest divergence, the largest first."""
    scores = []
    for apply, tree in ((apply_float, variables), (apply_jitted, qvariables)):
        outputs = [graph.logits(apply(graph, tree, x)) for x in batches(images, BATCH)]
        scores.append(np.concatenate([np.asarray(z, np.float64).reshape(len(z), -1) for z in outputs]))
    reference, other = scores
    if graph.num_classes < 2:
        divergences = np.square(reference - other).sum(1) / np.maximum(np.square(reference).sum(1), 1e-300)
    else:
        wanted, found = (z - np.logaddexp.reduce(z, axis=1, keepdims=True) for z in scores)
        divergences = (np.exp(wanted) * (wanted - found)).sum(1)
    order = np.argsort(-divergences, kind="stable")
    if len(order) > PICTURES:
        order = np.concatenate([order[: PICTURES // 2], order[-PICTURES // 2 :]])
    tiles = _smaller(pictures(images, preprocessing))
    return tuple(
        Picture(
            png=base64.b64encode(png(tiles[i])).decode(),
            divergence=float(divergences[i]),
            classes=None if graph.num_classes < 2 else (int(reference[i].argmax()), int(other[i].argmax())),
        )
        for i in order
    )


def _smaller(tiles: np.ndarray) -> np.ndarray:
    """Means of squares of pixels, so that no side is longer than `LARGEST_SIDE`."""
    count, height, width, channels = tiles.shape
    factor = -(-max(height, width) // LARGEST_SIDE)
    if factor == 1:
        return tiles
    tiles = tiles[:, : height // factor * factor, : width // factor * factor]
    parts = tiles.reshape(count, height // factor, factor, width // factor, factor, channels)
    return np.rint(parts.mean((2, 4))).astype(np.uint8)
