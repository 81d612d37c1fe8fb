"""A batch computed a few images at a time, as many pieces at once as a CPU has cores.

What lies between the layers of a few images stays in the cache, and memory for it is not asked of the system again at
each call. XLA runs the calls of one Python thread one after the other, those of several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dfq_jax.base.backend import platform_of
from dfq_jax.base.threads import side_by_side

__all__ = ["in_pieces"]

# Of a piece: four photographs, or more images that are smaller. It is no matter of how many cores there are: what is
# computed together decides how its sums round.
_VALUES, _IMAGES = 4 * 224 * 224 * 3, 16


def in_pieces(
    function: Callable[..., Any], variables: Any, x: Any, *, static: tuple[Any, ...] = ()
) -> Callable[[Any], Any]:
    """Compile a function for batches that it computes image by image.

    >>> double = in_pieces(lambda factor, x: factor * x, jnp.float32(2), np.ones((9, 3), np.float32))
    >>> double(np.ones((5, 3))).sum()
    np.float32(30.0)

    Args:
      function: `(*static, variables, x) -> outputs`, the batch in front in each; pure. The same function is compiled
        once for each piece's shape and for what is static, however often it is given.
      variables: its variables, arrays.
      x: a batch `[N, ...]`; only its shape and type are read. Elsewhere than on a CPU, N images are a piece.
      static: its first arguments, hashable.

    Returns:
      `x -> outputs` for batches `[M, ...]` of any size, with outputs of NumPy. The last piece is filled up with copies
      of the last image.
    """
    on_cpu = platform_of(variables) == "cpu"
    fit = max(1, min(_IMAGES, _VALUES // max(1, math.prod(x.shape[1:]))))
    size, dtype = min(fit, len(x)) if on_cpu else len(x), jax.dtypes.canonicalize_dtype(x.dtype)
    variables = jax.device_put(variables)
    # Compiled and put on the device here, where the caller's settings hold: other threads have their own.
    piece = jax.ShapeDtypeStruct((size, *x.shape[1:]), dtype)
    compiled = jax.jit(function, static_argnums=range(len(static))).lower(*static, variables, piece).compile()

    def on_device(piece: np.ndarray) -> jax.Array:
        lacking = size - len(piece)
        return jax.device_put(np.concatenate([piece, np.repeat(piece[-1:], lacking, axis=0)]) if lacking else piece)

    def outputs(piece: jax.Array) -> Any:
        return jax.tree.map(np.asarray, compiled(variables, piece))

    def call(x: Any) -> Any:
        x = np.asarray(x, dtype)
        pieces = [on_device(x[i : i + size]) for i in range(0, len(x), size)]
        if len(pieces) == 1:
            return jax.tree.map(lambda leaf: leaf[: len(x)], outputs(pieces[0]))
        found = side_by_side(outputs, pieces, None if on_cpu else 1)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(x)], *found)

    return call
