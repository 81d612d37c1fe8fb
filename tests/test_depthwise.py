"""Depthwise convolutions as shifted products: values and both gradients are those of XLA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfq_jax.depthwise import depthwise_product, is_supported
from dfq_jax.execute import run
from dfq_jax.graph import trace

NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((7, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((8, 7), (3, 3), (2, 2), ((0, 1), (1, 1))),
        ((9, 8), (5, 5), (2, 2), ((2, 2), (1, 2))),
        ((9, 11), (5, 3), (1, 2), ((0, 0), (2, 0))),
        ((10, 9), (2, 2), (3, 3), ((0, 0), (0, 0))),  # pixels that no window reads
        ((6, 6), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ],
)
def test_values_and_gradients(size, kernel, strides, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(*kernel, 1, 4)), jnp.float32)

    def expected(x, weights):
        return lax.conv_general_dilated(x, weights, strides, padding, dimension_numbers=NUMBERS, feature_group_count=4)

    y, pull = jax.vjp(expected, x, weights)
    found, found_pull = jax.vjp(lambda x, w: depthwise_product(x, w, strides, padding), x, weights)
    gradient = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for a, b in zip((found, *found_pull(gradient)), (y, *pull(gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1] * self.multiplier
        return nn.Conv(features, (3, 3), self.stride, feature_group_count=x.shape[-1], kernel_dilation=self.dilation)(x)


@pytest.mark.parametrize(
    ("options", "supported"),
    [({"stride": 2}, True), ({}, True), ({"dilation": 2}, False), ({"multiplier": 2}, False)],
)
def test_the_interpreter_uses_it_where_it_may(options, supported):
    net = Net(**options)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    variables = net.init(jax.random.key(1), x)
    graph = trace(net.apply, variables, x.shape)
    layer = graph.first_layer
    op = graph.program.ops[layer.op]
    assert is_supported(op.params, x.shape, layer.kernel_shape) == supported
    np.testing.assert_allclose(run(graph, variables, x), net.apply(variables, x), rtol=1e-5, atol=1e-5)
    convolutions = str(jax.make_jaxpr(lambda x: run(graph, variables, x))(x)).count("conv_general_dilated")
    assert convolutions == (0 if supported and jax.default_backend() == "cpu" else 1)
