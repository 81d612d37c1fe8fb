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
from dfq_jax.base.devices import by_image, fetched, mesh_of, sharded, threads_for
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
      variables: its variables, arrays. Those that lie on several devices have these share each piece.
      x: a batch `[N, ...]`; only its shape and type are read. Elsewhere than on a single CPU, N images are a piece, or
        so many more as several devices share evenly.
      static: its first arguments, hashable.

    Returns:
      `x -> outputs` for batches `[M, ...]` of any size, with outputs of NumPy. The last piece is filled up with copies
      of the last image.
    """
    mesh, threads = mesh_of(variables), threads_for(variables)
    if mesh is not None:
        size = -(-len(x) // mesh.size) * mesh.size
    elif platform_of(variables) == "cpu":
        size = min(len(x), max(1, min(_IMAGES, _VALUES // max(1, math.prod(x.shape[1:])))))
    else:
        size = len(x)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    variables = jax.device_put(variables)
    # Compiled and put on the device here, where the caller's settings hold: other threads have their own.
    shape = (size, *x.shape[1:])
    piece = jax.ShapeDtypeStruct(shape, dtype, sharding=None if mesh is None else by_image(mesh, shape))
    compiled = jax.jit(function, static_argnums=range(len(static))).lower(*static, variables, piece).compile()

    def on_device(piece: np.ndarray) -> jax.Array:
        lacking = size - len(piece)
        whole = np.concatenate([piece, np.repeat(piece[-1:], lacking, axis=0)]) if lacking else piece
        return jax.device_put(whole) if mesh is None else sharded(whole, mesh)

    def outputs(piece: jax.Array) -> Any:
        return fetched(compiled(variables, piece))

    def call(x: Any) -> Any:
        x = np.asarray(x, dtype)
        pieces = [on_device(x[i : i + size]) for i in range(0, len(x), size)]
        if len(pieces) == 1:
            return jax.tree.map(lambda leaf: leaf[: len(x)], outputs(pieces[0]))
        found = side_by_side(outputs, pieces, threads)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(x)], *found)

    return call
