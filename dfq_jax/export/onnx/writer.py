"""ONNX nodes and initializers, with transposition and broadcasting put off until an operation needs them.

JAX networks are channels-last, ONNX convolutions channels-first. Each value remembers which of the program's axes
each of its ONNX axes holds, so that a transposition is a change of that record: a chain of convolutions, activations
and sums stays channels-first and has Transpose nodes at its two ends alone. In the same way an axis along which a
value is merely repeated has size 1 until an operation wants it whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dfq_jax.export.onnx.batched import Batch, Shape

INPUT = "input"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Value:
    """A value of the program: a tensor of the ONNX graph or a constant.

    Attributes:
      shape: of the program's value.
      axes: the program's axis that each ONNX axis holds.
      narrow: the program's axes along which the tensor has size 1 in place of the size in `shape`.
      name: of the ONNX tensor; None for a constant.
      array: the constant, in the program's order of axes, size 1 along narrow ones.
    """

    shape: Shape
    axes: tuple[int, ...]
    narrow: frozenset[int] = frozenset()
    name: str | None = None
    array: np.ndarray | None = None

    @property
    def is_constant(self) -> bool:
        """Whether its number is known."""
        return self.array is not None

    @property
    def scalar(self) -> Any:
        """The number that a constant holds; None if it holds several or is not constant."""
        return self.array.reshape(-1)[0] if self.is_constant and self.array.size == 1 else None

    def is_thin(self, axis: int) -> bool:
        """Whether the ONNX tensor has size 1 along one of the program's axes."""
        return axis in self.narrow or self.shape[axis] == 1

    def moved(self, new_axis: dict[int, int], shape: Shape, **fields: Any) -> Value:
        """The value of another shape, whose axes hold the ONNX axes that these held; others are gone."""
        axes = tuple(new_axis[a] for a in self.axes if a in new_axis)
        narrow = frozenset(new_axis[a] for a in self.narrow if a in new_axis)
        return dataclasses.replace(self, **{"shape": shape, "axes": axes, "narrow": narrow, **fields})


def constant(array: Any, shape: Shape | None = None) -> Value:
    """A constant; `shape` where it stands for a larger value."""
    array = onnx_array(array)
    shape = array.shape if shape is None else shape
    narrow = frozenset(i for i, size in enumerate(shape) if array.shape[i] == 1 and size != 1)
    return Value(shape=shape, axes=tuple(range(len(shape))), narrow=narrow, array=array)


def plain(name: str, shape: Shape) -> Value:
    """An ONNX tensor whose axes are the program's."""
    return Value(shape=shape, axes=tuple(range(len(shape))), name=name)


def onnx_dtype(dtype: Any) -> np.dtype:
    """The type that a value has in ONNX: all floats are float32, in which runtimes have every operation."""
    return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def onnx_array(array: Any) -> np.ndarray:
    """An array of a type that ONNX has."""
    array = np.asarray(array)
    return array.astype(onnx_dtype(array.dtype), copy=False)


class Writer:
    """Collects the nodes and initializers of one ONNX graph. Equal nodes are written once."""

    def __init__(self, onnx: Any):
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: set[str] = {INPUT}
        self._written: dict[Any, tuple[str, ...]] = {}
        self.scope = ""

    # --- the graph ---

    def unique(self, wanted: str) -> str:
        """A name that no tensor has."""
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def node(self, kind: str, inputs: Sequence[str], *, name: str | None = None, **attributes: Any) -> str:
        """Add a node of one result and give the result's name."""
        return self.nodes_of(kind, inputs, 1, name=name, **attributes)[0]

    def nodes_of(
        self, kind: str, inputs: Sequence[str], results: int, *, name: str | None = None, **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node of several results."""
        key = (kind, tuple(inputs), results, repr(sorted(attributes.items())))
        if key not in self._written:
            wanted = name or "/".join(part for part in (self.scope, kind) if part)
            outputs = tuple(self.unique(wanted) for _ in range(results))
            self.nodes.append(
                self._onnx.helper.make_node(kind, list(inputs), list(outputs), name=outputs[0], **attributes)
            )
            self._written[key] = outputs
        return self._written[key]

    def initializer(self, array: Any, name: str | None = None) -> str:
        """The name of a constant tensor of the graph."""
        array = np.ascontiguousarray(onnx_array(array)).reshape(np.shape(array))  # the former makes scalars vectors
        return self.initializer_of(self._onnx.numpy_helper.from_array(array), name)

    def initializer_of(self, tensor: Any, name: str | None = None) -> str:
        """The name of a tensor in the file, written once."""
        key = tensor.SerializeToString(deterministic=True)
        if key not in self._written:
            tensor.name = self.unique(name or "constant")
            self.initializers.append(tensor)
            self._written[key] = (tensor.name,)
        return self._written[key][0]

    def four_bits(self, packed: np.ndarray, shape: Sequence[int], signed: bool, name: str) -> str:
        """A constant tensor of 4-bit integers, two in a byte."""
        types = self._onnx.TensorProto
        kind = types.INT4 if signed else types.UINT4
        tensor = self._onnx.helper.make_tensor("", kind, shape, packed.tobytes(), raw=True)
        return self.initializer_of(tensor, name)

    def element_type(self, dtype: Any) -> int:
        """The number by which ONNX knows a type."""
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(onnx_dtype(dtype)))

    def integers(self, numbers: Iterable[int | np.integer]) -> str:
        """An initializer of int64."""
        return self.initializer(np.array(list(numbers), np.int64))

    # --- values ---

    def arranged(self, value: Value, axes: Sequence[int] | None = None) -> str:
        """The ONNX tensor of a value with the program's axes in the given order, size 1 along narrow ones."""
        axes = tuple(range(len(value.shape))) if axes is None else tuple(axes)
        if value.is_constant:
            return self.initializer(value.array.transpose(axes))
        if axes == value.axes:
            return value.name
        return self.node("Transpose", [value.name], perm=[value.axes.index(a) for a in axes])

    def whole(self, value: Value, axes: Sequence[int] | None = None) -> str:
        """As `arranged`, with narrow axes repeated to their full size."""
        axes = tuple(range(len(value.shape))) if axes is None else tuple(axes)
        name = self.arranged(value, axes)
        return self.node("Expand", [name, self.shape([value.shape[a] for a in axes])]) if value.narrow else name

    def shape(self, shape: Sequence[Any]) -> str:
        """A shape as a tensor."""
        if not any(isinstance(size, Batch) for size in shape):
            return self.integers(shape)
        batch = self.node("Shape", [INPUT], start=0, end=1)
        parts = []
        for size in shape:
            if not isinstance(size, Batch):
                parts.append(self.integers([size]))
            else:
                parts.append(batch if size.times == 1 else self.node("Mul", [batch, self.integers([size.times])]))
        return self.node("Concat", parts, axis=0)

    def reshape(self, name: str, shape: Sequence[Any]) -> str:
        """A tensor in another shape."""
        if sum(isinstance(size, Batch) for size in shape) == 1:
            return self.node("Reshape", [name, self.integers(-1 if isinstance(s, Batch) else s for s in shape)])
        return self.node("Reshape", [name, self.shape(shape)])

    def elementwise(self, kind: str, operands: Sequence[Value], shape: Shape, **attributes: Any) -> Value:
        """A node that treats every element alike, in the axes of its largest operand."""
        leading = max(operands, key=lambda v: (not v.is_constant, len(v.shape), -sum(map(v.is_thin, v.axes))))
        axes = leading.axes if len(leading.shape) == len(shape) else tuple(range(len(shape)))
        names = [self.arranged(v, axes if len(v.shape) == len(shape) else None) for v in operands]
        ranked = [v for v in operands if len(v.shape) == len(shape)]
        narrow = [i for i, size in enumerate(shape) if size != 1 and all(v.is_thin(i) for v in ranked)]
        return Value(shape=shape, axes=axes, narrow=frozenset(narrow), name=self.node(kind, names, **attributes))

    def cast(self, value: Value, dtype: Any) -> Value:
        """A value in another type."""
        return self.elementwise("Cast", [value], value.shape, to=self.element_type(dtype))

    def is_ordered(self, value: Value) -> bool:
        """Whether the elements of the ONNX tensor lie in the program's order, whatever axes of size 1 do."""
        wide = [a for a in value.axes if not value.is_thin(a)]
        return wide == sorted(wide)
