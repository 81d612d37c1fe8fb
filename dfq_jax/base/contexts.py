"""Functions that run within one of JAX's contexts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def within(
    context: Callable[..., contextlib.AbstractContextManager[Any]], *settings: Any
) -> Callable[[Function], Function]:
    """A decorator: the function runs within `context(*settings)`, made anew for each call."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with context(*settings):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]

    return decorate


_x64: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # it has moved
# What a block may set for its own thread alone: what decides which programs are compiled, and which results are errors.
_OF_A_THREAD: dict[str, Callable[[Any], contextlib.AbstractContextManager[Any]]] = {
    "jax_debug_infs": jax.debug_infs,
    "jax_debug_nans": jax.debug_nans,
    "jax_default_device": jax.default_device,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_disable_jit": jax.disable_jit,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_enable_x64": _x64.enable_x64,
    "jax_threefry_partitionable": jax.threefry_partitionable,
}


def carried() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context for other threads, in which JAX's settings are those of this one here and now.

    >>> with jax.default_matmul_precision("high"):
    ...     context = carried()
    >>> with context():
    ...     jax.config.jax_default_matmul_precision
    'high'
    """
    settings = {name: getattr(jax.config, name) for name in _OF_A_THREAD}

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, value in settings.items():
                if getattr(jax.config, name) != value:  # programs are told apart by what a block sets, even to the same
                    stack.enter_context(_OF_A_THREAD[name](value))
            yield

    return context


# For a job that runs on the host as well and moves its own constants and results: the guard (`jax_transfer_guard`) is
# for the caller's own arrays.
may_transfer = within(jax.transfer_guard, "allow")
