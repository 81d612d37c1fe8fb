"""JAX's guard of transfers between host and device (`jax_transfer_guard`), which is for the caller's own arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def may_transfer(function: Function) -> Function:
    """A job that runs on the host as well and moves its own constants and results, whatever the guard says."""

    @functools.wraps(function)
    def job(*args: Any, **kwargs: Any) -> Any:
        with jax.transfer_guard("allow"):
            return function(*args, **kwargs)

    return job  # type: ignore[return-value]
