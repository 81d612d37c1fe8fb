"""Swing convolution: strided convolutions see shifted inputs, everything else is as it was."""

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

from dfq_jax.graph import loop_friendly, run
from dfq_jax.graph.graph import trace
from dfq_jax.synthesis.swing import swing

LAYOUT = ("NHWC", "HWIO", "NHWC")
SHAPE = (2, 6, 8, 3)


def network(v, x):
    x = jax.lax.conv_general_dilated(x, v["first"]["kernel"], (2, 2), "SAME", dimension_numbers=LAYOUT)
    x = jax.lax.conv_general_dilated(x, v["second"]["kernel"], (1, 1), "SAME", dimension_numbers=LAYOUT)
    return x[:, ::2]  # a slice with stride is no convolution


VARIABLES = model_grid.function_case(
    "strided", network, {"first": {"kernel": (3, 3, 3, 4)}, "second": {"kernel": (3, 3, 4, 2)}}, SHAPE
).variables
GRAPH = trace(network, VARIABLES, SHAPE)
X = jax.random.normal(jax.random.key(0), SHAPE)


def test_only_strided_convolutions_swing_by_up_to_a_pixel():
    padded = np.pad(X, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    shifted = {(i, j): network(VARIABLES, padded[:, i : i + 6, j : j + 8]) for i in range(3) for j in range(3)}
    swung = jax.jit(lambda key: run(GRAPH, VARIABLES, X, layer=swing(key)))
    seen = set()
    for seed in range(40):
        found = swung(jax.random.key(seed))
        matches = [offset for offset, wanted in shifted.items() if np.allclose(found, wanted, atol=1e-5)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9
    np.testing.assert_allclose(run(GRAPH, VARIABLES, X, layer=loop_friendly), network(VARIABLES, X), atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "dilation", "groups", "layout"),
    [
        ((1, 1), (1, 1), 1, LAYOUT),
        ((2, 3), (1, 1), 1, LAYOUT),
        ((1, 2), (2, 1), 1, LAYOUT),
        ((1, 1), (1, 1), 2, LAYOUT),
        ((2, 1), (1, 1), 1, ("NCHW", "OIHW", "NHWC")),
    ],
)
def test_gradients_in_loops_are_those_of_the_layer(strides, dilation, groups, layout):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 9, 8) if layout[0] == "NCHW" else (2, 9, 8, 4)), jnp.float32)
    shape = (6, 4, 3, 2) if layout[1] == "OIHW" else (3, 2, 4 // groups, 6)

    def network(v, x):
        return jax.lax.conv_general_dilated(
            x, v["kernel"], strides, "SAME", rhs_dilation=dilation, dimension_numbers=layout, feature_group_count=groups
        )

    variables = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    graph = trace(network, variables, x.shape)

    def gradients(apply):
        def step(total, x):
            found = jax.grad(lambda v, x: jnp.square(apply(v, x)).sum(), (0, 1))(variables, x)
            return jax.tree.map(jnp.add, total, found), None

        return jax.jit(lambda: jax.lax.scan(step, (variables, x), jnp.stack([x, 2 * x]))[0])()

    found, expected = gradients(lambda v, x: run(graph, v, x, layer=loop_friendly)), gradients(network)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, expected)


def test_each_layer_and_call_draws_its_own_offset():
    """In a deep network, equal keys give equal results, others differ; gradients are finite in any layout."""
    case = model_grid.cifar_resnet8()
    graph = trace(*case.function(), case.input_shape)
    x = jax.random.normal(jax.random.key(0), case.input_shape)

    def loss(x, key):
        return jnp.square(graph.logits(run(graph, case.variables, x, layer=swing(key)))).sum()

    value = jax.jit(jax.value_and_grad(loss))
    (first, gradient), (same, _), (other, _) = (value(x, jax.random.key(k)) for k in (0, 0, 1))
    assert first == same != other
    assert np.isfinite(gradient).all() and (gradient != 0).any()
