"""From modules of Flax, Keras, Haiku or Equinox and functions to one contract: `apply_fn(variables, x) -> outputs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.adapters import flax_modules, other_modules
from dfq_jax.graph.adapters.arguments import INFERENCE_ARGUMENTS, inference_arguments
from dfq_jax.graph.adapters.flax_modules import ApplyFn, linen_shapes

__all__ = [
    "INFERENCE_ARGUMENTS",
    "ApplyFn",
    "as_function",
    "inference_arguments",
    "is_module",
    "linen_shapes",
    "on_device",
    "variable_shapes",
]

# What a model is recognized by, and what makes a function of it.
_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any], tuple[ApplyFn, Any]]], ...] = (
    (flax_modules.is_linen, flax_modules.from_linen),
    (flax_modules.is_nnx, flax_modules.from_nnx),
    (other_modules.is_keras, other_modules.from_keras),
    (other_modules.is_haiku, other_modules.from_haiku),
    (other_modules.is_equinox, other_modules.from_equinox),
    (flax_modules.is_wrapper, flax_modules.from_wrapper),
)


def as_function(model: Any, variables: Any = None) -> tuple[ApplyFn, Any]:
    """The pure inference function of a model, and its variables.

    >>> from flax import nnx
    >>> apply_fn, variables = as_function(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    >>> apply_fn(variables, images).shape
    (8, 3)

    Args:
      model: one of

        * a `flax.linen.Module`, with `variables` as from `init`, or bound to them;
        * a `flax.nnx.Module`: its own state is taken unless `variables`, a state or pure dict of the same module, is
          given;
        * a Hugging Face Flax model, or whatever else holds a Linen module as `module` and parameters as `params`;
        * a Keras 3 model on the JAX backend: its own variables are taken, as a dict by path;
        * what `haiku.transform` returned, with its parameters, or `haiku.transform_with_state`, with
          `(params, state)`;
        * an Equinox module written for one example, with its `equinox.nn.State` as `variables` if it has one;
        * a function `(variables, x) -> outputs`.
      variables: the variables, where the model does not hold them.

    Returns:
      `(apply_fn, variables)`. Inference mode is chosen by the arguments of `INFERENCE_ARGUMENTS` that the module's
      `__call__` has, such as `train=False`, and by `eval()` for NNX and `inference_mode` for Equinox; the module that
      is passed keeps its mode. The state of random number streams is no variable: it stays inside `apply_fn`. Weights
      do not, except those of a Keras model and what a function of your own closes over.

    Raises:
      TypeError: the model is none of these, variables are missing, or its `__call__` has further required arguments;
        the message says what to pass.
    """
    if isinstance(model, type):
        raise TypeError(f"model: {model.__name__} is a class; pass an instance, e.g. {model.__name__}(...).")
    for is_kind, convert in _KINDS:
        if is_kind(model):
            return convert(model, variables)
    if not callable(model):
        raise TypeError(
            f"model: expected a Linen module, an NNX module or a function (variables, x), found "
            f"{type(model).__name__}. dfq_jax.as_function says what else is known."
        )
    if variables is None:
        raise TypeError("variables: a function (variables, x) needs its variables.")
    return model, variables


def variable_shapes(model: Any, input_shape: Sequence[int]) -> Any:
    """Shapes of a model's variables where its kind tells them from an input's shape alone, else None.

    Linen modules and Haiku functions do; others hold their variables, or have none of their own.
    """
    x = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    if flax_modules.is_linen(model) and model.scope is None:
        return linen_shapes(model, x)
    if other_modules.is_haiku(model):
        return other_modules.haiku_shapes(model, x)
    return None


def on_device(variables: Any) -> Any:
    """NumPy leaves as JAX arrays: transferred once, and in a type that JAX computes in."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)


def is_module(model: Any) -> bool:
    """Whether `as_function` has to make a function of a model: it is a module, and not a function by itself."""
    return not isinstance(model, type) and any(is_kind(model) for is_kind, _ in _KINDS)
