"""A count of what JAX compiles."""

from collections import Counter

import jax


class Compilations(Counter):
    """How often each function was compiled within the block.

    with Compilations() as compiled:
        jax.jit(f)(x)
    assert compiled["f"] == 1
    """

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._count)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._count)

    def _count(self, event, seconds, fun_name="?", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self[fun_name.removeprefix("jit(").removesuffix(")")] += 1
