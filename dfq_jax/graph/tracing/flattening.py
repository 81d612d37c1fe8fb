"""From a function to its flat program.

Equations that merely call their body are inlined, whatever their primitive is called. Only custom derivatives of
parameter-free functions (ReLU and its relatives) stay whole, so that their gradients stay what their authors wrote.
Loops that hold layers are unrolled, and leaves that they read step by step are taken apart, so that each step has
leaves of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from dfq_jax.graph.tracing.elementwise import NotElementwise, evaluate, scalar
from dfq_jax.graph.tracing.layout import LAYOUT
from dfq_jax.graph.tracing.program import (
    CONTROL_FLOW,
    LAYER_PRIMITIVES,
    ClosureError,
    Constant,
    Op,
    Operand,
    Program,
    Shape,
    holds_layers,
    live_ops,
    sub_jaxprs,
)
from dfq_jax.graph.tracing.slices import Slices
from dfq_jax.graph.tracing.views import Split

# Arrays that the traced function closes over stay in the program up to this size; weights belong in `variables`.
MAX_CONSTANT_BYTES = 1 << 20
# Loops of more steps (nested ones: of more steps together) are not unrolled: every step adds its operations.
MAX_STEPS = 256


def flatten(
    function: Callable[[Sequence[Any], Any], Any],
    leaves: Sequence[jax.ShapeDtypeStruct],
    x: jax.ShapeDtypeStruct,
) -> tuple[Program, Any]:
    """Trace `function(leaves, x)` and flatten it; dead operations are dropped.

    Args:
      function: takes the list of leaves and the input.
      leaves: shape and dtype of every leaf.
      x: shape and dtype of the input.

    Returns:
      The program, and the tree structure of the function's result.

    Raises:
      ClosureError: the function closes over large arrays instead of taking them in `variables`.
    """
    # Without a setting, so that what the function leaves open shows: `Op` closes it when the program runs.
    with jax.default_matmul_precision(None):
        closed, out_shape = jax.make_jaxpr(function, return_shape=True)(list(leaves), x)

    def build(*, indexed: bool) -> Program:
        builder = Builder(len(leaves), [*leaves, x], indexed=indexed)
        return builder.program(builder.inline(closed.jaxpr, closed.consts, list(range(len(leaves) + 1)), ""))

    program = build(indexed=False)
    if sliced := _sliced_kernels(program):
        # Only for kernels: what else is read by index, a position table say, stays the leaf that it is.
        by_index = build(indexed=True)
        program = by_index if _sliced_kernels(by_index) < sliced else program
    return program, jax.tree.structure(out_shape)


def _sliced_kernels(program: Program) -> int:
    """How many convolutions and matrix products have a slice of a parameter as their kernel."""

    def is_slice(value: int) -> bool:
        while (op := program.producer(value)) is not None and op.name in LAYOUT and len(op.value_inputs) == 1:
            value = op.value_inputs[0]
        return op is not None and op.name in ("slice", "dynamic_slice", "gather", "unstack")

    products = [op for op in program.ops if op.name in LAYER_PRIMITIVES and program.data_inputs(op)]
    return sum(v in program.parameter_only and is_slice(v) for op in products for v in op.value_inputs)


class Builder:
    """Walks jaxprs and numbers values in the order they are computed."""

    def __init__(self, num_leaves: int, arguments: Sequence[jax.ShapeDtypeStruct], *, indexed: bool):
        self.ops: list[Op] = []
        self.avals = dict(enumerate(arguments))
        self.num_leaves = num_leaves
        self.indexed = indexed  # whether slices of leaves at constant indices are leaves of their own
        self.parameter_only = set(range(num_leaves))
        self.producers: dict[int, Op] = {}
        self.platform_indices: set[Operand] = set()
        self.steps = 1  # of all loops around
        self.slices = Slices(self)

    # --- equations ---

    def inline(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Operand], scope: str) -> list[Operand]:
        """Append what a jaxpr computes from its arguments; its results."""
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Constant(_small_array(const))

        def read(atom: Any) -> Operand:
            return Constant(_small_array(atom.val)) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            stack = str(eqn.source_info.name_stack) if hasattr(eqn, "source_info") else ""
            inner = "/".join(part for part in (scope, stack) if part)
            outputs = self._opened(eqn, inputs, inner)
            env.update(zip(eqn.outvars, self._append(eqn, inputs, inner) if outputs is None else outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _opened(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> Sequence[Operand] | None:
        """The results of an equation that need no operation of its own; None if it is one."""
        name = eqn.primitive.name
        if _casts_a_number(eqn, inputs):  # the padding value of jnp.pad: a constant again
            return [Constant(np.asarray(inputs[0].value).astype(eqn.params["new_dtype"]))]
        if (number := _computed_index(eqn, inputs)) is not None:
            return [number]
        if name == "slice" and eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape:  # `x[0]` under vmap in JAX 0.6
            return inputs
        if (body := _call_body(eqn)) is not None and not self._keep_whole(eqn, inputs):
            return self.inline(*body, inputs, scope)
        if (branch := self._known_branch(eqn, inputs)) is not None:
            return self.inline(branch.jaxpr, branch.consts, inputs[1:], scope)
        if name in ("scan", "while") and any(holds_layers(j) for j, _ in sub_jaxprs(eqn.params)):
            return (self._unrolled_scan if name == "scan" else self._unrolled_while)(eqn, inputs, scope)
        return self.slices.indexed(eqn, inputs) if self.indexed else None

    def _known_branch(self, eqn: Any, inputs: Sequence[Operand]) -> Any:
        """The branch of a choice that is made while tracing: by the number of a step, or by platform; else None."""
        if eqn.primitive.name != "cond":
            return None
        branches = eqn.params["branches"]
        if isinstance(inputs[0], Constant):
            return branches[int(np.clip(int(inputs[0].value), 0, len(branches) - 1))]
        # The last branch of `lax.platform_dependent` is what it computes on platforms that it does not name.
        return branches[-1] if inputs[0] in self.platform_indices else None

    def _keep_whole(self, eqn: Any, inputs: Sequence[Operand]) -> bool:
        custom = eqn.primitive.name.startswith("custom_")
        has_parameters = any(isinstance(i, int) and i in self.parameter_only for i in inputs)
        return custom and not has_parameters and not any(holds_layers(j) for j, _ in sub_jaxprs(eqn.params))

    def _append(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> list[int]:
        outputs = [self.new_value(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
        if all(not isinstance(i, int) or i in self.parameter_only for i in inputs):
            self.parameter_only.update(outputs)
        op = Op(len(self.ops), eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), scope)
        self.ops.append(op)
        self.producers.update(dict.fromkeys(outputs, op))
        if op.name == "platform_index" or not self.platform_indices.isdisjoint(inputs):
            self.platform_indices.update(outputs)  # before JAX 0.8 it is clamped first
        return outputs

    def new_value(self, shape: Sequence[Any], dtype: Any) -> int:
        """Number a value."""
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        return number

    def emit(self, function: Callable[..., jax.Array], *operands: Operand) -> Operand:
        """Append the operations of a function."""
        closed = jax.make_jaxpr(function)(*(o.value if isinstance(o, Constant) else self.avals[o] for o in operands))
        return self.inline(closed.jaxpr, closed.consts, operands, "")[0]

    # --- loops ---

    def _unrolled_scan(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> list[Operand] | None:
        params = eqn.params
        length, (constants, carried) = params["length"], _scan_sizes(params)
        if not 1 <= length * self.steps <= MAX_STEPS:
            return None
        ((body, consts),) = sub_jaxprs(params)
        fixed, carry = inputs[:constants], inputs[constants : constants + carried]
        rows: dict[int, list[Operand]] = {}
        self.steps *= length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            xs = [self.slices.row(x, i) for x in inputs[constants + carried :]]
            results = self.inline(body, consts, [*fixed, *carry, *xs], f"{scope}[{i}]")
            carry, rows[i] = results[:carried], results[carried:]
        self.steps //= length
        dtypes = [var.aval.dtype for var in eqn.outvars[carried:]]
        stacked = zip(dtypes, *(rows[i] for i in range(length)), strict=True)
        return [*carry, *(self.slices.stacked(row, 0, dtype) for dtype, *row in stacked)]

    def _unrolled_while(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> list[Operand] | None:
        """A loop whose condition depends on a counter alone; None for others."""
        params = eqn.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        condition, body, carry = params["cond_jaxpr"], params["body_jaxpr"], inputs[second:]
        for _ in range(MAX_STEPS // self.steps + 1):
            # What this appends is dead if the loop stays whole.
            (goes_on,) = self.inline(condition.jaxpr, condition.consts, [*inputs[:first], *carry], scope)
            if not isinstance(goes_on, Constant):
                return None
            if not goes_on.value:
                return list(carry)
            carry = self.inline(body.jaxpr, body.consts, [*inputs[first:second], *carry], scope)
        return None

    # --- the program ---

    def program(self, outputs: Sequence[Operand]) -> Program:
        """The live operations, with the leaves as they are taken apart numbered first, then x."""
        split = {leaf: parts for leaf, (_, parts) in self.slices.parts.items() if leaf in self.slices.leaves}
        body, self.ops = self.ops, []
        whole: dict[int, Operand] = {}  # split leaves that something reads whole, too: made of their slices
        for leaf in reversed(split):
            axis, parts = self.slices.parts[leaf]
            made = [whole.get(part, part) for part in parts]
            whole[leaf] = self.slices.stacked(made, axis, self.avals[leaf].dtype)
        prefix, self.ops = self.ops, body

        def resolve(operand: Operand) -> Operand:
            return whole.get(operand, operand) if isinstance(operand, int) else operand

        outputs = [resolve(o) for o in outputs]
        body = [dataclasses.replace(op, inputs=tuple(map(resolve, op.inputs))) for op in body]
        ops = live_ops([*prefix, *body], outputs)

        def slices(leaf: int) -> Iterator[int]:
            if leaf not in split:
                yield leaf
            for part in split.get(leaf, ()):
                yield from slices(part)

        leaves = [item for leaf in range(self.num_leaves) for item in slices(leaf)]
        values = [*leaves, self.num_leaves, *(value for op in ops for value in op.outputs)]
        numbers = {value: number for number, value in enumerate(values)}

        def renumber(operand: Operand) -> Operand:
            return numbers[operand] if isinstance(operand, int) else operand

        def form(leaf: int) -> Split | None:
            return Split(self.slices.parts[leaf][0], tuple(map(form, split[leaf]))) if leaf in split else None

        return Program(
            num_leaves=len(leaves),
            ops=tuple(
                dataclasses.replace(
                    op, index=i, inputs=tuple(map(renumber, op.inputs)), outputs=tuple(map(renumber, op.outputs))
                )
                for i, op in enumerate(ops)
            ),
            outputs=tuple(map(renumber, outputs)),
            avals={number: self.avals[value] for value, number in numbers.items()},
            splits=tuple(map(form, range(self.num_leaves))),
        )


def _call_body(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The body of an equation that merely calls it (jit, remat, custom derivatives), by shape and not by name."""
    bodies = list(sub_jaxprs(eqn.params))
    if eqn.primitive.name in CONTROL_FLOW or len(bodies) != 1:
        return None
    jaxpr, consts = bodies[0]
    if len(jaxpr.constvars) != len(consts):
        return None

    def signature(variables: Sequence[Any]) -> list[tuple[Shape, Any]]:
        return [(v.aval.shape, v.aval.dtype) for v in variables]

    try:
        same_inputs = signature(jaxpr.invars) == signature(eqn.invars)
        same_outputs = signature(jaxpr.outvars) == signature(eqn.outvars)
    except AttributeError:  # tokens and references have no shape
        return None
    return (jaxpr, consts) if same_inputs and same_outputs else None


def _casts_a_number(eqn: Any, inputs: Sequence[Operand]) -> bool:
    """Whether an equation gives a constant number another type."""
    if eqn.primitive.name != "convert_element_type" or not isinstance(inputs[0], Constant):
        return False
    return inputs[0].shape == () and jax.dtypes.issubdtype(eqn.params["new_dtype"], np.number)


def _computed_index(eqn: Any, inputs: Sequence[Operand]) -> Constant | None:
    """The result of arithmetic on constant integers, as that of loop counters and indices; None for others."""
    if not inputs or len(eqn.outvars) != 1 or not all(isinstance(i, Constant) for i in inputs):
        return None
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    is_bool = aval.dtype == bool
    if math.prod(aval.shape) != 1 or not (is_bool or jax.dtypes.issubdtype(aval.dtype, np.integer)):
        return None
    if name in ("and", "or", "not") and not is_bool:  # bitwise
        return None
    try:
        numbers = [scalar(i.value) for i in inputs]
        value = np.fmod(*numbers) if name == "rem" else evaluate(name, eqn.params, numbers, channelwise=True)
    except (NotElementwise, TypeError, ValueError):
        return None
    if not is_bool and not (np.isfinite(value) and np.iinfo(aval.dtype).min <= value <= np.iinfo(aval.dtype).max):
        return None
    return Constant(np.asarray(value).astype(aval.dtype).reshape(aval.shape))


def _small_array(const: Any) -> Any:
    size = math.prod(np.shape(const)) * getattr(getattr(const, "dtype", None), "itemsize", 1)
    if size > MAX_CONSTANT_BYTES:
        raise ClosureError(
            f"apply_fn closes over an array of {size / 2**20:.1f} MiB (shape {np.shape(const)}). Pass weights in "
            "`variables` instead: captured arrays cannot be quantized and slow compilation down."
        )
    return const


def _scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are the same at each step, and how many are carried from step to step."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = map(len, params["ft_in"].unpack())  # as of jax 0.12
    return constants, carried
