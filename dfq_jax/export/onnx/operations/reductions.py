"""Operations over whole axes."""

from __future__ import annotations

import dataclasses

import numpy as np

from dfq_jax.export.onnx.operations.table import Call, Unsupported, emits, emits_as
from dfq_jax.export.onnx.writer import Value


@emits_as(
    {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}
)
def reduction(call: Call, kind: str) -> Value:
    """An operator that takes axes away."""
    (x,), gone = call.inputs, call.params["axes"]
    if not gone:
        return x
    where = call.writer.integers(sorted(x.axes.index(a) for a in gone))
    held = call.writer.whole(x, x.axes) if x.narrow.intersection(gone) else call.writer.arranged(x, x.axes)
    name = call.writer.node(kind, [held, where], keepdims=0)
    narrow = frozenset() if x.narrow.intersection(gone) else x.narrow
    kept = [a for a in range(len(x.shape)) if a not in gone]
    moved = dataclasses.replace(x, narrow=narrow, array=None)
    return moved.moved({old: new for new, old in enumerate(kept)}, call.shape, name=name)


@emits_as({"reduce_and": "ReduceMin", "reduce_or": "ReduceMax"})
def _of_booleans(call: Call, kind: str) -> Value:
    if call.dtype != np.bool_:
        raise Unsupported("it is of bits")
    (x,) = call.inputs
    number = dataclasses.replace(call, inputs=[call.writer.cast(x, np.int32)])
    return call.writer.cast(reduction(number, kind), np.bool_)


@emits_as({"argmax": "ArgMax", "argmin": "ArgMin"})
def _arg(call: Call, kind: str) -> Value:
    (x,), (axis,) = call.inputs, call.params["axes"]
    name = call.writer.node(kind, [call.writer.whole(x, x.axes)], axis=x.axes.index(axis), keepdims=0)
    kept = [a for a in range(len(x.shape)) if a != axis]
    found = Value(shape=call.shape, axes=tuple(kept.index(a) for a in x.axes if a != axis), name=name)
    return call.writer.cast(found, call.dtype)


@emits("top_k")
def _top_k(call: Call) -> list[Value]:
    (x,) = call.inputs
    axis = call.params.get("axis", len(x.shape) - 1)
    inputs = [call.writer.whole(x, x.axes), call.writer.integers([call.params["k"]])]
    values, indices = call.writer.nodes_of("TopK", inputs, 2, axis=x.axes.index(axis))
    return [call.like(x, values), call.writer.cast(call.like(x, indices), np.int32)]


@emits("cumsum")
def _cumsum(call: Call) -> Value:
    (x,) = call.inputs
    where = call.writer.initializer(np.int64(x.axes.index(call.params["axis"])))
    name = call.writer.node("CumSum", [call.writer.whole(x, x.axes), where], reverse=int(call.params["reverse"]))
    return call.like(x, name)
