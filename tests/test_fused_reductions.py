"""Sums that XLA fuses with the product before them: jaxlib 0.10.2 computes the last of many columns wrong on CPU.

Where a product with three terms is summed over its first axis and more than 32,768 columns are left, the columns beyond
them hold other columns' sums (jax-ml/jax#39103).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dfq_jax
from dfq_jax.graph import LayerCall, run
from dfq_jax.stages.batch_norm import batch_norm_moments

COLUMNS = (32_769, 33_000, 40_001)
rng = np.random.default_rng(0)


def operands(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch `[2, 3]` and a kernel `[columns, 3]` whose columns are all different."""
    kernel = rng.normal(1, 0.1, (columns, 3)) * np.linspace(0.1, 1, columns)[:, None]
    return rng.normal(1, 1, (2, 3)).astype(np.float32), kernel.astype(np.float32)


@pytest.mark.parametrize("columns", COLUMNS)
def test_whether_jaxlib_sums_products_right(columns):
    x, kernel = operands(columns)
    found = jax.jit(lambda x, kernel: jnp.square(x @ kernel.T).sum(0))(x, kernel)
    exact = np.square(x.astype(np.float64) @ kernel.T.astype(np.float64)).sum(0)
    if not np.allclose(found, exact, rtol=1e-4):
        pytest.xfail("this jaxlib fuses products into reductions, and does so wrong")


@pytest.mark.parametrize("columns", COLUMNS)
def test_statistics_behind_such_a_product_are_right(columns):
    x, kernel = operands(columns)
    statistics = {"mean": np.zeros(columns, np.float32), "var": np.ones(columns, np.float32)}
    variables = jax.tree.map(jnp.asarray, {"dense": {"kernel": kernel}, "bn": statistics})

    def network(v, x):
        return (x @ v["dense"]["kernel"].T - v["bn"]["mean"]) * jax.lax.rsqrt(v["bn"]["var"] + 1e-5)

    graph = dfq_jax.trace(network, variables, (2, 3))
    exact = x.astype(np.float64) @ kernel.T.astype(np.float64)
    ((mean, var),) = batch_norm_moments(graph, variables, jnp.asarray(x)).values()
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, exact.var(0), rtol=1e-3, atol=1e-5)

    @jax.jit
    def means(variables, x):
        found = []

        def layer(call: LayerCall) -> jax.Array:
            result = call.default()
            found.append(call.form.channel_mean(result))
            return result

        run(graph, variables, x, layer=layer)
        return found

    (mean,) = means(variables, jnp.asarray(x))
    np.testing.assert_allclose(mean.reshape(-1), exact.mean(0), rtol=1e-4, atol=1e-5)
