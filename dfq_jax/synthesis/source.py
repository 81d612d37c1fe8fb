"""Where images come from: a pair of pure functions, and the optimizer of what is between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.fourier import init_coefficients, sum_of_waves
from dfq_jax.synthesis.generator import generate, init_generator
from dfq_jax.synthesis.pyramid import init_levels, sum_of_levels

# ReduceLROnPlateau as GENIE uses it: a tenth after so many steps without progress, down to this learning rate.
PLATEAU_PATIENCE, PLATEAU_FACTOR, PLATEAU_LOWEST = 100, 0.1, 1e-4


class Source(NamedTuple):
    """What is optimized in place of images, or images themselves.

    Attributes:
      init: `key -> parameters`, for one batch.
      images: `parameters -> [N, H, W, C]`, differentiable.
    """

    init: Callable[[Key[Array, ""]], Any]
    images: Callable[[Any], Float[Array, "n ..."]]


def make_source(config: SynthesisConfig, input_shape: tuple[int, ...]) -> Source:
    """The source of a config for a network whose input is `[N, *spatial, C]`; images are `extra_pixels` larger."""
    *spatial, channels = input_shape[1:]
    shape = (config.batch_size, *(size + config.extra_pixels for size in spatial), channels)
    if config.source == "generator":
        return Source(functools.partial(init_generator, shape=shape), functools.partial(generate, shape=shape))
    if config.source == "fourier" and spatial:
        images = functools.partial(sum_of_waves, shape=shape, exponent=config.spectrum_exponent)
        return Source(functools.partial(init_coefficients, shape=shape), images)
    if config.source == "pyramid" and spatial:
        return Source(
            functools.partial(init_levels, shape=shape),
            functools.partial(sum_of_levels, exponent=config.spectrum_exponent),
        )
    return Source(lambda key: jax.random.normal(key, shape, jnp.float32), lambda images: images)


@functools.cache
def image_optimizer(config: SynthesisConfig) -> optax.GradientTransformation:
    """The optax transformation of a config; cached, since compilation is keyed on it."""
    rate = config.learning_rate
    schedules = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, config.steps),
        "exponential": lambda: optax.exponential_decay(rate, config.steps, 0.05),
        "plateau": lambda: optax.constant_schedule(rate),
    }
    makers = {
        "adam": functools.partial(optax.adam, b2=config.b2),
        "radam": functools.partial(optax.radam, b2=config.b2),
        "sgd": functools.partial(optax.sgd, momentum=0.9),
    }
    make = makers[config.optimizer]
    optimizer = make(schedules[config.schedule]())
    if config.schedule == "plateau":
        lowest = min(PLATEAU_LOWEST / rate, 1.0)
        plateau = optax.contrib.reduce_on_plateau(PLATEAU_FACTOR, PLATEAU_PATIENCE, min_scale=lowest)
        optimizer = optax.chain(optimizer, plateau)
    if config.source != "generator":
        return optimizer
    weights = make(optax.exponential_decay(config.generator_learning_rate, 100, 0.95, staircase=True))
    return optax.partition({"latent": optimizer, "generator": weights}, {"latent": "latent", "generator": "generator"})
