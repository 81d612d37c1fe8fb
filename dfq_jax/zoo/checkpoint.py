"""Loads trained weights of other programs into the variables of a Flax module, all of them or none.

Reading has two steps: a file becomes a flat dictionary of names and arrays, whatever its format; then a
layout, a table of rules, says for every name where in the variables it belongs and how its axes are turned.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dfq_jax.zoo.layouts import FLAX, LAYOUTS, TRANSFORMS, Layout, Rule
from dfq_jax.zoo.torch_reader import check_archive, read_member, read_torch

__all__ = ["flatten_names", "load_checkpoint", "read_arrays", "read_npz"]

_FORMATS = "safetensors, torch (.pth, .pt, .th), npz, Flax msgpack"
# Compressed images may be mostly background; 1032 is what deflate can reach at all.
_NPZ_EXPANSION = 200
_NPZ_FLOOR = 64 << 20


def load_checkpoint(
    path: str | os.PathLike[str], template: Mapping[str, Any], layout: Layout | str | None = None
) -> dict[str, Any]:
    """Loads a checkpoint into the structure of a module's variables; never a part of it.

    Args:
        path: a safetensors, torch (zip or legacy format), npz or Flax msgpack file, recognized by its
            content.
        template: the variables as nested dictionaries of `jax.ShapeDtypeStruct` (or arrays), for example
            ``jax.eval_shape(module.init, key, x)``.
        layout: how the file names its arrays: a `Layout`, the name of one of `LAYOUTS`, or None to recognize
            it.

    Returns:
        Nested dictionaries as in `template`, with numpy arrays of its shapes and dtypes.

    Raises:
        TypeError: if `template` is not made of nested dictionaries of shapes.
        ValueError: if the file cannot be read, its layout is unknown, or names are missing, unexpected or of
            another shape or kind than the template's; the message names them.
    """
    wanted = flatten_names(template, argument="template")
    for name, leaf in wanted.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"template: {name!r} is a {type(leaf).__name__}; expected a jax.ShapeDtypeStruct")
    arrays = read_arrays(path)
    layout = _find_layout(layout, arrays, wanted, path)

    sources: dict[str, str] = {}
    placed: dict[str, np.ndarray] = {}
    unexpected: list[str] = []
    misfits: list[str] = []
    for name, array in arrays.items():
        place = layout.place(name)
        if place is not None and place[1] is None:
            continue
        target = None if place is None else _existing(place[1], wanted)
        if target is None:
            unexpected.append(name)
            continue
        rule = place[0]
        if target in sources:
            misfits.append(f"{name}: goes to {target}, as does {sources[target]}")
            continue
        sources[target] = name
        fitted = _fit(array, rule, wanted[target])
        if isinstance(fitted, str):
            misfits.append(f"{name}: {fitted}")
        else:
            placed[target] = fitted
    missing = [name for name in wanted if name not in sources]
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("not fitting", misfits))
        if names
    ]
    if problems:
        raise ValueError(
            f"path: {os.fspath(path)!r}, read in the layout {layout.name!r}, does not fit the model; "
            "nothing was loaded.\n  " + "\n  ".join(problems) + "\nIs the checkpoint of this model?"
        )
    return _unflatten_like(template, placed)


def _find_layout(
    layout: Layout | str | None, arrays: Mapping[str, Any], wanted: Mapping[str, Any], path: Any
) -> Layout:
    if isinstance(layout, Layout):
        return layout
    known = ", ".join(known.name for known in LAYOUTS) + " (dfq_jax.zoo.LAYOUTS describes them)"
    if layout is not None:
        for candidate in LAYOUTS:
            if candidate.name == layout:
                return candidate
        raise ValueError(f"layout: unknown layout {layout!r}; known are: {known}")
    if any(name in wanted for name in arrays):
        return FLAX
    candidates = [candidate for candidate in LAYOUTS if candidate.matches(arrays)]
    if candidates:
        # Networks of one program may share the names that tell its layouts: the one that fits the model best.
        return max(candidates, key=lambda candidate: _count_placed(candidate, arrays, wanted))
    raise ValueError(
        f"path: {os.fspath(path)!r} is in no known layout; it starts with {_some(list(arrays)[:8])}. "
        f"Known are: {known}. Pass a dfq_jax.zoo.checkpoint.Layout for it"
    )


def _existing(target: str, wanted: Mapping[str, Any]) -> str | None:
    """The template's name for a target, None if it has none.

    Targets are written for Linen. The state of an NNX module has no collections: the mean of a BatchNorm stands beside
    its scale.
    """
    return next((name for name in (target, target.partition("/")[2]) if name in wanted), None)


def _count_placed(layout: Layout, arrays: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    places = [layout.place(name) for name in arrays]
    return sum(bool(place and place[1] and _existing(place[1], wanted)) for place in places)


def _fit(array: np.ndarray, rule: Rule, leaf: Any) -> np.ndarray | str:
    """The array turned and cast for a leaf of the template, or what is wrong with it."""
    rank, turn = TRANSFORMS[rule.transform]
    if rank not in (-1, array.ndim):
        return f"shape {array.shape}, expected {rank} axes for {rule.transform!r}"
    array = turn(array)
    if array.shape != tuple(leaf.shape):
        return f"shape {array.shape} (axes in Flax order), expected {tuple(leaf.shape)}"
    for kind in (jnp.floating, jnp.integer, jnp.bool_):
        # Rounding weights to another float type is fine; between kinds a cast would change what is meant.
        if jnp.issubdtype(leaf.dtype, kind):
            if not jnp.issubdtype(array.dtype, kind):
                return f"dtype {array.dtype}, expected {leaf.dtype}"
            return np.ascontiguousarray(array, leaf.dtype).reshape(array.shape)
    return f"the template's dtype {leaf.dtype} cannot be loaded"


def _some(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# Names


def flatten_names(tree: Mapping[Any, Any], *, argument: str = "tree") -> dict[str, Any]:
    """Flattens nested dictionaries to '/'-joined names: ``{"a": {0: x}}`` to ``{"a/0": x}``.

    Args:
        tree: nested dictionaries with string or integer keys.
        argument: what to call it in error messages.

    Returns:
        Name to leaf, in order.

    Raises:
        TypeError: if a key is neither string nor integer, or `tree` is no dictionary.
        ValueError: if two leaves get the same name, or there are none.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{argument}: expected nested dictionaries, found {type(tree).__name__}")
    result: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if not isinstance(node, Mapping):
            if prefix in result:
                raise ValueError(f"{argument}: two leaves have the name {prefix!r}")
            result[prefix] = node
            return
        for key, value in node.items():
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"{argument}: the key {key!r} is neither a string nor an integer")
            walk(value, f"{prefix}/{key}" if prefix else str(key))

    walk(tree, "")
    if not result:
        raise ValueError(f"{argument}: holds no arrays")
    return result


def _unflatten_like(template: Mapping[Any, Any], arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in template.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        result[key] = _unflatten_like(value, arrays, name) if isinstance(value, Mapping) else arrays[name]
    return result


# Files


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the named arrays of a file; the format is recognized by content, not by the file's name.

    Args:
        path: a safetensors, torch, npz or Flax msgpack file.

    Returns:
        Name to array; nested names of a msgpack file joined with '/'.

    Raises:
        ValueError: if there is no such file, it is in none of the formats, or is damaged.
    """
    shown = repr(os.fspath(path))
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"path: cannot read {shown}: {error.strerror or error}") from error
    if start.startswith(b"PK\x03\x04"):
        return read_torch(path) if _holds_pickle(path) else read_npz(path)
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path, shown)
    if start[:1] == b"\x80":
        return read_torch(path)
    if start and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return _read_msgpack(path, shown)
    what = "is empty" if not start else f"starts with {start!r}"
    raise ValueError(f"path: {shown} {what}, which is none of the formats read here: {_FORMATS}")


def _holds_pickle(path: Any) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except Exception as error:
        raise ValueError(f"path: the zip archive {os.fspath(path)!r} is damaged ({error})") from error


def _read_safetensors(path: Any, shown: str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {shown} is a damaged or unsupported safetensors file: {error}") from error


def _read_msgpack(path: Any, shown: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            tree = flax.serialization.msgpack_restore(file.read())
    except Exception as error:  # msgpack's own exceptions, and whatever Flax makes of wrong contents
        raise ValueError(f"path: {shown} is no Flax msgpack file or damaged: {error}") from error
    try:
        leaves = flatten_names(tree)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {shown} does not hold nested names: {error}") from error
    odd = [name for name, leaf in leaves.items() if not isinstance(leaf, (np.ndarray, np.generic))]
    if odd:
        raise ValueError(f"path: {shown} holds {odd[0]!r}, a {type(leaves[odd[0]]).__name__}, no array")
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file, without pickles, believing no declared size.

    `numpy.load` allocates what a member's header declares before it reads the data; here the header must
    agree with the size of the member.

    Args:
        path: the file.

    Returns:
        Name to array, read-only.

    Raises:
        ValueError: if there is no such file, it is no npz file, is damaged, or holds Python objects.
    """
    shown = repr(os.fspath(path))
    try:
        size = os.stat(path).st_size
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, size, floor=_NPZ_FLOOR, expansion=_NPZ_EXPANSION)
            names = archive.namelist()
            return {name.removesuffix(".npy"): _parse_npy(name, read_member(archive, name)) for name in names}
    except zipfile.BadZipFile as error:
        raise ValueError(f"path: {shown} is no npz file or truncated ({error})") from error
    except OSError as error:
        raise ValueError(f"path: cannot read {shown}: {error.strerror or error}") from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"path: {shown} cannot be read as npz: {error}") from error


def _parse_npy(name: str, raw: bytes) -> np.ndarray:
    stream = io.BytesIO(raw)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except KeyError as error:
        raise ValueError(f"member {name!r} is in npy format {error}, which is not read here") from error
    except Exception as error:  # the header is a Python literal; anything may be wrong with it
        raise ValueError(f"member {name!r} is no npy array: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"member {name!r} holds Python objects, stored as a pickle: refused")
    start = stream.tell()
    count = 1
    for extent in shape:
        count *= extent
    if any(extent < 0 for extent in shape) or count * dtype.itemsize != len(raw) - start:
        raise ValueError(f"member {name!r} declares {dtype} {shape} but has {len(raw) - start} bytes")
    return np.frombuffer(raw, dtype, count, start).reshape(shape, order="F" if fortran else "C")
