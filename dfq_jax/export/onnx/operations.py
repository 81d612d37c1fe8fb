"""The table of operations: what each primitive of JAX becomes in ONNX.

An emitter takes a `Call` and gives the result as a `Value` (a list of them for several results). Convolutions and
matrix products are in `products`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from dfq_jax.export.onnx.batched import Batch, Shape, Size
from dfq_jax.export.onnx.writer import Value, Writer, constant, onnx_dtype

_LAST = np.iinfo(np.int64).max


class Unsupported(Exception):
    """ONNX has nothing for this use of the operation; the message says what about it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One use of a primitive: its operands and their types, its parameters, and shape and type of the results."""

    writer: Writer
    inputs: Sequence[Value]
    params: Mapping[str, Any]
    shapes: Sequence[Shape]
    dtype: np.dtype
    input_dtypes: Sequence[np.dtype]

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def elementwise(self, kind: str, *operands: Value, **attributes: Any) -> Value:
        return self.writer.elementwise(kind, operands or self.inputs, self.shape, **attributes)


Emitter = Callable[[Call], Any]
EMITTERS: dict[str, Emitter] = {}


def emits(*primitives: str) -> Callable[[Emitter], Emitter]:
    """Enter an emitter into the table."""

    def enter(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(primitives, emitter))
        return emitter

    return enter


# --- elementwise ---

_ELEMENTWISE = {
    "Abs": ["abs"], "Acos": ["acos"], "Acosh": ["acosh"], "Add": ["add", "add_any"], "Asin": ["asin"],
    "Asinh": ["asinh"], "Atan": ["atan"], "Atanh": ["atanh"], "Ceil": ["ceil"], "Cos": ["cos"], "Cosh": ["cosh"],
    "Div": ["div"], "Equal": ["eq"], "Erf": ["erf"], "Exp": ["exp"], "Floor": ["floor"], "Greater": ["gt"],
    "GreaterOrEqual": ["ge"], "Less": ["lt"], "LessOrEqual": ["le"], "Log": ["log"], "Mul": ["mul"], "Neg": ["neg"],
    "Pow": ["pow"], "Sigmoid": ["logistic"], "Sign": ["sign"], "Sin": ["sin"], "Sinh": ["sinh"], "Sqrt": ["sqrt"],
    "Sub": ["sub"], "Tan": ["tan"], "Tanh": ["tanh"],
}  # fmt: skip
for _kind, _names in _ELEMENTWISE.items():
    emits(*_names)(lambda call, kind=_kind: call.elementwise(kind))


@emits("and")
def _and(call: Call) -> Value:
    return _logical(call, "And")


@emits("or")
def _or(call: Call) -> Value:
    return _logical(call, "Or")


@emits("xor")
def _xor(call: Call) -> Value:
    return _logical(call, "Xor")


@emits("not")
def _not(call: Call) -> Value:
    return _logical(call, "Not")


def _logical(call: Call, kind: str) -> Value:
    return call.elementwise(kind if call.dtype == np.bool_ else f"Bitwise{kind}")


@emits("copy", "copy_p", "reduce_precision", "stop_gradient", "sharding_constraint", "name")
def _identity(call: Call) -> Value:
    return call.inputs[0]


@emits("device_put", "optimization_barrier")
def _identities(call: Call) -> list[Value]:
    return list(call.inputs)


@emits("convert_element_type")
def _cast(call: Call) -> Value:
    (x,) = call.inputs
    if onnx_dtype(call.dtype) == onnx_dtype(call.input_dtypes[0]):
        return x
    if x.is_constant:
        return dataclasses.replace(x, array=x.array.astype(onnx_dtype(call.dtype)))
    return call.elementwise("Cast", to=call.writer.element_type(call.dtype))


@emits("max")
def _max(call: Call) -> Value:
    return _bounded(call, "Max", low=True)


@emits("min")
def _min(call: Call) -> Value:
    return _bounded(call, "Min", low=False)


def _bounded(call: Call, kind: str, low: bool) -> Value:
    """Relu and Clip where one operand is a float number."""
    bound = next((v.scalar for v in call.inputs if v.scalar is not None), None)
    data = [v for v in call.inputs if not v.is_constant]
    if bound is None or len(data) != 1 or onnx_dtype(call.dtype) != np.float32:
        return call.elementwise(kind)
    if low and bound == 0:
        return call.elementwise("Relu", *data)
    return _clip(call, data[0], bound if low else None, None if low else bound)


def _clip(call: Call, x: Value, low: Any, high: Any) -> Value:
    names = [call.writer.arranged(x, x.axes)]
    names += ["" if bound is None else call.writer.initializer(np.float32(bound)) for bound in (low, high)]
    return dataclasses.replace(x, name=call.writer.node("Clip", names if names[2] else names[:2]))


@emits("clamp")
def _clamp(call: Call) -> Value:
    low, x, high = call.inputs
    numbers = low.scalar is not None and high.scalar is not None
    if numbers and not x.is_constant and onnx_dtype(call.dtype) == np.float32:
        return _clip(call, x, low.scalar, high.scalar)
    return call.elementwise("Min", call.elementwise("Max", x, low), high)


@emits("ne")
def _not_equal(call: Call) -> Value:
    return call.elementwise("Not", call.elementwise("Equal"))


@emits("square")
def _square(call: Call) -> Value:
    return call.elementwise("Mul", *call.inputs, *call.inputs)


@emits("integer_pow")
def _integer_pow(call: Call) -> Value:
    exponent = call.params["y"]
    if exponent == 2:
        return _square(call)
    return call.elementwise("Pow", *call.inputs, constant(np.float32(exponent)))


@emits("exp2")
def _exp2(call: Call) -> Value:
    return call.elementwise("Pow", constant(np.float32(2)), *call.inputs)


@emits("rsqrt")
def _rsqrt(call: Call) -> Value:
    return call.elementwise("Reciprocal", call.elementwise("Sqrt"))


@emits("cbrt")
def _cbrt(call: Call) -> Value:
    root = call.elementwise("Pow", call.elementwise("Abs"), constant(np.float32(1 / 3)))
    return call.elementwise("Mul", call.elementwise("Sign"), root)


@emits("log1p")
def _log1p(call: Call) -> Value:
    """ONNX has no function that keeps the digits of small x; the absolute error is that of rounding 1 + x."""
    return call.elementwise("Log", call.elementwise("Add", *call.inputs, constant(np.float32(1))))


@emits("expm1")
def _expm1(call: Call) -> Value:
    return call.elementwise("Sub", call.elementwise("Exp"), constant(np.float32(1)))


@emits("erfc")
def _erfc(call: Call) -> Value:
    return call.elementwise("Sub", constant(np.float32(1)), call.elementwise("Erf"))


@emits("is_finite")
def _is_finite(call: Call) -> Value:
    return call.elementwise("Less", call.elementwise("Abs"), constant(np.float32(np.inf)))


@emits("round")
def _round(call: Call) -> Value:
    if int(call.params["rounding_method"]) != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("it rounds halves away from zero")
    return call.elementwise("Round")


@emits("rem")
def _remainder(call: Call) -> Value:
    return call.elementwise("Mod", *call.inputs, fmod=1)


@emits("select_n")
def _select(call: Call) -> Value:
    which, *cases = call.inputs
    if len(cases) != 2:
        raise Unsupported(f"it selects from {len(cases)} cases")
    if call.input_dtypes[0] != np.bool_:
        which = call.writer.elementwise("Cast", [which], which.shape, to=call.writer.element_type(np.bool_))
    if call.dtype == np.bool_:  # for which ONNX Runtime has no Where
        either = call.elementwise("And", which, cases[1])
        return call.elementwise("Or", either, call.elementwise("And", call.elementwise("Not", which), cases[0]))
    return call.elementwise("Where", which, cases[1], cases[0])


# --- layout ---


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
    return _plain(call.writer.reshape(name, call.shape), call.shape)


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
    return Value(shape=call.shape, axes=x.axes, name=call.writer.node("Tile", [call.writer.whole(x, x.axes), times]))


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
    return _plain(call.writer.node("Concat", names, axis=axis), call.shape)


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
    return Value(shape=call.shape, axes=x.axes, name=name)


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
    return Value(shape=call.shape, axes=x.axes, name=name)


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


def _plain(name: str, shape: Shape) -> Value:
    return Value(shape=shape, axes=tuple(range(len(shape))), name=name)


# --- reductions ---


def reduction(kind: str) -> Emitter:
    def emit(call: Call) -> Value:
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

    return emit


for _primitive, _kind in {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}.items():
    emits(_primitive)(reduction(_kind))


@emits("reduce_and")
def _all(call: Call) -> Value:
    return _of_booleans(call, "ReduceMin")


@emits("reduce_or")
def _any(call: Call) -> Value:
    return _of_booleans(call, "ReduceMax")


def _of_booleans(call: Call, kind: str) -> Value:
    if call.dtype != np.bool_:
        raise Unsupported("it is of bits")
    (x,) = call.inputs
    number = call.writer.elementwise("Cast", [x], x.shape, to=call.writer.element_type(np.int32))
    result = reduction(kind)(dataclasses.replace(call, inputs=[number]))
    return call.writer.elementwise("Cast", [result], call.shape, to=call.writer.element_type(np.bool_))


@emits("argmax")
def _argmax(call: Call) -> Value:
    return _arg(call, "ArgMax")


@emits("argmin")
def _argmin(call: Call) -> Value:
    return _arg(call, "ArgMin")


def _arg(call: Call, kind: str) -> Value:
    (x,), (axis,) = call.inputs, call.params["axes"]
    name = call.writer.node(kind, [call.writer.whole(x, x.axes)], axis=x.axes.index(axis), keepdims=0)
    name = call.writer.node("Cast", [name], to=call.writer.element_type(call.dtype))
    kept = [a for a in range(len(x.shape)) if a != axis]
    return Value(shape=call.shape, axes=tuple(kept.index(a) for a in x.axes if a != axis), name=name)


@emits("top_k")
def _top_k(call: Call) -> list[Value]:
    (x,) = call.inputs
    axis = call.params.get("axis", len(x.shape) - 1)
    inputs = [call.writer.whole(x, x.axes), call.writer.integers([call.params["k"]])]
    values, indices = call.writer.nodes_of("TopK", inputs, 2, axis=x.axes.index(axis))
    indices = call.writer.node("Cast", [indices], to=call.writer.element_type(np.int32))
    return [Value(shape=call.shape, axes=x.axes, name=name) for name in (values, indices)]


@emits("cumsum")
def _cumsum(call: Call) -> Value:
    (x,) = call.inputs
    where = call.writer.initializer(np.int64(x.axes.index(call.params["axis"])))
    name = call.writer.node("CumSum", [call.writer.whole(x, x.axes), where], reverse=int(call.params["reverse"]))
    return Value(shape=call.shape, axes=x.axes, name=name)


# --- pooling ---


@emits("reduce_window_max")
def _max_pool(call: Call) -> Value:
    return _pool(call, call.inputs[0], "MaxPool")


@emits("reduce_window_min")
def _min_pool(call: Call) -> Value:
    x = call.inputs[0]
    negative = call.writer.elementwise("Neg", [x], x.shape)
    return call.elementwise("Neg", _pool(call, negative, "MaxPool"))


@emits("reduce_window_sum")
def _sum_pool(call: Call) -> Value:
    count = constant(np.float32(np.prod(call.params["window_dimensions"])))
    return call.elementwise("Mul", average_pool(call), count)


def average_pool(call: Call) -> Value:
    """The sum over a window by the number of elements in it, those of the padding included."""
    if any(d != 1 for d in call.params["window_dilation"]):
        raise Unsupported("its windows are dilated")
    return _pool(call, call.inputs[0], "AveragePool", count_include_pad=1)


def _pool(call: Call, x: Value, kind: str, **attributes: Any) -> Value:
    params, rank = call.params, len(x.shape)
    if any(d != 1 for d in params["base_dilation"]):
        raise Unsupported("its input is dilated")
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    if any(low < 0 or high < 0 for low, high in padding):
        raise Unsupported("it pads by less than nothing")
    idle = [a for a in range(rank) if window[a] == strides[a] == 1 and tuple(padding[a]) == (0, 0)]
    if len(idle) < 2 or rank < 3:
        raise Unsupported("its windows extend over more axes than there are in space")
    axes = x.axes
    if not set(axes[:2]) <= set(idle):
        first = (idle[0], idle[-1])
        axes = (*first, *(a for a in range(rank) if a not in first))
    spatial = axes[2:]
    if any(d != 1 for d in params["window_dilation"]):
        attributes["dilations"] = [params["window_dilation"][a] for a in spatial]
    name = call.writer.node(
        kind,
        [call.writer.whole(x, axes)],
        kernel_shape=[window[a] for a in spatial],
        strides=[strides[a] for a in spatial],
        pads=[padding[a][0] for a in spatial] + [padding[a][1] for a in spatial],
        **attributes,
    )
    return Value(shape=call.shape, axes=axes, name=name)
