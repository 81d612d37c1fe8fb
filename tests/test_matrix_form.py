"""A layer's matrix form computes the layer, on every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

from dfq_jax.graph import run
from dfq_jax.graph.graph import trace

NAMES = ("dilated_grouped", "transposed_conv", "general_dense", "conv_1d", "conv_3d", "channels_first", "odd_sizes")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "odd_sizes" else []) for n in NAMES])
def test_patches_times_kernel_is_the_layer(name):
    case = getattr(model_grid, name)()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    seen = []

    def check(call):
        result = call.default()
        form = call.form.kernel
        matrix = form.matrix(call.kernel)
        np.testing.assert_array_equal(form.leaf(matrix), call.kernel)
        product = jnp.einsum("mgd,god->mgo", call.form.patches(call.operand), matrix.reshape(*matrix.shape[:2], -1))
        axes = call.form.channel_axes
        expected = jnp.moveaxis(result, axes, range(-len(axes), 0)).reshape(product.shape)
        np.testing.assert_allclose(product, expected, rtol=0, atol=1e-5 * float(jnp.abs(result).max()))
        seen.append(call.layer.name)
        return result

    run(graph, variables, case.images(), layer=check)
    assert seen == [layer.name for layer in graph.layers]


def test_input_channels():
    case = model_grid.dilated_grouped()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    grouped = graph.layer("grouped")
    np.testing.assert_array_equal(graph.form(grouped).input_channels(3), [[0, 1], [2, 3]])
    # Along another axis every input runs over all indices.
    assert graph.form(grouped).input_channels(1) is None


def test_input_channels_behind_a_flattened_image():
    case = model_grid.function_case(
        "flat",
        lambda v, x: x.reshape(x.shape[0], -1) @ v["kernel"],
        {"kernel": (2 * 3 * 4, 5)},
        (1, 2, 3, 4),
    )
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    (layer,) = graph.layers
    np.testing.assert_array_equal(graph.form(layer).input_channels(3), np.tile(np.arange(4), 6)[None])
    np.testing.assert_array_equal(graph.form(layer).input_channels(1), np.repeat(np.arange(2), 12)[None])


@pytest.mark.parametrize("side", [0, 1])
def test_axes_of_products_are_where_the_result_has_them(side):
    shapes = (3, 2, 5, 7), (3, 7, 4)

    def apply_fn(v, x):
        return jax.lax.dot_general(*((v, x), (x, v))[side], (((3,), (1,)), ((0,), (0,))))

    kernel, x = (jnp.ones(shapes[i]) for i in (side, 1 - side))
    graph = trace(apply_fn, kernel, x.shape)
    (layer,) = graph.layers
    form = graph.form(layer)
    assert form is graph.form(graph.layer(layer.name)) and {form: 1}[form] == 1
    for own, axes in ((form.shapes[side], form.kernel_axes), (form.shapes[1 - side], form.input_axes)):
        assert sorted(axes.order) == list(range(len(own)))
        assert [own[a] for a in axes.batch] == [3] and [own[a] for a in axes.summed] == [7]
    assert [form.result_shape[a] for a in form.channel_axes] == [
        kernel.shape[a] for a in (*form.kernel_axes.batch, *form.kernel_axes.free)
    ]
    assert form.channel_vector(jnp.ones((1,) * kernel.ndim)).shape == form.channel_shape
