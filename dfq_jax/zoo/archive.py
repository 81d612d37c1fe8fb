"""Zip archives that are not trusted."""

from __future__ import annotations

import zipfile
from collections import Counter
from typing import BinaryIO

__all__ = ["MAX_BYTES", "check_archive", "open_archive", "read_member"]

MAX_BYTES = 4 << 30


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Opens an archive; whatever is wrong with it is a ValueError."""
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # besides BadZipFile, whatever damaged records lead to
        raise ValueError(f"the zip archive is truncated or damaged ({error})") from error


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
    if total > MAX_BYTES or total > max(floor, expansion * size):
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
