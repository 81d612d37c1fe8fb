"""The quantized network against the float one layer by layer: where the error is made, and where it only passes by."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import LINE, aligned, batches, full_precision
from dfq_jax.graph import (
    Graph,
    LayerCall,
    Tensor,
    affine,
    batch_norm_parameters,
    check_images,
    quantized_rules,
    run,
    simulated_layer,
)
from dfq_jax.quantizers import check_quantized
from dfq_jax.stages.comparison import decibel

FALL = 6.0  # decibel, at which the error of one layer is twice that of those before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of a quantized network; each figure is the signal-to-quantization-noise ratio of its output in decibel.

    Outputs are past the layer's bias and BatchNorm.

    Attributes:
      name: of the layer.
      sqnr: as the quantized network computes it.
      own: of the quantized layer on the float network's inputs.
      carried: of the float layer on the quantized network's inputs.
    """

    name: str
    sqnr: float
    own: float
    carried: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """All layers, in the order they run.

    Attributes:
      layers: one entry each.
    """

    layers: tuple[LayerError, ...]

    @property
    def falls_at(self) -> str | None:
        """The first layer whose SQNR is at least `FALL` below the least before it; None if there is none."""
        least = math.inf
        for layer in self.layers:
            if layer.sqnr <= least - FALL and least < math.inf:
                return layer.name
            least = min(least, layer.sqnr)
        return None

    def table(self) -> str:
        """Plain text."""
        rows: list[tuple[str, ...]] = [("layer", "SQNR dB", "own", "carried", "")]
        for layer in self.layers:
            cells = (f"{value:.1f}" for value in (layer.sqnr, layer.own, layer.carried))
            rows.append((layer.name, *cells, "falls here" if layer.name == self.falls_at else ""))
        return "\n".join(aligned(rows, width=LINE))

    __str__ = table


@full_precision
def compare_layers(
    graph: Graph, variables: Any, qvariables: Any, images: Float[Array, "n ..."], *, batch_size: int = 16
) -> LayerComparison:
    """Compare a quantized network with the float one layer by layer.

    >>> compared = compare_layers(graph, variables, qvariables, images)
    >>> compared.layers[0].carried, compared.layers[1].carried < compared.layers[1].own + 60
    (inf, True)

    Args:
      graph: from `trace`.
      variables: float variables; those that were quantized, so equalized ones where weight ranges were equalized.
      qvariables: quantized ones of the same function.
      images: `[N, H, W, C]`, preprocessed.
      batch_size: images in one pass of the networks.

    Raises:
      ValueError: unusable images, or variables that are not quantized.
    """
    check_images(graph, images)
    check_quantized(qvariables)
    found = [_powers(graph, variables, qvariables, x) for x in batches(jnp.asarray(images), batch_size)]
    totals = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *found)

    def error(name: str, signal: float, *noise: float) -> LayerError:
        sqnr, own, carried = (decibel(signal, power) for power in noise)
        return LayerError(name=name, sqnr=sqnr, own=own, carried=carried)

    return LayerComparison(layers=tuple(error(layer.name, *totals[layer.name]) for layer in graph.layers))


@functools.partial(jax.jit, static_argnames="graph")
def _powers(graph: Graph, variables: Any, qvariables: Any, x: Array) -> dict[str, Float[Array, " 4"]]:
    """Of each layer's output, the power of its float values and of three errors: all, its own, and carried."""
    leaves, kernels = graph.leaves(variables), graph.leaves_by_path(variables)
    qleaves, rules = graph.leaves(qvariables), quantized_rules(qvariables, product=simulated_layer)
    sources: dict[str, Array] = {}  # of the float network, by layer
    wanted: dict[str, Array] = {}
    before: dict[str, Array] = {}  # of the quantized network, by tensor, in front of its quantizer
    found: dict[str, Array] = {}

    def reference(call: LayerCall) -> Array:
        result = call.default()
        sources[call.layer.name] = call.source
        wanted[call.layer.name] = _finished(graph, call, result, leaves)
        return result

    def tensor(item: Tensor, value: Array) -> Array:
        before[item.name] = value
        return rules.tensor(item, value)

    def layer(call: LayerCall) -> Array:
        name, item = call.layer.name, graph.tensor(call.layer.tensor)
        result = rules.layer(call)
        own = rules.layer(call.reading(rules.tensor(item, sources[name])))
        in_float = dataclasses.replace(call, kernel=kernels[call.layer.kernel]).reading(before[item.name])
        outputs = [(result, qleaves), (own, qleaves), (in_float.default(), leaves)]
        errors = [_finished(graph, call, *output) - wanted[name] for output in outputs]
        found[name] = jnp.stack([jnp.square(power).sum() for power in (wanted[name], *errors)])
        return result

    run(graph, variables, x, layer=reference)
    run(graph, qvariables, x, layer=layer, tensor=tensor)
    return found


def _finished(graph: Graph, call: LayerCall, result: Array, leaves: list[Any]) -> Array:
    """A layer's result past its bias and its BatchNorm, float32."""
    layer, shape = call.layer, call.form.channel_shape
    result = result.astype(jnp.float32)
    if layer.bias_index is not None:
        result = result + leaves[layer.bias_index].astype(jnp.float32).reshape(shape)
    if layer.batch_norm is not None:
        bn = graph.batch_norm(layer.batch_norm)
        factor, offset = affine(bn, batch_norm_parameters(bn, leaves))
        result = result * factor.reshape(shape) + offset.reshape(shape)
    return result
