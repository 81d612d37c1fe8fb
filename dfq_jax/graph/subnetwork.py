"""A block of a network as a network of its own.

Blocks that compute the same (all basic blocks of one stage of a ResNet) become equal graphs with other weights, so what
is compiled for one serves all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxtyping import Array, Float

from dfq_jax.graph.call import LayerCall
from dfq_jax.graph.execution import Rules, block_operations, place_block, run_block_leaves
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.structure import Block, GraphError
from dfq_jax.quantizers import is_quantized, quantization, with_quantization


@dataclasses.dataclass(frozen=True)
class Subnetwork:
    """One block as a graph of its own.

    Attributes:
      graph: of the block alone. Its leaves, layers and tensors are named by the order in which they are used.
      leaves: path in the whole network of each of its leaves, in order.
      layers: name in the whole network of each of its layers, in order.
      tensors: names of its tensors, and the names they have in the whole network.
    """

    graph: Graph
    leaves: tuple[str, ...]
    layers: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]

    def select(self, graph: Graph, variables: Any) -> dict[str, Any]:
        """The block's variables, among those of the whole network (float or quantized)."""
        leaves = graph.leaves_by_path(variables)
        own = {name: leaves[path] for name, path in zip(self.graph.leaf_paths, self.leaves, strict=True)}
        if not is_quantized(variables):
            return own
        return with_quantization(own, quantization(variables).renamed(self.tensors))

    def insert(self, graph: Graph, variables: Any, own: dict[str, Any]) -> Any:
        """The variables of the whole network with those of the block put in their places."""
        new = {path: own[name] for name, path in zip(self.graph.leaf_paths, self.leaves, strict=True)}
        variables = graph.replace(variables, new)
        if not is_quantized(own):
            return variables
        quantizers = quantization(own).renamed((whole, name) for name, whole in self.tensors)
        return with_quantization(variables, quantization(variables).updated(quantizers))


@functools.lru_cache(maxsize=256)
def subnetwork(graph: Graph, block: Block, batch_size: int) -> Subnetwork:
    """Trace one block of a network by itself.

    Args:
      graph: from `trace`.
      block: one of `graph.blocks`, or neighbors joined by `merge_blocks`.
      batch_size: images in a batch.

    Returns:
      The block as a network whose input is the block's input value.

    Raises:
      GraphError: the block is not of this graph, or by itself shows other layers than within the network.
    """
    graph = graph.at((batch_size, *graph.input.shape[1:]), graph.input.dtype)
    block = place_block(graph, block)
    program = graph.program
    used = dict.fromkeys(v for op in block_operations(graph, block) for v in op.value_inputs if v < program.num_leaves)
    width = len(str(len(used)))
    names = {f"leaf{i:0{width}}": leaf for i, leaf in enumerate(used)}
    x = program.avals[block.input]

    def apply_fn(own: dict[str, Any], value: Float[Array, "n ..."]) -> Any:
        leaves = list(graph.leaf_shapes)
        for name, leaf in names.items():
            leaves[leaf] = own[name]
        return run_block_leaves(graph, block, leaves, value, Rules(layer=LayerCall.verbatim))

    own = trace(apply_fn, {name: graph.leaf_shapes[leaf] for name, leaf in names.items()}, x)
    kernels = [graph.leaf_paths[names[layer.kernel]] for layer in own.layers]
    if kernels != [graph.layer(name).kernel for name in block.layers]:
        raise GraphError(f"block {block.name!r}: its layers {block.layers} are not found when it is traced by itself.")
    tensors = {layer.tensor: graph.layer(name).tensor for layer, name in zip(own.layers, block.layers, strict=True)}
    return Subnetwork(own, tuple(graph.leaf_paths[leaf] for leaf in used), block.layers, tuple(tensors.items()))
