"""Operations that take parts of a value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfq_jax.export.onnx.batched import Batch, Shape
from dfq_jax.export.onnx.operations.table import Call, Unsupported, emits
from dfq_jax.export.onnx.writer import Value

_LAST = np.iinfo(np.int64).max


@emits("slice")
def _slice(call: Call) -> Value:
    (x,), params = call.inputs, call.params
    strides = params["strides"] or (1,) * len(x.shape)
    parts = {}
    for axis, bounds in enumerate(zip(params["start_indices"], params["limit_indices"], strides, strict=True)):
        if x.shape[axis] == call.shape[axis]:
            continue
        if isinstance(call.shape[axis], Batch):
            raise Unsupported("it cuts a part that depends on the batch size")
        parts[axis] = bounds
    return _sliced(call, x, parts)


def _sliced(call: Call, x: Value, parts: dict[int, tuple[int, int, int]]) -> Value:
    """The parts (start, limit, stride) of some axes."""
    if not parts:
        return x
    starts, limits, strides = zip(*parts.values(), strict=True)
    where = [x.axes.index(axis) for axis in parts]
    numbers = [call.writer.integers(n) for n in (starts, limits, where, strides)]
    name = call.writer.node("Slice", [call.writer.whole(x, x.axes), *numbers])
    return call.like(x, name)


@emits("rev")
def _reverse(call: Call) -> Value:
    return _sliced(call, call.inputs[0], {axis: (-1, -_LAST, -1) for axis in call.params["dimensions"]})


@emits("dynamic_slice")
def _dynamic_slice(call: Call) -> Value:
    x, *starts = call.inputs
    if any(start.scalar is None for start in starts):
        raise Unsupported("it cuts a part whose place depends on the input")
    parts = {}
    for axis, (start, size) in enumerate(zip(starts, call.shape, strict=True)):
        if x.shape[axis] == size:
            continue
        if isinstance(size, Batch) or isinstance(x.shape[axis], Batch):
            raise Unsupported("it cuts a part of the batch")
        first = int(np.clip(start.scalar, 0, x.shape[axis] - size))
        parts[axis] = (first, first + size, 1)
    return _sliced(call, x, parts)


@emits("gather")
def _gather(call: Call) -> Value:
    """Elements of some axes by their numbers, as x[:, index] or x[:, rows, columns] has it."""
    x, indices = call.inputs
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    chosen_axes = tuple(numbers.start_index_map)
    whole = all(size == call_size for size, call_size in zip(sizes, _static(x.shape, sizes), strict=True))
    if sorted(numbers.collapsed_slice_dims) != sorted(chosen_axes) or numbers.operand_batching_dims or not whole:
        raise Unsupported("it is no choice of elements along axes")
    if any(isinstance(x.shape[a], Batch) for a in chosen_axes):
        raise Unsupported("it chooses from the examples of the batch")
    offsets = list(numbers.offset_dims)
    inserted = [i for i in range(len(call.shape)) if i not in offsets]
    if len(chosen_axes) == 1:
        (axis,) = chosen_axes
        index = call.writer.reshape(_indices(call, chosen_axes), indices.shape[:-1])
        name = call.writer.node("Gather", [call.writer.whole(x), index], axis=axis)
        return Value(shape=call.shape, axes=(*offsets[:axis], *inserted, *offsets[axis:]), name=name)
    rest = [a for a in range(len(x.shape)) if a not in chosen_axes]
    held = call.writer.whole(x, (*chosen_axes, *rest))
    name = call.writer.node("GatherND", [held, _indices(call, chosen_axes)])
    return Value(shape=call.shape, axes=(*inserted, *offsets), name=name)


def _indices(call: Call, axes: Sequence[int]) -> str:
    """The numbers of the chosen elements, `[..., axes]`: outside the array clipped, or refused where JAX fills in."""
    x, indices = call.inputs
    largest = np.array([x.shape[a] - 1 for a in axes], np.int64)
    if indices.is_constant:
        chosen = np.broadcast_to(indices.array, indices.shape).astype(np.int64)
        if np.any(chosen < 0) or np.any(chosen > largest):
            raise Unsupported("its indices lie outside the array")
        return call.writer.initializer(chosen)
    if "CLIP" not in str(call.params["mode"]) and "PROMISE" not in str(call.params["mode"]):
        raise Unsupported("its indices depend on the input and are filled in outside the array; pass mode='clip'")
    found = call.writer.node("Cast", [call.writer.whole(indices)], to=call.writer.element_type(np.int64))
    found = call.writer.node("Max", [found, call.writer.initializer(np.int64(0))])
    return call.writer.node("Min", [found, call.writer.initializer(largest)])


def _static(shape: Shape, sizes: Sequence[int]) -> list[int]:
    """The sizes a gather has where it takes an axis whole, 1 on the axis it chooses from."""
    return [size if isinstance(full, Batch) or size == 1 else full for full, size in zip(shape, sizes, strict=True)]
