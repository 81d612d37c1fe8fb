"""Images in the Fourier basis against NumPy in float64, for all kinds of sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_synthesis
from test_synthesis import CONFIG, GRAPH, KEY, VARIABLES

from dfq_jax.synthesis import fourier, source, synthesize

FOURIER = dataclasses.replace(CONFIG, num_images=4, source="fourier")
SHAPES = [(3, 8, 8, 3), (2, 28, 28, 1), (2, 9, 6, 1), (3, 6, 7, 2), (4, 5, 2), (2, 4, 5, 3, 2), (2, 1, 4, 1)]

sum_of_waves = jax.jit(fourier.sum_of_waves, static_argnums=(1, 2))


def reference(coefficients, shape, exponent):
    """The images, summed wave by wave, up to one factor for all."""
    real, imaginary = np.moveaxis(np.asarray(coefficients, np.float64), 1, 0)
    spatial, found = shape[1:-1], 0.0
    places = np.meshgrid(*map(np.arange, spatial), indexing="ij")
    for wave in np.ndindex(real.shape[2:]):
        # The half of the waves that `rfftn` keeps; each of the others is the mirror image of one of them.
        signed = [k if 2 * k <= size else k - size for k, size in zip(wave, spatial, strict=True)]
        frequency = np.sqrt(sum((k / size) ** 2 for k, size in zip(signed, spatial, strict=True)))
        amplitude = max(frequency, 1 / max(spatial)) ** -exponent
        turns = sum(k * place / size for k, place, size in zip(wave, places, spatial, strict=True))
        twice = 1 if 2 * wave[-1] % spatial[-1] == 0 else 2
        values = (real + 1j * imaginary)[(..., *wave)]
        waves = values[(..., *(None,) * len(spatial))] * np.exp(2j * np.pi * turns)
        found = found + twice * amplitude * waves.real
    return np.moveaxis(found, 1, -1)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_sums_of_waves(shape, exponent):
    coefficients = fourier.init_coefficients(KEY, shape)
    found = sum_of_waves(coefficients, shape, exponent)
    assert found.shape == shape and found.dtype == jnp.float32
    wanted = reference(coefficients, shape, exponent)
    factor = np.vdot(wanted, found) / np.vdot(wanted, wanted)
    np.testing.assert_allclose(found, factor * wanted, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_begin_with_unit_variance(shape):
    """The variance of each pixel is the sum of the squares of what each coefficient adds to it."""
    shape = (1, *shape[1:-1], 1)
    start = jnp.zeros_like(fourier.init_coefficients(KEY, shape))
    slopes = jax.jacobian(lambda c: fourier.sum_of_waves(c, shape, 1.3))(start)
    variances = np.square(np.asarray(slopes, np.float64)).reshape(*shape, -1).sum(-1)
    np.testing.assert_allclose(variances, 1.0, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_the_spectrum_falls_with_frequency(exponent):
    shape = (64, 32, 32, 3)
    images = np.asarray(sum_of_waves(fourier.init_coefficients(KEY, shape), shape, exponent), np.float64)
    power = np.square(np.abs(np.fft.fft2(images, axes=(1, 2)))).mean((0, 3))
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(32),) * 2))
    some = frequency > 0
    slope, _ = np.polyfit(np.log(frequency[some]), np.log(power[some]), 1)
    np.testing.assert_allclose(slope, -2 * exponent, atol=0.05)


def test_the_gradient_is_that_of_real_numbers():
    """Down it the loss falls as fast as its square says, in the real and in the imaginary parts."""
    shape = (2, 7, 6, 2)
    coefficients = fourier.init_coefficients(KEY, shape)

    def loss(c):
        return jnp.sin(2 * fourier.sum_of_waves(c, shape, 1.0)).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(coefficients), np.float64)
    for part in range(2):
        step = np.zeros_like(gradient)
        step[:, part] = 0.05 * gradient[:, part] / np.linalg.norm(gradient[:, part])
        change = loss(coefficients + step) - loss(coefficients - step)
        np.testing.assert_allclose(change, 2 * (step * gradient).sum(), rtol=0.02)


def test_images_come_to_match_the_statistics():
    result = synthesize(GRAPH, VARIABLES, KEY, dataclasses.replace(FOURIER, steps=60))
    start_key = jax.random.split(jax.random.split(jax.random.fold_in(KEY, 0))[0])[0]
    made = source.make_source(FOURIER, GRAPH.input.shape)
    before, after = (
        test_synthesis.expected_loss(CONFIG, VARIABLES, images, test_synthesis.LABELS)[0]
        for images in (made.images(made.init(start_key)), result.images)
    )
    assert after < 0.1 * before
    np.testing.assert_allclose(result.losses[0], after, rtol=0.2)
