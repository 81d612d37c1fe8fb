"""Tensors of PyTorch's checkpoint files, without PyTorch.

A torch file is a pickle that describes tensors (storage, offset, sizes, strides) plus the raw storages: members of a
zip archive since torch 1.6, appended to the pickle before. `torch_pickle` reads the pickle.
"""

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dfq_jax.zoo.archive import MAX_BYTES, open_archive, read_member
from dfq_jax.zoo.names import Readers
from dfq_jax.zoo.torch_pickle import Storage, Tensor, brief, unpickle

__all__ = ["open_torch"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STATE_KEYS = ("state_dict", "model", "net", "model_state_dict")
_MAX_PICKLE_BYTES = 64 << 20
# By strides of 0 tensors repeat what their storages hold: so many times the size of the file, beyond the floor.
_FLOOR, _EXPANSION = 1 << 20, 16


def open_torch(file: BinaryIO, size: int) -> Readers:
    """Opens a file of `size` bytes; everything but the numbers is read and checked at once.

    Raises:
      ValueError: it is no torch file, damaged, holds anything but tensors in plain containers or declares absurd
        sizes.
    """
    if size > MAX_BYTES:
        raise ValueError(f"its {size} bytes are more than the {MAX_BYTES} this reader accepts")
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        return _open_zip(file, size)
    if start[:1] == b"\x80":
        return _open_legacy(file, size)
    raise ValueError("wrong magic: it is neither a zip archive nor starts with a pickle")


# --- the two containers ---


def _open_zip(file: BinaryIO, size: int) -> Readers:
    archive = open_archive(file, size)
    names = set(archive.namelist())
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a torch archive holds one data.pkl, this zip archive {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in names:
        raise ValueError("this is a TorchScript archive; save the module's state_dict() instead")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than the {_MAX_PICKLE_BYTES} bytes this reader accepts")
    order = read_member(archive, root + "byteorder").strip() if root + "byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"unknown byte order {order[:20]!r}")
    raw = read_member(archive, pickles[0])
    content, storages = unpickle(io.BytesIO(raw), len(raw))
    for key, storage in storages.items():
        if f"{root}data/{key}" not in names:
            raise ValueError(f"the archive lacks storage {key!r}")
        found = archive.getinfo(f"{root}data/{key}").file_size
        if found != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"storage {key!r} has {found} bytes, not {storage.numel} x {storage.dtype}")

    def load(storage: Storage) -> bytes:
        return read_member(archive, f"{root}data/{storage.key}")

    return _readers(content, load, size, swap=order == b"big")


def _open_legacy(file: BinaryIO, size: int) -> Readers:
    magic, _ = unpickle(file, size)
    if magic != _LEGACY_MAGIC:
        raise ValueError("wrong magic: it does not start with the number of torch's legacy format")
    protocol, _ = unpickle(file, size)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"legacy protocol version {brief(protocol)}; this reader knows {_LEGACY_PROTOCOL}")
    system, _ = unpickle(file, size)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("written by a machine that was not little-endian; convert it with torch")
    content, storages = unpickle(file, size)
    keys, _ = unpickle(file, size)
    position = file.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len({*keys}) < len(keys):
        raise ValueError("its list of storages is not one of different names")
    if odd := {*keys} ^ {*storages}:
        raise ValueError(f"storage {min(odd)!r} is listed or used, but not both")
    starts: dict[str, int] = {}
    for key in keys:
        storage = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little", signed=True)
        starts[key] = position + 8
        position += 8 + storage.numel * storage.dtype.itemsize
        if position > size:
            raise ValueError(f"truncated: storage {key!r} ends at byte {position} of {size}")
        if count != storage.numel:
            raise ValueError(f"storage {key!r} has {count} elements where {storage.numel} are declared")

    def load(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return _readers(content, load, size)


# --- from records to arrays ---


def _select_state(content: Any) -> dict[str, Tensor]:
    """The dictionary that holds the tensors, without the prefix ``module.``."""
    state, tensors = content, {}
    for _ in range(3):
        if not isinstance(state, dict):
            raise ValueError(f"it holds {brief(state)}, not a state dict")
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        inner = [state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)]
        if tensors or not inner:
            break
        state = inner[0]
    if not tensors:
        found = ", ".join(brief(key) for key in list(state)[:8]) or "nothing"
        raise ValueError(f"found no tensors in it nor under {', '.join(_STATE_KEYS)}; keys: {found}")
    for key, value in state.items():
        if key in tensors and not isinstance(key, str):
            raise ValueError(f"a tensor has the key {brief(key)}; names are strings")
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            raise ValueError(f"{brief(key)} holds {brief(value)}, neither a tensor nor a scalar or string")
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _readers(content: Any, load: Callable[[Storage], bytes], size: int, *, swap: bool = False) -> Readers:
    state = _select_state(content)
    for name, tensor in state.items():
        _check_bounds(name, tensor)
    total = sum(math.prod(tensor.size) * tensor.storage.dtype.itemsize for tensor in state.values())
    if total > max(_FLOOR, _EXPANSION * size):
        raise ValueError(f"its tensors take {total} bytes, far more than the {size} of the file: a bomb?")
    uses = Counter(tensor.storage.key for tensor in state.values())
    shared: dict[str, np.ndarray] = {}  # else a storage of many tensors would be read as many times

    def read(tensor: Tensor) -> np.ndarray:
        key, dtype = tensor.storage.key, tensor.storage.dtype
        flat = shared.get(key)
        if flat is None:
            raw = load(tensor.storage)
            flat = np.frombuffer(raw, np.uint8) != 0 if dtype == np.bool_ else np.frombuffer(raw, dtype)
            flat = flat.byteswap() if swap else flat
        if uses[key] > 1:
            shared[key] = flat
        strides = tuple(flat.itemsize * stride for stride in tensor.stride)
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, strides, writeable=False)
        return np.array(view, order="C", copy=True)

    return {name: functools.partial(read, tensor) for name, tensor in state.items()}


def _check_bounds(name: str, tensor: Tensor) -> None:
    size, stride, numel = tensor.size, tensor.stride, tensor.storage.numel
    if len(size) != len(stride):
        raise ValueError(f"tensor {name!r} has {len(size)} sizes and {len(stride)} strides")
    if any(not 0 <= value < 1 << 40 for value in (*size, *stride, tensor.offset)):
        raise ValueError(f"tensor {name!r} has a negative or absurd size, stride or offset")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if tensor.offset > numel or (0 not in size and last >= numel):
        raise ValueError(f"tensor {name!r} reaches beyond its storage of {numel} elements")
