"""Slices of leaves, followed through the operations that rearrange them.

Layers in a loop read kernels slice by slice: each step then has leaves of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from dfq_jax.graph.tracing.elementwise import CASTS
from dfq_jax.graph.tracing.program import Constant, Op, Operand, Shape

if TYPE_CHECKING:
    from dfq_jax.graph.tracing.flattening import Builder
else:  # which imports this module
    Builder = Any


class Slices:
    """The slices of a program's values, as far as they are known while it is built.

    Attributes:
      builder: of the program.
      leaves: leaves of the variables, and slices of such.
      parts: of values with known slices, the axis and the slices along it. In order: leaves are split before their
        slices.
    """

    def __init__(self, builder: Builder):
        self.builder = builder
        self.leaves = set(range(builder.num_leaves))
        self.parts: dict[int, tuple[int, tuple[Operand, ...]]] = {}
        self._taken: dict[tuple[int, int, int], Operand] = {}

    def row(self, operand: Operand, index: int) -> Operand:
        """A slice along the first axis."""
        found = self._take(operand, 0, index)
        if found is None:
            found = self.builder.emit(lambda a: lax.index_in_dim(a, index, 0, keepdims=False), operand)
        return found

    def stacked(self, slices: Sequence[Operand], axis: int, dtype: Any) -> Operand:
        """The value that has the given slices."""
        slices = [_with_dtype(item, dtype) for item in slices]
        value = self.builder.emit(lambda *a: lax.concatenate([lax.expand_dims(i, (axis,)) for i in a], axis), *slices)
        if isinstance(value, int):
            self.parts[value] = axis, tuple(slices)
        return value

    def _split(self, leaf: int, axis: int) -> None:
        """Make every slice of a leaf a leaf."""
        aval = self.builder.avals[leaf]
        shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
        parts = tuple(self.builder.new_value(shape, aval.dtype) for _ in range(aval.shape[axis]))
        self.leaves.update(parts)
        self.builder.parameter_only.update(parts)
        self.parts[leaf] = axis, parts

    def _take(self, operand: Operand, axis: int, index: int) -> Operand | None:
        """The slice of a value whose slices are known or come from those of leaves; None for others."""
        if isinstance(operand, Constant):
            return Constant(operand.value[(*[slice(None)] * axis, index)])
        key = operand, axis, index
        if key not in self._taken:
            if operand in self.leaves and operand not in self.parts:
                self._split(operand, axis)
            if operand in self.parts:
                own, parts = self.parts[operand]
                found = parts[index] if own == axis else None
            else:
                op = self.builder.producers.get(operand)
                found = None if op is None else self._take_from(op, axis, index)
            if found is None:
                return None
            self._taken[key] = found
        return self._taken[key]

    def _take_from(self, op: Op, axis: int, index: int) -> Operand | None:
        """The slice of an operation's result, from a slice of its operand."""
        params, source = op.params, op.inputs[0] if op.inputs else None
        shape, result = self._shape(source), self.builder.avals[op.outputs[0]].shape
        rest = (*result[:axis], *result[axis + 1 :])

        def then(function: Callable[[jax.Array], jax.Array], *path: tuple[int, int]) -> Operand | None:
            value = source
            for place in path:
                value = None if value is None else self._take(value, *place)
            return None if value is None else self.builder.emit(function, value)

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
        self, source: Operand, old: Sequence[Any], new: Sequence[Any], axis: int, index: int
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
            dtype = self.builder.avals[source].dtype if isinstance(source, int) else source.dtype
            value = self.stacked(parts, start, dtype)
        else:
            end = next((e for e in range(start + 1, len(old) + 1) if math.prod(old[start:e]) == new[axis]), None)
            if end is None:
                return None
            value = source
            for place in np.unravel_index(index, old[start:end]):
                value = None if value is None else self._take(value, start, int(place))
            if value is None:
                return None
        return self.builder.emit(lambda a: lax.reshape(a, rest), value)

    def indexed(self, eqn: Any, inputs: Sequence[Operand]) -> list[Operand] | None:
        """The results of an equation that reads slices of leaves: `w[1]` in its several forms; None for others."""
        source = inputs[0] if inputs else None
        if source not in self.builder.parameter_only:
            return None
        name, params, shape = eqn.primitive.name, eqn.params, self._shape(source)
        if name == "unstack":
            return _all_or_none(self._take(source, params["axis"], i) for i in range(shape[params["axis"]]))
        if name == "squeeze":
            op = self.builder.producers.get(source)
            if op is None or _static_slice(op, self._shape(op.inputs[0])) is None:
                return None
            wide = self._shape(op.inputs[0])
            axis = next((a for a in params["dimensions"] if wide[a] > 1), None)
            found = None if axis is None else self._take(source, axis, 0)
            shape = eqn.outvars[0].aval.shape
            return None if found is None else [self.builder.emit(lambda a: lax.reshape(a, shape), found)]
        if name == "gather" and (place := _gathered_slice(params, shape, inputs[1])) is not None:
            return _all_or_none([self._take(source, *place)])
        return None

    def _shape(self, operand: Operand | None) -> Shape:
        if operand is None:
            return ()
        return operand.shape if isinstance(operand, Constant) else self.builder.avals[operand].shape


def _all_or_none(items: Any) -> list[Any] | None:
    items = list(items)
    return None if None in items else items


def _static_slice(op: Op, shape: Sequence[Any]) -> tuple[list[int], list[int]] | None:
    """Starts and strides of a slice at constant places; None for other operations."""
    if op.name == "slice":
        return list(op.params["start_indices"]), list(op.params["strides"] or [1] * len(shape))
    if op.name != "dynamic_slice" or not all(isinstance(i, Constant) for i in op.inputs[1:]):
        return None
    room = [size - taken for size, taken in zip(shape, op.params["slice_sizes"], strict=True)]
    starts = [int(np.clip(int(i.value), 0, most)) for i, most in zip(op.inputs[1:], room, strict=True)]
    return starts, [1] * len(shape)


def _gathered_slice(params: Mapping[str, Any], shape: Sequence[Any], indices: Operand) -> tuple[int, int] | None:
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
