"""Learning rates over steps."""

from __future__ import annotations

import optax


def of_steps(schedule: optax.Schedule) -> optax.Schedule:
    """An optax schedule that is read at the step as float32: optax multiplies counts by fractions, which
    `jax_numpy_dtype_promotion="strict"` refuses for integers."""
    return lambda count: schedule(count.astype("float32"))


def cosine_decay(rate: float, steps: int) -> optax.Schedule:
    """From `rate` to zero in half a cosine over `steps` steps."""
    return of_steps(optax.cosine_decay_schedule(rate, steps))
