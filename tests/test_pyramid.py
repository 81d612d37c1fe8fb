"""Images of a pyramid against NumPy in float64, for all kinds of sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fourier import SHAPES
from test_synthesis import CONFIG, GRAPH, KEY, VARIABLES

from dfq_jax.synthesis import pyramid, synthesize

PYRAMID = dataclasses.replace(CONFIG, num_images=4, source="pyramid")

sum_of_levels = jax.jit(pyramid.sum_of_levels, static_argnums=1)


def stretched(x, sizes):
    """Linear interpolation between the centers of pixels, the outermost values beyond them."""
    for axis, size in enumerate(sizes, 1):
        own = x.shape[axis]
        places = (np.arange(size) + 0.5) * own / size - 0.5
        x = np.apply_along_axis(lambda line: np.interp(places, np.arange(own), line), axis, x)  # noqa: B023
    return x


@pytest.mark.parametrize("exponent", [0.5, 1.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_sums_of_levels(shape, exponent):
    levels = pyramid.init_levels(KEY, shape)
    found = sum_of_levels(levels, exponent)
    assert found.shape == shape and found.dtype == jnp.float32
    weights = 2.0 ** (np.arange(len(levels)) * (exponent - (len(shape) - 2) / 2))
    wanted = 0.0
    for weight, level in reversed(list(zip(weights, levels, strict=True))):
        level = np.asarray(level, np.float64)
        wanted = weight * level + (stretched(wanted, level.shape[1:-1]) if np.ndim(wanted) else 0.0)
    factor = np.vdot(wanted, found) / np.vdot(wanted, wanted)
    np.testing.assert_allclose(found, factor * wanted, atol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(256, 32, 32, 1), (256, 28, 28, 1), (1024, 33, 1), (512, 8, 9, 7, 1)], ids=str)
def test_images_begin_with_about_unit_variance(shape, exponent):
    images = sum_of_levels(pyramid.init_levels(KEY, shape), exponent)
    np.testing.assert_allclose(np.asarray(images, np.float64).std(), 1.0, atol=0.2)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_the_spectrum_falls_with_frequency(exponent):
    """An octave's waves have 2^exponent times the amplitude of the next octave's, up to what interpolation adds."""
    images = sum_of_levels(pyramid.init_levels(KEY, (64, 64, 64, 1)), exponent)
    power = np.square(np.abs(np.fft.fft2(np.asarray(images, np.float64), axes=(1, 2)))).mean((0, 3))
    frequency = 64 * np.hypot(*np.meshgrid(*(np.fft.fftfreq(64),) * 2))
    octaves = [power[(frequency > low) & (frequency <= 2 * low)].mean() for low in (2, 4, 8, 16)]
    slope, _ = np.polyfit(np.arange(4), np.log2(octaves), 1)
    np.testing.assert_allclose(slope, -2 * exponent, atol=0.5)


def test_images_come_to_match_the_statistics():
    result = synthesize(GRAPH, VARIABLES, KEY, dataclasses.replace(PYRAMID, steps=60))
    start = synthesize(GRAPH, VARIABLES, KEY, dataclasses.replace(PYRAMID, steps=1))
    assert result.losses[0] < 0.1 * start.losses[0]
