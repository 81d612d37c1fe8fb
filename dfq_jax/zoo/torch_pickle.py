"""Interprets the pickles of PyTorch's checkpoint files as plain records, without running them.

A pickle is a program for a small stack machine, and loading one with `pickle` may call anything. Here the program is
only tokenized by `pickletools` and interpreted below, by a machine that knows the few opcodes and the few names a state
dict consists of, builds plain records from them, imports nothing and calls nothing. Everything else is refused by name.

It is not a `pickle.Unpickler` with a restricted `find_class` because that still lets a small file take the
process down: a memo index of 2**31 allocates gigabytes, nested tuples as dictionary keys hash for ever.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

__all__ = ["Storage", "Stream", "Tensor", "brief", "interpret"]

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


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


class _Mark:
    """Where a MARK lies on the stack."""


@dataclass(frozen=True)
class _Name:
    """A name the pickle refers to; never imported."""

    name: str


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


@dataclass(frozen=True)
class _Inert:
    """An object without data for us, such as a device."""

    name: str


class _OrderedDict(dict):
    """Stands for `collections.OrderedDict`; the attributes it may carry (`_metadata`) are dropped."""


def interpret(stream: Stream) -> tuple[Any, dict[str, Storage]]:
    """Interprets one pickle at the stream's position: what it describes and the storages it refers to."""
    machine = _Machine()
    for opcode, argument in _tokens(stream):
        if opcode == "STOP":
            if len(machine.stack) != 1:
                break
            return machine.stack[0], machine.storages
        machine.step(opcode, argument)
    raise ValueError("its pickle ends with an unbalanced stack")


def _tokens(stream: Stream) -> Iterator[tuple[str, Any]]:
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
        self.storages: dict[str, Storage] = {}

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
                raise ValueError(f"its pickle appends to {brief(self._top())}")
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
                raise ValueError(f"its pickle sets attributes of {brief(self._top())}: refused")
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
            raise ValueError(f"its pickle sets items of {brief(target)}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError(f"a dictionary has the key {brief(key)}; expected strings or integers")
            target[key] = value

    def _storage(self, reference: Any) -> Storage:
        if not isinstance(reference, tuple) or not reference or reference[0] != "storage":
            what = reference[0] if isinstance(reference, tuple) and reference else reference
            raise ValueError(f"its pickle refers to {brief(what)} outside of it; only storages are known")
        if len(reference) not in (5, 6) or (len(reference) == 6 and reference[5] is not None):
            raise ValueError("a storage is described in an unknown way (as the view of another?)")
        kind, key, _location, numel = reference[1:5]
        name = kind.name.rsplit(".", 1)[-1] if isinstance(kind, _Name) else ""
        if name not in _DTYPES:
            raise ValueError(f"a storage is of the type {brief(kind)}, not one of {', '.join(_DTYPES)}")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 40:
            raise ValueError(f"storage {brief(key)} has a bad name or number of elements")
        storage = Storage(key, _DTYPES[name], numel)
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
            "If you trust the file, load it with the program that wrote it, and save a torch module's state_dict(), or "
            "arrays of JAX by flax.serialization.to_bytes"
        )
    raise ValueError("its pickle refers to a name that is no string")


def _call(function: Any, arguments: Any) -> Any:
    """What a call of one of the known functions amounts to."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError(f"its pickle calls {brief(function)}: refused")
    match function.name, len(arguments):
        case "collections.OrderedDict", 0:
            return _OrderedDict()
        case "collections.OrderedDict", 1 if isinstance(arguments[0], list):
            return _ordered(arguments[0])
        case ("torch._utils._rebuild_tensor", 4) | ("torch._utils._rebuild_tensor_v2", 6 | 7):
            storage, offset, size, stride = arguments[:4]
            if not isinstance(storage, Storage) or type(offset) is not int or not _are_ints(size, stride):
                raise ValueError("a tensor is described in a way this reader does not know")
            return Tensor(storage, offset, size, stride)
        case "torch._utils._rebuild_parameter", 3 if isinstance(arguments[0], Tensor):
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


def brief(value: Any) -> str:
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
