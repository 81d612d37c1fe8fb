"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], data: bytes | bytearray) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed.

    Raises:
      OSError: the folder is missing, read-only or full; it names `path`, and nothing is left behind.
    """
    directory, base = os.path.split(os.path.abspath(path))
    # Not tempfile.mkstemp, whose files only their owner can read.
    with replacing(path, os.path.join(directory, f".{base}.{uuid.uuid4().hex}.tmp")) as file:
        file.write(data)
    # The new name survives a power cut once the directory is on disk too, where it can be opened (POSIX).
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], temporary: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write under a temporary name in the folder of `path`, which it takes the place of in the end.

    Raises:
      OSError: as `write_atomically`.
    """
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            # The user knows nothing of the temporary name, and a full disk has none.
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        raise
