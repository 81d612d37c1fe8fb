"""Random and fixed changes of images during synthesis; each takes and returns `[N, *spatial, C]`."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Key

from dfq_jax.base import clip, low_pass, random_crop, random_flip, random_shift, random_window, smooth
from dfq_jax.synthesis.config import SynthesisConfig


def augment(config: SynthesisConfig, key: Key[Array, ""], images: Float[Array, "n *s c"]) -> Float[Array, "n *s c"]:
    """The random changes of one optimizer step; the key is consumed."""
    flip_key, window_key, jitter_key, crop_key = jax.random.split(key, 4)
    if config.flip:
        images = random_flip(flip_key, images)
    if config.smoothing:
        images = smooth(images, config.smoothing)
    if config.extra_pixels:
        images = random_window(window_key, images, config.extra_pixels)
    if config.jitter:
        images = random_shift(jitter_key, images, config.jitter)
    if config.crop:
        images = random_crop(crop_key, images, config.crop)
    if config.pixel_range is not None:
        # Clipped pixels keep their gradient: without it they could never come back.
        images = images + jax.lax.stop_gradient(clip(images, config.pixel_range) - images)
    return images


def finish(config: SynthesisConfig, images: Float[Array, "n *s c"]) -> Float[Array, "n *t c"]:
    """The fixed changes of finished images: what `augment` does at random, and the low-pass filter."""
    if config.smoothing:
        images = smooth(images, config.smoothing)
    if config.extra_pixels:
        before = config.extra_pixels // 2
        cut = slice(before, before - config.extra_pixels)
        images = images[:, *(cut,) * (images.ndim - 2)]
    if config.low_pass:
        images = low_pass(images, config.low_pass)
    return images if config.pixel_range is None else clip(images, config.pixel_range)
