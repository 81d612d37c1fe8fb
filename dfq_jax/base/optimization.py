"""One step of an optimizer."""

from __future__ import annotations

from typing import Any

import jax
import optax


def descend(
    optimizer: optax.GradientTransformation, gradient: Any, state: Any, parameters: Any, **extra: Any
) -> tuple[Any, Any]:
    """New parameters and the optimizer's new state.

    `extra` goes to optimizers that take more than gradients, as schedules that watch the loss do. optax multiplies
    counts of steps by fractions, so types are promoted as usual here, also under
    `jax_numpy_dtype_promotion="strict"`.
    """
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optax.with_extra_args_support(optimizer).update(gradient, state, parameters, **extra)
        return optax.apply_updates(parameters, updates), state
