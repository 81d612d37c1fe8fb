"""Steps of an optimizer, as part of compiled functions."""

from __future__ import annotations

import functools
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean_of_parts(
    loss: Callable[[Any, Any], tuple[Float[Array, ""], Any]], parameters: Any, parts: Any
) -> tuple[Float[Array, ""], Any]:
    """The mean of a loss over the parts of a batch, with its gradient, computed one part after the other.

    It takes the memory of one part, and on CPU less time than the whole batch: what a part computes stays in the cache.

    Args:
      loss: of the parameters and a part, and what else it shows, of floats.
      parameters: of floats; the gradient is to them alone.
      parts: with one more axis than a part, the first.

    Returns:
      The mean loss, and the mean of what else it shows, which has no gradient.

    >>> def loss(x, part):
    ...     return (x * part).sum(), part[0]
    >>> (value, seen), gradient = jax.value_and_grad(mean_of_parts, 1, has_aux=True)(loss, 2.0, jnp.eye(2))
    >>> float(value), float(seen), float(gradient)
    (2.0, 0.5, 1.0)
    """
    return _mean_and_gradient(loss, parameters, parts)[0]


def _mean_and_gradient(loss: Any, parameters: Any, parts: Any) -> tuple[tuple[jax.Array, Any], Any]:
    def one(part: Any) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(parameters, part)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    first = jax.tree.map(lambda a: a[0], parts)
    count = len(jax.tree.leaves(parts)[0])
    if count == 1:
        return one(first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda a: a / count, total)


def _backward(loss: Any, gradient: Any, cotangent: tuple[jax.Array, Any]) -> tuple[Any, None]:
    return jax.tree.map(lambda g: cotangent[0].astype(g.dtype) * g, gradient), None


mean_of_parts.defvjp(_mean_and_gradient, _backward)


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
