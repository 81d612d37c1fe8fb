"""Reads tensors from PyTorch checkpoint files without PyTorch and without running pickled code.

A torch file is a pickle that describes tensors (storage, offset, sizes, strides) plus the raw storages:
members of a zip archive since torch 1.6, appended to the pickle before. A pickle is a program for a small
stack machine, and loading one with `pickle` may call anything. Here the program is only tokenized by
`pickletools` and interpreted below, by a machine that knows the few opcodes and the few names a state dict
consists of, builds plain records from them, imports nothing and calls nothing. Everything else is refused by
name.

It is not a `pickle.Unpickler` with a restricted `find_class` because that still lets a small file take the
process down: a memo index of 2**31 allocates gigabytes, nested tuples as dictionary keys hash for ever.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

__all__ = ["Readers", "open_torch", "read_torch"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRONG_MAGIC = "wrong magic: it is neither a zip archive nor starts with the number of torch's legacy format"
_STATE_KEYS = ("state_dict", "model", "net", "model_state_dict")
_MAX_BYTES = 4 << 30
_MAX_PICKLE_BYTES = 64 << 20
_MAX_OPCODES = 1_000_000
_MAX_DIMS = 32
_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}


class _Mark:
    """Where a MARK lies on the stack."""


@dataclass(frozen=True)
class _Name:
    """A name the pickle refers to; never imported."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Inert:
    """An object without data for us, such as a device."""

    name: str


class _OrderedDict(dict):
    """Stands for `collections.OrderedDict`; the attributes it may carry (`_metadata`) are dropped."""


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
    if size > _MAX_BYTES:
        raise ValueError(f"its {size} bytes are more than the {_MAX_BYTES} this reader accepts")
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        return _open_zip(file, size)
    if start[:1] == b"\x80":
        return _open_legacy(_Stream(file, size))
    raise ValueError(_WRONG_MAGIC)


# The two containers


def check_archive(archive: zipfile.ZipFile, size: int, *, floor: int = 1 << 20, expansion: int = 16) -> None:
    """Refuses a zip archive whose members would unpack to an absurd size.

    Args:
        archive: the open archive.
        size: bytes of the archive's file.
        floor: a total of so many unpacked bytes is always fine.
        expansion: beyond the floor, how many times the file's size the members may take. Archives may be
            repacked with compression, but weights hardly compress: far beyond the default it is a bomb.

    Raises:
        ValueError: if it is empty, the declared sizes are above the limits, or a name occurs twice.
    """
    members = archive.infolist()
    if not members:
        raise ValueError("the archive is empty")
    total = sum(member.file_size for member in members)
    if total > _MAX_BYTES or total > max(floor, expansion * size):
        raise ValueError(f"the archive of {size} bytes declares {total} bytes of content: a zip bomb?")
    name, count = max(Counter(member.filename for member in members).items(), key=lambda item: item[1])
    if count > 1:
        raise ValueError(f"the archive holds {name!r} more than once")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads one member of a checked archive; anything wrong with it is a ValueError that names it."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"the archive's member {name!r} is damaged or unsupported: {error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError: the decompressors have exceptions of their own
        raise ValueError(f"the archive's member {name!r} does not unpack: {error}") from error


def _open_zip(file: BinaryIO, size: int) -> Readers:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the zip archive is truncated or damaged ({error})") from error
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
    content, storages = _interpret(io.BytesIO(read_member(archive, pickles[0])))
    state = _select_state(content)

    def load(storage: _Storage) -> np.ndarray:
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
    magic, _ = _interpret(stream)
    if magic != _LEGACY_MAGIC:
        raise ValueError(_WRONG_MAGIC)
    protocol, _ = _interpret(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"legacy protocol version {_brief(protocol)}; this reader knows {_LEGACY_PROTOCOL}")
    system, _ = _interpret(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("written by a machine that was not little-endian; convert it with torch")
    content, storages = _interpret(stream)
    state = _select_state(content)
    keys, _ = _interpret(stream)
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

    def load(storage: _Storage) -> np.ndarray:
        stream.seek(starts[storage.key])
        return _as_array(stream.read(storage.numel * storage.dtype.itemsize), storage.dtype, swap=False)

    return _readers(state, load)


def _as_array(raw: bytes | memoryview, dtype: np.dtype, *, swap: bool) -> np.ndarray:
    if dtype == np.bool_:
        return np.frombuffer(raw, np.uint8) != 0
    array = np.frombuffer(raw, dtype)
    return array.byteswap() if swap else array


# From records to arrays


def _select_state(content: Any) -> dict[str, _Tensor]:
    """The dictionary that holds the tensors, without the prefix ``module.``."""
    state = content
    for _ in range(3):
        if not isinstance(state, dict):
            raise ValueError(f"it holds {_brief(state)}, not a state dict")
        if any(isinstance(value, _Tensor) for value in state.values()):
            break
        inner = [state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    if not any(isinstance(value, _Tensor) for value in state.values()):
        found = ", ".join(_brief(key) for key in list(state)[:8]) or "nothing"
        raise ValueError(f"found no tensors in it nor under {', '.join(_STATE_KEYS)}; keys: {found}")
    tensors: dict[str, _Tensor] = {}
    for key, value in state.items():
        if isinstance(value, _Tensor):
            if not isinstance(key, str):
                raise ValueError(f"a tensor has the key {_brief(key)}; names are strings")
            tensors[key] = value
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(f"{_brief(key)} holds {_brief(value)}, neither a tensor nor a scalar or string")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _readers(state: dict[str, _Tensor], load: Callable[[_Storage], np.ndarray]) -> Readers:
    # All sizes are checked before the first storage is read.
    total = 0
    for name, tensor in state.items():
        _check_bounds(name, tensor)
        total += math.prod(tensor.size) * tensor.storage.dtype.itemsize
    if total > _MAX_BYTES:
        raise ValueError(f"its tensors take {total} bytes, more than the {_MAX_BYTES} this reader accepts")
    uses = Counter(tensor.storage.key for tensor in state.values())
    shared: dict[str, np.ndarray] = {}  # else a storage of many tensors would be read as many times

    def reader(tensor: _Tensor) -> Callable[[], np.ndarray]:
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


def _check_bounds(name: str, tensor: _Tensor) -> None:
    size, stride, numel = tensor.size, tensor.stride, tensor.storage.numel
    if len(size) != len(stride):
        raise ValueError(f"tensor {name!r} has {len(size)} sizes and {len(stride)} strides")
    if any(not 0 <= value < 1 << 40 for value in (*size, *stride, tensor.offset)):
        raise ValueError(f"tensor {name!r} has a negative or absurd size, stride or offset")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if tensor.offset > numel or (0 not in size and last >= numel):
        raise ValueError(f"tensor {name!r} reaches beyond its storage of {numel} elements")


# The stack machine


def _interpret(stream: io.BytesIO | _Stream) -> tuple[Any, dict[str, _Storage]]:
    """Interprets one pickle at the stream's position: what it describes and the storages it refers to."""
    machine = _Machine()
    for opcode, argument in _tokens(stream):
        if opcode == "STOP":
            if len(machine.stack) != 1:
                break
            return machine.stack[0], machine.storages
        machine.step(opcode, argument)
    raise ValueError("its pickle ends with an unbalanced stack")


def _tokens(stream: io.BytesIO | _Stream) -> Iterator[tuple[str, Any]]:
    tokens = pickletools.genops(stream)
    for _ in range(_MAX_OPCODES):
        try:
            opcode, argument, _position = next(tokens)
        except StopIteration:
            return
        except (ValueError, IndexError, OverflowError, MemoryError) as error:
            raise ValueError(f"its pickle is truncated or damaged ({error})") from error
        yield opcode.name, argument
    raise ValueError(f"its pickle has more than {_MAX_OPCODES} opcodes")


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": _Mark,
}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
)
_TUPLE_LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """A pickle machine that can only build lists, dictionaries, scalars and the records above."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in _LITERALS:
            stack.append(argument)
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top()
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError(f"its pickle refers to entry {argument} of the memo before it is set")
            stack.append(self.memo[argument])
        elif opcode in _TUPLE_LENGTHS:
            values = [self._pop() for _ in range(_TUPLE_LENGTHS[opcode])]
            stack.append(tuple(reversed(values)))
        elif opcode == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif opcode in ("APPEND", "APPENDS"):
            values = [self._pop()] if opcode == "APPEND" else self._pop_to_mark()
            if not isinstance(self._top(), list):
                raise ValueError(f"its pickle appends to {_brief(self._top())}")
            self._top().extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._pop_to_mark()
            self._set_items(values)
        elif opcode == "GLOBAL":
            stack.append(_allowed(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = self._pop(), self._pop()
            stack.append(_allowed(module, name))
        elif opcode == "REDUCE":
            arguments, function = self._pop(), self._pop()
            stack.append(_call(function, arguments))
        elif opcode == "BUILD":
            self._pop()  # attributes such as a state dict's `_metadata`: nothing in them is data
            if not isinstance(self._top(), _OrderedDict):
                raise ValueError(f"its pickle sets attributes of {_brief(self._top())}: refused")
        elif opcode == "BINPERSID":
            stack.append(self._storage(self._pop()))
        else:
            raise ValueError(f"its pickle uses the opcode {opcode}, which no state dict needs: refused")

    def _top(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise ValueError("its pickle uses an empty stack")
        return self.stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[index], _Mark):
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("its pickle uses a mark that was never set")

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError(f"its pickle sets items of {_brief(target)}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError(f"a dictionary has the key {_brief(key)}; expected strings or integers")
            target[key] = value

    def _storage(self, reference: Any) -> _Storage:
        if not isinstance(reference, tuple) or not reference or reference[0] != "storage":
            what = reference[0] if isinstance(reference, tuple) and reference else reference
            raise ValueError(f"its pickle refers to {_brief(what)} outside of it; only storages are known")
        if len(reference) not in (5, 6) or (len(reference) == 6 and reference[5] is not None):
            raise ValueError("a storage is described in an unknown way (as the view of another?)")
        kind, key, _location, numel = reference[1:5]
        name = kind.name.rsplit(".", 1)[-1] if isinstance(kind, _Name) else ""
        if name not in _DTYPES:
            raise ValueError(f"a storage is of the type {_brief(kind)}, not one of {', '.join(_DTYPES)}")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 40:
            raise ValueError(f"storage {_brief(key)} has a bad name or number of elements")
        storage = _Storage(key, _DTYPES[name], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} is described twice, differently")
        return storage


_FUNCTIONS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


def _allowed(module: Any, name: Any) -> _Name:
    if isinstance(module, str) and isinstance(name, str):
        full = f"{module}.{name}"
        if full in _FUNCTIONS or (module in _STORAGE_MODULES and name in _DTYPES):
            return _Name(full)
        raise ValueError(
            f"its pickle refers to {full[:200]!r}, not part of a state dict: refused, nothing was run. "
            "If you trust the file, load it with torch and save the module's state_dict()"
        )
    raise ValueError("its pickle refers to a name that is no string")


def _call(function: Any, arguments: Any) -> Any:
    """What a call of one of the known functions amounts to."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError(f"its pickle calls {_brief(function)}: refused")
    match function.name, len(arguments):
        case "collections.OrderedDict", 0:
            return _OrderedDict()
        case "collections.OrderedDict", 1 if isinstance(arguments[0], list):
            return _ordered(arguments[0])
        case ("torch._utils._rebuild_tensor", 4) | ("torch._utils._rebuild_tensor_v2", 6 | 7):
            storage, offset, size, stride = arguments[:4]
            if not isinstance(storage, _Storage) or type(offset) is not int or not _are_ints(size, stride):
                raise ValueError("a tensor is described in a way this reader does not know")
            return _Tensor(storage, offset, size, stride)
        case "torch._utils._rebuild_parameter", 3 if isinstance(arguments[0], _Tensor):
            return arguments[0]
        case "torch.Size", 1 if _are_ints(arguments[0]):
            return arguments[0]
        case "torch.device", 1 | 2:
            return _Inert("torch.device")
    raise ValueError(f"its pickle calls {function.name} with arguments this reader does not know")


def _ordered(pairs: list[Any]) -> _OrderedDict:
    """How Python 2 wrote an OrderedDict: as the call of it with a list of pairs."""
    result = _OrderedDict()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (str, int)):
            raise ValueError("an OrderedDict is made of something other than names and values")
        result[pair[0]] = pair[1]
    pairs.clear()  # else a list that many calls refer to would be copied as many times
    return result


def _are_ints(*values: Any) -> bool:
    """Whether every value is a short tuple of integers."""
    return all(
        isinstance(value, tuple) and len(value) <= _MAX_DIMS and all(type(item) is int for item in value)
        for value in values
    )


def _brief(value: Any) -> str:
    """A short description that never follows references: nested values may be exponentially large."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 1 << 64 else "a huge integer"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    if isinstance(value, (_Name, _Inert)):
        return value.name[:200]
    return f"a {type(value).__name__.lstrip('_')}"
