"""Functions that run within one of JAX's contexts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
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


# For a job that runs on the host as well and moves its own constants and results: the guard (`jax_transfer_guard`) is
# for the caller's own arrays.
may_transfer = within(jax.transfer_guard, "allow")
