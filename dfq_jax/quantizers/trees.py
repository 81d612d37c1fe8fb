"""Trees of variables, whose leaves are arrays and quantized tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dfq_jax.quantizers.qtensor import QTensor


def is_qtensor(node: Any) -> bool:
    """Whether a node of a tree is a `QTensor`."""
    return isinstance(node, QTensor)


def path_string(path: Sequence[Any]) -> str:
    """A key path as 'params/conv1/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any]]:
    """Paths and leaves of a tree, `QTensor` nodes kept whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return [path_string(path) for path, _ in flat], [leaf for _, leaf in flat]


def changed_codes(before: Any, after: Any) -> float:
    """Share of the quantized weights whose code differs between two trees of one structure."""
    pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_qtensor) for tree in (before, after)), strict=True)
    codes = jax.device_get([(a.qvalue, b.qvalue) for a, b in pairs if is_qtensor(a)])
    changed = sum(int(np.count_nonzero(a != b)) for a, b in codes)
    return changed / max(sum(a.size for a, _ in codes), 1)
