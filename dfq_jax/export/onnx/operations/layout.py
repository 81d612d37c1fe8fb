"""Operations that move, repeat, join or pad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dfq_jax.export.onnx.batched import Batch, Size
from dfq_jax.export.onnx.operations.table import Call, Unsupported, emits
from dfq_jax.export.onnx.writer import Value, Writer, constant, onnx_dtype, plain


@emits("transpose")
def _transpose(call: Call) -> Value:
    (x,), permutation = call.inputs, call.params["permutation"]
    if x.is_constant:
        return constant(x.array.transpose(permutation), call.shape)
    return x.moved({old: new for new, old in enumerate(permutation)}, call.shape)


@emits("reshape")
def _reshape(call: Call) -> Value:
    (x,) = call.inputs
    if call.params.get("dimensions") is not None:
        raise Unsupported("it transposes")
    ordered = not x.is_constant and not x.narrow and call.writer.is_ordered(x)
    name = x.name if ordered else call.writer.whole(x)
    return plain(call.writer.reshape(name, call.shape), call.shape)


@emits("squeeze")
def _squeeze(call: Call) -> Value:
    (x,), gone = call.inputs, set(call.params["dimensions"])
    kept = [a for a in range(len(x.shape)) if a not in gone]
    if x.is_constant:
        return constant(x.array.squeeze(tuple(gone)), call.shape)
    name = x.name
    if gone:
        where = [i for i, a in enumerate(x.axes) if a in gone]
        name = call.writer.node("Squeeze", [name, call.writer.integers(where)])
    return x.moved({old: new for new, old in enumerate(kept)}, call.shape, name=name)


@emits("expand_dims")
def _expand_dims(call: Call) -> Value:
    new = set(call.params["dimensions"])
    return _broadcast(call, [a for a in range(len(call.shape)) if a not in new])


@emits("broadcast_in_dim")
def _broadcast_in_dim(call: Call) -> Value:
    return _broadcast(call, call.params["broadcast_dimensions"])


def _broadcast(call: Call, places: Sequence[int]) -> Value:
    """New axes have size 1, whatever size the program gives them: see the module `writer`."""
    x = call.inputs[0]
    new = [a for a in range(len(call.shape)) if a not in places]
    if x.is_constant:
        return constant(np.expand_dims(x.array, tuple(new)), call.shape)
    ordered = x.axes == tuple(range(len(x.axes)))
    held = [places[a] for a in x.axes]
    axes = tuple(range(len(call.shape))) if ordered else (*new, *held)
    name = x.name
    if new:
        name = call.writer.node("Unsqueeze", [name, call.writer.integers(axes.index(a) for a in new)])
    thin = {*new, *(places[a] for a in range(len(places)) if x.is_thin(a))}
    narrow = frozenset(a for a in thin if call.shape[a] != 1)
    return Value(shape=call.shape, axes=axes, narrow=narrow, name=name)


@emits("tile")
def _tile(call: Call) -> Value:
    (x,) = call.inputs
    repeats = [_times(old, new) for old, new in zip(x.shape, call.shape, strict=True)]
    whole = [a for a, times in enumerate(repeats) if times != 1 and x.shape[a] != 1]
    if not whole:  # what has size 1 is merely repeated
        narrow = x.narrow.union(a for a, times in enumerate(repeats) if times != 1)
        return dataclasses.replace(x, shape=call.shape, narrow=narrow)
    times = call.writer.shape([repeats[a] for a in x.axes])
    return call.like(x, call.writer.node("Tile", [call.writer.whole(x, x.axes), times]))


def _times(size: Size, of: Size) -> Size:
    """How often a size goes into another."""
    if isinstance(of, Batch) and isinstance(size, Batch):
        return of.times // size.times
    return Batch(of.times // size) if isinstance(of, Batch) else of // size


@emits("iota")
def _iota(call: Call) -> Value:
    """Of a shape with the batch size in it; others are constants."""
    axis, shape = call.params["dimension"], call.shape
    if isinstance(shape[axis], Batch):
        raise Unsupported("it counts the examples of the batch")
    count = np.arange(shape[axis], dtype=onnx_dtype(call.dtype))
    return constant(count.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)


@emits("stack")
def _stack(call: Call) -> Value:
    axis = call.params["axis"] % len(call.shape)
    where = call.writer.integers([axis])
    names = [call.writer.node("Unsqueeze", [call.writer.whole(x), where]) for x in call.inputs]
    return plain(call.writer.node("Concat", names, axis=axis), call.shape)


@emits("concatenate")
def _concatenate(call: Call) -> Value:
    axis = call.params["dimension"]
    parts = [x for x in call.inputs if x.shape[axis] != 0]
    if len(parts) == 1:
        return parts[0]
    axes = next((x.axes for x in parts if not x.is_constant), tuple(range(len(call.shape))))
    names = [call.writer.whole(x, axes) for x in parts]
    name = call.writer.node("Concat", names, axis=axes.index(axis))
    return Value(shape=call.shape, axes=axes, name=name)


@emits("split")
def _split(call: Call) -> list[Value]:
    (x,) = call.inputs
    axis, sizes = call.params["axis"], call.params["sizes"]
    inputs = [call.writer.whole(x, x.axes), call.writer.integers(sizes)]
    names = call.writer.nodes_of("Split", inputs, len(sizes), axis=x.axes.index(axis))
    return [Value(shape=shape, axes=x.axes, name=name) for shape, name in zip(call.shapes, names, strict=True)]


@emits("pad")
def _pad(call: Call) -> Value:
    x, padding = call.inputs
    config = call.params["padding_config"]
    if all(numbers == (0, 0, 0) for numbers in config):
        return x
    fill, sizes = call.writer.arranged(padding), [x.shape[a] for a in x.axes]
    name = spread(call.writer, call.writer.whole(x, x.axes), sizes, [config[a][2] for a in x.axes], fill)
    pads = [config[a][0] for a in x.axes] + [config[a][1] for a in x.axes]
    if any(pads):
        name = call.writer.node("Pad", [name, call.writer.integers(pads), fill], mode="constant")
    return call.like(x, name)


def spread(writer: Writer, name: str, sizes: Sequence[Size], between: Sequence[int], fill: str) -> str:
    """A tensor with so many elements put between those along each axis: padded on an axis of its own, and merged."""
    sizes = list(sizes)
    for axis, count in enumerate(between):
        if not count or sizes[axis] == 1:
            continue
        if isinstance(sizes[axis], Batch):
            raise Unsupported("it pads between the examples of the batch")
        apart = writer.node("Unsqueeze", [name, writer.integers([axis + 1])])
        pads = [0] * (2 * len(sizes) + 2)
        pads[len(sizes) + 1 + axis + 1] = count
        apart = writer.node("Pad", [apart, writer.integers(pads), fill], mode="constant")
        sizes[axis] *= count + 1
        merged = writer.reshape(apart, sizes)
        numbers = [writer.integers([n]) for n in (0, -count, axis)]
        name = writer.node("Slice", [merged, *numbers])
        sizes[axis] -= count
    return name
