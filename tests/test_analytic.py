"""The correction from BatchNorm parameters alone, against closed forms."""

from __future__ import annotations

import flax.linen as nn
import jax
import model_grid
import numpy as np
import pytest
from model_grid import linen_case
from scipy.stats import norm

from dfq_jax.analytic import analytic_correction, gptq_from_noise
from dfq_jax.batch_norm import BatchNormConfig
from dfq_jax.convention import Convention, quantize_params
from dfq_jax.graph import GraphError, trace


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


def rectified_moments(bn):
    """Mean and variance of each channel behind the ReLU, for a Gaussian in front of it."""
    center, spread = np.asarray(bn["bias"], np.float64), np.abs(np.asarray(bn["scale"], np.float64))
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
    mean, var = rectified_moments(variables["params"]["bn1"])
    shift = mean @ (rounded - weights)
    np.testing.assert_allclose(new["mean"] - bn2["mean"], shift, atol=0.02 * np.abs(shift).max())
    ratio = (var @ rounded**2) / (var @ weights**2)  # channels as independent
    np.testing.assert_allclose(new["var"] / bn2["var"], ratio, rtol=0.02)
    # The head has no BatchNorm: its bias takes the shift.
    kernel, codes = variables["params"]["head"]["kernel"], qvariables["params"]["head"]["kernel"]
    mean, _ = rectified_moments(variables["params"]["bn2"])
    shift = mean @ np.asarray(codes.dequantize() - kernel, np.float64)
    change = corrected["params"]["head"]["bias"] - variables["params"]["head"]["bias"]
    np.testing.assert_allclose(change, -shift, atol=0.02 * np.abs(shift).max())


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
