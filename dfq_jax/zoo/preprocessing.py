"""From pixels to the input of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dfq_jax.base import check_field

__all__ = ["Preprocessing"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From pixels to a network's input: ``(pixels * scale - mean) / std``, after resizing and cropping.

    >>> Preprocessing(mean=(0.5,), std=(0.5,))(np.array([[[[0], [255]]]], np.uint8)).ravel().tolist()
    [-1.0, 1.0]

    Attributes:
      mean: mean of each channel, on the scale of ``pixels * scale``.
      std: standard deviation of each channel, on the same scale.
      scale: factor for the pixels 0...255.
      resize: length in pixels to which an image's short side is resized, or None to leave it.
      crop: side in pixels of the square cut from the center, or None not to cut.
      interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, for `resize`.

    Raises:
      TypeError: if `mean` or `std` is not a tuple of numbers.
      ValueError: if `mean` and `std` differ in length or are empty, a number is not finite, a standard
        deviation, `scale` or a size is not positive, or the interpolation is unknown.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(_is_number(item) for item in value):
                raise TypeError(f"{name}: expected a tuple of numbers, one a channel, found {value!r}")
            if not value or not all(map(math.isfinite, value)):
                raise ValueError(f"{name}: expected finite numbers, one for each channel, found {value!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: has {len(self.std)} channels and mean {len(self.mean)}")
        check_field("std", self.std, "positive numbers", lambda std: min(std) > 0)
        check_field("scale", self.scale, "a positive number such as 1/255", _is_positive)
        for name in ("resize", "crop"):
            check_field(name, getattr(self, name), "a positive number of pixels or None", _is_size)
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop: {self.crop} pixels do not fit into images resized to {self.resize}")
        known = f"one of {', '.join(_INTERPOLATIONS)}"
        check_field("interpolation", self.interpolation, known, _INTERPOLATIONS.__contains__)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n ho wo c"]:
        """Preprocesses images.

        Images that already have the size of `crop` are neither resized nor cropped.

        Args:
          images: pixels 0...255, `[N, H, W, C]`, uint8.

        Returns:
          The network's input `[N, H', W', C]`, float32.

        Raises:
          TypeError: if the images are not a uint8 array.
          ValueError: if they are not `[N, H, W, C]`, have another number of channels or are smaller than
            `crop`.
          ImportError: if they are to be resized and pillow is not installed.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected pixels as uint8, found {images.dtype}; do not scale them")
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(f"images: expected shape [N, H, W, C], found {images.shape}")
        if images.shape[3] != self.channels:
            raise ValueError(f"images: expected {self.channels} channels, found shape {images.shape}")
        if self.crop is None or images.shape[1:3] != (self.crop, self.crop):
            if self.resize is not None:
                images = _resize(images, self.resize, self.interpolation)
            if self.crop is not None:
                images = _crop(images, self.crop)
        result = images.astype(np.float32) * np.float32(self.scale)
        result -= np.asarray(self.mean, np.float32)
        result /= np.asarray(self.std, np.float32)
        return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value > 0


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)


def _resize(images: np.ndarray, short: int, interpolation: str) -> np.ndarray:
    count, height, width, channels = images.shape
    if min(height, width) == short or count == 0:
        return images
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("resizing images needs pillow: pip install 'dfq_jax[folder]'") from error
    size = tuple(round(side * short / min(height, width)) for side in (width, height))
    method = getattr(Image.Resampling, interpolation.upper())
    result = np.empty((count, size[1], size[0], channels), np.uint8)
    # Pillow knows images of three channels or of one, networks take any number.
    for parts in [slice(0, 3)] if channels == 3 else range(channels):
        for image, resized in zip(images, result, strict=True):
            pixels = np.ascontiguousarray(image[:, :, parts])
            resized[:, :, parts] = np.asarray(Image.fromarray(pixels).resize(size, method))
    return result


def _crop(images: np.ndarray, side: int) -> np.ndarray:
    height, width = images.shape[1:3]
    if side > min(height, width):
        raise ValueError(f"images: {height}x{width} pixels are too small to crop {side}x{side} from")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]
