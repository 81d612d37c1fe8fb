"""Operations on every element alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax import lax

from dfq_jax.export.onnx.operations.table import Call, Unsupported, emits, emits_as
from dfq_jax.export.onnx.writer import Value, constant, onnx_dtype


@emits_as(
    {
        "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "add": "Add", "add_any": "Add", "asin": "Asin",
        "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh",
        "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor", "gt": "Greater",
        "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "log": "Log", "mul": "Mul", "neg": "Neg",
        "pow": "Pow", "logistic": "Sigmoid", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt",
        "sub": "Sub", "tan": "Tan", "tanh": "Tanh",
    }
)  # fmt: skip
def _elementwise(call: Call, kind: str) -> Value:
    return call.elementwise(kind)


@emits_as({"and": "And", "or": "Or", "xor": "Xor", "not": "Not"})
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
    return call.writer.cast(x, call.dtype)


@emits_as({"max": "Max", "min": "Min"})
def _bounded(call: Call, kind: str) -> Value:
    """Relu and Clip where one operand is a float number."""
    bound = next((v.scalar for v in call.inputs if v.scalar is not None), None)
    data = [v for v in call.inputs if not v.is_constant]
    if bound is None or len(data) != 1 or onnx_dtype(call.dtype) != np.float32:
        return call.elementwise(kind)
    if kind == "Max" and bound == 0:
        return call.elementwise("Relu", *data)
    return _clip(call, data[0], *((bound, None) if kind == "Max" else (None, bound)))


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
        which = call.writer.cast(which, np.bool_)
    if call.dtype == np.bool_:  # for which ONNX Runtime has no Where
        either = call.elementwise("And", which, cases[1])
        return call.elementwise("Or", either, call.elementwise("And", call.elementwise("Not", which), cases[0]))
    return call.elementwise("Where", which, cases[1], cases[0])
