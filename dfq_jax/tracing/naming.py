"""Names for leaves of the variables and for what is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def path_string(path: Sequence[Any]) -> str:
    """A key path as 'params/conv1/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def inner_paths(paths: Sequence[str]) -> list[str]:
    """The paths without what says nothing about where in the network a leaf is.

    That is the collection in Linen's variables ("params", "batch_stats" and others beside "params"), and the "value"
    that ends paths of NNX states.
    """
    in_collections = any(path.startswith("params/") for path in paths)
    inner = []
    for path in paths:
        path = path.removesuffix("/value")
        inner.append(path.partition("/")[2] or path if in_collections else path)
    return inner


def unique_names(inner: Sequence[str]) -> list[str]:
    """A name for each use of a leaf: that of its module, 'layer1/conv/kernel' -> 'layer1/conv'.

    Leaves of the same module are told apart by their own names; a leaf used again gets a number: 'conv#2'.
    """
    modules = {path: path.rpartition("/")[0] or path for path in inner}
    crowded = Counter(modules.values())
    uses: Counter[str] = Counter()
    names = []
    for path in inner:
        name = modules[path] if crowded[modules[path]] == 1 else path
        uses[name] += 1
        names.append(name if uses[name] == 1 else f"{name}#{uses[name]}")
    return names
