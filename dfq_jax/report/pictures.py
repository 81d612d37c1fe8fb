"""Images of a network as pictures: its preprocessing undone, in a grid, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dfq_jax.base import check_field, require

GAP = 2  # pixels between the pictures of a grid
NOT_AFFINE = "preprocessing: expected one that scales and shifts each channel of pixels; pass None for another"


def image_grid(
    images: Float[Any, "n h w c"],
    preprocessing: Callable[[np.ndarray], Any] | None = None,
    *,
    columns: int | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """One picture of images that a network takes, as with `matplotlib.pyplot.imshow`.

    >>> image_grid(np.zeros((4, 8, 8, 3), np.float32), lambda pixels: pixels / 255).shape
    (18, 18, 3)

    Args:
      images: preprocessed, `[N, H, W, C]`. One channel is shown as gray, three as red, green and blue, others as gray
        pictures side by side.
      preprocessing: what made such images of pixels 0...255 (a `zoo.Preprocessing`, or a function of yours), to be
        undone; by default nearly the lowest value of all is shown as 0 and nearly the highest as 255.
      columns: images in a row; by default as many as make the picture about square.

    Returns:
      Pixels 0...255, `[height, width, 3]`, with white between the images.

    Raises:
      ValueError: images of another shape, values that are not finite, columns that are no number of at least 1, or
        preprocessing that does more to values than to scale and shift each channel.
    """
    if columns is not None:
        check_field("columns", columns, "an integer of at least 1, or None", lambda n: type(n) is int and n > 0)
    tiles = pictures(images, preprocessing)
    count, height, width, _ = tiles.shape
    if columns is None:
        columns = max(1, round(math.sqrt(count * height / width)))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (height + GAP) * (index // columns), (width + GAP) * (index % columns)
        grid[top : top + height, left : left + width] = tile
    return grid


def pictures(
    images: Float[Any, "n h w c"], preprocessing: Callable[[np.ndarray], Any] | None = None
) -> UInt8[np.ndarray, "n height width 3"]:
    """A picture of each image, as `image_grid` shows them."""
    values = np.asarray(images, np.float64)  # differences of the largest float32 are finite
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"images: expected shape [N, H, W, C], found {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("images: expected finite numbers, found NaN or infinite ones.")
    low, high = _spread(values) if preprocessing is None else _ends(preprocessing, values.shape)
    tiles = np.rint(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)
    if tiles.shape[-1] == 3:
        return tiles
    side_by_side = np.concatenate(np.split(tiles, tiles.shape[-1], axis=-1), axis=2)
    return np.repeat(side_by_side, 3, axis=-1)


def _spread(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (0.5, 99.5))
    return (low, high) if low < high else (low - 1, high + 1)


def _ends(preprocessing: Callable[[np.ndarray], Any], shape: tuple[int, ...]) -> np.ndarray:
    """What preprocessing makes of black and of white, `[2, C]`: two points tell a line, a third one that it is one."""
    probe = np.broadcast_to(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1), (3, *shape[1:]))
    try:
        found = np.asarray(preprocessing(np.ascontiguousarray(probe)), np.float32)
    except Exception as error:  # it may be any function
        raise ValueError(f"{NOT_AFFINE} ({type(error).__name__}: {error}).") from error
    if found.ndim != 4 or found.shape[-1] != shape[-1]:
        raise ValueError(f"{NOT_AFFINE} (pixels {shape[1:]} became {found.shape[1:]}).")
    channels = found.mean((1, 2))
    span = np.abs(channels[2] - channels[0])
    line = channels[0] + (channels[2] - channels[0]) / 5
    near = np.abs(found - channels[:, None, None]).max(initial=0) + np.abs(channels[1] - line).max()
    if not (span > 0).all() or near > 1e-3 * span.max():
        raise ValueError(f"{NOT_AFFINE}.")
    return channels[[0, 2]]


def png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The content of a PNG file.

    Raises:
      ImportError: pillow is not installed.
    """
    file = io.BytesIO()
    require("PIL.Image", "report").fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
