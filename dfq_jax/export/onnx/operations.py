"""The table of operations: what each primitive of JAX becomes in ONNX.

An emitter takes a `Call` and gives the result as a `Value` (a list of them for several results). Convolutions and
matrix products are in `products`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_jax.export.onnx.batched import Batch, Shape
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
    "Abs": ["abs"], "Acos": ["acos"], "Add": ["add", "add_any"], "And": ["and"], "Asin": ["asin"], "Atan": ["atan"],
    "Ceil": ["ceil"], "Cos": ["cos"], "Div": ["div"], "Equal": ["eq"], "Erf": ["erf"], "Exp": ["exp"],
    "Floor": ["floor"], "Greater": ["gt"], "GreaterOrEqual": ["ge"], "Less": ["lt"], "LessOrEqual": ["le"],
    "Log": ["log"], "Mul": ["mul"], "Neg": ["neg"], "Not": ["not"], "Or": ["or"], "Pow": ["pow"],
    "Sigmoid": ["logistic"], "Sign": ["sign"], "Sin": ["sin"], "Sqrt": ["sqrt"], "Sub": ["sub"], "Tan": ["tan"],
    "Tanh": ["tanh"], "Xor": ["xor"],
}  # fmt: skip
for _kind, _names in _ELEMENTWISE.items():
    emits(*_names)(lambda call, kind=_kind: call.elementwise(kind))


@emits("copy", "copy_p", "reduce_precision", "stop_gradient", "sharding_constraint")
def _identity(call: Call) -> Value:
    return call.inputs[0]


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
    if "EVEN" not in str(call.params["rounding_method"]):
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


@emits("concatenate")
def _concatenate(call: Call) -> Value:
    axes = next((x.axes for x in call.inputs if not x.is_constant), tuple(range(len(call.shape))))
    names = [call.writer.whole(x, axes) for x in call.inputs]
    name = call.writer.node("Concat", names, axis=axes.index(call.params["dimension"]))
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
    if any(interior for _, _, interior in config):
        raise Unsupported("it pads between elements")
    if not any(low or high for low, high, _ in config):
        return x
    pads = [config[a][0] for a in x.axes] + [config[a][1] for a in x.axes]
    inputs = [call.writer.whole(x, x.axes), call.writer.integers(pads), call.writer.arranged(padding)]
    return Value(shape=call.shape, axes=x.axes, name=call.writer.node("Pad", inputs, mode="constant"))


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
    """Elements of one axis by their numbers, as x[:, index] has it."""
    x, indices = call.inputs
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (None,)
    whole = all(size == call_size for size, call_size in zip(sizes, _static(x.shape, sizes), strict=True))
    if axis is None or numbers.collapsed_slice_dims != (axis,) or numbers.operand_batching_dims or not whole:
        raise Unsupported("it is no choice of elements along one axis")
    if not indices.is_constant:
        raise Unsupported("its indices depend on the input")
    chosen = indices.array.squeeze(-1).astype(np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= x.shape[axis]):
        raise Unsupported("its indices lie outside the array")
    held = call.writer.whole(x)
    name = call.writer.node("Gather", [held, call.writer.initializer(chosen)], axis=axis)
    inserted = [i for i in range(len(call.shape)) if i not in numbers.offset_dims]
    rest = list(numbers.offset_dims)
    return Value(shape=call.shape, axes=(*rest[:axis], *inserted, *rest[axis:]), name=name)


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


@emits("argmax", "argmin")
def _arg(call: Call) -> Value:
    raise Unsupported("class indices are no scores; let the network return the scores")


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
