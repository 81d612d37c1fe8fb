"""Steps of an optimizer, as part of compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class State(NamedTuple):
    """What is optimized, between two steps."""

    parameters: Any
    optimizer: Any
    step: Int[Array, ""]


def init_state(optimizer: optax.GradientTransformation, parameters: Any) -> State:
    """Parameters before the first step.

    >>> init_state(optax.sgd(0.1), jnp.ones(2)).parameters.tolist()
    [1.0, 1.0]
    """
    return State(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))


def descend(
    optimizer: optax.GradientTransformation, loss: Callable[[Any], tuple[Float[Array, ""], Any]], state: State
) -> tuple[State, Any]:
    """One step down the gradient.

    Args:
      optimizer: those that watch the loss, as some schedules do, are given it.
      loss: of the parameters, and what else it shows.
      state: before the step.

    Returns:
      The state after it, and what else the loss showed.

    >>> state, seen = descend(optax.sgd(0.5), lambda x: (x**2, x), init_state(optax.sgd(0.5), jnp.float32(3)))
    >>> float(state.parameters), float(seen)
    (0.0, 3.0)
    """
    (value, seen), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    # optax multiplies counts of steps by fractions: types are promoted as usual here, also under
    # `jax_numpy_dtype_promotion="strict"`.
    with jax.numpy_dtype_promotion("standard"):
        update = optax.with_extra_args_support(optimizer).update
        updates, optimizer_state = update(gradient, state.optimizer, state.parameters, value=value)
        return State(optax.apply_updates(state.parameters, updates), optimizer_state, state.step + 1), seen


def repeat(step: Callable[[State], tuple[State, Any]], state: State, steps: int | Int[Array, ""]) -> tuple[State, Any]:
    """So many times `state -> (state, result)`, and the last result; zeros where it is not called at all.

    A traced number of steps makes one program for any number.

    >>> state, seen = repeat(lambda s: (s._replace(step=s.step + 1), s.step), init_state(optax.sgd(0.1), 0.0), 3)
    >>> int(state.step), int(seen)
    (3, 2)
    """
    if isinstance(steps, int) and steps == 1:
        return step(state)
    step = jax.jit(step)  # traced once, for the shapes of its result and for the loop
    nothing = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), jax.eval_shape(step, state)[1])
    return jax.lax.fori_loop(0, steps, lambda _, carry: step(carry[0]), (state, nothing))
