"""Where arrays live, for choices that the host makes before anything is traced.

What is traced never asks: it may be lowered for another platform (`dfq_jax.graph.convolutions.by_platform`).
"""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["platform_of"]


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
