"""Checkpoints that are directories: those of Orbax, and folders with one checkpoint for each step of a training run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfq_jax.zoo.names import Readers

__all__ = ["find_checkpoint", "open_orbax"]

# Each of these lies in a folder of arrays that Orbax wrote.
_MARKS = ("_METADATA", "manifest.ocdbt")
# `flax.training.checkpoints` and Orbax' manager name a step's folder or file 10, checkpoint_10, step_00010.
_STEP = re.compile(r"(?:[A-Za-z][\w-]*[_-])?(\d+)(?:\.\w+)?")
_READ = "Read are: what Orbax and flax.training.checkpoints write (the folder of one step, or of all), and single files"


def find_checkpoint(path: Path) -> Path | dict[str, Path]:
    """What to read of a directory.

    Returns:
      A file; or the folders of Orbax' arrays by the prefix that their names get, '' for a single one. Of several
      steps the newest complete one.

    Raises:
      ValueError: it is no checkpoint; the message says what it holds.
    """
    if _is_orbax(path):
        return {"": path}
    inner = sorted(child for child in path.iterdir() if child.is_dir())
    items = [child for child in inner if _is_orbax(child) and not _STEP.fullmatch(child.name)]
    if len(items) == 1:
        return {"": items[0]}
    if items:
        return {item.name: item for item in items}
    steps = {child: int(match[1]) for child in path.iterdir() if (match := _STEP.fullmatch(child.name))}
    for step in sorted(steps, key=steps.__getitem__, reverse=True):
        if step.is_file():
            return step
        if _holds_orbax(step):  # a step that was cut off while it was written holds no arrays
            return find_checkpoint(step)
    names = sorted(child.name for child in path.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ValueError(f"it is a directory and no checkpoint; {_advice(names)} (it holds {shown or 'nothing'}). {_READ}")


def _advice(names: list[str]) -> str:
    if "saved_model.pb" in names:
        return "it is a TensorFlow SavedModel, which holds no Flax weights: load the weights with TensorFlow"
    weights = [name for name in names if name.endswith((".safetensors", ".msgpack", ".npz", ".pth", ".pt", ".bin"))]
    return f"name the file: {weights[0]}" if weights else "was it written to the end?"


def _is_orbax(path: Path) -> bool:
    return path.is_dir() and any((path / mark).exists() for mark in _MARKS)


def _holds_orbax(path: Path) -> bool:
    return _is_orbax(path) or any(_is_orbax(child) for child in path.iterdir())


def open_orbax(folders: Mapping[str, Path]) -> Readers:
    """The arrays of folders that Orbax wrote, each read by itself, their names joined with '/'.

    Raises:
      ImportError: Orbax is not installed.
      ValueError: a folder is damaged.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("path: a directory of Orbax needs orbax-checkpoint: pip install 'dfq_jax[orbax]'") from error
    readers: Readers = {}
    for prefix, folder in folders.items():
        checkpointer = ocp.PyTreeCheckpointer()
        tree = _guarded(folder, checkpointer.metadata)
        tree = getattr(tree, "item_metadata", tree)
        tree = getattr(tree, "tree", tree)
        if not isinstance(tree, Mapping):
            raise ValueError(f"Orbax finds no tree of arrays in {os.fspath(folder)!r}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if getattr(leaf, "shape", None) is None:  # a string, say
                continue
            keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
            name = "/".join(str(key) for key in (*([prefix] if prefix else []), *keys))
            readers[name] = _reader(ocp, checkpointer, folder, tree, keys)
    if not readers:
        raise ValueError("it holds no arrays")
    return readers


def _reader(ocp: Any, checkpointer: Any, folder: Path, tree: Any, keys: list[Any]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        item = _only(tree, keys, ocp.PLACEHOLDER)
        # As NumPy, whatever devices the training ran on.
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        found = _guarded(folder, lambda at: checkpointer.restore(at, args=arguments))
        for key in keys:
            found = found[key]
        return np.asarray(found)

    return read


def _only(tree: Any, keys: list[Any], placeholder: Any) -> Any:
    """A tree to restore one leaf by: dicts of that leaf alone, lists whole, with placeholders for others."""
    if not keys:
        return 0
    key, *rest = keys
    if isinstance(tree, Mapping):
        return {key: _only(tree[key], rest, placeholder)}
    others = [jax.tree.map(lambda _: placeholder, value) for value in tree]
    return [_only(value, rest, placeholder) if i == key else others[i] for i, value in enumerate(tree)]


def _guarded(folder: Path, function: Callable[[Path], Any]) -> Any:
    """Orbax and TensorStore raise many kinds of errors for damaged files."""
    try:
        return function(folder.absolute())
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"Orbax cannot read {os.fspath(folder)!r}: {reason[:300]}") from error
