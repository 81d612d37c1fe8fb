"""Encoded images to pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

__all__ = ["decode", "is_gray", "pillow"]

_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"})
_GRAY = frozenset({"1", "L", "LA"})


def pillow(spec: str) -> Any:
    """Pillow's image module.

    Raises:
      ImportError: it is not installed; the message names the extra.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"spec: {spec} needs pillow: pip install 'dfq_jax[folder]'") from error
    return Image


def decode(content: Path | bytes, name: str, channels: int | None) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image.

    Args:
      content: its file, or what is in it.
      name: what to call it in errors.
      channels: 1 for gray, 3 for RGB; None for what it has.

    Raises:
      ValueError: it is damaged, too large, or not of 8 bits.
    """
    image_module = pillow("decoding images")
    try:
        with image_module.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image_file:
            image, mode = image_file, image_file.mode
            if mode in _MODES:
                if "transparency" in image.info:
                    image = image.convert("RGBA")  # else Pillow warns about palettes
                gray = channels == 1 or (channels is None and mode in _GRAY)
                pixels = np.asarray(image.convert("L" if gray else "RGB"))
                return pixels[..., None] if gray else pixels
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(f"spec: image {name!r} cannot be decoded: {error}") from error
    raise ValueError(f"spec: image {name!r} has pixels of mode {mode}, not of 8 bits")


def is_gray(file: Path) -> bool:
    """Whether an image file has no colors; from its header alone. A damaged one passes: `decode` will report it."""
    try:
        with pillow(os.fspath(file)).open(file) as image:
            return image.mode in _GRAY
    except Exception:  # whatever is wrong with it, decoding says so
        return True
