"""Reads tensors from PyTorch checkpoint files without PyTorch and without running pickled code.

A torch file is a pickle that describes tensors (storage, offset, sizes, strides) plus the raw storages: members of a
zip archive since torch 1.6, appended to the pickle before. `torch_pickle` interprets the pickle.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dfq_jax.zoo.archive import MAX_BYTES, check_archive, open_archive, read_member
from dfq_jax.zoo.torch_pickle import Storage, Tensor, brief, interpret

__all__ = ["Readers", "open_torch", "read_torch"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRONG_MAGIC = "wrong magic: it is neither a zip archive nor starts with the number of torch's legacy format"
_STATE_KEYS = ("state_dict", "model", "net", "model_state_dict")
_MAX_PICKLE_BYTES = 64 << 20

Readers = dict[str, Callable[[], np.ndarray]]


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the state dict of a torch file (`.pth`, `.pt`, `.th`; zip or the legacy format) as numpy arrays.

    The state dict is the file's dictionary itself or, where that holds no tensors, what it has under
    ``state_dict``, ``model``, ``net`` or ``model_state_dict``. The prefix ``module.`` is dropped where every
    name has it. Scalars and strings among the tensors are passed over.

    Args:
        path: the file.

    Returns:
        Name to array, in the file's order, each a copy of its own in C order; bfloat16 as
        `jax.numpy.bfloat16`.

    Raises:
        ValueError: if there is no such file, it is not a torch file, is truncated, refers to names other than
            those of tensors, its tensors reach beyond their storages, or it declares absurd sizes.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            return {name: read() for name, read in open_torch(file, size).items()}
    except OSError as error:
        raise ValueError(f"path: cannot read {os.fspath(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)!r} cannot be read as a torch file: {error}") from error


def open_torch(file: BinaryIO, size: int) -> Readers:
    """As `read_torch`, of an open file of `size` bytes: name to a function that reads the array from it.

    Everything but the numbers is read and checked at once.
    """
    if size > MAX_BYTES:
        raise ValueError(f"its {size} bytes are more than the {MAX_BYTES} this reader accepts")
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        return _open_zip(file, size)
    if start[:1] == b"\x80":
        return _open_legacy(_Stream(file, size))
    raise ValueError(_WRONG_MAGIC)


# The two containers


def _open_zip(file: BinaryIO, size: int) -> Readers:
    archive = open_archive(file)
    check_archive(archive, size)
    names = set(archive.namelist())
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a torch archive holds one data.pkl, this zip archive {len(pickles)}")
    root = pickles[0][: -len("data.pkl")]
    if root + "constants.pkl" in names:
        raise ValueError("this is a TorchScript archive; save the module's state_dict() instead")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than the {_MAX_PICKLE_BYTES} bytes this reader accepts")
    order = read_member(archive, root + "byteorder").strip() if root + "byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"unknown byte order {order[:20]!r}")
    content, storages = interpret(io.BytesIO(read_member(archive, pickles[0])))
    state = _select_state(content)

    def load(storage: Storage) -> np.ndarray:
        raw = read_member(archive, f"{root}data/{storage.key}")
        if len(raw) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key!r} has {len(raw)} bytes, not {storage.numel} x {storage.dtype}")
        return _as_array(raw, storage.dtype, swap=order == b"big")

    missing = [key for key in storages if f"{root}data/{key}" not in names]
    if missing:
        raise ValueError(f"the archive lacks storage {missing[0]!r}")
    return _readers(state, load)


class _Stream:
    """A file of which no more bytes are asked for than there are: a pickle may declare a string of 2**60."""

    def __init__(self, file: BinaryIO, size: int):
        self.size = size
        self.readline, self.seek, self.tell = file.readline, file.seek, file.tell
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self.size - self.tell())))


def _open_legacy(stream: _Stream) -> Readers:
    magic, _ = interpret(stream)
    if magic != _LEGACY_MAGIC:
        raise ValueError(_WRONG_MAGIC)
    protocol, _ = interpret(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"legacy protocol version {brief(protocol)}; this reader knows {_LEGACY_PROTOCOL}")
    system, _ = interpret(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("written by a machine that was not little-endian; convert it with torch")
    content, storages = interpret(stream)
    state = _select_state(content)
    keys, _ = interpret(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is not a list of names")
    if len(set(keys)) != len(keys):
        raise ValueError("its list of storages names one twice")
    if set(keys) != set(storages):
        odd = sorted(set(keys) ^ set(storages))[0]
        raise ValueError(f"storage {odd!r} is listed or used, but not both")

    starts: dict[str, int] = {}
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        stream.seek(position)
        count = int.from_bytes(stream.read(8), "little", signed=True)
        end = position + 8 + storage.numel * storage.dtype.itemsize
        if end > stream.size:
            raise ValueError(f"truncated: storage {key!r} ends at byte {end} of {stream.size}")
        if count != storage.numel:
            raise ValueError(f"storage {key!r} has {count} elements where {storage.numel} are declared")
        starts[key] = position + 8
        position = end

    def load(storage: Storage) -> np.ndarray:
        stream.seek(starts[storage.key])
        return _as_array(stream.read(storage.numel * storage.dtype.itemsize), storage.dtype, swap=False)

    return _readers(state, load)


def _as_array(raw: bytes | memoryview, dtype: np.dtype, *, swap: bool) -> np.ndarray:
    if dtype == np.bool_:
        return np.frombuffer(raw, np.uint8) != 0
    array = np.frombuffer(raw, dtype)
    return array.byteswap() if swap else array


# From records to arrays


def _select_state(content: Any) -> dict[str, Tensor]:
    """The dictionary that holds the tensors, without the prefix ``module.``."""
    state = content
    for _ in range(3):
        if not isinstance(state, dict):
            raise ValueError(f"it holds {brief(state)}, not a state dict")
        if any(isinstance(value, Tensor) for value in state.values()):
            break
        inner = [state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    if not any(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(brief(key) for key in list(state)[:8]) or "nothing"
        raise ValueError(f"found no tensors in it nor under {', '.join(_STATE_KEYS)}; keys: {found}")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if not isinstance(key, str):
                raise ValueError(f"a tensor has the key {brief(key)}; names are strings")
            tensors[key] = value
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(f"{brief(key)} holds {brief(value)}, neither a tensor nor a scalar or string")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _readers(state: dict[str, Tensor], load: Callable[[Storage], np.ndarray]) -> Readers:
    # All sizes are checked before the first storage is read.
    total = 0
    for name, tensor in state.items():
        _check_bounds(name, tensor)
        total += math.prod(tensor.size) * tensor.storage.dtype.itemsize
    if total > MAX_BYTES:
        raise ValueError(f"its tensors take {total} bytes, more than the {MAX_BYTES} this reader accepts")
    uses = Counter(tensor.storage.key for tensor in state.values())
    shared: dict[str, np.ndarray] = {}  # else a storage of many tensors would be read as many times

    def reader(tensor: Tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            key = tensor.storage.key
            flat = shared[key] if key in shared else load(tensor.storage)
            if uses[key] > 1:
                shared[key] = flat
            strides = tuple(flat.itemsize * stride for stride in tensor.stride)
            view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, strides, writeable=False)
            return np.array(view, order="C", copy=True)

        return read

    return {name: reader(tensor) for name, tensor in state.items()}


def _check_bounds(name: str, tensor: Tensor) -> None:
    size, stride, numel = tensor.size, tensor.stride, tensor.storage.numel
    if len(size) != len(stride):
        raise ValueError(f"tensor {name!r} has {len(size)} sizes and {len(stride)} strides")
    if any(not 0 <= value < 1 << 40 for value in (*size, *stride, tensor.offset)):
        raise ValueError(f"tensor {name!r} has a negative or absurd size, stride or offset")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if tensor.offset > numel or (0 not in size and last >= numel):
        raise ValueError(f"tensor {name!r} reaches beyond its storage of {numel} elements")
