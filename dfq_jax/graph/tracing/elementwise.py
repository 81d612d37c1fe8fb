"""What a piece of program computes for one element, found by running it on NumPy numbers.

Activations and BatchNorms are recognized by their values and not by how they are written, so all that is needed of
an operation is its value on a few numbers, and the certainty that it treats every element alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from dfq_jax.graph.tracing.program import CONTROL_FLOW, Op, sub_jaxprs

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.logical_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "div": np.divide,
    "eq": np.equal,
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.logical_or,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sign": np.sign,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}
# Operations that keep every element where it is.
CASTS = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient"})
# Operations on the elements of operands of one shape or of numbers, whatever that shape is.
POINTWISE = frozenset({*_FUNCTIONS, *CASTS, "integer_pow", "select_n"})
# Operations that only move elements, so that for a value that is one number per channel they change nothing.
_MOVES = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"})


class NotElementwise(Exception):
    """The operation does not act on each element alone, or is not known."""


def evaluate(name: str, params: Mapping[str, Any], args: Sequence[Any], *, channelwise: bool = False) -> Any:
    """The value of an operation on NumPy numbers.

    Args:
      name: of the primitive.
      params: of the equation.
      args: one for each operand: an array of sample points for a value of the program, a scalar for a constant.
      channelwise: the sample points stand for a whole channel each, so broadcasts and reshapes are the identity.

    Raises:
      NotElementwise: the operation mixes or moves elements, or is not known.
    """
    if name == "select_n":
        which, *cases = args
        if len(cases) != 2:
            raise NotElementwise(name)
        return np.where(which, cases[1], cases[0])
    if name in _FUNCTIONS:
        with np.errstate(all="ignore"):
            return _FUNCTIONS[name](*args)
    if name in CASTS or (name in _MOVES and (channelwise or np.ndim(args[0]) == 0)):
        return args[0]
    if name == "integer_pow":
        with np.errstate(all="ignore"):
            return np.power(args[0], float(params["y"]))
    bodies = list(sub_jaxprs(params))
    if name in CONTROL_FLOW or len(bodies) != 1:
        raise NotElementwise(name)
    return _evaluate_body(*bodies[0], args, channelwise)


def _evaluate_body(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], channelwise: bool) -> Any:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(scalar, consts), *args], strict=True))

    def read(atom: Any) -> Any:
        return scalar(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        if len(eqn.outvars) != 1:
            raise NotElementwise(eqn.primitive.name)
        operands = [read(atom) for atom in eqn.invars]
        env[eqn.outvars[0]] = evaluate(eqn.primitive.name, eqn.params, operands, channelwise=channelwise)
    if len(jaxpr.outvars) != 1:
        raise NotElementwise("several results")
    return read(jaxpr.outvars[0])


def scalar(value: Any) -> np.ndarray:
    """A constant of the program as one number.

    Raises:
      NotElementwise: it is an array of several, or a random key.
    """
    if np.size(value) != 1 or jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
        raise NotElementwise("a constant that is no single number")
    array = np.asarray(value).reshape(())
    return array if array.dtype == bool else array.astype(np.float64)


def is_elementwise(op: Op) -> bool:
    """Whether each element of the result depends on the same element of the operands only."""
    try:
        evaluate(op.name, op.params, [np.full(2, 0.5)] * len(op.inputs))
    except (NotElementwise, TypeError, ValueError):
        return False
    return True
