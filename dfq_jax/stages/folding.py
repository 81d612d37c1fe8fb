"""BatchNorm folded into the layer before it, with the tree structure kept."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from dfq_jax.graph import Graph, Layer, affine, batch_norm_parameters


def fold_batch_norm(graph: Graph, variables: Any) -> Any:
    """Move every BatchNorm's scale into the kernel before it, and leave the BatchNorm as a pure bias.

    The kernel of each output channel is multiplied by scale / sqrt(var + epsilon); the BatchNorm keeps mean 0, variance
    1 - epsilon, scale 1 and its whole offset as bias. The same `apply_fn` computes the same function (to rounding) on
    the returned tree. A BatchNorm is left as it is where it does not directly follow a layer, where its kernel serves
    others too, or where it has no bias to take the offset.

    >>> folded = dfq_jax.fold_batch_norm(graph, variables)
    >>> bool((folded["bn1"]["scale"] == 1).all())
    True
    >>> bool(jnp.allclose(apply_fn(folded, images), apply_fn(variables, images), atol=1e-4))
    True

    Args:
      graph: from `trace`.
      variables: float variables.

    Returns:
      Variables of the same structure. Pure and traceable.
    """
    leaves = graph.leaves_by_path(variables)
    in_order = list(leaves.values())
    updates: dict[str, Any] = {}
    for layer in graph.layers:
        if not foldable(graph, layer):
            continue
        bn = graph.batch_norm(layer.batch_norm)
        parameters = batch_norm_parameters(bn, in_order)
        added = 0.0 if layer.bias is None else leaves[layer.bias].astype(jnp.float32).reshape(-1)
        factor, offset = affine(bn, parameters._replace(mean=parameters.mean - added))
        kernel = leaves[layer.kernel]
        shape = [kernel.shape[a] if a in layer.channel_axes else 1 for a in range(kernel.ndim)]
        new = {
            layer.kernel: kernel * factor.reshape(shape),
            bn.mean: jnp.zeros_like(offset),
            bn.var: jnp.full_like(offset, 1.0 - bn.epsilon),
            bn.bias: offset,
        }
        if bn.scale is not None:
            new[bn.scale] = jnp.ones_like(offset)
        if layer.bias is not None:
            new[layer.bias] = jnp.zeros_like(leaves[layer.bias])
        updates.update({p: v.reshape(leaves[p].shape).astype(leaves[p].dtype) for p, v in new.items()})
    return graph.replace(variables, updates)


def foldable(graph: Graph, layer: Layer) -> bool:
    """Whether a layer can take the scale of the BatchNorm behind it."""
    if layer.batch_norm is None:
        return False
    bn = graph.batch_norm(layer.batch_norm)
    roles = bn.indices
    changed = (layer.kernel_index, layer.bias_index, roles.mean, roles.var, roles.scale, roles.bias)
    # A leaf that serves something else too cannot change.
    own = (*layer_operations(graph, layer), *bn.chain)
    sole_use = all(graph.program.served[i].issubset(own) for i in changed if i is not None)
    channels = math.prod(layer.kernel_shape[a] for a in layer.channel_axes)
    return sole_use and bn.channels == channels and bn.bias is not None


def layer_operations(graph: Graph, layer: Layer) -> tuple[int, int]:
    """The operations of a layer that parameters take part in: its product, and the sum with its bias if it has one."""
    return layer.op, graph.program.producer(layer.output).index
