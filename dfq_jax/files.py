"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed.

    Raises:
      OSError: the folder is missing, read-only or full; nothing is left behind.
    """
    path = os.fspath(path)
    directory, base = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{base}.{uuid.uuid4().hex}.tmp")
    try:
        # Not tempfile.mkstemp, whose files only their owner can read.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new name survives a power cut once the directory is on disk too, where it can be opened (POSIX).
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
