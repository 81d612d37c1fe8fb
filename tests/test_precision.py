"""What decides is computed in full precision on every backend.

The same result, bit for bit, whether JAX's setting leaves float32 products at their default precision or asks for the
highest. On a CPU nothing is rounded; `pytest -p tests.tf32`, or a GPU, makes this a test.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from conftest import rounds_products

import dfq_jax
from dfq_jax.stages.comparison import compare
from dfq_jax.stages.convention import Convention
from dfq_jax.synthesis.refine import RefineConfig, refine

pytestmark = pytest.mark.default_precision
CONVENTION = Convention.parse("w4a4")
SMALL = dfq_jax.SynthesisConfig(num_images=8, batch_size=8, steps=2)


@pytest.fixture(scope="module")
def network():
    case = model_grid.conv_bias_bn()
    apply_fn, variables = case.function()
    graph = dfq_jax.trace(apply_fn, variables, case.input_shape)
    images = jax.random.normal(jax.random.key(1), (8, *case.input_shape[1:]))
    ranges = dfq_jax.estimate_ranges(graph, variables, images, CONVENTION)
    return graph, variables, dfq_jax.quantize_params(graph, variables, ranges, CONVENTION), images


def reconstruction(graph, v, q, x):
    config = dfq_jax.ReconstructionConfig(steps=2, batch_size=2, precision="highest")
    return dfq_jax.reconstruct(graph, v, q, x, jax.random.key(0), config)[0]


def finetuning(graph, v, q, x):
    config = dfq_jax.FinetuneConfig(steps=2, batch_size=2, precision="highest")
    return dfq_jax.finetune(graph, v, q, x, jax.random.key(0), config)[0]


DECIDING = {
    "ranges": lambda graph, v, q, x: dfq_jax.estimate_ranges(graph, v, x, CONVENTION),
    "analytic ranges": lambda graph, v, q, x: dfq_jax.analytic_summaries(graph, v, num_samples=4),
    "folding": lambda graph, v, q, x: dfq_jax.fold_batch_norm(graph, v),
    "equalization": lambda graph, v, q, x: dfq_jax.equalize(graph, v),
    "high biases": lambda graph, v, q, x: dfq_jax.absorb_high_bias(graph, v),
    "BatchNorm adaptation": lambda graph, v, q, x: dfq_jax.adapt_batch_norm(graph, v, q, x),
    "moments": lambda graph, v, q, x: dfq_jax.batch_norm_moments(graph, v, x),
    "bias correction": lambda graph, v, q, x: dfq_jax.correct_bias(graph, v, q, x),
    "analytic correction": lambda graph, v, q, x: dfq_jax.analytic_correction(graph, v, q, num_samples=4),
    "SQuant": lambda graph, v, q, x: dfq_jax.squant(graph, v, q),
    "GPTQ": lambda graph, v, q, x: dfq_jax.gptq(graph, v, q, x),
    "comparison": lambda graph, v, q, x: dataclasses.astuple(compare(graph, v, q, x)),
    "synthesis": lambda graph, v, q, x: (
        dfq_jax.synthesize(graph, v, jax.random.key(0), dataclasses.replace(SMALL, precision="highest")).images
    ),
    "refinement": lambda graph, v, q, x: refine(
        graph, v, q, x, jax.random.key(0), RefineConfig(steps=2, batch_size=4, statistics=SMALL)
    ),
    "reconstruction": reconstruction,
    "fine-tuning": finetuning,
}


@pytest.mark.skipif(not rounds_products(), reason="products are exact here: pytest -p tests.tf32, or a GPU")
@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_does_not_depend_on_the_setting(network, name):
    found = DECIDING[name](*network)
    with jax.default_matmul_precision("highest"):
        expected = DECIDING[name](*network)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.skipif("tests.tf32" not in sys.modules, reason="needs the emulation: pytest -p tests.tf32")
def test_the_emulation_rounds_the_float_network(network):
    graph, variables, _, images = network
    fast = graph.apply_fn(variables, images)
    with jax.default_matmul_precision("highest"):
        exact = graph.apply_fn(variables, images)
    error = float(jnp.abs(fast - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 1e-2


def test_a_program_follows_the_setting_in_force_where_it_runs(network):
    graph, variables, _, images = network

    def precisions(**setting):
        with jax.default_matmul_precision(setting.get("at_run")):
            jaxpr = jax.make_jaxpr(lambda v, x: dfq_jax.run(graph, v, x))(variables, images)
        found = [eqn.params["precision"] for eqn in jaxpr.eqns if "precision" in eqn.params]
        assert found
        return set(found)

    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert precisions(at_run=None) == {None}
    assert precisions(at_run="highest") == {highest}
    with jax.default_matmul_precision("highest"):
        graph = dfq_jax.trace(graph.apply_fn, variables, graph.input.shape)
    assert precisions(at_run=None) == {None}


def test_a_precision_that_the_function_asks_for_stays():
    def network(v, x):
        return jax.lax.dot(x, v["w"], precision="highest")

    graph = dfq_jax.trace(network, {"w": jnp.ones((3, 2))}, (1, 3))
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(lambda v, x: dfq_jax.run(graph, v, x))({"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    assert [eqn.params["precision"] for eqn in jaxpr.eqns if "precision" in eqn.params] == [
        (jax.lax.Precision.HIGHEST,) * 2
    ]


@pytest.mark.parametrize(
    "config", [dfq_jax.SynthesisConfig, dfq_jax.ReconstructionConfig, dfq_jax.FinetuneConfig], ids=lambda c: c.__name__
)
def test_a_precision_that_there_is_not_is_refused(config):
    with pytest.raises(ValueError, match=r"precision: expected one of .*'tf32'"):
        config(precision="tf32")
