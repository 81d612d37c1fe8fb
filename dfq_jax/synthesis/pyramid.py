"""Images as sums of a pyramid: free values at every resolution, the coarse ones drawn large, are what is optimized.

Waves (`fourier`) bring slow changes within reach of few steps, but each of them runs through the whole image, which
images with empty parts want none of. Values of a pyramid have a size and a place. Lucid, the library of "Feature
Visualization", offers both (https://github.com/tensorflow/lucid).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key


def level_sizes(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of the levels, from the image's own to at most two pixels a side, halved and rounded up."""
    sizes = [spatial]
    while max(sizes[-1]) > 2:
        sizes.append(tuple(math.ceil(size / 2) for size in sizes[-1]))
    return sizes


def init_levels(key: Key[Array, ""], shape: tuple[int, ...]) -> list[Float[Array, "n ..."]]:
    """Standard Gaussian values of each level for images of `shape` `[N, *spatial, C]`; the key is consumed."""
    count, *spatial, channels = shape
    shapes = [(count, *size, channels) for size in level_sizes(tuple(spatial))]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    # Drawn in one piece: the compiler takes its time for each drawing.
    parts = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def sum_of_levels(levels: list[Float[Array, "n ..."]], exponent: float) -> Float[Array, "n ..."]:
    """The images of `init_levels`'s values, at first of mean 0 and a standard deviation of about 1."""
    weights = [jnp.float32(weight) for weight in level_weights(len(levels), levels[0].ndim - 2, exponent)]
    images = weights[-1] * levels[-1]
    for weight, level in zip(weights[-2::-1], levels[-2::-1], strict=True):
        images = weight * level + jax.image.resize(images, level.shape, "linear")
    return images


def level_weights(count: int, axes: int, exponent: float) -> np.ndarray:
    """The weight of each level: amplitudes then fall with frequency to the power `exponent`.

    Twice the pixels along each of d axes spread a level's power over 2^d times as many waves.
    """
    weights = 2.0 ** (np.arange(count) * (exponent - axes / 2))
    variances = np.where(np.arange(count) == 0, 1.0, (2 / 3) ** axes)  # between pixels two values are averaged
    return weights / np.sqrt((variances * np.square(weights)).sum())
