"""Compilation on CPU, where it costs as much as the work it is for, and where some of XLA's choices are slow.

Options of the compiler are named differently from one jaxlib to the next, hold for one platform, and JAX takes them for
the outermost function alone. So they are an offer here: where one of these forbids them, a function is compiled as by
`jax.jit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base.backend import platform_of
from dfq_jax.base.contexts import may_transfer

__all__ = ["NO_YNN", "RUN_ONCE", "cpu_jit"]

# For what runs once or a few times: half the time to compile, and code that is hardly slower.
RUN_ONCE = {"xla_backend_optimization_level": 0}
# For gradients of convolution kernels, which fusions of YNN make up to four times slower.
NO_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


def cpu_jit(fun: Callable[..., Any], options: Mapping[str, Any], **keywords: Any) -> Callable[..., Any]:
    """Compile a function as `jax.jit` does, with options of the compiler where it runs on a CPU.

    >>> double = cpu_jit(lambda x: 2 * x, RUN_ONCE)
    >>> float(double(jnp.float32(3))), float(jax.grad(double)(3.0))
    (6.0, 2.0)

    Args:
      fun: to compile.
      options: of XLA's compiler. They are left out on other platforms, within another traced function, and if the
        installed jaxlib does not know them.
      keywords: of `jax.jit`.

    Returns:
      The compiled function; it can be traced, and called from several threads at once.
    """
    plain, tuned = jax.jit(fun, **keywords), jax.jit(fun, compiler_options=dict(options), **keywords)

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        on_cpu = platform_of(args, kwargs) == "cpu"
        takes_options = on_cpu and not _is_traced(args, kwargs) and _is_known(tuple(sorted(options.items())))
        return (tuned if takes_options else plain)(*args, **kwargs)

    return call


def _is_traced(*trees: Any) -> bool:
    """Whether a function of these arguments would become part of another one."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees)):
        return True
    return isinstance(_constant(), jax.core.Tracer)  # within a trace constants are traced, too


@may_transfer
def _constant() -> jax.Array:
    return jax.device_put(np.zeros(()))


@functools.cache
def _is_known(options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the installed jaxlib takes these options."""
    try:
        jax.jit(jnp.zeros, static_argnums=(0, 1), compiler_options=dict(options)).lower((), np.float32).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
