"""Names for leaves of the variables and for what is made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from dfq_jax.graph.tracing.views import Split, indices

_INDEX = re.compile(r"(.*?)(\[[\d:,]+\])?", re.DOTALL)  # of a slice, see `slice_paths`


def slice_paths(paths: Sequence[str], splits: Sequence[Split | None], ranks: Sequence[int]) -> tuple[str, ...]:
    """The paths of slices of leaves, 'params/blocks/conv/kernel[2]'; leaves that are read whole keep theirs.

    Args:
      paths: of the leaves.
      splits: how each is taken apart.
      ranks: number of axes of each.
    """
    taken = set(paths)
    result: list[str] = []
    for path, split, rank in zip(paths, splits, ranks, strict=True):
        own = [path + index for index in indices(split, rank)]
        while split is not None and not taken.isdisjoint(own):  # another leaf is called like that
            path += "'"
            own = [path + index for index in indices(split, rank)]
        result += own
    return tuple(result)


def inner_paths(paths: Sequence[str]) -> list[str]:
    """The paths without what says nothing about where in the network a leaf is.

    That is the collection in Linen's variables ("params", "batch_stats" and others beside "params"), and the "value"
    that ends paths of NNX states.
    """
    in_collections = any(path.startswith("params/") for path in paths)
    inner = []
    for path in paths:
        path, index = _INDEX.fullmatch(path).groups("")
        path = path.removesuffix("/value")
        inner.append((path.partition("/")[2] or path if in_collections else path) + index)
    return inner


def unique_names(inner: Sequence[str]) -> list[str]:
    """A name for each use of a leaf: that of its module, 'layer1/conv/kernel[2]' -> 'layer1/conv[2]'.

    Leaves of the same module are told apart by their own names; a leaf used again gets a number: 'conv#2'.
    """
    modules = {}
    for path in inner:
        leaf, index = _INDEX.fullmatch(path).groups("")
        modules[path] = (leaf.rpartition("/")[0] or leaf) + index
    crowded = Counter(modules.values())
    uses: Counter[str] = Counter()
    names = []
    for path in inner:
        name = modules[path] if crowded[modules[path]] == 1 else path
        uses[name] += 1
        names.append(name if uses[name] == 1 else f"{name}#{uses[name]}")
    return names
