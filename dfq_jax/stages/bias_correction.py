"""Adapting a quantized network without training: its biases.

Quantization shifts the mean of every layer's result. Where a BatchNorm follows whose statistics are adapted
(`batch_norm`) nothing of that is left; elsewhere a bias takes it back.
"""

from __future__ import annotations

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import cpu_jit, full_precision
from dfq_jax.graph import BatchNormRule, Graph, LayerCall, apply_quantized, as_argument, check_images, run


@full_precision
def correct_bias(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    *,
    normalized: bool = True,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Correct biases so that every layer's mean output per channel becomes that of the float network.

    After Nagel et al. (DFQ, arXiv 1906.04721) and Banner et al. (arXiv 1810.05723). The correction goes into the mean
    of the BatchNorm that follows, else into the layer's own bias; layers with neither are left as they are. Layers are
    corrected in order, each behind those already corrected, over all images together. What is corrected already, by
    this function or by differential adaptation, stays as it is.

    >>> corrected = dfq_jax.correct_bias(graph, variables, qvariables, images)
    >>> bool((corrected["dense2"]["bias"] == qvariables["dense2"]["bias"]).any())
    False

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: from `quantize_params`.
      images: `[N, H, W, C]`, preprocessed.
      normalized: correct layers that a BatchNorm follows, too; false to keep its adapted statistics.
      batch_norm: what each BatchNorm computes in place of itself; see `adapt_batch_norm`.

    Returns:
      `qvariables` with new bias and mean leaves.

    Raises:
      ValueError: no images, or images with NaN or infinity.
    """
    check_images(graph, images)
    return _correct_bias(graph, variables, qvariables, images, normalized, as_argument(batch_norm))


@full_precision
def compile_bias_correction(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    *,
    normalized: bool = True,
    batch_norm: BatchNormRule | None = None,
) -> None:
    """Compile ahead what `correct_bias` runs on such arguments."""
    _correct_bias.compile_ahead(graph, variables, qvariables, images, normalized, as_argument(batch_norm))


@functools.partial(cpu_jit, static_argnames=("graph", "normalized"))
def _correct_bias(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: jax.Array,
    normalized: bool,
    batch_norm: BatchNormRule | None,
) -> Any:
    targets = offset_leaves(graph, normalized)
    stored, leaves = (graph.leaves_by_path(v) for v in (variables, qvariables))
    wanted: dict[str, jax.Array] = {}

    def note(call: LayerCall) -> jax.Array:
        result = call.default()
        if call.layer.name in targets:
            path, sign = targets[call.layer.name]
            wanted[call.layer.name] = _shifted_mean(call, result, -sign * stored[path])
        return result

    run(graph, variables, images, layer=note, batch_norm=batch_norm)
    updates: dict[str, jax.Array] = {}

    def correct(call: LayerCall, result: jax.Array) -> jax.Array:
        if call.layer.name not in targets:
            return result
        path, sign = targets[call.layer.name]
        error = _shifted_mean(call, result, -sign * leaves[path]) - wanted[call.layer.name]
        updates[path] = (leaves[path] + sign * error.reshape(leaves[path].shape)).astype(leaves[path].dtype)
        return result - error  # what later layers see behind the corrected leaf

    apply_quantized(graph, qvariables, images, batch_norm=batch_norm, after_layer=correct)
    return graph.replace(qvariables, updates)


def _shifted_mean(call: LayerCall, result: jax.Array, shift: jax.Array) -> jax.Array:
    """Mean per channel of a layer's result with the leaf behind it added."""
    mean = call.form.channel_mean(result)
    return mean + shift.astype(jnp.float32).reshape(mean.shape)


def offset_leaves(graph: Graph, normalized: bool) -> dict[str, tuple[str, float]]:
    """The leaf that takes each layer's correction, and its sign: a mean is subtracted, a bias added."""
    targets: dict[str, tuple[str, float]] = {}
    for layer in graph.layers:
        if layer.batch_norm is not None:
            if normalized:
                targets[layer.name] = (graph.batch_norm(layer.batch_norm).mean, 1.0)
        elif layer.bias is not None:
            targets[layer.name] = (layer.bias, -1.0)
    users = collections.Counter(path for path, _ in targets.values())
    # A leaf that several layers or several of a layer's channels share has no one value that corrects them all.
    return {
        layer.name: targets[layer.name]
        for layer in graph.layers
        if layer.name in targets
        and users[targets[layer.name][0]] == 1
        and graph.shapes_by_path[targets[layer.name][0]].size
        == math.prod(layer.kernel_shape[a] for a in layer.channel_axes)
    }
