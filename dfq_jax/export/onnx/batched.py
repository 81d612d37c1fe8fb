"""The program of a graph with every call opened, and its sizes as numbers or multiples of the batch size.

A jaxpr has the batch size written into its shapes. Tracing at two batch sizes tells which of the sizes follow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from dfq_jax.graph import CONTROL_FLOW, Constant, Graph, GraphError, Op, Operand, Program, constant_bytes, sub_jaxprs

_BATCHES = (2, 3)  # not 1, with which axes come and go
_SIZES = frozenset({"shape", "new_sizes", "dimensions", "limit_indices", "slice_sizes", "reps", "sizes"})


@dataclasses.dataclass(frozen=True)
class Batch:
    """A size: so many times the batch size."""

    times: int


Size = int | Batch
Shape = tuple[Size, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchedProgram:
    """A graph's program without calls.

    Attributes:
      graph: the graph whose value numbers and indices of operations hold here.
      ops: the operations; those of an opened call have the index of the call.
      shapes: of every value.
      dtypes: of every value.
    """

    graph: Graph
    ops: tuple[Op, ...]
    shapes: Mapping[int, Shape]
    dtypes: Mapping[int, np.dtype]

    def shape(self, operand: Operand) -> Shape:
        """The shape of an operand, with the batch's size where it has one."""
        return operand.shape if isinstance(operand, Constant) else self.shapes[operand]


def batched_program(graph: Graph, batch: int | None) -> BatchedProgram:
    """The program of a graph for one batch size, or for any.

    Args:
      graph: from `trace`.
      batch: the batch size; None for any.

    Raises:
      GraphError: the network does not take other batch sizes, or depends on them otherwise than by its shapes.
    """
    if batch is not None:
        graph = graph.at((batch, *graph.input.shape[1:]), graph.input.dtype)
        ops, avals = _opened(graph.program)
        shapes = {value: tuple(aval.shape) for value, aval in avals.items()}
        return BatchedProgram(graph, tuple(ops), shapes, _dtypes(avals))
    hint = f"Pass batch={graph.input.shape[0]} to export for that batch size alone."
    try:
        graphs = [graph.at((n, *graph.input.shape[1:]), graph.input.dtype) for n in _BATCHES]
    except GraphError as error:
        raise GraphError(f"the network does not take every batch size: {error} {hint}") from error
    (ops, avals), (other_ops, other_avals) = (_opened(g.program) for g in graphs)
    if [(op.name, op.outputs) for op in ops] != [(op.name, op.outputs) for op in other_ops]:
        raise GraphError(f"the network computes something else at batch size {_BATCHES[1]} than {_BATCHES[0]}. {hint}")
    for op, other in zip(ops, other_ops, strict=True):
        if not all(map(_same_operand, op.inputs, other.inputs)) or not _same_params(op.params, other.params):
            raise GraphError(f"`{op.name}` at {op.scope or 'the top'} computes with the batch size. {hint}")
    shapes = {value: tuple(map(_size, aval.shape, other_avals[value].shape)) for value, aval in avals.items()}
    return BatchedProgram(graphs[0], tuple(ops), shapes, _dtypes(avals))


def _size(size: int, other: int) -> Size:
    if size == other:
        return size
    if size * _BATCHES[1] != other * _BATCHES[0]:
        raise GraphError(f"a size of the network is {size} and {other} at batch sizes {_BATCHES[0]} and {_BATCHES[1]}.")
    return Batch(size // _BATCHES[0])


def _same_operand(operand: Operand, other: Operand) -> bool:
    if isinstance(operand, Constant) and isinstance(other, Constant):
        return operand.shape == other.shape and constant_bytes(operand.value) == constant_bytes(other.value)
    return operand == other


def _same_params(params: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether numbers and tuples among the parameters of an operation are the same, but for sizes of its result."""
    return all(
        repr(value) == repr(other[name]) or name in _SIZES or not isinstance(value, (int, float, str, tuple))
        for name, value in params.items()
    )


def _dtypes(avals: Mapping[int, Any]) -> dict[int, np.dtype]:
    return {value: aval.dtype for value, aval in avals.items()}


def _opened(program: Program) -> tuple[list[Op], dict[int, Any]]:
    """The operations with the bodies of calls in their place (a ReLU is one), and the shapes of all values."""
    ops: list[Op] = []
    avals = dict(program.avals)

    def append(primitive: Any, params: Any, inputs: Sequence[Operand], outputs: Sequence[int], outer: Op) -> None:
        op = dataclasses.replace(
            outer, primitive=primitive, params=params, inputs=tuple(inputs), outputs=tuple(outputs)
        )
        bodies = list(sub_jaxprs(params))
        if len(bodies) == 1 and op.name not in CONTROL_FLOW and len(bodies[0][0].invars) == len(inputs):
            open_body(*bodies[0], op)
        else:
            ops.append(op)

    def open_body(jaxpr: Any, consts: Sequence[Any], outer: Op) -> None:
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, outer.inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        results = {var: number for var, number in zip(jaxpr.outvars, outer.outputs, strict=True) if _is_var(var)}

        def read(atom: Any) -> Operand:
            return Constant(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            numbers = []
            for var in eqn.outvars:
                numbers.append(results.get(var, len(avals)) if _is_var(var) else len(avals))
                avals.setdefault(numbers[-1], jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype))
            env.update(zip(eqn.outvars, numbers, strict=True))
            append(eqn.primitive, eqn.params, inputs, numbers, outer)
        for atom, number in zip(jaxpr.outvars, outer.outputs, strict=True):
            if read(atom) != number:  # an argument, a constant or a result handed out twice
                append(_COPY, {}, [read(atom)], [number], outer)

    for op in program.ops:
        append(op.primitive, op.params, op.inputs, op.outputs, op)
    return _needed(ops, program.output_values, avals), avals


def _needed(ops: Sequence[Op], outputs: Collection[int], avals: Mapping[int, Any]) -> list[Op]:
    """The operations that the outputs need; a value without elements, as of padding by nothing, needs none."""
    needed, wanted = [], set(outputs)
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            needed.append(op)
            if any(0 not in avals[value].shape for value in op.outputs):
                wanted.update(op.value_inputs)
    return needed[::-1]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


_COPY = jex.Primitive("copy")
