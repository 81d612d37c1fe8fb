"""Run a traced network, with the arithmetic of layers, tensors and BatchNorms replaced by rules.

One interpreter, `run`, serves every purpose: without rules it computes what `apply_fn` computes; recording, fake
quantization, integer arithmetic and the statistics of synthesis are rules. Everything is a pure function of the
variables and the input, so `jax.jit`, `jax.grad` and `jax.vmap` apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from dfq_jax.graph.batch_norm import BatchNormParameters, batch_norm_parameters
from dfq_jax.graph.call import LayerCall
from dfq_jax.graph.graph import Graph, check_array
from dfq_jax.graph.tracing.program import Constant, Op, Operand
from dfq_jax.graph.tracing.structure import BatchNorm, Block, GraphError, Layer, Tensor
from dfq_jax.quantizers import QTensor

ProductRule = Callable[[LayerCall], jax.Array]
TensorRule = Callable[[Tensor, jax.Array], jax.Array]
BatchNormRule = Callable[[BatchNorm, jax.Array, BatchNormParameters], jax.Array]


class Rules(NamedTuple):
    """What takes the place of a network's arithmetic, as in `run`; None for what the program has."""

    layer: ProductRule | None = None
    tensor: TensorRule | None = None
    batch_norm: BatchNormRule | None = None


def as_argument(rule: Callable[..., Any] | None) -> jax.tree_util.Partial | None:
    """A rule as an argument of a compiled function: the arrays bound to it are traced, the function is static."""
    return rule if rule is None or isinstance(rule, jax.tree_util.Partial) else jax.tree_util.Partial(rule)


# --- networks ---


def run(
    graph: Graph,
    variables: Any,
    x: Float[Array, "n ..."],
    *,
    layer: ProductRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Run the network with rules in place of its arithmetic.

    >>> outputs = run(graph, variables, images, layer=lambda call: call.default().at[:, 0].set(0))  # channels put out
    >>> outputs[:, 0].tolist() == [variables["dense2"]["bias"][0]] * 8
    True

    Args:
      graph: from `trace`.
      variables: the traced tree or a quantized copy of it (`QTensor` kernels).
      x: a batch, `[N, H, W, C]`; any batch size, and other image sizes where the network takes them.
      layer: computes a layer's product (without bias) from a `LayerCall`.
      tensor: maps each tensor that layers read, `(tensor, value) -> value`, before anyone reads it.
      batch_norm: computes each BatchNorm, `(batch_norm, input, parameters) -> output`.

    Returns:
      What `apply_fn` returns.

    Raises:
      GraphError: `variables` or `x` do not fit the graph.
      TypeError: `x` is no array.
    """
    graph = graph.at_input(x)
    return run_leaves(graph, graph.leaves(variables), x, Rules(layer, tensor, batch_norm))


def run_leaves(
    graph: Graph,
    leaves: list[Any],
    x: Float[Array, "n ..."],
    rules: Rules,
    *,
    live: frozenset[int] | None = None,
    results: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """`run` on a list of leaves, for rules that compute more than one operation.

    Args:
      graph: traced at the shape of x.
      leaves: of the variables, in the graph's order; None for one that no live operation reads.
      x: as in `run`.
      rules: in place of the program's arithmetic.
      live: indices of the operations to run; all if None.
      results: for layers whose rule computes what follows them too, the value (of the program) that it computes, in
        its type or as something that the rule of tensors takes. What that returns needs a method `astype` only.
    """
    execution = _Execution(graph, leaves, rules, results=results)
    execution.store(graph.program.input, x)
    execution.execute(op for op in graph.program.ops if live is None or op.index in live)
    return execution.outputs()


def record_tensors(
    graph: Graph, variables: Any, x: Float[Array, "n ..."], *, batch_norm: BatchNormRule | None = None
) -> tuple[Any, dict[str, jax.Array]]:
    """Outputs, and every tensor that layers read, by name; `batch_norm` as in `run`.

    >>> outputs, tensors = record_tensors(graph, variables, images)
    >>> {name: value.shape for name, value in tensors.items()}
    {'dense1': (8, 6), 'dense2': (8, 4)}
    """
    recorded: dict[str, jax.Array] = {}

    def keep(tensor: Tensor, value: jax.Array) -> jax.Array:
        recorded[tensor.name] = value
        return value

    return run(graph, variables, x, tensor=keep, batch_norm=batch_norm), recorded


# --- blocks ---


def run_block(
    graph: Graph,
    block: Block,
    variables: Any,
    x: Float[Array, "n ..."],
    *,
    layer: ProductRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Run the operations of one block alone; the blocks of a network one after the other are the network.

    >>> x = images
    >>> for block in graph.blocks:
    ...     x = run_block(graph, block, variables, x)
    >>> bool(jnp.allclose(x, apply_fn(variables, images), atol=1e-5))
    True

    Args:
      graph: from `trace`.
      block: one of `graph.blocks`, or neighbors joined by `merge_blocks`.
      variables: as in `run`.
      x: value of the block's input, any batch size. The rule for tensors applies to it, and not to the block's result,
        which is the next block's input.
      layer: as in `run`.
      tensor: as in `run`.
      batch_norm: as in `run`.

    Returns:
      The value of the block's output; what `apply_fn` returns for the last block.

    Raises:
      GraphError: the block is not of this graph, or `variables` or `x` do not fit.
    """
    check_array(x)
    return run_block_leaves(graph, block, graph.leaves(variables), x, Rules(layer, tensor, batch_norm))


def run_block_leaves(graph: Graph, block: Block, leaves: list[Any], x: Float[Array, "n ..."], rules: Rules) -> Any:
    """`run_block` on a list of leaves; those that the block does not read may be `jax.ShapeDtypeStruct`."""
    block = place_block(graph, block)
    if x.shape != graph.program.avals[block.input].shape:
        graph = graph.at((*x.shape[:1], *graph.input.shape[1:]), graph.input.dtype)
        block = place_block(graph, block)
        expected = graph.program.avals[block.input].shape
        if x.shape != expected:
            raise GraphError(f"x: block {block.name!r} takes a value of shape {expected}, found {x.shape}.")
    execution = _Execution(graph, leaves, rules, end=block.output)
    execution.store(block.input, x)
    execution.execute(block_operations(graph, block))
    return execution.outputs() if block.output < 0 else execution.values[block.output]


def place_block(graph: Graph, block: Block) -> Block:
    """The block with its places in this graph, which may be of another batch size than the one it was taken from."""
    first = [b for b in graph.blocks if b.layers[0] == block.layers[0]]
    last = [b for b in graph.blocks if b.layers[-1] == block.layers[-1]]
    if not first or not last:
        raise GraphError(f"block: {block.name!r} is no block of this network; its blocks are in graph.blocks.")
    return dataclasses.replace(block, input=first[0].input, output=last[0].output)


def block_operations(graph: Graph, block: Block) -> tuple[Op, ...]:
    """The operations from a block's input to its output, or to the network's."""
    program = graph.program
    return program.between(block.input, program.output_values if block.output < 0 else {block.output})


# --- the interpreter ---


class _Execution:
    """One run of some of a network's operations by rules; that for tensors leaves the value `end` alone."""

    def __init__(
        self,
        graph: Graph,
        leaves: list[Any],
        rules: Rules,
        *,
        end: int | None = None,
        results: Mapping[str, int] = MappingProxyType({}),
    ):
        self.graph, self.program, self.leaves, self.rules, self.results = graph, graph.program, leaves, rules, results
        self.values: dict[int, Any] = {
            i: leaf.dequantize() if isinstance(leaf, QTensor) else leaf for i, leaf in enumerate(leaves)
        }
        self.sources: dict[str, Any] = {}
        self.layers = {layer.op: layer for layer in graph.layers}
        self.tensors = {t.value: t for t in graph.tensors if t.value != end} if rules.tensor else {}
        self.norms = {bn.chain[-1]: bn for bn in graph.batch_norms} if rules.batch_norm else {}
        self.inside = {i for bn in self.norms.values() for i in bn.chain[:-1]}

    def outputs(self) -> Any:
        """What `apply_fn` returns, when all is executed."""
        return jax.tree.unflatten(self.graph.output_treedef, map(self.read, self.program.outputs))

    def read(self, operand: Operand) -> Any:
        """A value that is known."""
        return operand.value if isinstance(operand, Constant) else self.values[operand]

    def store(self, value: int, result: Any) -> None:
        """Give a value what an operation computes, or what the rule for tensors makes of that."""
        if (tensor := self.tensors.get(value)) is not None:
            result = self.rules.tensor(tensor, result)
            self.sources[tensor.name] = result  # readers that compute in float32 get it before rounding to its type
            result = result.astype(self.program.avals[value].dtype)
        self.values[value] = result

    def execute(self, ops: Iterable[Op]) -> None:
        """Run operations in order."""
        for op in ops:
            if op.index in self.inside:
                continue
            if (bn := self.norms.get(op.index)) is not None:
                parameters = batch_norm_parameters(bn, self.leaves)
                self._store_as_typed(op, self.rules.batch_norm(bn, self.values[bn.input], parameters))
            elif (layer := self.layers.get(op.index)) is not None:
                result = (self.rules.layer or LayerCall.default)(self._call(layer, op))
                if layer.name in self.results:
                    self.store(self.results[layer.name], result)
                else:
                    self._store_as_typed(op, result)
            else:
                for value, result in zip(op.outputs, op(*map(self.read, op.inputs)), strict=True):
                    self.store(value, result)

    def _call(self, layer: Layer, op: Op) -> LayerCall:
        source = self.sources.get(layer.tensor, self.values[self.graph.tensor(layer.tensor).value])
        operand = self.values.get(op.inputs[1 - layer.kernel_operand])
        return LayerCall(self.graph.form(layer), source, operand, self.leaves[layer.kernel_index])

    def _store_as_typed(self, op: Op, result: jax.Array) -> None:
        self.store(op.outputs[0], result.astype(self.program.avals[op.outputs[0]].dtype))
