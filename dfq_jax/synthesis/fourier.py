"""Images as sums of waves: pixels are the inverse Fourier transform of free coefficients, which are optimized.

The wave of frequency f has amplitude c / f^exponent, c a coefficient of its own. Adam moves all coefficients at one
pace, so that slow waves, which natural images mostly consist of, change faster than fast ones; free pixels, which begin
as white noise, reach them last. Olah et al. look into networks in this basis ("Feature Visualization", Distill 2017,
https://distill.pub/2017/feature-visualization).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key


def init_coefficients(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "n 2 c *h"]:
    """Standard Gaussian real and imaginary parts for images of `shape` `[N, *spatial, C]`; the key is consumed."""
    count, *spatial, channels = shape
    found = (count, 2, channels, *spatial[:-1], spatial[-1] // 2 + 1)
    # Drawn as one line, the same values: for several axes the compiler takes ten times as long.
    return jax.random.normal(key, (math.prod(found),), jnp.float32).reshape(found)


def sum_of_waves(
    coefficients: Float[Array, "n 2 c *h"], shape: tuple[int, ...], exponent: float
) -> Float[Array, "n *s c"]:
    """The images of `init_coefficients`'s array, at first of mean 0 and standard deviation 1 over many of them."""
    spatial = shape[1:-1]
    parts = coefficients * jnp.asarray(amplitudes(spatial, exponent), jnp.float32)
    waves = lax.complex(parts[:, 0], parts[:, 1])
    images = jnp.fft.irfftn(waves, spatial, tuple(range(2, waves.ndim)), norm="forward")
    return jnp.moveaxis(images, 1, -1)


def amplitudes(spatial: tuple[int, ...], exponent: float) -> np.ndarray:
    """The amplitude of each wave of `numpy.fft.rfftn`: frequency ^ -exponent, for pixels of unit variance.

    The frequency, in cycles per pixel, is at least one cycle per image, for the mean too.
    """
    along = [*map(np.fft.fftfreq, spatial[:-1]), np.fft.rfftfreq(spatial[-1])]
    frequency = np.sqrt(sum(np.square(f) for f in np.ix_(*along)))
    found = np.maximum(frequency, 1 / max(spatial)) ** -exponent
    # Each wave stands for its mirror image as well, but for those that are their own along the last axis: of them the
    # real part alone counts.
    variance = np.full(found.shape[-1], 4.0)
    variance[0] = 1.0
    if spatial[-1] % 2 == 0:
        variance[-1] = 1.0
    return found / np.sqrt((variance * np.square(found)).sum())
