"""One use of a primitive, and the table of what writes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_jax.export.onnx.batched import Shape
from dfq_jax.export.onnx.writer import Value, Writer


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
        """Of the only result, or of the first."""
        return self.shapes[0]

    def elementwise(self, kind: str, *operands: Value, **attributes: Any) -> Value:
        """The result of an operator on every element of the given operands, or of all."""
        return self.writer.elementwise(kind, operands or self.inputs, self.shape, **attributes)

    def like(self, x: Value, name: str) -> Value:
        """The result as an ONNX tensor whose axes hold what those of an operand hold."""
        return Value(shape=self.shape, axes=x.axes, name=name)


Emitter = Callable[[Call], Any]
EMITTERS: dict[str, Emitter] = {}


def emits(*primitives: str) -> Callable[[Emitter], Emitter]:
    """Enter an emitter into the table."""

    def enter(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(primitives, emitter))
        return emitter

    return enter


def emits_as(kinds: Mapping[str, str]) -> Callable[[Callable[[Call, str], Any]], Callable[[Call, str], Any]]:
    """Enter an emitter for several primitives, with the ONNX operator of each as its second argument."""

    def enter(emitter: Callable[[Call, str], Any]) -> Callable[[Call, str], Any]:
        for primitive, kind in kinds.items():
            EMITTERS[primitive] = functools.partial(emitter, kind=kind)
        return emitter

    return enter
