"""Zip archives that are not trusted."""

from __future__ import annotations

import zipfile
from collections import Counter
from typing import BinaryIO

__all__ = ["MAX_BYTES", "open_archive", "read_member"]

MAX_BYTES = 4 << 30


def open_archive(file: BinaryIO, size: int, *, floor: int = 1 << 20, expansion: int = 16) -> zipfile.ZipFile:
    """Opens a zip archive, unless its members would unpack to an absurd size.

    Args:
      file: the archive.
      size: its bytes.
      floor: a total of so many unpacked bytes is always fine.
      expansion: beyond the floor, how many times the file's size the members may take. Archives may be
        repacked with compression, but weights hardly compress: far beyond the default it is a bomb.

    Raises:
      ValueError: if it is damaged or empty, the declared sizes are above the limits, or a name occurs twice.
    """
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # besides BadZipFile, whatever damaged records lead to
        raise ValueError(f"the zip archive is truncated or damaged ({error})") from error
    members = archive.infolist()
    if not members:
        raise ValueError("the archive is empty")
    total = sum(member.file_size for member in members)
    if total > min(MAX_BYTES, max(floor, expansion * size)) or sum(m.compress_size for m in members) > size:
        raise ValueError(f"the archive of {size} bytes declares {total} bytes of content: a zip bomb?")
    # Of the others nobody's weights are; what they unpack a few bytes to cannot be limited.
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("the archive is compressed by another method than deflate")
    name, count = Counter(member.filename for member in members).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the archive holds {name!r} more than once")
    return archive


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads one member; anything wrong with it is a ValueError that names it."""
    try:
        with archive.open(name) as member:
            # Never more than declared, which has been checked: `ZipFile.read` would unpack whatever is there.
            return member.read(archive.getinfo(name).file_size)
    except Exception as error:  # zlib.error, lzma.LZMAError: the decompressors have exceptions of their own
        raise ValueError(f"the archive's member {name!r} is damaged or unsupported: {error}") from error
