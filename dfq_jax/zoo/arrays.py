"""Named arrays in files of every format that is read here, one at a time: a file is never held as a whole.

A file is opened to a table of names and functions, each of which reads one array. So loading a checkpoint takes its own
size in memory and that of its largest array, not twice or three times its size.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import flax.serialization
import msgpack
import numpy as np
import safetensors

from dfq_jax.zoo.archive import check_archive, open_archive, read_member
from dfq_jax.zoo.directories import find_checkpoint, open_orbax
from dfq_jax.zoo.torch_reader import Readers, open_torch

__all__ = ["Readers", "open_arrays", "read_arrays", "read_npz"]

_FORMATS = "safetensors, torch (.pth, .pt, .th), npz, Flax msgpack, or a directory of Orbax"
# What else people have, by its first bytes, and what to do.
_FOREIGN = {
    b"\x89HDF": "an HDF5 file, as Keras writes: load it with Keras and pass the model",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "one npy array: save all of them with numpy.savez",
    b"version https": "a pointer of Git LFS: run `git lfs pull`",
}
# Compressed images may be mostly background; 1032 is what deflate can reach at all.
_NPZ_EXPANSION = 200
_NPZ_FLOOR = 64 << 20
# Flax writes arrays of more than a gigabyte as a dictionary of pieces, with this key among them.
_CHUNKED = "__msgpack_chunked_array__"
# What has been read of a mapped file counts as memory of the process until the file is mapped anew.
_MAPPED_BYTES = 16 << 20


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all named arrays of a file; the format is recognized by content, not by the file's name.

    Args:
        path: what `open_arrays` opens.

    Returns:
        Name to array; nested names of a msgpack file or directory joined with '/'.

    Raises:
        ValueError: if there is no such file, it is in none of the formats, or is damaged.
        ImportError: for a directory of Orbax without orbax-checkpoint.
    """
    with open_arrays(path) as readers:
        return {name: read() for name, read in readers.items()}


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[Readers]:
    """Opens a file whose arrays are read one by one.

    Args:
        path: a safetensors, torch, npz or Flax msgpack file, recognized by its content; or a directory of Orbax or of
            `flax.training.checkpoints`, the newest step of several.

    Yields:
        Name to a function that reads the array; in the file's order, to be called inside the `with` statement.

    Raises:
        ValueError: as `read_arrays`; the functions raise it, too.
    """
    with contextlib.ExitStack() as stack:
        with _naming(path):
            found = find_checkpoint(Path(path)) if os.path.isdir(path) else path
        if isinstance(found, dict):
            with _naming(path):
                readers = open_orbax(found)
            yield {name: _guarded(read, path, "cannot be read") for name, read in readers.items()}
            return
        path = found
        with _naming(path):
            size = os.stat(path).st_size
            file = stack.enter_context(open(path, "rb"))
            failure, opener = _recognize(file, size, path)
        with _naming(path, failure):
            readers = opener(file, size)
        yield {name: _guarded(read, path, failure) for name, read in readers.items()}


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
    with _naming(path, _NPZ_FAILURE):
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            return {name: read() for name, read in _open_npz(file, size).items()}


@contextlib.contextmanager
def _naming(path: Any, failure: str = "cannot be read") -> Iterator[None]:
    """Errors of reading become a ValueError that names the file."""
    shown = repr(os.fspath(path))
    try:
        yield
    except OSError as error:
        raise ValueError(f"path: cannot read {shown}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"path: {shown} {failure}: {error}") from error


def _guarded(read: Callable[[], np.ndarray], path: Any, failure: str) -> Callable[[], np.ndarray]:
    def guarded() -> np.ndarray:
        with _naming(path, failure):
            return read()

    return guarded


def _recognize(file: BinaryIO, size: int, path: Any) -> tuple[str, Callable[[BinaryIO, int], Readers]]:
    """What to say where reading fails, and the function that opens the format."""
    start = file.read(9)
    file.seek(0)
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise ValueError(f"it is {kind}. Read here are: {_FORMATS}")
    if start.startswith(b"PK\x03\x04"):
        return _TORCH if _holds_pickle(file) else _NPZ
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "is a damaged or unsupported safetensors file", lambda *_: _open_safetensors(path)
    if start[:1] == b"\x80":
        return _TORCH
    if start and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "is no Flax msgpack file or damaged", _open_msgpack
    what = "it is empty" if not start else f"it starts with {start!r}"
    raise ValueError(f"{what}, which is none of the formats read here: {_FORMATS}")


def _holds_pickle(file: BinaryIO) -> bool:
    with open_archive(file) as archive:
        found = any(name.endswith(".pkl") for name in archive.namelist())
    file.seek(0)
    return found


# npz


def _open_npz(file: BinaryIO, size: int) -> Readers:
    archive = open_archive(file)
    names = archive.namelist()
    if names and not any(name.endswith(".npy") for name in names):
        keras = ": a Keras file, which Keras loads; pass the model" if "model.weights.h5" in names else ""
        raise ValueError(f"it is a zip archive of {', '.join(names[:5])}{keras}")
    check_archive(archive, size, floor=_NPZ_FLOOR, expansion=_NPZ_EXPANSION)

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: _parse_npy(name, read_member(archive, name))

    return {name.removesuffix(".npy"): reader(name) for name in archive.namelist()}


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


_NPZ_FAILURE = "cannot be read as npz"
_NPZ = _NPZ_FAILURE, _open_npz
_TORCH = "cannot be read as a torch file", open_torch


# safetensors


def _open_safetensors(path: Any) -> Readers:
    errors = (safetensors.SafetensorError, KeyError, TypeError)
    mapped: Any = None
    read_since = 0

    def open_() -> Any:
        try:
            return safetensors.safe_open(path, framework="numpy").__enter__()
        except errors as error:
            raise ValueError(str(error)) from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            nonlocal mapped, read_since
            if mapped is None or read_since > _MAPPED_BYTES:
                mapped, read_since = open_(), 0
            try:
                array = mapped.get_tensor(name)
            except errors as error:
                raise ValueError(f"{name!r}: {error}") from error
            read_since += array.nbytes
            return array

        return read

    return {name: reader(name) for name in open_().keys()}  # noqa: SIM118 (no mapping)


# Flax msgpack


def _open_msgpack(file: BinaryIO, size: int) -> Readers:
    try:
        spans = _msgpack_spans(file, size)
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error
    if not spans:
        raise ValueError("it holds no arrays")

    def reader(name: str, start: int, end: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            file.seek(start)
            try:
                leaf = flax.serialization.msgpack_restore(file.read(end - start))
            except Exception as error:  # msgpack's own exceptions, and whatever Flax makes of wrong contents
                raise ValueError(f"{name!r}: {error}") from error
            if not isinstance(leaf, (np.ndarray, np.generic)):
                raise ValueError(f"it holds {name!r}, a {type(leaf).__name__}, no array")
            return np.asarray(leaf)

        return read

    return {name: reader(name, *span) for name, span in spans.items()}


def _msgpack_spans(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Where in the file each leaf of the nested dictionaries lies: name to first byte and end."""
    limit = max(size, 1 << 20)
    unpacker = msgpack.Unpacker(file, read_size=1 << 20, max_buffer_size=limit, strict_map_key=False)

    def walk(name: str) -> dict[str, tuple[int, int]]:
        start = unpacker.tell()
        kind = os.pread(file.fileno(), 1, start)
        if not (b"\x80" <= kind <= b"\x8f" or kind in (b"\xde", b"\xdf")):
            unpacker.skip()
            return {name: (start, unpacker.tell())}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise ValueError(f"the key {key!r} is neither a string nor an integer")
            inner = walk(f"{name}/{key}" if name else str(key))
            twice = spans.keys() & inner.keys()
            if twice:
                raise ValueError(f"two leaves have the name {min(twice)!r}")
            spans |= inner
        return {name: (start, unpacker.tell())} if f"{name}/{_CHUNKED}" in spans else spans

    spans = walk("")
    if unpacker.tell() != size:
        raise ValueError(f"it goes on for {size - unpacker.tell()} bytes after its end")
    return spans
