"""Linen modules, NNX modules, and wrappers that hold a Linen module and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dfq_jax.graph.adapters.arguments import inference_call

ApplyFn = Callable[[Any, jax.Array], Any]


def modules() -> tuple[Any, Any]:
    """Flax's two module systems, or None: networks that are plain functions do not need them."""
    try:
        from flax import linen, nnx
    except ImportError:
        return None, None
    return linen, nnx


def is_linen(model: Any) -> bool:
    """Whether it is a Linen module."""
    linen, _ = modules()
    return linen is not None and isinstance(model, linen.Module)


def is_nnx(model: Any) -> bool:
    """Whether it is an NNX module."""
    _, nnx = modules()
    return nnx is not None and isinstance(model, nnx.Module)


def is_wrapper(model: Any) -> bool:
    """Whether it holds a Linen module as `module` and its parameters as `params`, as Hugging Face's Flax classes do."""
    return is_linen(getattr(model, "module", None)) and isinstance(getattr(model, "params", None), Mapping)


def from_linen(module: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of a Linen module, bound to its variables or not."""
    if module.scope is not None:
        # What is bound would live as long as the function; it is what the function is given.
        module, bound = module.unbind()
        variables = bound if variables is None else variables
    if variables is None:
        raise TypeError("variables: a Linen module needs its variables, as from module.init or training.")
    linen_call(module)  # refuses what cannot be called
    return functools.partial(_apply_linen, module), variables


def _apply_linen(module: Any, variables: Any, x: jax.Array) -> Any:
    # A function of this module with the user's bound to it: it can be pickled wherever theirs can.
    args, kwargs = linen_call(module)(x)
    return module.apply(variables, *args, **kwargs)


def linen_call(module: Any) -> Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a Linen module's `__call__` for an input, in inference mode."""
    name = type(module).__name__
    return inference_call(
        _call_of(module, "lambda variables, x: model.apply(variables, x, method='...')"),
        1,
        f"{name}.__call__",
        "lambda variables, x: model.apply(variables, x{})",
    )


def linen_shapes(module: Any, x: jax.ShapeDtypeStruct, initialized: Any = None) -> Any:
    """Shapes of a Linen module's variables for an input; computes nothing.

    Args:
      module: the module, which says how it is called.
      x: shape and type of the input.
      initialized: a form of `module` to initialize in its place.

    Raises:
      TypeError: `__call__` has required arguments besides its input and switches of inference.
    """
    call = linen_call(module)
    model = module if initialized is None else initialized

    def init(key: jax.Array, x: jax.Array) -> Any:
        args, kwargs = call(x)
        return model.init(key, *args, **kwargs)

    return jax.eval_shape(init, jax.random.key(0), x)


def from_wrapper(model: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of an object that holds a Linen module and its parameters, with or without the collection's name."""
    params = model.params
    own = params if isinstance(params.get("params"), Mapping) else {"params": params}
    return from_linen(model.module, own if variables is None else variables)


def from_nnx(module: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of an NNX module: its own state unless variables are given.

    Only the module's definition, without arrays, and the state of its random streams stay in the function.
    """
    _, nnx = modules()
    call = inference_call(
        _call_of(module, "graphdef, variables = nnx.split(model); lambda v, x: nnx.merge(graphdef, v).METHOD(x)"),
        1,
        f"{type(module).__name__}.__call__",
        "graphdef, variables = nnx.split(model); lambda variables, x: nnx.merge(graphdef, variables)(x{})",
    )
    copy = nnx.clone(module)  # the caller's module keeps its mode
    copy.eval()
    graphdef, random, state = nnx.split(copy, nnx.RngState, ...)
    own = nnx.to_pure_dict(state)

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        args, kwargs = call(x)
        return nnx.merge(graphdef, random, variables)(*args, **kwargs)

    if variables is None:
        return apply_fn, own
    return apply_fn, _restrict(nnx.to_pure_dict(variables) if isinstance(variables, nnx.State) else variables, own)


def _call_of(module: Any, example: str) -> Callable[..., Any]:
    if not callable(module):
        name = type(module).__name__
        raise TypeError(f"model: {name} has no __call__; pass a function that calls its method: {example}.")
    return type(module).__call__


def _restrict(tree: Any, like: Any) -> Any:
    """The part of nested dicts that another one has too: a full state has random streams besides variables."""
    if not (isinstance(tree, Mapping) and isinstance(like, Mapping)):
        return tree
    return {key: _restrict(value, like[key]) for key, value in tree.items() if key in like}
