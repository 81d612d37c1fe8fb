"""Arrays of images, `[N, *spatial, C]`: taken in batches, flipped, shifted, cropped and smoothed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.base.devices import sharded_as


def batches(images: Any, batch_size: int) -> Iterator[Any]:
    """Equal batches of at most `batch_size`, so that each stage compiles once; the count of images is kept.

    Batches of images that are sharded over devices are sharded over them, too.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, found {batch_size!r}.")
    count = images.shape[0]
    size = largest_divisor(min(batch_size, count), count)
    if size * 4 < min(batch_size, count):  # an awkward count: one smaller last batch instead of many tiny ones
        size = min(batch_size, count)
    for start in range(0, count, size):
        yield sharded_as(images[start : start + size], images)


def largest_divisor(limit: int, length: int) -> int:
    """The largest number, at most `limit`, that divides a length into equal parts, so that each stage compiles once.

    >>> largest_divisor(50, 120)
    40
    """
    return max(size for size in range(1, limit + 1) if length % size == 0)


def random_flip(key: Key[Array, ""], images: Float[Array, "n *s c"]) -> Float[Array, "n *s c"]:
    """Mirror each image left to right with probability one half; vectors have no sides and stay as they are."""
    if images.ndim < 3:
        return images
    chosen = jax.random.bernoulli(key, shape=(images.shape[0],) + (1,) * (images.ndim - 1))
    return jnp.where(chosen, jnp.flip(images, axis=-2), images)


def random_shift(key: Key[Array, ""], images: Float[Array, "n *s c"], distance: int) -> Float[Array, "n *s c"]:
    """Shift all images cyclically by the same random distance on each spatial axis."""
    axes = tuple(range(1, images.ndim - 1))
    shifts = jax.random.randint(key, (len(axes),), -distance, distance + 1)
    return jnp.roll(images, shifts, axes)


def random_crop(key: Key[Array, ""], images: Float[Array, "n *s c"], pad: int) -> Float[Array, "n *s c"]:
    """Reflect-pad by `pad` pixels and cut a random window of the original size."""
    spatial = images.ndim - 2
    padded = jnp.pad(images, [(0, 0)] + [(pad, pad)] * spatial + [(0, 0)], mode="reflect")
    return random_window(key, padded, 2 * pad)


def random_window(key: Key[Array, ""], images: Float[Array, "n *s c"], cut: int) -> Float[Array, "n *t c"]:
    """A random window of all images, `cut` pixels smaller along each spatial axis."""
    sizes = [size - cut for size in images.shape[1:-1]]
    offsets = jax.random.randint(key, (len(sizes),), 0, cut + 1)
    return jax.lax.dynamic_slice(images, (0, *offsets, 0), (len(images), *sizes, images.shape[-1]))


def smooth(images: Float[Array, "n *s c"], sigma: float) -> Float[Array, "n *s c"]:
    """Blur by a Gaussian of standard deviation `sigma` pixels, cut to 3 taps an axis; mirrored at the border."""
    side = math.exp(-0.5 / sigma**2)
    center, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    for axis in range(1, images.ndim - 1):
        padded = jnp.pad(images, [(int(a == axis),) * 2 for a in range(images.ndim)], mode="reflect")
        left, right = (jax.lax.slice_in_dim(padded, start, start + images.shape[axis], axis=axis) for start in (0, 2))
        images = center * images + side * (left + right)
    return images


def clip(
    images: Float[Array, "n *s c"], pixel_range: tuple[tuple[float, ...], tuple[float, ...]]
) -> Float[Array, "n *s c"]:
    """Each channel within its lowest and highest value."""
    low, high = (jnp.asarray(limit, images.dtype) for limit in pixel_range)
    return jnp.clip(images, low, high)


def low_pass(images: Float[Array, "n *s c"], cutoff: float) -> Float[Array, "n *s c"]:
    """Multiply the spectrum of each image by exp(-D^2 / (2 cutoff^2)), D in cycles per image (SynQ)."""
    axes = tuple(range(1, images.ndim - 1))
    squared = jnp.zeros((1,) * images.ndim)
    for axis in axes:
        size = images.shape[axis]
        shape = [1] * images.ndim
        shape[axis] = size
        squared = squared + jnp.square(jnp.fft.fftfreq(size) * size).reshape(shape)
    spectrum = jnp.fft.fftn(images, axes=axes) * jnp.exp(-squared / (2 * cutoff**2))
    return jnp.fft.ifftn(spectrum, axes=axes).real.astype(images.dtype)
