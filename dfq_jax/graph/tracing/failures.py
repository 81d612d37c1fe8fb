"""What to say when a network cannot be traced: what was raised, where in its own code, and the likely cause."""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from typing import Any

import jax
import numpy as np

from dfq_jax.graph.adapters.arguments import explain_required, explain_switches
from dfq_jax.graph.tracing.program import ClosureError
from dfq_jax.graph.tracing.structure import GraphError

# Packages in whose code an error is raised, though it is made by the code that calls them.
_LIBRARIES = {
    "jax",
    "jaxlib",
    "flax",
    "haiku",
    "equinox",
    "keras",
    "optax",
    "numpy",
    "jaxtyping",
    "beartype",
    "dfq_jax",
}
_LIBRARIES |= sys.stdlib_module_names

_INFERENCE = (
    "Trace it in inference mode, by its own switch: lambda v, x: model.apply(v, x, train=False), or "
    "use_running_average=True, deterministic=True. "
)
_SHAPES = (
    "The sizes of the weights and of what reaches them do not fit: the input is not of a shape that the network takes "
    "(channels last or first, image size, rank), or the variables are another network's."
)
_BRANCH = (
    "The network's Python code needs the value of an array while it is traced: use jnp.where or jax.lax.cond for "
    "branches on values, and jax.numpy for numpy."
)
_STATE = "It updates its state while it runs, as BatchNorm in training mode does. "
_RANDOM = "It draws random numbers, as dropout in training mode does. "
_IMPURE = "An array of one call is kept and used in another: the function is not pure."
_VARIABLES = (
    "The variables lack what the network asks for: pass them whole, as module.init returned them "
    "({'params': ..., 'batch_stats': ...}), of this network."
)
_DTYPE = (
    "A type does not fit: the input is {dtype}; cast it in a function that you pass, "
    "lambda v, x: model(v, x.astype(...))."
)
# Likely causes: what the type's name and message match, and what to say. The first that matches holds.
_CAUSES = (
    (r"ModifyScopeVariable|mutable|TraceContextError", _STATE + _INFERENCE),
    (r"InvalidRng|RngStream|requires an? .*rng|non-?None.* (rng|PRNGKey)|an RNG", _RANDOM + _INFERENCE),
    (r"Tracer\w*ConversionError|ConcretizationTypeError|NonConcreteBoolean", _BRANCH),
    (r"UnexpectedTracerError|leaked", _IMPURE),
    (r"Scope\w*NotFound|ScopeCollection|nable to retrieve parameter|'params'|'batch_stats'", _VARIABLES),
    (r"Shape|shape|dimension|dims|divisible|broadcast|size|rank|ndim|unpack|too many indices", _SHAPES),
    (r"^(Type|Value)Error.*(dtype|integer|floating)", _DTYPE),
)
_MISSING = re.compile(r"missing (?:a|\d+) required (?:keyword-only |positional )?arguments?: (.*)")


def explain_trace_failure(error: Exception, spec: jax.ShapeDtypeStruct) -> str:
    """The message of the `GraphError` for an error that was raised while `apply_fn` was traced on `spec`."""
    if isinstance(error, (ClosureError, GraphError)):
        return str(error)
    text = f"{type(error).__name__}: {_first_line(error)}"
    cause = _cause(error, text).replace("{dtype}", str(spec.dtype))
    return f"apply_fn cannot be traced on an input of shape {spec.shape} {spec.dtype}: {text}{where(error)}. {cause}"


def where(error: BaseException) -> str:
    """Where in the user's own code an error was raised, as ' (at FILE:LINE, in NAME: CODE)'; '' if nowhere in it."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).split(".")[0] in _LIBRARIES:
            continue
        file = frame.f_code.co_filename
        source = linecache.getline(file, line, frame.f_globals).strip()
        found = f" (at {_short(file)}:{line}, in {frame.f_code.co_name}" + (f": {source})" if source else ")")
    return found


def check_outputs(outputs: Any) -> None:
    """Refuses outputs of `apply_fn` that are no pytree of arrays.

    Raises:
      GraphError: the message names the place and the type, and what to return.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            continue
        place = f" at {jax.tree_util.keystr(path)}" if path else ""
        kind = type(leaf).__name__
        raise GraphError(
            f"apply_fn returns a {kind}{place}, which is neither an array nor a pytree of arrays. Return an array, or "
            "a dict, tuple or NamedTuple of arrays (lambda v, x: model.apply(v, x).logits), or make the type one: "
            f"jax.tree_util.register_dataclass({kind}), or flax.struct.dataclass."
        )


def _cause(error: Exception, text: str) -> str:
    missing = _MISSING.search(text)
    if isinstance(error, TypeError) and missing:
        names = re.findall(r"'([^']+)'", missing[1])
        who = text.partition(": ")[2].partition(" missing")[0]
        return explain_required(who, names, "lambda variables, x: model.apply(variables, x{})")
    for pattern, cause in _CAUSES:
        if re.search(pattern, text):
            return cause + (explain_switches() if cause.endswith(_INFERENCE) else "")
    return "Does apply_fn(variables, x) run by itself on such an input?"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:400] if lines else ""


def _short(file: str) -> str:
    """A path from the current folder where the file is below it."""
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return file if relative.startswith("..") else relative
