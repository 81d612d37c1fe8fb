"""What learned rounding and fine-tuning are made of: values and gradients against those that JAX takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfq_jax import trace
from dfq_jax.base import mean_of_parts
from dfq_jax.graph import run
from dfq_jax.stages.learning import learned_batch_norm, materialized


@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_norm_and_its_gradients_are_those_of_the_network(axis):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, axis=axis)(nn.Conv(5, (1, 1))(x))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), jnp.float32), Net().init(jax.random.key(0), x)
    )
    graph = trace(Net().apply, variables, x.shape)
    assert len(graph.batch_norms) == 1
    direction = rng.normal(size=x.shape).astype(np.float32)

    def pulled(apply):
        return jax.jit(lambda v, x: (apply(v, x), jax.vjp(apply, v, x)[1](direction)))(variables, x)

    found = pulled(lambda v, x: run(graph, v, x, batch_norm=learned_batch_norm))
    for a, b in zip(*map(jax.tree.leaves, (found, pulled(Net().apply))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_the_mean_of_parts_is_that_of_the_batch():
    rng = np.random.default_rng(0)
    weights, batch = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 3), (8, 5)))
    places = jnp.arange(8)

    def loss(weights, part):
        places, rows = part
        off = jnp.square(jnp.tanh(rows @ weights) + places[:, None]).sum(-1).mean()
        return off, {"off": off}

    expected = jax.value_and_grad(loss, has_aux=True)(weights, (places, batch))
    for parts in (1, 2, 8):
        divided = jax.tree.map(lambda a, parts=parts: a.reshape(parts, -1, *a.shape[1:]), (places, batch))
        found = jax.jit(jax.value_and_grad(lambda w, d: mean_of_parts(loss, w, d), has_aux=True))(weights, divided)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (11, 13), (1,), ()])
def test_what_is_materialized_stays_as_it_is(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    value, pull = jax.vjp(jax.jit(materialized), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(pull(2 * x)[0], 2 * x)
    np.testing.assert_array_equal(jax.vmap(materialized)(jnp.stack([x, -x])), jnp.stack([x, -x]))
