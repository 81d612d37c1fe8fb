"""A quantized network in one file.

An artifact is a safetensors file (https://huggingface.co/docs/safetensors). Codes narrower than a byte are packed, and
all that is not a tensor is one JSON object under the key ``dfq_jax`` of the file's metadata::

    format, format_version   what wrote the file, and the layout of this object
    versions                 of the packages that wrote it
    tensors                  name -> dtype and shape; bits, if the tensor is packed codes
    nodes                    name -> type, fields and static fields of a QTensor or QuantizerParams
    header                   the caller's own: recipe, graph digest, model name, ...
    sha256                   of all of the above and of the tensors' contents

A leaf is named by its path in the user's tree, joined by "/" (in a key "~" becomes "~0" and "/" becomes "~1"), and the
arrays of a node are named like leaves below it; activation quantizers are named below "quantization". Loading runs no
code from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import package_version
from dfq_jax.export.container import ArtifactError, decode, encode, encode_codes, read, some, write
from dfq_jax.quantizers import (
    QUANTIZATION,
    QTensor,
    QuantizedVariables,
    QuantizerParams,
    bounds,
    is_quantized,
    with_collection,
)

_RESERVED = ("format", "format_version", "versions", "sha256")  # keys that `load` adds to the header
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors", "dfq_jax")
_NODES = {
    "QTensor": (QTensor, ("qvalue", "scale", "zero_point"), ("bits", "signed", "dtype")),
    "QuantizerParams": (QuantizerParams, ("scale", "zero_point"), ("bits", "signed")),
}


# --- names ---


def _is_node(x: Any) -> bool:
    return isinstance(x, QTensor | QuantizerParams)


def _name(path: tuple[Any, ...]) -> str:
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves and quantized nodes by name, and the tree structure above them."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)
    if isinstance(tree, QuantizedVariables):  # names are those of the tree in it
        flat = [(path if path[0].name == QUANTIZATION else path[1:], leaf) for path, leaf in flat]
    named = {_name(path): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("variables: found leaves whose paths read the same; give keys distinct names.")
    return named, treedef


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from names."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


# --- writing ---


def _jsonable(header: Any, argument: str) -> Any:
    """The header as it will be read back (tuples become lists, keys strings)."""
    if not isinstance(header, Mapping):
        raise TypeError(f"{argument}: expected a dict, found {type(header).__name__}.")
    try:
        return json.loads(json.dumps(dict(header), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{argument}: expected JSON (str, int, finite float, bool, None): {error}.") from None


def save(path: str | os.PathLike, variables: Any, *, header: Mapping[str, Any]) -> None:
    """Write a network's variables to one file, whole or not at all.

    An existing file is replaced only when the new one is complete on disk. The encoded file is held in memory
    meanwhile.

    Args:
      path: file to write, by convention ``*.safetensors``; its directory must exist.
      variables: pytree whose leaves are arrays, `QTensor` or `QuantizerParams`. Its collection "quantization", if any,
        must be nested dicts with str keys, since a float template cannot tell `restore` its structure.
      header: what else to record, JSON: recipe, model name, digests. `load` gives it back together with the keys
        "format", "format_version", "versions" and "sha256", which it must not have.

    Raises:
      TypeError: a leaf is not numeric, a PRNG key or a tracer, `header` is not JSON, or "quantization" has other nodes
        than dicts with str keys.
      ValueError: `header` has a reserved key, or names of leaves clash.
      OSError: the file cannot be written; nothing is left behind.
    """
    header = _jsonable(header, "header")
    if clash := [key for key in _RESERVED if key in header]:
        raise ValueError(f"header: found the reserved keys {clash}; rename them.")
    _check_quantization(variables)
    stored: dict[str, np.ndarray] = {}
    tensors: dict[str, Any] = {}
    nodes: dict[str, Any] = {}
    for name, leaf in _flatten(variables)[0].items():
        if not _is_node(leaf):
            stored[name], tensors[name] = encode(name, leaf)
            continue
        kind = type(leaf).__name__
        _, arrays, statics = _NODES[kind]
        fields = [field for field in arrays if getattr(leaf, field) is not None]
        nodes[name] = {"type": kind, "fields": fields, **{field: getattr(leaf, field) for field in statics}}
        for field in fields:
            key, value = f"{name}/{field}", getattr(leaf, field)
            codes = field == "qvalue"
            stored[key], tensors[key] = encode_codes(key, value, leaf.bits) if codes else encode(key, value)
    if "__metadata__" in stored:
        raise ValueError("variables: found a leaf named '__metadata__', which safetensors reserves.")
    versions = {package: package_version(package) for package in _PACKAGES}
    write(path, stored, {"versions": versions, "tensors": tensors, "nodes": nodes, "header": header})


def _check_quantization(variables: Any) -> None:
    collection = variables.get(QUANTIZATION) if isinstance(variables, Mapping) else None
    collection = variables.quantization if isinstance(variables, QuantizedVariables) else collection
    if collection is None:
        return
    for path, _ in jax.tree_util.tree_flatten_with_path(collection, is_leaf=_is_node)[0]:
        if not path or not all(isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str) for k in path):
            raise TypeError(
                f"variables['{QUANTIZATION}']: expected nested dicts with str keys, found a leaf at "
                f"{jax.tree_util.keystr(path) or 'its top'}; name its entries by strings."
            )


# --- reading ---


def _build_node(line: Mapping[str, Any], leaves: Mapping[str, Any]) -> QTensor | QuantizerParams:
    cls, arrays, statics = _NODES[line["type"]]
    if set(leaves) - {"zero_point"} != set(arrays) - {"zero_point"}:
        raise ValueError(f"a {line['type']} with fields {sorted(leaves)}")
    fields = {field: line[field] for field in statics}
    bounds(fields["bits"], fields["signed"])
    if "dtype" in fields:
        jnp.dtype(fields["dtype"])
    return cls(**{field: leaves.get(field) for field in arrays}, **fields)


def load(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and verify an artifact.

    Args:
      path: file written by `save`.

    Returns:
      ``(flat, header)``: leaves by name ("params/conv/kernel"), each an array, `QTensor` or `QuantizerParams`, bit for
      bit as saved; arrays are JAX arrays on the default device (NumPy arrays where JAX would narrow a 64-bit dtype).
      The header is the caller's with "format", "format_version", "versions" and "sha256" added.

    Raises:
      ArtifactError: the file is truncated, damaged, not safetensors, of another program, of a newer format, has a
        malformed header or lacks tensors, or its contents do not have the recorded digest; the message says which.
      OSError: the file cannot be read.
    """
    path = os.fspath(path)
    stored, meta = read(path)
    try:
        flat = {name: decode(stored[name], line) for name, line in meta["tensors"].items()}
        for name, line in meta["nodes"].items():
            flat[name] = _build_node(line, {field: flat.pop(f"{name}/{field}") for field in line["fields"]})
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} has a malformed header: {type(error).__name__}: {error}") from None
    return dict(sorted(flat.items())), {**meta["header"], **{key: meta[key] for key in _RESERVED}}


def _describe(leaf: Any) -> str:
    """What restore compares of a leaf, in words."""
    if isinstance(leaf, QuantizerParams):
        return f"QuantizerParams(bits={leaf.bits}, signed={leaf.signed}, scale={list(np.shape(leaf.scale))})"
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
    words = f"{getattr(dtype, 'name', dtype)}{list(shape)}"
    if isinstance(leaf, QTensor):
        words += f" in {'signed' if leaf.signed else 'unsigned'} {leaf.bits}-bit codes"
    return words


def _fits(template: Any, leaf: Any) -> bool:
    if isinstance(leaf, QTensor) and not _is_node(template):
        # A quantized kernel in the place of a float one.
        leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return _describe(template) == _describe(leaf)


def restore(
    path: str | os.PathLike, template_variables: Any, *, expect: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load an artifact into the structure of a network's variables.

    Args:
      path: file written by `save`.
      template_variables: variables of the network, float or quantized; only structure, shapes and dtypes count, so
        `jax.eval_shape` of its initialization will do. A float array may come back as a `QTensor` of its shape and
        dtype, and a float template gains the collection "quantization".
      expect: header entries that must equal those of the file, e.g. ``{"graph": graph_digest}``.

    Returns:
      ``(variables, header)``, see `load`.

    Raises:
      ArtifactError: as `load`, or the header differs from `expect`, or the leaves differ from those of the template;
        the message says in what.
      TypeError: `expect` is not a JSON dict.
      OSError: the file cannot be read.
    """
    expect = _jsonable({} if expect is None else expect, "expect")
    flat, header = load(path)
    path = os.fspath(path)
    for key, value in expect.items():
        if key not in header or header[key] != value:
            found = repr(header[key]) if key in header else "nothing"
            raise ArtifactError(f"{path} is of another network: its {key!r} is {found}, expected {value!r}")
    wanted, treedef = _flatten(template_variables)
    extra = {name: flat[name] for name in flat.keys() - wanted.keys()}
    gained: dict[str, Any] = {}
    if not is_quantized(template_variables):
        gained = {name: extra.pop(name) for name in list(extra) if name.startswith(f"{QUANTIZATION}/")}
    unlike = [
        f"{name} is {_describe(flat[name])}, expected {_describe(leaf)}"
        for name, leaf in wanted.items()
        if name in flat and not _fits(leaf, flat[name])
    ]
    problems = [
        f"{words}: {some(names)}"
        for words, names in (
            ("it lacks", wanted.keys() - flat.keys()),
            ("it has also", extra),
            ("differing", unlike),
        )
        if names
    ]
    if problems:
        raise ArtifactError(f"{path} does not fit the template; {'; '.join(problems)}")
    variables = jax.tree.unflatten(treedef, [flat[name] for name in wanted])
    if gained:
        variables = with_collection(variables, _nest(dict(sorted(gained.items())))[QUANTIZATION])
    return variables, header
