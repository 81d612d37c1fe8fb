"""The correction from BatchNorm parameters alone, against closed forms."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import linen_case
from scipy.stats import norm

from dfq_jax.graph.batch_norm import batch_norm_parameters
from dfq_jax.graph.execution import run
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.stages.analytic import analytic_comparison, analytic_correction, gptq_from_noise, noise_of_moments
from dfq_jax.stages.batch_norm import BatchNormConfig
from dfq_jax.stages.convention import Convention, quantize_params


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(x))
        x = nn.Dense(4, use_bias=False, name="second")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn2")(x))
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def quantized():
    case = linen_case("two", TwoLayers(), (1, 5))
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    return graph, variables, quantize_params(graph, variables, {}, Convention.parse("w3a16", edge_bits=None))


def rectified_moments(bn, stats):
    """Mean and variance of each channel behind the ReLU, for a Gaussian in front of it."""
    center, scale, var = (np.asarray(leaf, np.float64) for leaf in (bn["bias"], bn["scale"], stats["var"]))
    spread = np.abs(scale) * np.sqrt(var / (var + 1e-5))
    ratio = center / spread
    mean = center * norm.cdf(ratio) + spread * norm.pdf(ratio)
    square = (center**2 + spread**2) * norm.cdf(ratio) + center * spread * norm.pdf(ratio)
    return mean, square - mean**2


def test_is_the_closed_form(quantized):
    graph, variables, qvariables = quantized
    corrected = analytic_correction(graph, variables, qvariables, num_samples=20000)
    bn2, new = variables["batch_stats"]["bn2"], corrected["batch_stats"]["bn2"]
    weights = np.asarray(variables["params"]["second"]["kernel"], np.float64)
    rounded = np.asarray(qvariables["params"]["second"]["kernel"].dequantize(), np.float64)
    mean, var = rectified_moments(variables["params"]["bn1"], variables["batch_stats"]["bn1"])
    shift = mean @ (rounded - weights)
    np.testing.assert_allclose(new["mean"] - bn2["mean"], shift, atol=0.02 * np.abs(shift).max())
    ratio = (var @ rounded**2) / (var @ weights**2)  # channels as independent
    np.testing.assert_allclose(new["var"] / bn2["var"], ratio, rtol=0.02)
    # The head has no BatchNorm: its bias takes the shift.
    kernel, codes = variables["params"]["head"]["kernel"], qvariables["params"]["head"]["kernel"]
    mean, _ = rectified_moments(variables["params"]["bn2"], variables["batch_stats"]["bn2"])
    shift = mean @ np.asarray(codes.dequantize() - kernel, np.float64)
    change = corrected["params"]["head"]["bias"] - variables["params"]["head"]["bias"]
    np.testing.assert_allclose(change, -shift, atol=0.02 * np.abs(shift).max())


def test_noise_of_nearly_dead_channels(quantized):
    """The epsilon counts: a channel whose variance is a hundredth of it has a tenth of its scale for a deviation."""
    graph, variables, _ = quantized
    var = jnp.asarray([1e-7, 1e-6, 1e-5, 1e-4, 1.0, 0.0])
    variables = graph.replace(variables, {"batch_stats/bn1/var": var, "params/bn1/bias": jnp.full(6, 1.0)})
    noise, rule = noise_of_moments(graph, variables, 20000)
    found = rule(graph.batch_norm("bn1"), jnp.zeros((20000, 6)), None)
    spread = np.abs(variables["params"]["bn1"]["scale"]) * np.sqrt(np.asarray(var, np.float64) / (var + 1e-5))
    np.testing.assert_allclose(found.std(0), spread, rtol=0.03, atol=1e-6)
    np.testing.assert_allclose(found.mean(0), 1.0, atol=0.05)
    assert noise.shape == (20000, 5)


@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize("model", ["mobilenet_v2", "channels_first", "conv_3d", "bfloat16"])
def test_few_samples_have_the_moments_exactly(model, heavy_tails):
    graph, variables, _ = model_grid.network_of(getattr(model_grid, model)())
    noise, rule = noise_of_moments(graph, variables, 4, heavy_tails=heavy_tails)
    seen = {}

    def note(bn, x, parameters):
        seen[bn.name] = bn, rule(bn, x, parameters)
        return seen[bn.name][1]

    run(graph, variables, noise, batch_norm=note)
    assert len(seen) == len(graph.batch_norms)
    leaves = graph.leaves(variables)
    for bn, values in seen.values():
        parameters = batch_norm_parameters(bn, leaves)
        var, scale, bias = (np.asarray(p, np.float64) for p in (parameters.var, parameters.scale, parameters.bias))
        spread = np.broadcast_to(np.abs(scale) * np.sqrt(var / (var + bn.epsilon)), var.shape)
        channels = np.moveaxis(np.asarray(values, np.float64), bn.channel_axis, -1).reshape(-1, bn.channels)
        np.testing.assert_allclose(channels.mean(0), np.broadcast_to(bias, var.shape), atol=1e-4 * spread.max())
        np.testing.assert_allclose(channels.std(0), spread, rtol=1e-3)


def test_one_sample_is_finite(quantized):
    graph, variables, _ = quantized
    _, rule = noise_of_moments(graph, variables, 1)
    found = rule(graph.batch_norm("bn1"), jnp.zeros((1, 6)), None)
    np.testing.assert_array_equal(found[0], variables["params"]["bn1"]["bias"])


def test_comparison_carries_errors_to_the_outputs(quantized):
    """Against the same in float64: noise of the moments, and behind it the error of what is in front."""
    graph, variables, qvariables = quantized
    found = analytic_comparison(graph, variables, qvariables, num_samples=64)
    noise, rule = noise_of_moments(graph, variables, 64)
    behind = {bn.name: np.asarray(rule(bn, jnp.zeros((64, bn.channels)), None), np.float64) for bn in graph.batch_norms}

    def outputs(kernels, error):
        x, e = np.asarray(noise, np.float64), 0.0
        for name, after in (("first", "bn1"), ("second", "bn2")):
            params, stats = variables["params"][after], variables["batch_stats"][after]
            factor = np.asarray(params["scale"]) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
            e = ((x + e) @ kernels[name] - x @ exact[name]) * factor if error else 0.0
            x = np.maximum(behind[after], 0)
            e = np.maximum(behind[after] + e, 0) - x
        return (x + e) @ kernels["head"] + np.asarray(variables["params"]["head"]["bias"])

    exact = {n: np.asarray(variables["params"][n]["kernel"], np.float64) for n in ("first", "second", "head")}
    rounded = {n: np.asarray(qvariables["params"][n]["kernel"].dequantize(), np.float64) for n in exact}
    wanted, other = outputs(exact, False), outputs(rounded, True)
    assert found.sqnr == pytest.approx(10 * np.log10((wanted**2).sum() / ((wanted - other) ** 2).sum()), abs=0.01)


def test_variances_stay_if_asked_to(quantized):
    graph, variables, qvariables = quantized
    corrected = analytic_correction(graph, variables, qvariables, BatchNormConfig(max_ratio=1.0))
    for name in ("bn1", "bn2"):
        before, after = (v["batch_stats"][name] for v in (variables, corrected))
        np.testing.assert_allclose(after["var"], before["var"], rtol=1e-6)
        assert not np.allclose(after["mean"], before["mean"], rtol=1e-6)


def test_gptq_from_noise_changes_codes_alone(quantized):
    graph, variables, qvariables = quantized
    better = gptq_from_noise(graph, variables, qvariables)
    assert jax.tree.structure(better) == jax.tree.structure(qvariables)
    kernel, before = (v["params"]["first"]["kernel"] for v in (better, qvariables))
    assert np.array_equal(kernel.scale, before.scale) and kernel.qvalue.dtype == before.qvalue.dtype
    changed = [
        not np.array_equal(better["params"][n]["kernel"].qvalue, qvariables["params"][n]["kernel"].qvalue)
        for n in ("first", "second", "head")
    ]
    assert any(changed)


def test_refuses_networks_without_batch_norm():
    case = model_grid.no_batch_norm()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    for function in (analytic_correction, gptq_from_noise):
        with pytest.raises(GraphError, match="no BatchNorm"):
            function(graph, variables, variables)
