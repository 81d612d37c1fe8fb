"""Where axes go: labels on the axes of a value, followed through operations that move elements."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from dfq_jax.graph.tracing.program import Op

Labels = tuple[tuple[Hashable, ...], ...]  # for each axis of a value, the labels in it, the slowest one first
LAYOUT = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze", "transpose"})


def one_label(rank: int, axis: int) -> Labels:
    """A label on a single axis."""
    return tuple(("label",) if i == axis else () for i in range(rank))


def move_labels(op: Op, labels: Labels, shape: Sequence[Any]) -> Labels:
    """The labels of the result of an operation in `LAYOUT`, from those of its operand of the given shape.

    An axis that is merged with others keeps its label in the merged axis; one that is split leaves it in each part.
    """
    params = op.params
    if op.name == "transpose":
        return tuple(labels[p] for p in params["permutation"])
    if op.name == "squeeze":
        return tuple(label for i, label in enumerate(labels) if i not in params["dimensions"])
    if op.name == "broadcast_in_dim":
        moved = dict(zip(params["broadcast_dimensions"], labels, strict=True))
        return tuple(moved.get(i, ()) for i in range(len(params["shape"])))
    if op.name == "reshape":
        return _reshape(labels, shape, params["new_sizes"])
    return labels


def _reshape(labels: Labels, old: Sequence[Any], new: Sequence[Any]) -> Labels:
    result: list[tuple[Hashable, ...]] = [()] * len(new)
    for group, parts in matching_axes(old, new):
        for part in parts:
            result[part] = tuple(label for i in group for label in labels[i])
    return tuple(result)


def matching_axes(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes of equal size before and after a reshape; axes of size 1 carry nothing."""
    old_axes = [i for i, size in enumerate(old) if size != 1]
    new_axes = [i for i, size in enumerate(new) if size != 1]
    groups = []
    while old_axes and new_axes:
        group, parts = [old_axes.pop(0)], [new_axes.pop(0)]
        while (left := math.prod(old[i] for i in group)) != (right := math.prod(new[i] for i in parts)):
            if left < right:
                group.append(old_axes.pop(0))
            else:
                parts.append(new_axes.pop(0))
        groups.append((group, parts))
    return groups


def follow_axis(op: Op, axis: int, shape: Sequence[Any]) -> int | None:
    """Where an axis of the operand of an operation in `LAYOUT` goes; the first of its parts if it is split.

    An axis of size 1 is followed through a reshape by its place between the others.
    """
    if op.name == "reshape" and shape[axis] == 1:
        return _follow_single(axis, shape, op.params["new_sizes"])
    moved = move_labels(op, one_label(len(shape), axis), shape)
    return next((i for i, label in enumerate(moved) if label), None)


def _follow_single(axis: int, old: Sequence[Any], new: Sequence[Any]) -> int | None:
    """Of the axes of size 1 at the same place, the one with the same number; else the axis that it is merged with."""
    place = math.prod(old[:axis])
    before = [i for i, size in enumerate(old) if size == 1 and math.prod(old[:i]) == place]
    there = [i for i in range(len(new)) if math.prod(new[:i]) == place]
    if not there:
        return len(new) - 1 if new else None
    single = [i for i in there if new[i] == 1]
    return single[min(before.index(axis), len(single) - 1)] if single else there[0]


def moved_elements(op: Op, array: np.ndarray) -> np.ndarray:
    """What an operation in `LAYOUT` makes of an array of NumPy, types left as they are: nothing is compiled."""
    params = op.params
    if op.name == "transpose":
        return array.transpose(params["permutation"])
    if op.name == "squeeze":
        return array.squeeze(tuple(params["dimensions"]))
    if op.name == "rev":
        return np.flip(array, params["dimensions"])
    if op.name == "reshape":
        return array.reshape(params["new_sizes"])
    if op.name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(array.reshape(shape), params["shape"])
    return array
