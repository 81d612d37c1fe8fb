"""The tree of a network's variables, and the leaves among them that the network reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.graph.tracing.views import Split, count, put_together, take_apart
from dfq_jax.quantizers import (
    QTensor,
    dequantized,
    flatten_with_paths,
    is_qtensor,
    is_quantized,
    quantization,
    with_quantization,
    without_quantization,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VariableTree:
    """How the variables of a network are put together; it holds none.

    Attributes:
      treedef: structure of the variables.
      variable_paths: of the leaves of the variables as they are.
      variable_shapes: their shapes and types.
      splits: how each of them is taken apart, None for one that is read whole.
      leaf_paths: of the leaves that the network reads: the variables' leaves, and in place of one that layers in a
        scan read slice by slice, its slices, as "params/blocks/Conv_0/kernel[2]".
      leaf_shapes: their shapes and types.
    """

    treedef: Any
    variable_paths: tuple[str, ...]
    variable_shapes: tuple[jax.ShapeDtypeStruct, ...]
    splits: tuple[Split | None, ...]
    leaf_paths: tuple[str, ...]
    leaf_shapes: tuple[jax.ShapeDtypeStruct, ...]

    def leaves(self, variables: Any) -> list[Any]:
        """The leaves that the network reads, in the graph's order, `QTensor` nodes kept whole.

        Raises:
          GraphError: the tree is not the one that was traced; the message names the first differing paths.
        """
        pairs = zip(self._variable_leaves(variables), self.splits, strict=True)
        return [item for leaf, split in pairs for item in take_apart(leaf, split)]

    def _variable_leaves(self, variables: Any) -> list[Any]:
        paths, leaves = flatten_with_paths(without_quantization(variables))
        if tuple(paths) != self.variable_paths:
            missing = [p for p in self.variable_paths if p not in set(paths)]
            extra = [p for p in paths if p not in set(self.variable_paths)]
            raise GraphError(
                f"variables do not match the traced network: missing {missing[:5]}, unexpected {extra[:5]}. "
                "Pass the tree given to trace(), or a quantized copy of it."
            )
        for path, leaf, expected in zip(paths, leaves, self.variable_shapes, strict=True):
            shape = getattr(leaf, "shape", None)
            if shape is not None and tuple(shape) != expected.shape:
                raise GraphError(
                    f"variables: {path!r} has shape {tuple(shape)}, the network was traced with {expected.shape}."
                )
        return leaves

    def replace(self, variables: Any, new: Mapping[str, Any]) -> Any:
        """`variables` with the leaves at the given paths replaced; the tree structure is kept.

        Raises:
          GraphError: there is no such leaf, or slices of one leaf of the variables are not quantized alike.
        """
        unknown = set(new) - set(self.leaf_paths)
        if unknown:
            raise GraphError(f"no leaf at {sorted(unknown)[:5]}; see Graph.leaf_paths.")
        leaves = []
        for leaf, split, paths in zip(self._variable_leaves(variables), self.splits, self._slices, strict=True):
            own = {path: new[path] for path in paths if path in new}
            if own and split is None:
                (leaf,) = own.values()
            elif own:
                parts = take_apart(leaf, split)
                if not any(map(is_qtensor, own.values())):
                    parts = list(map(dequantized, parts))  # a slice that nothing reads follows the others
                parts = [own.get(path, part) for path, part in zip(paths, parts, strict=True)]
                if len(kinds := sorted(set(map(_kind, parts)))) > 1:
                    raise GraphError(
                        f"{paths[0]!r} to {paths[-1]!r} are slices of one leaf, so they are quantized alike or not at "
                        f"all; found {', '.join(kinds)}."
                    )
                leaf = put_together(parts, split)
            leaves.append(leaf)
        tree = jax.tree.unflatten(self.treedef, leaves)
        return with_quantization(tree, quantization(variables)) if is_quantized(variables) else tree

    def leaves_by_path(self, variables: Any) -> dict[str, Any]:
        """`leaves` by their paths."""
        return dict(zip(self.leaf_paths, self.leaves(variables), strict=True))

    @functools.cached_property
    def shapes_by_path(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`leaf_shapes` by their paths."""
        return dict(zip(self.leaf_paths, self.leaf_shapes, strict=True))

    def leaf(self, variables: Any, path: str | None) -> Any:
        """One leaf by its path; None for None. Who reads several takes them from `leaves_by_path`."""
        return None if path is None else self.leaves_by_path(variables)[path]

    def together(self, path: str) -> tuple[str, ...]:
        """The paths of all slices of the variables' leaf that the leaf at `path` is a slice of; `path` alone if whole.

        They are stored as one, so they are quantized to the same bits, with a zero point or all without.
        """
        return self._together[path]

    @functools.cached_property
    def _slices(self) -> tuple[tuple[str, ...], ...]:
        """For each leaf of the variables, the paths of its slices."""
        rest = iter(self.leaf_paths)
        return tuple(tuple(next(rest) for _ in range(count(split))) for split in self.splits)

    @functools.cached_property
    def _together(self) -> dict[str, tuple[str, ...]]:
        return {path: paths for paths in self._slices for path in paths}


def _kind(leaf: Any) -> str:
    """What slices of one leaf have in common, in words."""
    if not isinstance(leaf, QTensor):
        return "float"
    zero = "with" if leaf.zero_point is not None else "without"
    return f"{leaf.bits}-bit {'signed' if leaf.signed else 'unsigned'} {zero} zero point"
