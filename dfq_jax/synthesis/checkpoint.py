"""Unfinished synthesis on disk: one npz file, written to a temporary name and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfq_jax.graph import flatten_with_paths


class Checkpoint:
    """A file that belongs to one piece of work, told by `identity`."""

    def __init__(self, path: str | Path, identity: str):
        self.path = Path(path)
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        if self.path.is_dir():
            raise ValueError(f"checkpoint: {str(self.path)!r} is a folder; give the name of a file.")
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {str(self.path.parent)!r}.")

    def save(self, work: dict[int, Any], **meta: Any) -> None:
        """Write `{batch: pytree of arrays}` and JSON-able facts."""
        arrays = {}
        for batch, tree in work.items():
            paths, leaves = flatten_with_paths(tree)
            arrays.update({f"{batch}:{p}": np.asarray(v) for p, v in zip(paths, leaves, strict=True)})
        header = json.dumps({"identity": self.identity, "batches": sorted(work), **meta})
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, header=np.array(header), **arrays)
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

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
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} cannot be read ({error}); delete it to start anew."
            ) from error
        if header.get("identity") != self.identity:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} belongs to other work (another key, config or network); delete it or "
                "give another name."
            )
        structure = template()
        paths, _ = flatten_with_paths(structure)
        treedef = jax.tree.structure(structure)
        work = {
            batch: jax.tree.unflatten(treedef, [jax.numpy.asarray(arrays[f"{batch}:{p}"]) for p in paths])
            for batch in header["batches"]
        }
        return work, header

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
