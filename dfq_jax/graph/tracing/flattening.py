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
from jax import lax
from jax.extend import core as jex

from dfq_jax.graph.tracing.elementwise import CASTS, NotElementwise, evaluate, scalar
from dfq_jax.graph.tracing.layout import LAYOUT
from dfq_jax.graph.tracing.program import (
    CONTROL_FLOW,
    LAYER_PRIMITIVES,
    ClosureError,
    Constant,
    Op,
    Operand,
    Program,
    holds_layers,
    live_ops,
    sub_jaxprs,
)
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
        builder = _Builder(len(leaves), [*leaves, x], indexed=indexed)
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


class _Builder:
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
        self.leaves = set(range(num_leaves))  # and slices of leaves
        # Values with known slices: the axis and the slices along it. In order: leaves are split before their slices.
        self.parts: dict[int, tuple[int, tuple[Operand, ...]]] = {}
        self.taken: dict[tuple[int, int, int], Operand] = {}

    # --- equations ---

    def inline(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Operand], scope: str) -> list[Operand]:
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
        if (body := _call_body(eqn)) is not None and not self._keep_whole(eqn, inputs):
            return self.inline(*body, inputs, scope)
        if (branch := self._known_branch(eqn, inputs)) is not None:
            return self.inline(branch.jaxpr, branch.consts, inputs[1:], scope)
        if name in ("scan", "while") and any(holds_layers(j) for j, _ in sub_jaxprs(eqn.params)):
            return (self._unrolled_scan if name == "scan" else self._unrolled_while)(eqn, inputs, scope)
        return self._indexed(eqn, inputs) if self.indexed else None

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
        outputs = [self._new_value(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
        if all(not isinstance(i, int) or i in self.parameter_only for i in inputs):
            self.parameter_only.update(outputs)
        op = Op(len(self.ops), eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), scope)
        self.ops.append(op)
        self.producers.update(dict.fromkeys(outputs, op))
        if op.name == "platform_index" or not self.platform_indices.isdisjoint(inputs):
            self.platform_indices.update(outputs)  # before JAX 0.8 it is clamped first
        return outputs

    def _new_value(self, shape: Sequence[int], dtype: Any) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        return number

    def _emit(self, function: Callable[..., jax.Array], *operands: Operand) -> Operand:
        """Append the operations of a function."""
        closed = jax.make_jaxpr(function)(*(o.value if isinstance(o, Constant) else self.avals[o] for o in operands))
        return self.inline(closed.jaxpr, closed.consts, operands, "")[0]

    # --- loops ---

    def _unrolled_scan(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> list[Operand] | None:
        params = eqn.params
        length, carried, constants = params["length"], params["num_carry"], params["num_consts"]
        if not 1 <= length * self.steps <= MAX_STEPS:
            return None
        ((body, consts),) = sub_jaxprs(params)
        fixed, carry = inputs[:constants], inputs[constants : constants + carried]
        rows: dict[int, list[Operand]] = {}
        self.steps *= length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            xs = [self._row(x, i) for x in inputs[constants + carried :]]
            results = self.inline(body, consts, [*fixed, *carry, *xs], f"{scope}[{i}]")
            carry, rows[i] = results[:carried], results[carried:]
        self.steps //= length
        dtypes = [var.aval.dtype for var in eqn.outvars[carried:]]
        stacked = zip(dtypes, *(rows[i] for i in range(length)), strict=True)
        return [*carry, *(self._stacked(row, 0, dtype) for dtype, *row in stacked)]

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

    # --- slices ---

    def _row(self, operand: Operand, index: int) -> Operand:
        """A slice along the first axis."""
        found = self._take(operand, 0, index)
        if found is None:
            found = self._emit(lambda a: lax.index_in_dim(a, index, 0, keepdims=False), operand)
        return found

    def _stacked(self, slices: Sequence[Operand], axis: int, dtype: Any) -> Operand:
        """The value that has the given slices."""
        slices = [_with_dtype(item, dtype) for item in slices]
        value = self._emit(lambda *a: lax.concatenate([lax.expand_dims(i, (axis,)) for i in a], axis), *slices)
        if isinstance(value, int):
            self.parts[value] = axis, tuple(slices)
        return value

    def _split(self, leaf: int, axis: int) -> None:
        """Make every slice of a leaf a leaf."""
        aval = self.avals[leaf]
        shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
        parts = tuple(self._new_value(shape, aval.dtype) for _ in range(aval.shape[axis]))
        self.leaves.update(parts)
        self.parameter_only.update(parts)
        self.parts[leaf] = axis, parts

    def _take(self, operand: Operand, axis: int, index: int) -> Operand | None:
        """The slice of a value whose slices are known or come from those of leaves; None for others."""
        if isinstance(operand, Constant):
            return Constant(operand.value[(*[slice(None)] * axis, index)])
        key = operand, axis, index
        if key not in self.taken:
            if operand in self.leaves and operand not in self.parts:
                self._split(operand, axis)
            if operand in self.parts:
                own, parts = self.parts[operand]
                found = parts[index] if own == axis else None
            else:
                op = self.producers.get(operand)
                found = None if op is None else self._take_from(op, axis, index)
            if found is None:
                return None
            self.taken[key] = found
        return self.taken[key]

    def _take_from(self, op: Op, axis: int, index: int) -> Operand | None:
        """The slice of an operation's result, from a slice of its operand."""
        params, source = op.params, op.inputs[0] if op.inputs else None
        shape, result = self._shape(source), self.avals[op.outputs[0]].shape
        rest = (*result[:axis], *result[axis + 1 :])

        def then(function: Callable[[jax.Array], jax.Array], *path: tuple[int, int]) -> Operand | None:
            value = source
            for place in path:
                value = None if value is None else self._take(value, *place)
            return None if value is None else self._emit(function, value)

        if op.name in CASTS and len(op.inputs) == 1:
            return then(lambda a: op(a)[0], (axis, index))
        if op.name == "transpose":
            taken = params["permutation"][axis]
            order = [p - (p > taken) for p in params["permutation"] if p != taken]
            return then(lambda a: lax.transpose(a, order), (taken, index))
        if op.name == "squeeze":
            taken = [a for a in range(len(shape)) if a not in params["dimensions"]][axis]
            return then(lambda a: lax.reshape(a, rest), (taken, index))
        if op.name == "broadcast_in_dim" and len(op.inputs) == 1:
            dimensions = params["broadcast_dimensions"]
            path = [(k, index if shape[k] > 1 else 0) for k, d in enumerate(dimensions) if d == axis]
            others = [d - (d > axis) for d in dimensions if d != axis]
            return then(lambda a: lax.broadcast_in_dim(a, rest, others), *path)
        if op.name == "reshape" and len(op.inputs) == 1:
            return self._take_from_reshape(source, shape, result, axis, index)
        if (box := _static_slice(op, shape)) is not None:
            starts, strides = box
            path = (axis, starts[axis] + index * strides[axis])
            keep = [a for a in range(len(shape)) if a != axis]
            if all(result[a] == shape[a] for a in keep):
                return then(lambda a: a, path)
            begin, steps = [starts[a] for a in keep], [strides[a] for a in keep]
            end = [starts[a] + (result[a] - 1) * strides[a] + 1 for a in keep]
            return then(lambda a: lax.slice(a, begin, end, steps), path)
        if op.name == "stack" and params["axis"] == axis:
            return op.inputs[index]
        if op.name == "concatenate" and params["dimension"] == axis:
            for part in op.inputs:
                if index < (size := self._shape(part)[axis]):
                    return self._take(part, axis, index)
                index -= size
        return None

    def _take_from_reshape(
        self, source: Operand, old: Sequence[int], new: Sequence[int], axis: int, index: int
    ) -> Operand | None:
        """The axis is an axis of the operand, several of them merged, or the first part of one that is split."""
        rest = (*new[:axis], *new[axis + 1 :])
        before = math.prod(new[:axis])
        places = [a for a in range(len(old)) if math.prod(old[:a]) == before and old[a] > 1] if new[axis] > 1 else []
        if not places:
            return None
        start, size = places[0], old[places[0]]
        if size > new[axis]:
            if size % new[axis]:
                return None
            step = size // new[axis]
            parts = [self._take(source, start, index * step + i) for i in range(step)]
            if None in parts:
                return None
            dtype = self.avals[source].dtype if isinstance(source, int) else source.value.dtype
            value = self._stacked(parts, start, dtype)
        else:
            end = next((e for e in range(start + 1, len(old) + 1) if math.prod(old[start:e]) == new[axis]), None)
            if end is None:
                return None
            value = source
            for place in np.unravel_index(index, old[start:end]):
                value = None if value is None else self._take(value, start, int(place))
            if value is None:
                return None
        return self._emit(lambda a: lax.reshape(a, rest), value)

    def _indexed(self, eqn: Any, inputs: Sequence[Operand]) -> list[Operand] | None:
        """The results of an equation that reads slices of leaves: `w[1]` in its several forms; None for others."""
        source = inputs[0] if inputs else None
        if source not in self.parameter_only:
            return None
        name, params, shape = eqn.primitive.name, eqn.params, self._shape(source)
        if name == "unstack":
            return _all_or_none(self._take(source, params["axis"], i) for i in range(shape[params["axis"]]))
        if name == "squeeze":
            op = self.producers.get(source)
            if op is None or _static_slice(op, self._shape(op.inputs[0])) is None:
                return None
            wide = self._shape(op.inputs[0])
            axis = next((a for a in params["dimensions"] if wide[a] > 1), None)
            found = None if axis is None else self._take(source, axis, 0)
            return None if found is None else [self._emit(lambda a: lax.reshape(a, eqn.outvars[0].aval.shape), found)]
        if name == "gather" and (place := _gathered_slice(params, shape, inputs[1])) is not None:
            return _all_or_none([self._take(source, *place)])
        return None

    def _shape(self, operand: Operand | None) -> tuple[int, ...]:
        return self.avals[operand].shape if isinstance(operand, int) else () if operand is None else operand.shape

    # --- the program ---

    def program(self, outputs: Sequence[Operand]) -> Program:
        """The live operations, with the leaves as they are taken apart numbered first, then x."""
        split = {leaf: parts for leaf, (_, parts) in self.parts.items() if leaf in self.leaves}
        body, self.ops = self.ops, []
        whole: dict[int, Operand] = {}  # split leaves that something reads whole, too: made of their slices
        for leaf in reversed(split):
            axis, parts = self.parts[leaf]
            made = [whole.get(part, part) for part in parts]
            whole[leaf] = self._stacked(made, axis, self.avals[leaf].dtype)
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
            return Split(self.parts[leaf][0], tuple(map(form, split[leaf]))) if leaf in split else None

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


def _all_or_none(items: Any) -> list[Any] | None:
    items = list(items)
    return None if None in items else items


def _call_body(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The body of an equation that merely calls it (jit, remat, custom derivatives), by shape and not by name."""
    bodies = list(sub_jaxprs(eqn.params))
    if eqn.primitive.name in CONTROL_FLOW or len(bodies) != 1:
        return None
    jaxpr, consts = bodies[0]
    if len(jaxpr.constvars) != len(consts):
        return None

    def signature(variables: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
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


def _static_slice(op: Op, shape: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Starts and strides of a slice at constant places; None for other operations."""
    if op.name == "slice":
        return list(op.params["start_indices"]), list(op.params["strides"] or [1] * len(shape))
    if op.name != "dynamic_slice" or not all(isinstance(i, Constant) for i in op.inputs[1:]):
        return None
    room = [size - taken for size, taken in zip(shape, op.params["slice_sizes"], strict=True)]
    starts = [int(np.clip(int(i.value), 0, most)) for i, most in zip(op.inputs[1:], room, strict=True)]
    return starts, [1] * len(shape)


def _gathered_slice(params: Mapping[str, Any], shape: Sequence[int], indices: Operand) -> tuple[int, int] | None:
    """Axis and index of a gather that takes one whole slice at a constant place, as `jnp.take(w, 1, axis=0)`."""
    numbers = params["dimension_numbers"]
    if not isinstance(indices, Constant) or np.size(indices.value) != 1 or len(numbers.start_index_map) != 1:
        return None
    (axis,), index = numbers.start_index_map, int(np.asarray(indices.value).reshape(()))
    whole = tuple(1 if a == axis else size for a, size in enumerate(shape))
    if numbers.collapsed_slice_dims != (axis,) or tuple(params["slice_sizes"]) != whole:
        return None
    plain = numbers.offset_dims == tuple(range(len(shape) - 1)) and np.ndim(indices.value) == 1
    return (axis, index) if plain and 0 <= index < shape[axis] else None


def _with_dtype(operand: Operand, dtype: Any) -> Operand:
    """A constant in the type of the values beside it."""
    if isinstance(operand, int) or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return operand
    return Constant(np.asarray(operand.value).astype(dtype))


def _small_array(const: Any) -> Any:
    size = math.prod(np.shape(const)) * getattr(getattr(const, "dtype", None), "itemsize", 1)
    if size > MAX_CONSTANT_BYTES:
        raise ClosureError(
            f"apply_fn closes over an array of {size / 2**20:.1f} MiB (shape {np.shape(const)}). Pass weights in "
            "`variables` instead: captured arrays cannot be quantized and slow compilation down."
        )
    return const
