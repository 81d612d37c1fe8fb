"""The file of an artifact: named arrays and one JSON object, in safetensors, each checked against the other.

What is wrong with a file is said as exactly as can be: truncated, foreign, damaged, malformed or too new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dfq_jax.base import write_atomically
from dfq_jax.quantizers import pack, unpack

FORMAT = "dfq_jax"
FORMAT_VERSION = 1

# Dtypes of the safetensors NumPy reader; others (bfloat16, 8-bit floats) are stored as their bytes.
_NATIVE = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_NATIVE |= {"bool", "float16", "float32", "float64"}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
# Parts of the JSON object beside "format" and "format_version", and their types.
_PARTS = {"versions": dict, "tensors": dict, "nodes": dict, "header": dict, "sha256": str}


class ArtifactError(ValueError):
    """The file is not a usable artifact, or not one of the expected network."""


# --- arrays ---


def _host_array(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"variables[{name!r}]: found a PRNG key; save jax.random.key_data(key) instead.")
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise TypeError(f"variables[{name!r}]: expected a numeric array, found {type(leaf).__name__}; leave it out.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.require(array, requirements="C")


def encode(name: str, leaf: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """An array as it is stored, and its line in the table of tensors."""
    array = _host_array(name, leaf)
    line = {"dtype": array.dtype.name, "shape": list(array.shape)}
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8), line


def encode_codes(name: str, leaf: Any, bits: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes as they are stored, packed, and their line in the table of tensors."""
    codes = _host_array(name, leaf)
    if codes.dtype not in (np.int8, np.uint8):
        raise TypeError(f"variables[{name!r}]: expected int8 or uint8 codes, found dtype {codes.dtype}.")
    return pack(codes, bits), {"dtype": codes.dtype.name, "shape": list(codes.shape), "bits": bits}


def decode(array: np.ndarray, line: Mapping[str, Any]) -> Any:
    """Inverse of `encode` and `encode_codes`."""
    dtype, shape = jnp.dtype(line["dtype"]), tuple(line["shape"])
    if "bits" in line:
        array = unpack(array, line["bits"], shape, signed=dtype == np.int8)
    elif line["dtype"] not in _NATIVE:
        array = array.view(dtype).reshape(shape)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"found {array.dtype}{list(array.shape)}, listed as {dtype}{list(shape)}")
    # JAX would narrow a 64-bit array while 64-bit types are off; leave such a one to NumPy.
    return jnp.array(array) if jax.dtypes.canonicalize_dtype(dtype) == dtype else array.copy()


# --- the file ---


def write(path: str | os.PathLike[str], stored: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write arrays, and the JSON object with the digest of both added, whole or not at all."""
    meta = {"format": FORMAT, "format_version": FORMAT_VERSION, **meta}
    meta["sha256"] = _digest(meta, stored)
    write_atomically(path, safetensors.numpy.save(dict(stored), metadata={FORMAT: json.dumps(meta)}))


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the JSON object of a file, verified.

    Raises:
      ArtifactError: see `artifact.load`.
      OSError: the file cannot be read.
    """
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
            raise ArtifactError(f"{path} {what}: {some(names)}")
    if (digest := _digest(meta, stored)) != meta["sha256"]:
        raise ArtifactError(f"{path} is damaged: the sha256 of its contents is {digest}, recorded is {meta['sha256']}")
    return stored, meta


def _digest(meta: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> str:
    covered = {key: value for key, value in meta.items() if key != "sha256"}
    sha = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    for name in sorted(stored):
        array = stored[name]
        # The description delimits the contents: nothing can move from one tensor to the next unseen.
        sha.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


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
    for key, kind in _PARTS.items():
        if not isinstance(meta.get(key), kind):
            raise ArtifactError(f"{path} has a malformed header: {key!r} is missing or not a {kind.__name__}")
    return meta


def some(items: Iterable[str], limit: int = 8) -> str:
    """The first of some names, and how many more there are."""
    items = sorted(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
