"""Loads trained weights of other programs into the variables of a Flax module, all of them or none.

Reading has two steps: a file becomes a flat table of names and arrays, whatever its format; then a layout, a table of
rules, says for every name where in the variables it belongs and how its axes are turned.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dfq_jax.graph import linen_shapes
from dfq_jax.zoo import hub
from dfq_jax.zoo.arrays import Readers, open_arrays
from dfq_jax.zoo.entry import ZooEntry
from dfq_jax.zoo.layouts import FLAX, LAYOUTS, TRANSFORMS, Layout, Rule
from dfq_jax.zoo.names import flax_names
from dfq_jax.zoo.registry import find_model

__all__ = ["flatten_names", "load_checkpoint"]


Model = Mapping[str, Any] | str | ZooEntry | nn.Module | nnx.Module


def load_checkpoint(
    path: str | os.PathLike[str],
    model: Model,
    layout: Layout | str | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint into the structure of a model's variables; never a part of it.

    Arrays are read one at a time: a file takes little more memory than the result. Of the state of a training run
    what belongs to training alone (``step``, ``opt_state``, ...) is left out. Nothing in a file is executed.

    Args:
      path: a safetensors, torch (zip or legacy format), npz or Flax msgpack file, recognized by its
        content; a directory of Orbax or of `flax.training.checkpoints`, the newest step of several; or
        ``hf:ORG/REPO[/FILE][@REVISION]``, a file of the Hugging Face hub.
      model: what the variables are of: a name of `list_models`, a `ZooEntry`, a Linen module (with
        `input_shape`), an NNX module, or the variables themselves as nested dictionaries of
        `jax.ShapeDtypeStruct` (or arrays), for example ``jax.eval_shape(module.init, key, x)``.
      layout: how the file names its arrays: a `Layout`, the name of one of `LAYOUTS`, or None to recognize
        it.
      input_shape: shape ``(N, H, W, C)`` of a Linen module's input.
      variables: what the file lacks, as nested dictionaries of arrays: ``{"batch_stats": ...}`` for a file of
        parameters alone.

    Returns:
      The variables as nested dictionaries of numpy arrays, in the model's shapes and dtypes: the collections
      of a Linen module, or the state of an NNX module without its random streams as a pure dictionary, as
      `dfq_jax.quantize` and `as_function` take them. The module itself is left as it is.

    Raises:
      TypeError: if `model` is none of the above.
      ValueError: if the file cannot be read or downloaded, its layout is unknown, or names are missing,
        unexpected or of another shape or kind than the model's; the message names them.
      ImportError: for ``hf:`` without huggingface_hub, and for a directory of Orbax without orbax-checkpoint.
    """
    template = _template(model, input_shape)
    wanted = flatten_names(template, argument="model")
    for name, leaf in wanted.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"model: {name!r} is a {type(leaf).__name__}; expected a jax.ShapeDtypeStruct")
    with open_arrays(hub.local_file(path)) as readers:
        if layout in (None, FLAX.name, FLAX):
            readers = flax_names(readers, wanted)
        layout = _find_layout(layout, readers, wanted, path)
        placed, problems = _place(readers, layout, wanted, {} if variables is None else _given(variables, wanted))
    if problems:
        hint = _lacking(wanted, placed) or "Is the checkpoint of this model?"
        raise ValueError(
            f"path: {os.fspath(path)!r}, read in the layout {layout.name!r}, does not fit the model; "
            "nothing was loaded.\n  " + "\n  ".join([*problems, ""]).rstrip(" ") + hint
        )
    return _unflatten_like(template, placed)


def _template(model: Any, input_shape: Sequence[int] | None) -> Mapping[str, Any]:
    """The model's variables as shapes."""
    if isinstance(model, nn.Module):
        if input_shape is None:
            raise ValueError("input_shape: a Linen module's variables depend on it; give (1, H, W, C)")
        return linen_shapes(model, jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32))
    if input_shape is not None:
        raise ValueError("input_shape: only a Linen module needs it; the variables of other models are known")
    if isinstance(model, str):
        model = find_model(model)
    if isinstance(model, ZooEntry):
        return model.template()
    if isinstance(model, nnx.Module):
        return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    if not isinstance(model, Mapping):
        raise TypeError(
            "model: expected a name of the zoo, an entry of it, a Linen or NNX module, or nested dictionaries of "
            f"shapes, found {type(model).__name__}"
        )
    return model


def _given(variables: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays that are given beside the file, by their names in the model."""
    found = {}
    for name, leaf in flatten_names(variables, argument="variables").items():
        target = _existing(name, wanted)
        if target is None:
            raise ValueError(f"variables: the model has no {name!r}; it has {_some(list(wanted), 8)}")
        fitted = _fit(np.asarray(leaf), FLAX.rules[0], wanted[target])
        if isinstance(fitted, str):
            raise ValueError(f"variables: {name!r}: {fitted}")
        found[target] = fitted
    return found


def _lacking(wanted: Mapping[str, Any], placed: Mapping[str, Any]) -> str | None:
    """What to say where the file lacks a whole collection, or all statistics, and nothing else."""
    missing = [name for name in wanted if name not in placed]
    if not placed or not missing:
        return None
    collections = {name.partition("/")[0] for name in missing}
    if collections & {name.partition("/")[0] for name in placed}:
        if any(name.rpartition("/")[2] not in ("mean", "var") for name in missing):
            return None
        what, where = "statistics of BatchNorms", "the module's nested names"
    else:
        what, where = " and ".join(map(repr, sorted(collections))), f"{{{min(collections)!r}: ...}}"
    return f"The file holds no {what}, which the model needs: give them as well, variables={where}."


def _place(
    readers: Readers, layout: Layout, wanted: Mapping[str, Any], given: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays by their names in the model, and all that is wrong with them; `given` where the file has none."""
    sources: dict[str, str] = {}
    placed: dict[str, np.ndarray] = {}
    unexpected: list[str] = []
    misfits: list[str] = []
    copies: dict[str, tuple[int, ...]] = {}
    for name, read in readers.items():
        rule, place = layout.place(name) or (FLAX.rules[0], "")
        if place is None:
            continue
        target = _existing(place, wanted)
        if target is None:
            unexpected.append(name)
            continue
        if target in sources:
            misfits.append(f"{name}: goes to {target}, as does {sources[target]}")
            continue
        sources[target] = name
        array = read()
        if layout is FLAX and array.ndim > len(shape := tuple(wanted[target].shape)) and array.shape[1:] == shape:
            copies[name] = array.shape
            if any(copy.tobytes() != array[0].tobytes() for copy in array[1:]):
                misfits.append(f"{name}: shape {array.shape}, and what lies along the first axis differs")
                continue
            array = array[0]
        fitted = _fit(array, rule, wanted[target])
        if isinstance(fitted, str):
            misfits.append(f"{name}: {fitted}")
        else:
            placed[target] = fitted
    misfits += _check_copies(copies, len(sources), quiet=bool(misfits))
    placed = {**given, **placed}
    missing = [name for name in wanted if name not in sources and name not in given]
    kinds = (("missing", missing), ("unexpected", unexpected), ("not fitting", misfits))
    return placed, [f"{title}: {_some(names)}" for title, names in kinds if names]


def _check_copies(copies: Mapping[str, tuple[int, ...]], count: int, *, quiet: bool) -> list[str]:
    """What is wrong with the shapes of arrays that have one axis too many, of so many arrays in all."""
    counts = {shape[0] for shape in copies.values()}
    if len(counts) > 1 or 0 < len(copies) < count:
        return [f"{name}: shape {shape} has an axis too many" for name, shape in copies.items()]
    if copies and not quiet:
        warnings.warn(
            f"path: every array has a leading axis of {min(counts)}, equal along it, as flax.jax_utils.replicate makes "
            "for as many devices; the first copy is taken.",
            stacklevel=4,
        )
    return []


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
        f"Known are: {known}. Pass a dfq_jax.zoo.Layout for it"
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


# --- names ---


def flatten_names(tree: Mapping[Any, Any], *, argument: str = "tree") -> dict[str, Any]:
    """Flattens nested dictionaries to '/'-joined names.

    >>> flatten_names({"a": {0: "x", "b": "y"}})
    {'a/0': 'x', 'a/b': 'y'}

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
