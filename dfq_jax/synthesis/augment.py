"""Random and fixed changes of images during synthesis; each takes and returns `[N, *spatial, C]`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.synthesis.config import SynthesisConfig


def augment(config: SynthesisConfig, key: Key[Array, ""], images: Float[Array, "n *s c"]) -> Float[Array, "n *s c"]:
    """The random changes of one optimizer step; the key is consumed."""
    flip_key, jitter_key, crop_key = jax.random.split(key, 3)
    if config.flip:
        images = random_flip(flip_key, images)
    if config.jitter:
        images = random_shift(jitter_key, images, config.jitter)
    if config.crop:
        images = random_crop(crop_key, images, config.crop)
    return images


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
    offsets = jax.random.randint(key, (spatial,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (0, *offsets, 0), images.shape)


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
