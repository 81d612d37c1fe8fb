"""Leaves that a network reads slice by slice, as those of layers stacked for a scan.

Everything that works on a network works on its layers, each with a kernel, a bias and a BatchNorm of its own. So such a
leaf is taken apart where variables enter, and put together again where they leave: the tree is the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfq_jax.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Split:
    """How a leaf is taken apart: along one axis, and each slice further or not."""

    axis: int
    parts: tuple[Split | None, ...]


def count(split: Split | None) -> int:
    """The number of slices."""
    return 1 if split is None else sum(map(count, split.parts))


def indices(split: Split | None, rank: int) -> list[str]:
    """Where each slice is in a leaf of `rank` axes, as NumPy writes it: "[2]", "[:,0]", "" for the whole leaf."""

    def walk(split: Split | None, index: list[str], axes: list[int]) -> Iterator[str]:
        if split is None:
            last = max((i for i, word in enumerate(index) if word != ":"), default=-1)
            yield f"[{','.join(index[: last + 1])}]" if last >= 0 else ""
            return
        axis, rest = axes[split.axis], [*axes[: split.axis], *axes[split.axis + 1 :]]
        for i, part in enumerate(split.parts):
            yield from walk(part, [*index[:axis], str(i), *index[axis + 1 :]], rest)

    return list(walk(split, [":"] * rank, list(range(rank))))


def take_apart(leaf: Any, split: Split | None) -> list[Any]:
    """The slices of a leaf: an array, a `QTensor` (whose scales are those of the slices), or a shape."""
    if split is None:
        return [leaf]
    slices = _slices(leaf, split.axis)
    return [item for part, own in zip(slices, split.parts, strict=True) for item in take_apart(part, own)]


def put_together(slices: Iterator[Any], split: Split | None) -> Any:
    """The leaf of slices.

    Raises:
      ValueError: some slices are quantized and others are not, or otherwise.
    """
    if split is None:
        return next(slices)
    return _stack([put_together(slices, part) for part in split.parts], split.axis)


def _slices(leaf: Any, axis: int) -> list[Any]:
    if isinstance(leaf, QTensor):
        number = leaf.shape[axis]

        def field(array: Any) -> list[Any]:
            parts = [None] if array is None else _slices(array, axis)
            return parts * number if len(parts) == 1 else parts  # one scale for the whole stack

        fields = zip(field(leaf.qvalue), field(leaf.scale), field(leaf.zero_point), strict=True)
        return [dataclasses.replace(leaf, qvalue=q, scale=s, zero_point=z) for q, s, z in fields]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
        return [jax.ShapeDtypeStruct(shape, leaf.dtype)] * leaf.shape[axis]
    if isinstance(leaf, np.ndarray):
        return list(np.moveaxis(leaf, axis, 0))
    return list(_unstacked(leaf, axis))


@functools.partial(jax.jit, static_argnames="axis")
def _unstacked(array: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """All slices in one compiled call: one by one each index would be compiled by itself."""
    return tuple(lax.index_in_dim(array, i, axis, keepdims=False) for i in range(array.shape[axis]))


def _stack(slices: list[Any], axis: int) -> Any:
    first = slices[0]
    if any(isinstance(item, QTensor) for item in slices):
        return _stack_quantized(slices, axis)
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (*first.shape[:axis], len(slices), *first.shape[axis:])
        return jax.ShapeDtypeStruct(shape, first.dtype)
    if all(isinstance(item, np.ndarray) for item in slices):
        return np.stack(slices, axis)
    return jnp.stack(slices, axis)


def _stack_quantized(slices: list[Any], axis: int) -> QTensor:
    kinds = {
        (item.bits, item.signed, item.dtype, item.zero_point is None) if isinstance(item, QTensor) else None
        for item in slices
    }
    if len(kinds) > 1:
        raise ValueError(
            "slices of one leaf must be quantized alike (bits, signedness, zero point or none), found "
            f"{', '.join(sorted(map(repr, slices)))[:400]}."
        )

    def field(arrays: list[Any], shape: tuple[int, ...]) -> Any:
        if arrays[0] is None:
            return None
        return _stack([a if a.shape == shape else jnp.broadcast_to(a, shape) for a in arrays], axis)

    first = slices[0]
    scale_shape = np.broadcast_shapes(*(item.scale.shape for item in slices))
    return dataclasses.replace(
        first,
        qvalue=field([item.qvalue for item in slices], first.shape),
        scale=field([item.scale for item in slices], scale_shape),
        zero_point=field([item.zero_point for item in slices], scale_shape),
    )
