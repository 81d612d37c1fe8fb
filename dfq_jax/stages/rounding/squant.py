"""SQuant: rounding that needs nothing but the weights.

Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation" (arXiv 2202.07471). Inputs of
neighboring positions and channels have much in common, so what a layer's result suffers from most is the *sum* of the
rounding errors of a kernel (one input and output channel) and of an output channel. Moving a few codes by one, those
whose errors are largest, makes these sums vanish: no loop, no images.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from dfq_jax.base import may_transfer, move_near, namespace_of, on_host
from dfq_jax.graph import Graph, KernelForm
from dfq_jax.quantizers import QTensor
from dfq_jax.stages.rounding.codes import kernel_codes, quantized_kernels, with_codes


@may_transfer
def squant(graph: Graph, variables: Any, qvariables: Any) -> Any:
    """Put the codes of SQuant in place of the nearest ones.

    Pure and traceable: `jax.jit` with `graph` static.

    >>> rounded = dfq_jax.squant(graph, variables, qvariables)
    >>> rounded["dense1"]["kernel"].qvalue.shape
    (6, 4)

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: from `quantize_params`, rounded to nearest.

    Returns:
      `qvariables` with other codes; each differs from the nearest one by at most 1. Weights beyond a clipped range keep
      their codes; what their errors add to a sum is made up for by others as far as those allow. A kernel that layers
      read as different matrices (`x @ w` and `h @ w.T`) keeps its codes, too.

    Raises:
      ValueError: no kernel is quantized, or `variables` are not the float ones.
    """
    updates = {}
    for path, (form, leaf, kernel) in quantized_kernels(graph, variables, qvariables).items():
        # What is known is sorted on the host, faster than XLA compiles a program for each shape, or sorts on a CPU.
        known = on_host((kernel, leaf))
        if known is None:
            updates[path] = _compiled(form, kernel, leaf)
        else:
            updates[path] = move_near(_squant_kernel(form, *known), leaf)
    return graph.replace(qvariables, updates)


def _squant_kernel(form: KernelForm, kernel: QTensor, leaf: Float[Any, "..."]) -> QTensor:
    groups, outputs, *rest = form.sizes
    codes = squant_codes(*(a.reshape(groups * outputs, *rest) for a in kernel_codes(form, kernel, leaf)))
    return with_codes(form, kernel, codes.reshape(form.sizes))


_compiled = jax.jit(_squant_kernel, static_argnums=0)


def squant_codes(
    values: Float[Any, "o i k"],
    codes: Float[Any, "o i k"],
    low: Float[Any, "o i k"],
    high: Float[Any, "o i k"],
) -> Float[Any, "o i k"]:
    """Codes whose errors sum to at most 1/2 over each output channel, and to at most 1 over each kernel.

    The first step flips codes within each kernel, until its errors sum to at most 1/2. The second flips one code in
    some kernels, until the same holds for the channel. The bounds assume that no weight is clipped.

    Args:
      values: weights in units of their scale, for each output channel, input channel and place in the window.
      codes: the nearest codes, within the limits.
      low: least codes.
      high: greatest codes.

    Returns:
      The codes, of NumPy if what is given is.
    """
    xp = namespace_of(values)
    error = codes - values
    movable = xp.where(error > 0, codes > low, codes < high)
    if values.shape[-1] == 1:  # kernels of one element: channels only
        error, movable = error[..., 0], movable[..., 0]
        return codes + _moves(error, movable, error.sum(-1))[0][..., None]
    moves, candidate = _moves(error, movable, error.sum(-1))
    error = error + moves
    # In each kernel one code may still move, and its error ranks the kernel.
    pick = xp.sum(xp.where(candidate, error, np.float32(0)), axis=-1)
    again, _ = _moves(pick, candidate.any(-1), error.sum((-2, -1)))
    return codes + moves + xp.where(candidate, again[..., None], np.float32(0))


def _moves(
    error: Float[Any, "*rows n"], movable: Bool[Any, "*rows n"], total: Float[Any, "*rows"]
) -> tuple[Float[Any, "*rows n"], Bool[Any, "*rows n"]]:
    """Moves by one, against the errors of largest size, that bring `total` closest to zero; and what to move next.

    What to move next is the last one moved, back again, if the total went past zero; else the first one not moved.
    """
    xp = namespace_of(error)
    sign, size = xp.sign(total)[..., None], xp.abs(total)[..., None]
    eligible = movable & (xp.sign(error) == sign)
    order = xp.argsort(xp.where(eligible, -xp.abs(error), np.float32(np.inf)), axis=-1, stable=True)
    rank = xp.argsort(order, axis=-1).astype(error.dtype)
    count = xp.round(size)
    moved = eligible & (rank < count)
    return -sign * moved.astype(sign.dtype), eligible & (rank == count - (count > size).astype(count.dtype))
