"""Compilation on CPU, where it costs as much as the work it is for, and where some of XLA's choices are slow.

What is known to be run later can be compiled ahead, on a core that is idle.

Options of the compiler are named differently from one jaxlib to the next, hold for one platform, and JAX takes them for
the outermost function alone. So they are an offer here: where one of these forbids them, a function is compiled as by
`jax.jit`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base.backend import platform_of, usable_cores
from dfq_jax.base.contexts import carried, may_transfer
from dfq_jax.base.devices import mesh_of

__all__ = ["NO_YNN", "RUN_ONCE", "Compiled", "compiles_ahead", "compiling_ahead", "cpu_jit"]

# For what runs once or a few times: half the time to compile, and code that is hardly slower.
RUN_ONCE = {"xla_backend_optimization_level": 0}
# For gradients of convolution kernels, which fusions of YNN make up to four times slower.
NO_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it `compile_ahead` has all cores but the caller's own; what it has not begun in the end, it never does."""
    if _pool.get() is not None or usable_cores() < 2:
        yield
        return
    pool = ThreadPoolExecutor(usable_cores() - 1)
    token = _pool.set(pool)
    try:
        yield
    finally:
        _pool.reset(token)
        pool.shutdown(wait=False, cancel_futures=True)


def compiles_ahead(*trees: Any) -> bool:
    """Whether `compile_ahead` does anything here, of such arguments."""
    return _pool.get() is not None and mesh_of(trees) is None


class Compiled:
    """A function compiled as `jax.jit` does, with options of the compiler where it runs on a CPU.

    It can be traced, and called from several threads at once. `cpu_jit` makes one.
    """

    def __init__(self, fun: Callable[..., Any], options: Mapping[str, Any], keywords: Mapping[str, Any]):
        functools.update_wrapper(self, fun)
        self._options = tuple(sorted(options.items()))
        self._plain = jax.jit(fun, **keywords)
        self._tuned = jax.jit(fun, compiler_options=dict(options), **keywords) if options else self._plain
        self._compiling: dict[Hashable, Future[None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if _is_traced(args, kwargs):
            return self._plain(*args, **kwargs)
        if self._compiling and (begun := self._compiling.get(_signature(args, kwargs))) is not None:
            wait([begun])  # its error is one of the call, too
        return self._for(args, kwargs)(*args, **kwargs)

    def compile_ahead(self, *args: Any, **kwargs: Any) -> None:
        """Compile the function for these arguments in another thread, while the caller does something else.

        A call with such arguments waits until that is done; in place of arrays shapes are enough here
        (`jax.ShapeDtypeStruct`). Nothing is run. Outside of `compiling_ahead` nothing is done, nor for several devices.
        """
        pool = _pool.get()
        if pool is None or not compiles_ahead(args, kwargs) or _is_traced(args, kwargs):
            return
        signature, settings, function = _signature(args, kwargs), carried(), self._for(args, kwargs)
        if signature in self._compiling:
            return

        def compile() -> None:
            with settings():
                function.lower(*args, **kwargs).compile()

        self._compiling[signature] = future = pool.submit(compile)
        future.add_done_callback(lambda _: self._compiling.pop(signature, None))

    def _for(self, args: Any, kwargs: Any) -> Any:
        takes_options = platform_of(args, kwargs) == "cpu" and _is_known(self._options)
        return self._tuned if takes_options else self._plain


def cpu_jit(fun: Callable[..., Any], options: Mapping[str, Any] | None = None, **keywords: Any) -> Compiled:
    """Compile a function as `jax.jit` does, with options of the compiler where it runs on a CPU.

    >>> double = cpu_jit(lambda x: 2 * x, RUN_ONCE)
    >>> with compiling_ahead():
    ...     double.compile_ahead(jnp.float32(3))
    >>> float(double(jnp.float32(3))), float(jax.grad(double)(3.0))
    (6.0, 2.0)

    Args:
      fun: to compile.
      options: of XLA's compiler. They are left out on other platforms, within another traced function, and if the
        installed jaxlib does not know them.
      keywords: of `jax.jit`.

    Returns:
      The compiled function.
    """
    return Compiled(fun, options or {}, keywords)


def _signature(args: Any, kwargs: Any) -> Hashable:
    """What tells programs apart: where it does not, a call waits for one that it has no use for."""
    leaves, structure = jax.tree.flatten((args, kwargs))

    def told(leaf: Any) -> Hashable:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return tuple(leaf.shape), str(leaf.dtype)
        return "number" if isinstance(leaf, int | float) else leaf

    return structure, *map(told, leaves)


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
