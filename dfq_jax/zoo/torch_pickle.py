"""Reads the pickles of PyTorch's checkpoint files as plain records, without running them.

A pickle is a program for a small stack machine, and loading one with `pickle` may call anything. The machine here is
that of `pickle` with most of it taken out: it knows the few opcodes and the few names that a state dict consists of,
imports nothing, and calls nothing but the functions below. Everything else is refused by name.

It is the machine in Python, not the one in C, which a small file can take down: there a memo index of 2**31 allocates
gigabytes, and nested tuples as keys of a dictionary hash for ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

__all__ = ["Storage", "Tensor", "brief", "unpickle"]

_MAX_OPCODES = 1_000_000
_MAX_DIMS = 32
_MAX_NAME = 1024
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
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


@dataclass(frozen=True)
class Storage:
    """Numbers that tensors are views of."""

    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """A dictionary that looks at its keys before it hashes them: some tuples, and sets of integers, take for ever."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 61):
            raise ValueError(f"a dictionary has the key {brief(key)}; expected strings or integers")
        super().__setitem__(key, value)


class _OrderedDict(_Dict):
    """Stands for `collections.OrderedDict`."""

    __slots__ = ()


# --- what the names stand for ---


def _ordered(pairs: Any = ()) -> _OrderedDict:
    result = _OrderedDict()
    for key, value in pairs:  # so Python 2 wrote it
        result[key] = value
    if pairs:
        pairs.clear()  # else a list that many calls refer to would be copied as many times
    return result


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, _: Any = None
) -> Any:
    whole = (isinstance(part, tuple) and len(part) <= _MAX_DIMS for part in (size, stride))
    if not isinstance(storage, Storage) or not all(whole) or {type(n) for n in (offset, *size, *stride)} != {int}:
        raise ValueError("a tensor is described in a way this reader does not know")
    return Tensor(storage, offset, size, stride)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, grad, hooks: tensor,
    "torch.Size": lambda size: size,
    "torch.device": lambda kind, index=None: None,
}

# --- the machine ---


def _empty_dict(machine: Any) -> None:
    machine.append(_Dict())


def _build(machine: Any) -> None:
    machine.stack.pop()  # attributes such as a state dict's `_metadata`: nothing in them is data
    if not isinstance(machine.stack[-1], _OrderedDict):
        raise ValueError(f"its pickle sets attributes of {brief(machine.stack[-1])}: refused")


_KNOWN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE
SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS
SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"""
_STEPS = {code: pickle._Unpickler.dispatch[code] for (code,) in (getattr(pickle, name) for name in _KNOWN.split())}
_STEPS |= {pickle.EMPTY_DICT[0]: _empty_dict, pickle.BUILD[0]: _build}


class _Dispatch(dict[int, Callable[[Any], None]]):
    """What each opcode does; counts how often it is asked."""

    asked = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.asked += 1
        if self.asked > _MAX_OPCODES:
            raise ValueError(f"its pickle has more than {_MAX_OPCODES} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> None:
        name = next((name for name in pickle.__all__ if getattr(pickle, name) == bytes([code])), code)
        raise ValueError(f"its pickle uses the opcode {name}, which no state dict needs: refused")


class _Stream:
    """A file of which no more bytes are asked for than there are: a pickle may declare a string of 2**60."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_NAME)


class _Unpickler(pickle._Unpickler):
    def __init__(self, file: BinaryIO, size: int):
        super().__init__(_Stream(file, size), encoding="latin-1")
        self.dispatch = _Dispatch(_STEPS)  # type: ignore[misc]
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _FUNCTIONS[full]
        if module in _STORAGE_MODULES and name in _DTYPES:
            return _DTYPES[name]
        raise ValueError(
            f"its pickle refers to {full[:200]!r}, not part of a state dict: refused, nothing was run. "
            "If you trust the file, load it with the program that wrote it, and save a torch module's state_dict(), or "
            "arrays of JAX by flax.serialization.to_bytes"
        )

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(numel), *view) if view in ([], [None]):
                storage = Storage(key, dtype, numel)
            case _:
                what = ", ".join(map(brief, pid[:6])) if isinstance(pid, tuple) else brief(pid)
                raise ValueError(f"its pickle refers to {what} outside of it, which is no storage of a known type")
        if not 0 <= numel < 1 << 40 or self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {brief(key)} has a bad number of elements, or is described twice, differently")
        return storage


def unpickle(file: BinaryIO, size: int) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from a file of `size` bytes: what it describes and the storages it refers to.

    Raises:
      ValueError: it is damaged, or holds anything but tensors in plain containers.
    """
    machine = _Unpickler(file, size)
    try:
        return machine.load(), machine.storages
    except ValueError:
        raise
    except Exception as error:  # whatever damaged programs lead to
        raise ValueError(f"its pickle is truncated or damaged ({error})") from error


def brief(value: Any) -> str:
    """A short description that never follows references: nested values may be exponentially large."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else repr(value[:80] + "...")
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)[:80]
    return f"a {type(value).__name__.strip('_').lower()}"
