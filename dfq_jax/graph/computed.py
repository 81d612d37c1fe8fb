"""Kernels that a network computes from its parameters before it uses them.

Weight standardization (arXiv 1903.10520), spectral normalization (arXiv 1802.05957), weight normalization
(arXiv 1602.07868) and adapters W + A B (arXiv 2106.09685) are such.
`compute_kernels` computes them once and puts each in the place of a leaf that is read for nothing else, so that it is a
kernel like any other, in a tree of the same structure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import full_precision
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.batch_norm_pattern import computed_statistics
from dfq_jax.graph.tracing.layout import LAYOUT
from dfq_jax.graph.tracing.products import computed_operands
from dfq_jax.graph.tracing.program import Constant, Op, Program
from dfq_jax.graph.tracing.structure import GraphError


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedKernels:
    """`apply_fn` of a network that finds its computed kernels in its variables.

    Attributes:
      graph: of the network that computes them.
      kernels: paths of the leaves that hold them.
    """

    graph: Graph
    kernels: tuple[str, ...]

    def __call__(self, variables: Any, x: Float[Array, "n ..."]) -> Any:
        """Compute the kernels of `variables`."""
        x = jnp.asarray(x)
        graph = self.graph.at(x.shape, x.dtype)
        leaves = graph.leaves(variables)
        values = dict(enumerate([*leaves, x]))
        values.update((value, leaves[leaf]) for value, leaf in find_homes(graph.program).items())
        outputs = _evaluate(graph.program, values, graph.program.outputs)
        return jax.tree.unflatten(graph.output_treedef, outputs)


def compute_kernels(graph: Graph, variables: Any) -> tuple[Graph, Any]:
    """Make leaves of the kernels that a network computes from its parameters alone.

    A computed kernel takes the place of a leaf of its shape that it is computed from, if nothing else reads that leaf:
    the standardized kernel that of the kernel, W + A B that of W. `quantize` and `load` do this by themselves.

    >>> variables = {"kernel": jnp.ones((2, 2))}
    >>> graph = trace(lambda v, x: x @ (v["kernel"] / jnp.linalg.norm(v["kernel"])), variables, (1, 2))
    >>> graph, computed = compute_kernels(graph, variables)
    >>> computed["kernel"].tolist()
    [[0.5, 0.5], [0.5, 0.5]]

    Args:
      graph: from `trace`.
      variables: float variables, or `jax.ShapeDtypeStruct` in their places.

    Returns:
      The graph of the same function that reads these kernels from the variables, and the variables with them, of the
      same structure; `graph` and `variables` themselves where no kernel is computed. What is computed from more than
      has a place stays as it is, and is in `graph.skipped` with the reason.

    Raises:
      GraphError: the network has no other layers than such without a place, or the variables are not of the graph.
    """
    homes = find_homes(graph.program)
    if not homes:
        if not graph.layers:
            reasons = " ".join(f"{item.name}: {item.reason}." for item in graph.skipped[:3])
            raise GraphError(f"no layer has a kernel that can be a leaf of `variables`. {reasons}")
        return graph, variables
    leaves = graph.leaves(variables)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    kernels = jax.eval_shape(functools.partial(_kernels, graph), leaves) if abstract else _kernels(graph, leaves)
    paths = tuple(graph.leaf_paths[leaf] for leaf in homes.values())
    variables = graph.replace(variables, dict(zip(paths, kernels, strict=True)))
    return trace(ComputedKernels(graph, paths), variables, graph.input), variables


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def _kernels(graph: Graph, leaves: list[Any]) -> list[jax.Array]:
    return _evaluate(graph.program, dict(enumerate(leaves)), list(find_homes(graph.program)))


def computed_kernels(graph: Graph) -> tuple[str, ...]:
    """Paths of the leaves that `compute_kernels` filled."""
    return graph.apply_fn.kernels if isinstance(graph.apply_fn, ComputedKernels) else ()


def find_homes(program: Program) -> dict[int, int]:
    """The values that are computed kernels, and for each the leaf whose place it takes."""
    chains = [_rearranged(operand, program) for operand in (*computed_operands(program), *computed_statistics(program))]
    free = set(range(program.num_leaves)) - _leaves_read(program, {chain[0] for chain in chains})
    homes: dict[int, int] = {}
    for chain in chains:
        pairs = [(v, leaf) for v in chain for leaf in sorted(free) if _fits(program, v, leaf)]
        if pairs and homes.keys().isdisjoint(chain):
            value, leaf = pairs[0]
            homes[value] = leaf
            free.remove(leaf)
    # A value without a place is computed as before, which may need a leaf that another one took.
    while lost := [value for value, leaf in homes.items() if leaf in _leaves_read(program, homes)]:
        for value in lost:
            del homes[value]
    return homes


def _rearranged(operand: int, program: Program) -> list[int]:
    """The values that an operand is a rearrangement of, itself included, the first one first."""
    chain = [operand]
    while (op := program.producer(chain[0])) is not None and op.name in LAYOUT and len(op.value_inputs) == 1:
        chain.insert(0, op.value_inputs[0])
    return chain


def _fits(program: Program, value: int, leaf: int) -> bool:
    own, other = program.avals[value], program.avals[leaf]
    floats = jnp.issubdtype(own.dtype, jnp.floating) and jnp.issubdtype(other.dtype, jnp.floating)
    return floats and own.shape == other.shape and leaf in program.leaves_behind[value]


def _computing(program: Program, wanted: Collection[Any], known: Collection[int]) -> list[Op]:
    """The operations that compute the wanted values from known ones, in order."""
    needed = {value for value in wanted if isinstance(value, int)}.difference(known)
    found = []
    for op in reversed(program.ops):
        if not needed.isdisjoint(op.outputs):
            found.append(op)
            needed.update(value for value in op.value_inputs if value not in known)
    return found[::-1]


def _leaves_read(program: Program, known: Collection[int]) -> set[int]:
    """The leaves that the network still reads where the values `known` are given."""
    ops = _computing(program, program.outputs, known)
    read = {value for op in ops for value in op.value_inputs} | program.output_values
    return {value for value in read if value < program.num_leaves}


def _evaluate(program: Program, values: Mapping[int, Any], wanted: Sequence[Any]) -> list[Any]:
    """The wanted values, computed from known ones."""
    env = dict(values)

    def read(operand: Any) -> Any:
        return operand.value if isinstance(operand, Constant) else env[operand]

    for op in _computing(program, wanted, values.keys()):
        with jax.named_scope(op.scope) if op.scope else contextlib.nullcontext():
            results = op(*map(read, op.inputs))
        env.update((value, result) for value, result in zip(op.outputs, results, strict=True) if value not in values)
    return [read(operand) for operand in wanted]
