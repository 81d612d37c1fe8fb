"""Named arrays in files of every format that is read here, one at a time: a file is never held as a whole.

A file is opened to a table of names and functions, each of which reads one array. So loading a checkpoint takes its own
size in memory and that of its largest array, not twice or three times its size.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import flax.serialization
import msgpack
import numpy as np
import safetensors

from dfq_jax.zoo.archive import MAX_BYTES, open_archive, read_member
from dfq_jax.zoo.directories import find_checkpoint, open_orbax
from dfq_jax.zoo.names import Readers
from dfq_jax.zoo.torch_reader import open_torch

__all__ = ["open_arrays", "read_arrays", "read_npz", "read_torch"]

# Of an open file and its size in bytes.
Opener = Callable[[BinaryIO, int], Readers]

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
# First bytes of msgpack's dictionaries, of those and extension types, and of integers and strings.
_MAP = re.compile(rb"[\x80-\x8f\xde\xdf]")
_ARRAY = re.compile(rb"[\x80-\x8f\xde\xdf\xc7-\xc9\xd4-\xd8]")
_KEY = re.compile(rb"[\x00-\x7f\xcc-\xd3\xe0-\xff\xa0-\xbf\xd9-\xdb]")
# Flax writes arrays of more than a gigabyte as a dictionary of pieces, with this key among them.
_CHUNKED = "__msgpack_chunked_array__"
# What has been read of a mapped file counts as memory of the process until the file is mapped anew.
_MAPPED_BYTES = 16 << 20


def read_arrays(path: str | os.PathLike[str], kind: tuple[str, Opener] | None = None) -> dict[str, np.ndarray]:
    """Reads all named arrays of a file; the format is recognized by content, not by the file's name.

    Args:
      path: what `open_arrays` opens.
      kind: as of `open_arrays`.

    Returns:
      Name to array; nested names of a msgpack file or directory joined with '/'.

    Raises:
      ValueError: if there is no such file, it is in none of the formats, or is damaged.
      ImportError: for a directory of Orbax without orbax-checkpoint.
    """
    with open_arrays(path, kind) as readers:
        return {name: read() for name, read in readers.items()}


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
    return read_arrays(path, ("npz", _open_npz))


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the state dict of a torch file (`.pth`, `.pt`, `.th`; zip or the legacy format) as numpy arrays.

    The state dict is the file's dictionary itself or, where that holds no tensors, what it has under
    ``state_dict``, ``model``, ``net`` or ``model_state_dict``. The prefix ``module.`` is dropped where every
    name has it. Scalars and strings among the tensors are passed over. No code of the file is run.

    Args:
      path: the file.

    Returns:
      Name to array, in the file's order, each a copy of its own in C order; bfloat16 as `jax.numpy.bfloat16`.

    Raises:
      ValueError: if there is no such file, it is not a torch file, is truncated, refers to names other than
        those of tensors, its tensors reach beyond their storages, or it declares absurd sizes.
    """
    return read_arrays(path, ("a torch file", open_torch))


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike[str], kind: tuple[str, Opener] | None = None) -> Iterator[Readers]:
    """Opens a file whose arrays are read one by one.

    Args:
      path: a safetensors, torch, npz or Flax msgpack file; or a directory of Orbax or of
        `flax.training.checkpoints`, the newest step of several.
      kind: a format's name and what opens it; None to recognize the format by the file's content.

    Yields:
      Name to a function that reads the array; in the file's order, to be called inside the `with` statement.

    Raises:
      ValueError: as `read_arrays`; the functions raise it, too.
    """
    with contextlib.ExitStack() as stack:
        with _naming(path):
            found = find_checkpoint(Path(path)) if kind is None and os.path.isdir(path) else path
            if isinstance(found, dict):
                name, open_ = "", functools.partial(open_orbax, found)
            else:
                path = found
                file = stack.enter_context(open(path, "rb"))
                size = os.fstat(file.fileno()).st_size
                name, opener = _recognize(file, size) if kind is None else kind
                open_ = functools.partial(opener, file, size)
        with _naming(path, name):
            readers = open_()

        def read(array: str) -> np.ndarray:
            with _naming(path, name, f"{array!r}: "):
                return readers[array]()

        yield {name: functools.partial(read, name) for name in readers}


@contextlib.contextmanager
def _naming(path: Any, kind: str = "", array: str = "") -> Iterator[None]:
    """What a parser makes of damaged bytes, whichever error, becomes a ValueError that names the file."""
    try:
        yield
    except ImportError:
        raise
    except OSError as error:
        raise ValueError(f"path: cannot read {os.fspath(path)!r}: {error.strerror or error}") from error
    except Exception as error:
        shown = f"{os.fspath(path)!r} cannot be read{kind and ' as ' + kind}"
        raise ValueError(f"path: {shown}: {array}{str(error) or type(error).__name__}") from error


def _recognize(file: BinaryIO, size: int) -> tuple[str, Opener]:
    """A format's name and what opens it."""
    start = file.read(9)
    file.seek(0)
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise ValueError(f"it is {kind}. Read here are: {_FORMATS}")
    if start.startswith(b"PK\x03\x04"):
        names = open_archive(file, size, floor=MAX_BYTES).namelist()
        file.seek(0)
        return ("a torch file", open_torch) if any(name.endswith(".pkl") for name in names) else ("npz", _open_npz)
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors", _open_safetensors
    if start[:1] == b"\x80":
        return "a torch file", open_torch
    if _MAP.match(start):
        return "Flax msgpack", _open_msgpack
    what = "it is empty" if not start else f"it starts with {start!r}"
    raise ValueError(f"{what}, which is none of the formats read here: {_FORMATS}")


# --- npz ---


def _open_npz(file: BinaryIO, size: int) -> Readers:
    archive = open_archive(file, size, floor=_NPZ_FLOOR, expansion=_NPZ_EXPANSION)
    names = archive.namelist()
    if not any(name.endswith(".npy") for name in names):
        keras = ": a Keras file, which Keras loads; pass the model" if "model.weights.h5" in names else ""
        raise ValueError(f"it is a zip archive of {', '.join(names[:5])}{keras}")

    def read(name: str) -> np.ndarray:
        return _parse_npy(read_member(archive, name))

    return {name.removesuffix(".npy"): functools.partial(read, name) for name in names}


def _parse_npy(raw: bytes) -> np.ndarray:
    stream = io.BytesIO(raw)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"it is in npy format {version}, which is not read here")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, stored as a pickle: refused")
    start, count = stream.tell(), math.prod(shape)
    if any(extent < 0 for extent in shape) or count * dtype.itemsize != len(raw) - start:
        raise ValueError(f"it declares {dtype} {shape} but has {len(raw) - start} bytes")
    return np.frombuffer(raw, dtype, count, start).reshape(shape, order="F" if fortran else "C")


# --- safetensors ---


def _open_safetensors(file: BinaryIO, size: int) -> Readers:
    mapped: Any = None
    unread = 0

    def read(name: str) -> np.ndarray:
        nonlocal mapped, unread
        if unread <= 0:
            mapped, unread = safetensors.safe_open(file.name, "numpy"), _MAPPED_BYTES
        array = mapped.get_tensor(name)
        unread -= array.nbytes
        return array

    with safetensors.safe_open(file.name, "numpy") as opened:
        return {name: functools.partial(read, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


# --- Flax msgpack ---


def _open_msgpack(file: BinaryIO, size: int) -> Readers:
    limit = max(size, 1 << 20)
    unpacker = msgpack.Unpacker(file, read_size=1 << 20, max_buffer_size=limit, strict_map_key=False)
    spans = _msgpack_spans(unpacker, file.fileno(), "")
    if unpacker.tell() != size:
        raise ValueError(f"it goes on for {size - unpacker.tell()} bytes after its end")
    if not spans:
        raise ValueError("it holds no arrays")

    def read(start: int, end: int) -> np.ndarray:
        file.seek(start)
        raw = file.read(end - start)
        # A list of numbers would take many times its bytes, so look first; whole arrays are of a type of Flax's own.
        leaf = flax.serialization.msgpack_restore(raw) if _ARRAY.match(raw) else None
        if not isinstance(leaf, (np.ndarray, np.generic)):
            raise ValueError("it is no array")
        return np.asarray(leaf)

    return {name: functools.partial(read, *span) for name, span in spans.items()}


def _msgpack_spans(unpacker: msgpack.Unpacker, descriptor: int, name: str) -> dict[str, tuple[int, int]]:
    """Where in the file each leaf of the nested dictionaries lies: name to first byte and end."""
    start = unpacker.tell()
    if not _MAP.match(os.pread(descriptor, 1, start)):
        unpacker.skip()
        return {name: (start, unpacker.tell())}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(unpacker.read_map_header()):
        if not _KEY.match(os.pread(descriptor, 1, unpacker.tell())):  # it may be of any size, so look first
            raise ValueError(f"a key in {name!r} is neither a string nor an integer")
        key = unpacker.unpack()
        inner = _msgpack_spans(unpacker, descriptor, f"{name}/{key}" if name else str(key))
        if twice := spans.keys() & inner.keys():
            raise ValueError(f"two leaves have the name {min(twice)!r}")
        spans |= inner
    return {name: (start, unpacker.tell())} if f"{name}/{_CHUNKED}" in spans else spans
