"""From a Linen module, an NNX module or a plain function to one contract: `apply_fn(variables, x) -> outputs`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ApplyFn = Callable[[Any, jax.Array], Any]

# Keyword arguments by which modules of the field choose inference mode, with the value that chooses it.
INFERENCE_ARGUMENTS = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def as_function(model: Any, variables: Any = None) -> tuple[ApplyFn, Any]:
    """The pure inference function of a model, and its variables.

    Args:
      model: a `flax.linen.Module` (with `variables` as from `init`), a `flax.nnx.Module` (its own state is taken
        unless `variables`, a state or pure dict of the same module, is given), or a function
        `(variables, x) -> outputs`.
      variables: the variables; optional for NNX.

    Returns:
      `(apply_fn, variables)`. Inference mode is chosen by `train=False` and its like where the module's `__call__`
      has such an argument, and by `eval()` for NNX; the module that is passed keeps its mode. The state of NNX
      random number streams is no variable: it stays inside `apply_fn`.

    Raises:
      TypeError: the model is none of these, or variables are missing.
    """
    linen, nnx = _flax()
    if linen is not None and isinstance(model, linen.Module):
        if variables is None:
            raise TypeError("variables: a Linen module needs its variables, as from module.init or training.")
        return _linen_function(model), variables
    if nnx is not None and isinstance(model, nnx.Module):
        return _nnx_function(model, nnx, variables)
    if isinstance(model, type):
        raise TypeError(f"model: {model.__name__} is a class; pass an instance, e.g. {model.__name__}(...).")
    if not callable(model):
        raise TypeError(
            f"model: expected a Linen module, an NNX module or a function (variables, x), found {type(model).__name__}."
        )
    if variables is None:
        raise TypeError("variables: a function (variables, x) needs its variables.")
    return model, variables


def on_device(variables: Any) -> Any:
    """NumPy leaves as JAX arrays: transferred once, and in a type that JAX computes in."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)


def is_module(model: Any) -> bool:
    """Whether a model is a Linen or an NNX module."""
    return any(system is not None and isinstance(model, system.Module) for system in _flax())


def inference_arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """The keyword arguments that put `function` into inference mode, of those it has."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in INFERENCE_ARGUMENTS.items() if name in parameters}


def _inference_call(method: Callable[..., Any], x: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a module's `__call__`, by position where possible: remat and jit mark static ones by number."""
    bound = inspect.signature(method).bind(None, x, **inference_arguments(method))
    return bound.args[1:], bound.kwargs


def _flax() -> tuple[Any, Any]:
    """Flax's two module systems, or None: networks that are plain functions do not need them."""
    try:
        from flax import linen, nnx
    except ImportError:
        return None, None
    return linen, nnx


def _linen_function(module: Any) -> ApplyFn:
    def apply_fn(variables: Any, x: jax.Array) -> Any:
        args, kwargs = _inference_call(type(module).__call__, x)
        return module.apply(variables, *args, **kwargs)

    return apply_fn


def _nnx_function(module: Any, nnx: Any, variables: Any) -> tuple[ApplyFn, Any]:
    copy = nnx.clone(module)  # the caller's module keeps its mode
    copy.eval()
    graphdef, random, state = nnx.split(copy, nnx.RngState, ...)
    own = nnx.to_pure_dict(state)

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        args, kwargs = _inference_call(type(module).__call__, x)
        return nnx.merge(graphdef, random, variables)(*args, **kwargs)

    if variables is None:
        return apply_fn, own
    return apply_fn, _restrict(nnx.to_pure_dict(variables) if isinstance(variables, nnx.State) else variables, own)


def _restrict(tree: Any, like: Any) -> Any:
    """The part of nested dicts that another one has too: a full state has random streams besides variables."""
    if not (isinstance(tree, Mapping) and isinstance(like, Mapping)):
        return tree
    return {key: _restrict(value, like[key]) for key, value in tree.items() if key in like}
