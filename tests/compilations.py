"""A count of what JAX compiles."""

from collections import Counter

import jax

_counting = []


class Compilations(Counter):
    """How often each function was compiled within the block.

    with Compilations() as compiled:
        jax.jit(f)(x)
    assert compiled["f"] == 1
    """

    def __enter__(self):
        _counting.append(self)
        return self

    def __exit__(self, *_):
        _counting[:] = [other for other in _counting if other is not self]


# Registered once and for all: jax 0.6 cannot take a listener back.
@jax.monitoring.register_event_duration_secs_listener
def _count(event, seconds, fun_name="?", **_):
    if event == "/jax/core/compile/backend_compile_duration":
        for count in _counting:
            count[fun_name.removeprefix("jit(").removesuffix(")")] += 1
