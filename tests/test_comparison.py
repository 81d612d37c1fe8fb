"""The comparison of a quantized network with the float one, against a float64 NumPy version."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

import dfq_jax
from dfq_jax.quantizers.collection import ActivationQuantizers, with_quantization
from dfq_jax.stages.comparison import apply_jitted, compare, compare_outputs, kl_divergence
from dfq_jax.stages.convention import Convention


@functools.cache
def quantized(build, bits):
    case = build()
    apply_fn, variables = case.function()
    graph = dfq_jax.trace(apply_fn, variables, case.input_shape)
    images = jax.random.normal(jax.random.key(0), (24, *case.input_shape[1:]))
    convention = Convention.parse(bits)
    ranges = dfq_jax.estimate_ranges(graph, variables, images, convention)
    return graph, variables, dfq_jax.quantize_params(graph, variables, ranges, convention), images


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.parametrize("batch_size", [24, 7])
def test_class_scores(batch_size):
    graph, variables, qvariables, images = quantized(model_grid.cifar_resnet8, "w3a3")
    found = compare(graph, variables, qvariables, images, batch_size=batch_size)
    float_, other = (
        np.asarray(graph.logits(outputs), np.float64)
        for outputs in (graph.apply_fn(variables, images), apply_jitted(graph, qvariables, images))
    )
    p, q = log_softmax(float_), log_softmax(other)
    assert found.divergence == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert found.agreement == 100 * (float_.argmax(1) == other.argmax(1)).mean()
    assert found.sqnr == pytest.approx(10 * np.log10((float_**2).sum() / ((float_ - other) ** 2).sum()), rel=1e-3)


def test_outputs_without_classes():
    graph, variables, qvariables, images = quantized(model_grid.transposed_conv, "w3a3")
    found = compare(graph, variables, qvariables, images)
    assert found.agreement is None
    # Both are the relative squared error, one of them in decibel.
    assert found.divergence == pytest.approx(10 ** (-found.sqnr / 10), rel=1e-6)
    assert found.divergence > 0


@pytest.mark.parametrize("seed", range(8))
def test_no_divergence_is_below_zero(seed):
    """Rounding alone would leave half of these a little below."""
    graph = quantized(model_grid.cifar_resnet8, "w3a3")[0]
    logits = np.random.default_rng(seed).normal(size=(16, graph.num_classes)).astype(np.float32)
    near = logits * np.float32(1 + 1e-7)
    assert 0 <= compare_outputs(graph, [(logits, near)]).divergence < 1e-12
    assert 0 <= kl_divergence(jnp.asarray(logits), jnp.asarray(near)) < 1e-6


def test_the_float_network_itself():
    graph, variables, _, images = quantized(model_grid.cifar_resnet8, "w3a3")
    same = compare(graph, variables, with_quantization(variables, ActivationQuantizers()), images)
    assert same.agreement == 100 and same.divergence == pytest.approx(0, abs=1e-6)


def test_more_bits_diverge_less():
    few, more = (
        compare(*quantized(model_grid.cifar_resnet8, bits)[:3], quantized(model_grid.cifar_resnet8, bits)[3])
        for bits in ("w3a3", "w8a8")
    )
    assert more.divergence < few.divergence / 10
    assert dataclasses.astuple(more) != dataclasses.astuple(few)


def test_no_images():
    graph, variables, qvariables, images = quantized(model_grid.cifar_resnet8, "w3a3")
    with pytest.raises(ValueError, match="images"):
        compare(graph, variables, qvariables, jnp.zeros((0, *images.shape[1:])))
