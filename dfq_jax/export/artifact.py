"""A quantized network in one file.

An artifact is a safetensors file (https://huggingface.co/docs/safetensors). Codes narrower than a byte are
packed, and all that is not a tensor is one JSON object under the key ``dfq_jax`` of the file's metadata::

    format, format_version   what wrote the file, and the layout of this object
    versions                 of the packages that wrote it
    tensors                  name -> dtype and shape; bits, if the tensor is packed codes
    nodes                    name -> type, fields and static fields of a QTensor or QuantizerParams
    header                   the caller's own: recipe, graph digest, model name, ...
    sha256                   of all of the above and of the tensors' contents

A leaf is named by its path in the user's tree, joined by "/" (in a key "~" becomes "~0" and "/" becomes "~1"), and
the arrays of a node are named like leaves below it; activation quantizers are named below "quantization".
Loading runs no code from the file.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dfq_jax.base import write_atomically
from dfq_jax.quantizers import (
    QUANTIZATION,
    QTensor,
    QuantizedVariables,
    QuantizerParams,
    bounds,
    is_quantized,
    pack,
    unpack,
    with_collection,
)

FORMAT = "dfq_jax"
FORMAT_VERSION = 1

_RESERVED = ("format", "format_version", "versions", "sha256")  # keys that `load` adds to the header
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors", "dfq_jax")
_NODES = {
    "QTensor": (QTensor, ("qvalue", "scale", "zero_point"), ("bits", "signed", "dtype")),
    "QuantizerParams": (QuantizerParams, ("scale", "zero_point"), ("bits", "signed")),
}
# Dtypes of the safetensors NumPy reader; others (bfloat16, 8-bit floats) are stored as their bytes.
_NATIVE = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_NATIVE |= {"bool", "float16", "float32", "float64"}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class ArtifactError(ValueError):
    """The file is not a usable artifact, or not one of the expected network."""


# --- names ----------------------------------------------------------------------------------------------


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
        raise ValueError("variables has leaves whose paths read the same; give keys distinct names")
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


# --- writing --------------------------------------------------------------------------------------------


def _host_array(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"variables[{name!r}] is a PRNG key; save jax.random.key_data(key) instead")
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise TypeError(f"variables[{name!r}] must be a numeric array, got {type(leaf).__name__}; leave it out")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.require(array, requirements="C")


def _encode(name: str, leaf: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """An array as it is stored, and its line in the table of tensors."""
    array = _host_array(name, leaf)
    line = {"dtype": array.dtype.name, "shape": list(array.shape)}
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8), line


def _encode_codes(name: str, leaf: Any, bits: int) -> tuple[np.ndarray, dict[str, Any]]:
    codes = _host_array(name, leaf)
    if codes.dtype not in (np.int8, np.uint8):
        raise TypeError(f"variables[{name!r}] must hold int8 or uint8 codes, got dtype {codes.dtype}")
    return pack(codes, bits), {"dtype": codes.dtype.name, "shape": list(codes.shape), "bits": bits}


def package_version(package: str) -> str:
    """The version of a package that is installed, or of this one wherever it is."""
    if package == FORMAT:
        return sys.modules[FORMAT].__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _digest(meta: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> str:
    covered = {key: value for key, value in meta.items() if key != "sha256"}
    sha = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    for name in sorted(stored):
        array = stored[name]
        # The description delimits the contents: nothing can move from one tensor to the next unseen.
        sha.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _jsonable(header: Any, argument: str) -> Any:
    """The header as it will be read back (tuples become lists, keys strings)."""
    if not isinstance(header, Mapping):
        raise TypeError(f"{argument} must be a dict, got {type(header).__name__}")
    try:
        return json.loads(json.dumps(dict(header), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{argument} must be JSON (str, int, finite float, bool, None): {error}") from None


def save(path: str | os.PathLike, variables: Any, *, header: Mapping[str, Any]) -> None:
    """Write a network's variables to one file, whole or not at all.

    An existing file is replaced only when the new one is complete on disk. The encoded file is held in
    memory meanwhile.

    Args:
      path: file to write, by convention ``*.safetensors``; its directory must exist.
      variables: pytree whose leaves are arrays, `QTensor` or `QuantizerParams`. Its collection
        "quantization", if any, must be nested dicts with str keys, since a float template cannot tell
        `restore` its structure.
      header: what else to record, JSON: recipe, model name, digests. `load` gives it back together with
        the keys "format", "format_version", "versions" and "sha256", which it must not have.

    Raises:
      TypeError: a leaf is not numeric, a PRNG key or a tracer, `header` is not JSON, or "quantization"
        has other nodes than dicts with str keys.
      ValueError: `header` has a reserved key, or names of leaves clash.
      OSError: the file cannot be written; nothing is left behind.
    """
    header = _jsonable(header, "header")
    if clash := [key for key in _RESERVED if key in header]:
        raise ValueError(f"header must not have the reserved keys {clash}; rename them")
    _check_quantization(variables)
    stored: dict[str, np.ndarray] = {}
    tensors: dict[str, Any] = {}
    nodes: dict[str, Any] = {}
    for name, leaf in _flatten(variables)[0].items():
        if not _is_node(leaf):
            stored[name], tensors[name] = _encode(name, leaf)
            continue
        kind = type(leaf).__name__
        _, arrays, statics = _NODES[kind]
        fields = [field for field in arrays if getattr(leaf, field) is not None]
        nodes[name] = {"type": kind, "fields": fields, **{field: getattr(leaf, field) for field in statics}}
        for field in fields:
            key, value = f"{name}/{field}", getattr(leaf, field)
            codes = field == "qvalue"
            stored[key], tensors[key] = _encode_codes(key, value, leaf.bits) if codes else _encode(key, value)
    if "__metadata__" in stored:
        raise ValueError("variables must not have a leaf named '__metadata__', which safetensors reserves")
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {package: package_version(package) for package in _PACKAGES},
        "tensors": tensors,
        "nodes": nodes,
        "header": header,
    }
    meta["sha256"] = _digest(meta, stored)
    write_atomically(path, safetensors.numpy.save(stored, metadata={FORMAT: json.dumps(meta)}))


def _check_quantization(variables: Any) -> None:
    collection = variables.get(QUANTIZATION) if isinstance(variables, Mapping) else None
    collection = variables.quantization if isinstance(variables, QuantizedVariables) else collection
    if collection is None:
        return
    for path, _ in jax.tree_util.tree_flatten_with_path(collection, is_leaf=_is_node)[0]:
        if not path or not all(isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str) for k in path):
            raise TypeError(
                f"variables['{QUANTIZATION}'] must be nested dicts with str keys, found a leaf at "
                f"{jax.tree_util.keystr(path) or 'its top'}; name its entries by strings"
            )


# --- reading --------------------------------------------------------------------------------------------


def _parse_container(path: str, data: bytes) -> dict[str, Any]:
    """The safetensors header; says what is wrong with a file that is none, or a part of one."""
    if len(data) < 8:
        raise ArtifactError(f"{path} is truncated: {len(data)} bytes, too few for any safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER or data[8:9] not in (b"{", b""):
        raise ArtifactError(f"{path} is not a safetensors file: it does not begin with a header")
    if 8 + length > len(data):
        raise ArtifactError(f"{path} is truncated: {len(data)} bytes, its header alone needs {8 + length}")
    try:
        table = json.loads(data[8 : 8 + length])
        metadata = table.pop("__metadata__", {})
        ends = [line["data_offsets"][1] for line in table.values()]
        expected = 8 + length + max(ends, default=0)
        if not isinstance(metadata, dict) or not isinstance(expected, int):
            raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ArtifactError(f"{path} is not a safetensors file: its header cannot be read") from None
    if expected > len(data):
        raise ArtifactError(f"{path} is truncated: {len(data)} bytes of {expected}")
    if expected < len(data):
        raise ArtifactError(f"{path} is damaged: {len(data)} bytes where its header accounts for {expected}")
    return metadata


def _parse_meta(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        found = ", ".join(sorted(metadata)[:8]) or "none"
        raise ArtifactError(
            f"{path} is a safetensors file of another program: it has no '{FORMAT}' metadata (found: {found})"
        )
    try:
        meta = json.loads(metadata[FORMAT])
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} has a malformed header: not JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ArtifactError(f"{path} has a malformed header: its format is not '{FORMAT}'")
    version = meta.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path} has a malformed header: format_version is {version!r}")
    if version > FORMAT_VERSION:
        writer = meta.get("versions")
        writer = writer.get("dfq_jax") if isinstance(writer, dict) else None
        raise ArtifactError(
            f"{path} has format_version {version}, newer than {FORMAT_VERSION}, the newest read here; "
            f"install the dfq_jax that wrote it ({writer or 'version not recorded'}) or a later one"
        )
    kinds = {"versions": dict, "tensors": dict, "nodes": dict, "header": dict, "sha256": str}
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            raise ArtifactError(f"{path} has a malformed header: {key!r} is missing or not a {kind.__name__}")
    return meta


def _decode(array: np.ndarray, line: Mapping[str, Any]) -> Any:
    """Inverse of `_encode` and `_encode_codes`."""
    dtype, shape = jnp.dtype(line["dtype"]), tuple(line["shape"])
    if "bits" in line:
        array = unpack(array, line["bits"], shape, signed=dtype == np.int8)
    elif line["dtype"] not in _NATIVE:
        array = array.view(dtype).reshape(shape)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"found {array.dtype}{list(array.shape)}, listed as {dtype}{list(shape)}")
    # JAX would narrow a 64-bit array while 64-bit types are off; leave such a one to NumPy.
    return jnp.array(array) if jax.dtypes.canonicalize_dtype(dtype) == dtype else array.copy()


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
      ``(flat, header)``: leaves by name ("params/conv/kernel"), each an array, `QTensor` or
      `QuantizerParams`, bit for bit as saved; arrays are JAX arrays on the default device (NumPy arrays
      where JAX would narrow a 64-bit dtype). The header is the caller's with "format",
      "format_version", "versions" and "sha256" added.

    Raises:
      ArtifactError: the file is truncated, damaged, not safetensors, of another program, of a newer
        format, has a malformed header or lacks tensors, or its contents do not have the recorded
        digest; the message says which.
      OSError: the file cannot be read.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        data = file.read()
    meta = _parse_meta(path, _parse_container(path, data))
    try:
        stored = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a valid safetensors file: {error}") from None
    for what, names in (
        ("lacks tensors", meta["tensors"].keys() - stored.keys()),
        ("has unlisted tensors", stored.keys() - meta["tensors"].keys()),
    ):
        if names:
            raise ArtifactError(f"{path} {what}: {_some(names)}")
    if (digest := _digest(meta, stored)) != meta["sha256"]:
        raise ArtifactError(f"{path} is damaged: the sha256 of its contents is {digest}, recorded is {meta['sha256']}")
    try:
        flat = {name: _decode(stored[name], line) for name, line in meta["tensors"].items()}
        for name, line in meta["nodes"].items():
            flat[name] = _build_node(line, {field: flat.pop(f"{name}/{field}") for field in line["fields"]})
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} has a malformed header: {type(error).__name__}: {error}") from None
    return dict(sorted(flat.items())), {**meta["header"], **{key: meta[key] for key in _RESERVED}}


def _some(items: Any, limit: int = 8) -> str:
    items = sorted(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


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
      template_variables: variables of the network, float or quantized; only structure, shapes and dtypes
        count, so `jax.eval_shape` of its initialization will do. A float array may come back as a
        `QTensor` of its shape and dtype, and a float template gains the collection "quantization".
      expect: header entries that must equal those of the file, e.g. ``{"graph": graph_digest}``.

    Returns:
      ``(variables, header)``, see `load`.

    Raises:
      ArtifactError: as `load`, or the header differs from `expect`, or the leaves differ from those of
        the template; the message says in what.
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
        f"{words}: {_some(names)}"
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
