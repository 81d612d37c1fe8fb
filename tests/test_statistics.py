"""How far images are from the stored statistics, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
import test_synthesis
from test_synthesis import CONFIG, GRAPH, KEY, VARIABLES, make

from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.synthesis import statistic_errors

IMAGES = jnp.asarray(test_synthesis.natural_images(12, seed=3) + 0.2, jnp.float32)


def expected(images, variables=VARIABLES):
    """The errors of mean and deviation of each BatchNorm."""
    inputs, _ = test_synthesis.reference(variables, images)
    found = []
    for (mean, std), name in zip(test_synthesis.statistics(inputs), ("unit1", "unit2"), strict=True):
        stored = np.sqrt(np.asarray(variables[name]["var"], np.float64))
        errors = (mean - np.asarray(variables[name]["mean"], np.float64), std - stored)
        found.append([np.sqrt(np.square(error).sum() / np.square(stored).sum()) for error in errors])
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_errors_of_images(batch_size):
    found = statistic_errors(GRAPH, VARIABLES, IMAGES, batch_size=batch_size)
    assert list(found) == [bn.name for bn in GRAPH.batch_norms]
    np.testing.assert_allclose(list(found.values()), expected(IMAGES), rtol=2e-4)


def test_natural_images_fit_and_noise_does_not():
    def largest(images):
        return np.max(list(statistic_errors(GRAPH, VARIABLES, images).values()))

    assert largest(jnp.asarray(test_synthesis.natural_images(64), jnp.float32)) < 1e-4  # the statistics are theirs
    assert largest(jax.random.normal(KEY, IMAGES.shape)) > 0.2


def test_a_channel_without_variance_hides_nothing():
    p = VARIABLES["unit1"]
    dead = VARIABLES | {"unit1": p | {"var": p["var"].at[0].set(0.0), "mean": p["mean"].at[0].set(0.0)}}
    dead["unit1"]["kernel"] = p["kernel"].at[..., 0].multiply(1e-3)
    found = statistic_errors(GRAPH, dead, IMAGES)
    np.testing.assert_allclose(list(found.values()), expected(IMAGES, dead), rtol=2e-4)
    none = VARIABLES | {"unit1": p | {"var": jnp.zeros_like(p["var"])}}
    assert np.isfinite(list(statistic_errors(GRAPH, none, IMAGES).values())).all()


@pytest.mark.parametrize("statistics", ["batch", "image", "set"])
def test_synthesis_tells_the_errors_of_its_last_step(statistics):
    """A step so small that it changes nothing."""
    config = dataclasses.replace(CONFIG, num_images=8, steps=1, learning_rate=1e-9, statistics=statistics)
    result = make(config)
    found = statistic_errors(GRAPH, VARIABLES, result.images)
    np.testing.assert_allclose(list(result.statistic_errors.values()), list(found.values()), rtol=1e-4)
    assert all(isinstance(error, float) for errors in result.statistic_errors.values() for error in errors)


def test_what_has_no_statistics_is_refused():
    case = model_grid.no_batch_norm()
    graph = trace(*case.function(), case.input_shape)
    with pytest.raises(GraphError, match="no BatchNorm, so there are no statistics to compare"):
        statistic_errors(graph, case.variables, jnp.zeros(case.input_shape))
    with pytest.raises(ValueError, match=r"^images: expected an array like"):
        statistic_errors(GRAPH, VARIABLES, IMAGES[..., :2])
