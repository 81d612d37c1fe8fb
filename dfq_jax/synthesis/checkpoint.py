"""Unfinished synthesis on disk: one npz file, written to a temporary name and renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import replacing
from dfq_jax.quantizers import flatten_with_paths


class Checkpoint:
    """A file that belongs to one piece of work, told by `identity`."""

    def __init__(self, path: str | Path, identity: str):
        self.path = Path(path)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        if self.path.is_dir():
            raise ValueError(f"checkpoint: {str(self.path)!r} is a folder; give the name of a file.")
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {str(self.path.parent)!r}.")
        if not os.access(self.path.parent, os.W_OK):
            raise ValueError(f"checkpoint: the folder {str(self.path.parent)!r} cannot be written to.")

    def save(self, work: dict[int, Any], **meta: Any) -> None:
        """Write `{batch: pytree of arrays}` and JSON-able facts."""
        arrays = {}
        for batch, tree in work.items():
            paths, leaves = flatten_with_paths(tree)
            arrays.update({f"{batch}:{p}": _to_numpy(v) for p, v in zip(paths, leaves, strict=True)})
        header = json.dumps({"identity": self.identity, "batches": sorted(work), **meta})
        with replacing(self.path, _temporary(self.path)) as file:
            np.savez(file, header=np.array(header), **arrays)

    def load(self, template: Callable[[], Any]) -> tuple[dict[int, Any], dict[str, Any]] | None:
        """What was saved, as pytrees like `template()`; None where there is no file.

        Raises:
          ValueError: the file is damaged, or belongs to other work.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in file.files}
            identity = header["identity"]
        except Exception as error:  # whatever a damaged or foreign file makes the readers raise
            raise self._unreadable(error) from error
        if identity != self.identity:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} belongs to other work (another key, config or network); delete it or "
                "give another name."
            )
        structure = template()
        paths, leaves = flatten_with_paths(structure)
        treedef = jax.tree.structure(structure)

        def restore(batch: int) -> Any:
            found = [arrays[f"{batch}:{path}"] for path in paths]
            return jax.tree.unflatten(treedef, list(map(_from_numpy, found, leaves)))

        try:
            return {batch: restore(batch) for batch in header["batches"]}, header
        except (KeyError, TypeError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"checkpoint: {str(self.path)!r} cannot be read ({error}); delete it to start anew.")

    def remove(self) -> None:
        """Remove the file."""
        remove_checkpoint(self.path)


def remove_checkpoint(path: str | Path) -> None:
    """Remove the file of a checkpoint and what a killed process may have left beside it."""
    Path(path).unlink(missing_ok=True)
    _temporary(Path(path)).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # Always the same name: what a killed process left behind is overwritten or removed by the next one.
    return path.with_name(path.name + ".tmp")


def _to_numpy(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_numpy(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    if _is_key(like):
        return jax.random.wrap_key_data(array)
    return jnp.asarray(array.view(like.dtype))  # NumPy reads types that it does not know (bfloat16) as bytes


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
