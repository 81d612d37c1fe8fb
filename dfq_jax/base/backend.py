"""Where arrays live, for choices that the host makes before anything is traced.

What is traced never asks: it may be lowered for another platform (`dfq_jax.graph.convolutions.by_platform`).
"""

from __future__ import annotations

import os
from typing import Any

import jax

__all__ = ["memory_size", "platform_of", "usable_cores"]


def platform_of(*trees: Any) -> str:
    """The platform that computations on these arrays run on: "cpu", "gpu" or "tpu".

    Args:
      trees: of arrays. Those of NumPy, and none at all, mean JAX's default device.
    """
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            return next(iter(leaf.devices())).platform
    device = jax.config.jax_default_device  # a device, the name of a platform, or None
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_size() -> int | None:
    """The host's memory in bytes; None where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no such function, others no such names
        return None
