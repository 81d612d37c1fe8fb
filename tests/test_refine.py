"""Refinement: its terms against NumPy, that similarity rises while statistics hold, and what it refuses."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_synthesis import CONFIG, GRAPH, KEY, VARIABLES, natural_images

from dfq_jax.base import usable_cores
from dfq_jax.graph import apply_quantized
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.ranges import estimate_ranges
from dfq_jax.synthesis import RefineConfig, SynthesisConfig, refine, synthesize
from dfq_jax.synthesis.refine import Gradients, largest_overlap, sharpness

IMAGES = jnp.asarray(natural_images(6), jnp.float32)
SETTINGS = RefineConfig(steps=60, batch_size=4, learning_rate=0.005, rho=2.0, statistics=CONFIG)
evaluate = jax.jit(sharpness, static_argnames=("graph", "config"))


@pytest.fixture(scope="module")
def qvariables():
    convention = Convention.parse("w3a3", edge_bits=None)
    ranges = estimate_ranges(GRAPH, VARIABLES, IMAGES, convention, estimator="max")
    return quantize_params(GRAPH, VARIABLES, ranges, convention)


@pytest.fixture(scope="module")
def synthetic():
    return synthesize(GRAPH, VARIABLES, KEY, dataclasses.replace(CONFIG, steps=100, num_images=4)).images


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_overlap_is_that_of_the_gradients_of_the_last_layer():
    rng = np.random.default_rng(0)
    features, residuals = rng.normal(size=(5, 7)), rng.normal(size=(5, 3))
    # The similarity of outer products r f^T, which are the gradients, written out in full.
    gradients = unit(np.einsum("nf,nk->nfk", features, residuals).reshape(5, -1))
    similar = np.abs(gradients @ gradients.T)
    np.fill_diagonal(similar, 0)
    found = largest_overlap(Gradients(jnp.asarray(features, jnp.float32), jnp.asarray(residuals, jnp.float32)))
    np.testing.assert_allclose(found, similar.max(1).mean(), rtol=1e-5)
    assert largest_overlap(Gradients(jnp.ones((1, 7)), jnp.ones((1, 3)))) == 0


def test_similarity_of_an_image_to_itself_is_one(qvariables):
    near = evaluate(GRAPH, dataclasses.replace(SETTINGS, rho=1e-9), VARIABLES, qvariables, IMAGES[:4])
    far = evaluate(GRAPH, SETTINGS, VARIABLES, qvariables, IMAGES[:4])
    np.testing.assert_allclose(near.similarity, 1, atol=1e-4)
    assert far.similarity < 0.99
    np.testing.assert_allclose(far.loss, far.statistics + 1 - far.similarity + far.overlap, rtol=1e-5)


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 1)], ids=["similarity", "diversity", "both"])
def test_what_is_asked_for_improves_and_statistics_hold(qvariables, synthetic, weights):
    """On synthetic images, which is what it is for: where statistics do not match yet, their term comes first.

    With both terms only their sum is sure to fall: they pull at the same features.
    """
    images = synthetic
    # Enough steps for any rounding of products: after 60 of half the rate, some images were no better yet.
    enough = {"steps": 200, "learning_rate": 0.01}
    settings = dataclasses.replace(SETTINGS, similarity_weight=weights[0], diversity_weight=weights[1], **enough)
    refined = refine(GRAPH, VARIABLES, qvariables, images, KEY, settings)
    before = evaluate(GRAPH, settings, VARIABLES, qvariables, images)
    after = evaluate(GRAPH, settings, VARIABLES, qvariables, refined)
    assert after.loss < before.loss - 0.05
    assert after.statistics < before.statistics + 0.02
    if weights == (1, 0):
        assert after.similarity > before.similarity + 0.05
    if weights == (0, 1):
        assert after.overlap < before.overlap - 0.05
    if weights == (1, 1):
        assert (refine(GRAPH, VARIABLES, qvariables, images, KEY, settings) == refined).all()


def test_any_number_of_images(qvariables):
    quick = dataclasses.replace(SETTINGS, steps=2)
    refined = refine(GRAPH, VARIABLES, qvariables, IMAGES, KEY, quick)  # batches of 4 and 2 + 2
    assert refined.shape == IMAGES.shape and refined.dtype == jnp.float32
    assert (jnp.abs(refined - IMAGES).max((1, 2, 3)) > 0).all()
    np.testing.assert_allclose(refined[:4], refine(GRAPH, VARIABLES, qvariables, IMAGES[:4], KEY, quick), atol=1e-6)
    assert np.isfinite(apply_quantized(GRAPH, qvariables, refined)).all()


def test_an_interrupted_refinement_resumes_to_the_same_bits(qvariables, tmp_path):
    quick, reports = dataclasses.replace(SETTINGS, steps=60), []  # in chunks of 25
    arguments = GRAPH, VARIABLES, qvariables, IMAGES, KEY, quick

    def interrupt(progress):
        if (progress.batch, progress.step) == (2, 25):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        refine(*arguments, checkpoint=tmp_path / "work.npz", on_progress=interrupt)
    with pytest.raises(ValueError, match="belongs to other work"):
        refine(*arguments[:3], IMAGES[::-1], KEY, quick, checkpoint=tmp_path / "work.npz")
    resumed = refine(*arguments, checkpoint=tmp_path / "work.npz", on_progress=reports.append)
    # On one core the next call is on its way; on more, batches run side by side, and wait for each other.
    assert (resumed == refine(*arguments)).all() and reports[0].step == (60 if usable_cores() == 1 else 50)


@pytest.mark.untyped
def test_bad_input_is_refused(qvariables):
    with pytest.raises(ValueError, match=r"^qvariables: hold no activation quantizers"):
        refine(GRAPH, VARIABLES, VARIABLES, IMAGES, KEY, SETTINGS)
    with pytest.raises(ValueError, match=r"^images: "):
        refine(GRAPH, VARIABLES, qvariables, IMAGES[..., :2], KEY, SETTINGS)
    for fields in ({"steps": 0}, {"rho": 0}, {"diversity_weight": -1}, {"statistics": None}, {"batch_size": 1.5}):
        (name,) = fields
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            RefineConfig(**fields)
    assert RefineConfig().statistics == SynthesisConfig()
