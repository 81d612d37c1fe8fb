"""Leaves that a network reads slice by slice, as those of layers stacked for a scan.

Everything that works on a network works on its layers, each with a kernel, a bias and a BatchNorm of its own. So such a
leaf is taken apart where variables enter, and put together again where they leave: the tree is the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfq_jax.quantizers import QTensor


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
    """The slices of a leaf: of an array, a `QTensor` (whose scales are those of the slices), or a shape."""
    if split is None:
        return [leaf]
    slices = _slices(leaf, split.axis)
    return [item for part, own in zip(slices, split.parts, strict=True) for item in take_apart(part, own)]


def put_together(slices: Iterable[Any], split: Split | None) -> Any:
    """The leaf, from its slices, which are quantized alike or not at all."""
    slices = iter(slices)
    return next(slices) if split is None else _stack([put_together(slices, p) for p in split.parts], split.axis)


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
    if isinstance(leaf, jax.core.Tracer):
        return [lax.index_in_dim(leaf, i, axis, keepdims=False) for i in range(leaf.shape[axis])]
    if isinstance(leaf, jax.Array):
        return [_slice(leaf, jax.device_put(np.int32(i)), axis) for i in range(leaf.shape[axis])]
    return list(np.moveaxis(leaf, axis, 0))


@functools.partial(jax.jit, static_argnames="axis")
def _slice(array: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """The index is an argument: for all slices of a leaf this compiles once."""
    return lax.dynamic_index_in_dim(array, index, axis, keepdims=False)


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
    """Of the same bits, signedness and type, with zero points or all without."""

    def field(arrays: list[Any], shape: tuple[Any, ...]) -> Any:
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
