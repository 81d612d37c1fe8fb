"""The generator of GENIE-D against NumPy in float64, for all kinds of sizes, and its optimizer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
import test_synthesis
from test_synthesis import CONFIG, GRAPH, KEY, VARIABLES, statistics

from dfq_jax.graph.graph import trace
from dfq_jax.synthesis import generator, source, synthesize

GENERATOR = dataclasses.replace(
    CONFIG, num_images=4, source="generator", learning_rate=0.1, schedule="plateau", swing=True
)


# --- the architecture, written out ---


def repeated(x):
    for axis in range(1, x.ndim - 1):
        x = np.repeat(x, 2, axis)
    return x


def convolved(x, kernel):
    """A 3x3x... convolution with zeros outside."""
    spatial = tuple(range(1, x.ndim - 1))
    padded = np.pad(x, [(0, 0)] + [(1, 1)] * len(spatial) + [(0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * len(spatial), axis=spatial)
    windows = np.moveaxis(windows, x.ndim - 1, -1)  # [N, *spatial, *taps, C]
    return np.tensordot(windows, kernel, len(spatial) + 1)


def normalized(x, scale=1.0, bias=0.0):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias


def reference(parameters, shape):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    g = p["generator"]
    x = np.tensordot(p["latent"], g["dense"]["kernel"], 1) + g["dense"]["bias"]
    x = normalized(x, **g["norm1"])
    x = normalized(convolved(repeated(x), g["conv1"]["kernel"]), **g["norm2"])
    x = np.maximum(x, 0.2 * x)
    x = np.tanh(convolved(repeated(x), g["conv2"]["kernel"]) + g["conv2"]["bias"])
    return normalized(x[tuple(map(slice, shape))])


SHAPES = [(3, 8, 8, 3), (2, 9, 6, 1), (4, 5, 2), (2, 4, 5, 3, 2), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_those_of_the_architecture(shape):
    fresh = jax.eval_shape(lambda key: generator.init_generator(key, shape), KEY)
    parameters = model_grid.randomize(fresh)  # no zero biases and unit scales
    images = jax.jit(generator.generate, static_argnums=1)(parameters, shape)
    assert images.shape == shape and images.dtype == jnp.float32
    np.testing.assert_allclose(images, reference(parameters, shape), atol=2e-4)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(np.asarray(images).mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(images).std(axes), 1, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 4, 5), (1, 2, 3, 2, 3)], ids=str)
def test_convolution_of_repeated_pixels(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    kernel = rng.normal(size=(*(3,) * (len(shape) - 2), shape[-1], 4))
    found = jax.jit(generator.upsampled_conv)(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(found, convolved(repeated(x), kernel), atol=1e-4)


@pytest.mark.parametrize("size", [28, 32, 224, 299])
def test_sizes_of_common_inputs(size):
    parameters = jax.eval_shape(lambda key: generator.init_generator(key, (2, size, size + 1, 3)), KEY)
    assert parameters["generator"]["dense"]["kernel"].shape == (
        256,
        math.ceil(size / 4),
        math.ceil((size + 1) / 4),
        128,
    )
    images = jax.eval_shape(lambda p: generator.generate(p, (2, size, size + 1, 3)), parameters)
    assert images.shape == (2, size, size + 1, 3)


def test_initial_weights():
    init = jax.jit(generator.init_generator, static_argnums=1)
    parameters = init(KEY, (64, 32, 32, 3))
    latent, weights = parameters["latent"], parameters["generator"]
    assert latent.shape == (64, 256)
    np.testing.assert_allclose([latent.mean(), latent.std()], [0, 1], atol=0.05)
    for kernel, fan_in in (("dense", 256), ("conv1", 9 * 128), ("conv2", 9 * 64)):
        bound = 1 / math.sqrt(fan_in)
        found = np.asarray(weights[kernel]["kernel"])
        assert np.abs(found).max() <= bound
        np.testing.assert_allclose(found.std(), bound / math.sqrt(3), rtol=0.05)
    other = init(jax.random.key(1), (64, 32, 32, 3))
    assert not (other["generator"]["conv2"]["kernel"] == weights["conv2"]["kernel"]).any()


# --- the optimizer ---


def updates_of(optimizer, parameters, losses):
    """Updates for a constant gradient while the loss runs through the given values."""
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    found = []
    for loss in losses:
        updates, state = update(jax.tree.map(jnp.ones_like, parameters), state, parameters, value=jnp.float32(loss))
        found.append(jax.tree.map(lambda u: -float(u), updates))
    return found


def test_latents_and_generator_have_their_own_learning_rates():
    """Of a constant gradient Adam's update is the learning rate."""
    optimizer = source.image_optimizer(GENERATOR)
    losses = [1.0] * 5 + [0.5] * 210
    found = updates_of(optimizer, {"latent": jnp.zeros(()), "generator": jnp.zeros(())}, losses)
    latent, weights = ([u[name] for u in found] for name in ("latent", "generator"))
    np.testing.assert_allclose([latent[0], latent[100]], 0.1, rtol=1e-3)
    assert np.flatnonzero(np.array(latent) < 0.05)[0] in (105, 106)  # 100 steps after the last improvement
    np.testing.assert_allclose(latent[150], 0.01, rtol=1e-3)
    np.testing.assert_allclose(
        [weights[0], weights[99], weights[100], weights[200]], [0.01, 0.01, 0.0095, 0.009025], rtol=1e-3
    )


def test_a_plateau_stops_at_the_lowest_rate():
    config = dataclasses.replace(CONFIG, learning_rate=5e-4, schedule="plateau")
    found = updates_of(source.image_optimizer(config), jnp.zeros(()), [1.0] * 320)
    np.testing.assert_allclose([found[0], found[-1]], [5e-4, 1e-4], rtol=1e-3)


# --- in the loop ---


def test_generated_images_come_to_match_the_statistics():
    result = synthesize(GRAPH, VARIABLES, KEY, dataclasses.replace(GENERATOR, steps=60))
    start = jax.jit(generator.generate, static_argnums=1)(
        source.make_source(GENERATOR, GRAPH.input.shape).init(
            jax.random.split(jax.random.split(jax.random.fold_in(KEY, 0))[0])[0]
        ),
        GRAPH.input.shape,
    )
    before, _ = test_synthesis.expected_loss(CONFIG, VARIABLES, start, test_synthesis.LABELS)
    after, _ = test_synthesis.expected_loss(CONFIG, VARIABLES, result.images, test_synthesis.LABELS)
    assert after < 0.2 * before
    np.testing.assert_allclose(result.losses[0], after, rtol=0.2)
    for mean, std in statistics([np.asarray(result.images)]):
        np.testing.assert_allclose(mean, 0, atol=1e-4)
        np.testing.assert_allclose(std, 1, atol=1e-2)


def test_networks_of_sequences():
    case = model_grid.conv_1d()
    graph = trace(*case.function(), case.input_shape)
    images = synthesize(graph, case.variables, KEY, dataclasses.replace(GENERATOR, steps=2)).images
    assert images.shape == (4, *case.input_shape[1:])
    assert np.isfinite(images).all()
