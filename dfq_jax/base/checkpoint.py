"""Unfinished work on disk: one npz file, written to a temporary name and renamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dfq_jax.base.devices import fetched, from_writer, is_writer
from dfq_jax.base.files import replacing


class Checkpoint:
    """A file that belongs to one piece of work, told by `identity`.

    Of several processes that share a mesh one alone reads and writes it; all of them call the same methods.
    """

    def __init__(self, path: str | Path, identity: str, mesh: Mesh | None = None):
        self.path, self.mesh, self.is_writer = Path(path), mesh, is_writer(mesh)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        if not self.is_writer:
            return
        if self.path.is_dir():
            raise ValueError(f"checkpoint: {str(self.path)!r} is a folder; give the name of a file.")
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {str(self.path.parent)!r}.")
        if not os.access(self.path.parent, os.W_OK):
            raise ValueError(f"checkpoint: the folder {str(self.path.parent)!r} cannot be written to.")

    def save(self, work: dict[int, Any], **facts: Any) -> None:
        """Write `{batch: pytree of arrays}` and JSON-able facts."""
        arrays = {name: _to_numpy(leaf) for batch, tree in work.items() for name, leaf in _named_leaves(batch, tree)}
        if not self.is_writer:
            return
        header = json.dumps({"identity": self.identity, "batches": sorted(work), **facts})
        with replacing(self.path, _temporary(self.path)) as file:
            np.savez(file, header=np.array(header), **arrays)

    def load(self, template: Callable[[int, dict[str, Any]], Any]) -> tuple[dict[int, Any], dict[str, Any]] | None:
        """What was saved, each batch as a pytree like `template(batch, facts)`; None where there is no file.

        Raises:
          ValueError: the file is damaged, or belongs to other work.
        """
        found = self.path.read_bytes() if self.is_writer and self.path.exists() else None
        if (found := from_writer(found, self.mesh)) is None:
            return None
        try:
            with np.load(io.BytesIO(found), allow_pickle=False) as file:
                facts = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in file.files}
            identity = facts["identity"]
        except Exception as error:  # whatever a damaged or foreign file makes the readers raise
            raise self._unreadable(error) from error
        if identity != self.identity:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} belongs to other work (another key, config or network, or other "
                "images); delete it or give another name."
            )
        work = {}
        for batch in facts["batches"]:
            like = template(batch, facts)
            try:
                leaves = [_from_numpy(arrays[name], leaf) for name, leaf in _named_leaves(batch, like)]
            except (KeyError, TypeError, ValueError) as error:
                raise self._unreadable(error) from error
            work[batch] = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return work, facts

    def remove(self) -> None:
        """Remove the file."""
        if self.is_writer:
            remove_checkpoint(self.path)

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error).partition(".")[0]  # NumPy goes on with advice to unpickle
        name = str(self.path)
        return ValueError(f"checkpoint: {name!r} cannot be read ({reason}); delete it or give another name.")


def remove_checkpoint(path: str | Path) -> None:
    """Remove the file of a checkpoint and what a killed process may have left beside it."""
    Path(path).unlink(missing_ok=True)
    _temporary(Path(path)).unlink(missing_ok=True)


def fingerprint(*trees: Any) -> str:
    """A digest of all the bytes in trees of arrays.

    >>> fingerprint({"a": np.zeros(3)}) == fingerprint([np.zeros(3)]) != fingerprint([np.ones(3)])
    True
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        digest.update(fetched(leaf).tobytes())
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    # Always the same name: what a killed process left behind is overwritten or removed by the next one.
    return path.with_name(path.name + ".tmp")


def _named_leaves(batch: int, tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(f"{batch}:{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in flat]


def _to_numpy(leaf: jax.Array) -> np.ndarray:
    return fetched(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_numpy(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    if _is_key(like):
        return jax.random.wrap_key_data(array)
    return jnp.asarray(array.view(like.dtype))  # NumPy reads types that it does not know (bfloat16) as bytes


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
