"""Where arrays live, for choices that the host makes before anything is traced.

What is traced never asks: it may be lowered for another platform (`dfq_jax.graph.convolutions.by_platform`).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["memory_size", "namespace_of", "on_host", "platform_of", "usable_cores"]


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


def namespace_of(*arrays: Any) -> Any:
    """`numpy` for arrays of NumPy, whose functions the host computes at once and never compiles; else `jax.numpy`.

    >>> namespace_of(np.ones(2)) is np, namespace_of(np.ones(2), jnp.ones(2)) is jnp
    (True, True)
    """
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def on_host(tree: Any) -> Any:
    """The tree with arrays of NumPy for leaves; None if a leaf is traced, or parts of it lie on several devices.

    >>> on_host({"w": jnp.ones(2)})
    {'w': array([1., 1.], dtype=float32)}

    >>> jax.make_jaxpr(lambda x: x if on_host(x) is None else 0)(1.0).jaxpr.eqns
    []
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_replicated):
            return None
    return jax.tree.map(np.asarray, tree)
