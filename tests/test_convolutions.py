"""Convolutions in the forms that are fast on CPU: values and both gradients are those of XLA."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from dfq_jax.base.backend import platform_of
from dfq_jax.graph import apply_quantized, loop_friendly, run
from dfq_jax.graph.convolutions import cpu_product, depthwise_product, pointwise_product
from dfq_jax.graph.graph import trace
from dfq_jax.runtime import apply_plan, compile_integer
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.ranges import estimate_ranges


def params(strides=(1, 1), padding=((0, 0), (0, 0)), groups=1, **others):
    """Parameters of the primitive `conv_general_dilated`."""
    usual = {
        "window_strides": strides,
        "padding": padding,
        "feature_group_count": groups,
        "batch_group_count": 1,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC")),
        "precision": None,
        "preferred_element_type": None,
    }
    return usual | others


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(functions, cast, x, kernel, direction):
    def both(function):
        y, pull = jax.vjp(lambda x, k: function(x.astype(cast), k.astype(cast)), x, kernel)
        return y, *pull(direction.astype(y.dtype))

    return [both(function) for function in functions]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding", "groups", "way"),
    [
        ((7, 8), (3, 3, 1, 4), (1, 1), ((1, 1), (1, 1)), 4, depthwise_product),
        ((8, 7), (3, 3, 1, 4), (2, 2), ((0, 1), (1, 1)), 4, depthwise_product),
        ((9, 8), (5, 5, 1, 4), (2, 2), ((2, 2), (1, 2)), 4, depthwise_product),
        ((9, 11), (5, 3, 1, 4), (1, 2), ((0, 0), (2, 0)), 4, depthwise_product),
        ((10, 9), (2, 2, 1, 4), (3, 3), ((0, 0), (0, 0)), 4, depthwise_product),  # pixels that no window reads
        ((6, 6), (1, 1, 1, 4), (2, 2), ((0, 0), (0, 0)), 4, depthwise_product),
        ((7, 6), (1, 1, 4, 5), (1, 1), ((0, 0), (0, 0)), 1, pointwise_product),
        ((7, 6), (1, 1, 4, 5), (2, 3), ((0, 0), (0, 0)), 1, pointwise_product),
        ((5, 6), (1, 1, 4, 3), (2, 1), ((1, 0), (2, 1)), 1, pointwise_product),
        ((5, 6), (1, 1, 2, 6), (1, 2), ((0, 1), (0, 0)), 2, pointwise_product),
        ((5, 6), (1, 1, 1, 8), (1, 1), ((0, 0), (0, 0)), 4, pointwise_product),
    ],
)
def test_values_and_gradients(size, kernel, strides, padding, groups, way, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=kernel), jnp.float32)
    own = cpu_product(params(strides, padding, groups), x.shape, kernel)
    assert own.func == way

    def expected(x, weights):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, weights, strides, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    shape = jax.eval_shape(expected, x, weights).shape
    direction = jnp.asarray(rng.integers(-4, 5, size=shape), jnp.float32)
    found = values_and_gradients((own, expected), dtype, x, weights, direction)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kernel", "groups", "sums"),
    [((3, 3, 1, 4), 4, "nhwckl,klzc->nhwc"), ((1, 1, 4, 6), 1, "nhwckl,klco->nhwo")],
)
def test_integers_are_summed_in_the_type_asked_for(kernel, groups, sums):
    rng = np.random.default_rng(0)
    x, weights = (rng.integers(-128, 128, size=size) for size in ((2, 6, 6, 4), kernel))
    own = cpu_product(params(groups=groups, preferred_element_type=jnp.int32), x.shape, kernel)
    found = jax.jit(own)(x.astype(np.int8), weights.astype(np.int8))
    assert found.dtype == jnp.int32
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel[:2], (1, 2))
    np.testing.assert_array_equal(found, np.einsum(sums, windows, weights))


@pytest.mark.parametrize(
    ("kernel", "different"),
    [
        ((3, 3, 4, 4), {}),
        ((1, 1, 4, 5), {"padding": ((-1, 0), (0, 0))}),
        ((1, 1, 4, 5), {"lhs_dilation": (2, 1)}),
        ((1, 1, 4, 5), {"batch_group_count": 2}),
        ((3, 3, 1, 4), {"groups": 4, "rhs_dilation": (2, 2)}),
        ((3, 3, 1, 8), {"groups": 4}),
        ((11, 11, 1, 4), {"groups": 4}),
        ((1, 1, 4, 5), {"dimension_numbers": lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NCHW", "HWIO", "NCHW"))}),
    ],
)
def test_others_are_left_to_xla(kernel, different):
    assert cpu_product(params(**different), (2, 8, 8, 4), kernel) is None


class Net(nn.Module):
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    pointwise: bool = False

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1] * self.multiplier
        if self.pointwise:
            return nn.Conv(features, (1, 1), self.stride)(x)
        return nn.Conv(features, (3, 3), self.stride, feature_group_count=x.shape[-1], kernel_dilation=self.dilation)(x)


@pytest.mark.parametrize(
    ("options", "supported"),
    [
        ({"stride": 2}, True),
        ({}, True),
        ({"dilation": 2}, False),
        ({"multiplier": 2}, False),
        ({"pointwise": True}, True),
        ({"pointwise": True, "stride": 2, "multiplier": 2}, True),
    ],
)
def test_the_interpreter_uses_it_where_it_may(options, supported):
    net = Net(**options)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    graph = trace(net.apply, variables, x.shape)
    layer = graph.first_layer
    op = graph.program.ops[layer.op]
    assert (cpu_product(op.params, x.shape, layer.kernel_shape) is not None) == supported
    found, expected = jax.jit(lambda v, x: (run(graph, v, x), net.apply(v, x)))(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # What is traced holds the program's own convolution; what is compiled for CPU only where nothing else is known.
    traced = jax.jit(lambda v, x: run(graph, v, x)).trace(variables, x)
    assert str(traced.jaxpr).count("conv_general_dilated") == 1
    on_cpu = traced.lower(lowering_platforms=("cpu",)).compile().as_text() if jax.default_backend() == "cpu" else None
    assert on_cpu is None or (" convolution(" in on_cpu) == (not supported)


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), 2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="pointwise")(x))
        return nn.Dense(5)(x.mean((1, 2)))


@functools.cache
def separable():
    net, x = Separable(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    return trace(net.apply, variables, x.shape), variables, x


@functools.cache
def quantized():
    graph, variables, x = separable()
    convention = Convention.parse("w8a8", weight_range="min_max")
    ranges = estimate_ranges(graph, variables, x, convention, estimator="max")
    return quantize_params(graph, variables, ranges, convention)


def gradient(graph, layer):
    def loss(variables, x):
        return jnp.sum(jnp.square(run(graph, variables, x, layer=layer)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


DEPTHWISE = "feature_group_count = 8"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("layer", [None, loop_friendly])
def test_the_platform_lowered_for_decides(platform, layer):
    graph, variables, x = separable()
    function = jax.jit(lambda v, x: run(graph, v, x, layer=layer))
    texts = [
        export.export(f, platforms=(platform,))(variables, x).mlir_module() for f in (function, gradient(graph, layer))
    ]
    if platform == "cpu" and jax.__version_info__ < (0, 8):
        return  # all branches are in the text, and the compiler drops those of other platforms
    assert [DEPTHWISE in text for text in texts] == [platform != "cpu"] * 2


def test_one_export_for_all_platforms():
    graph, variables, x = separable()
    program = export.export(jax.jit(lambda v, x: run(graph, v, x)), platforms=("cpu", "cuda", "tpu"))(variables, x)
    assert DEPTHWISE in program.mlir_module()
    np.testing.assert_allclose(program.call(variables, x), Separable().apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("integer", [False, True])
def test_quantized_network_by_platform(platform, integer):
    graph, _, x = separable()
    qvariables = quantized()
    if integer:
        plan, arrays = compile_integer(graph, qvariables)
        function = jax.jit(lambda v, x: apply_plan(plan, v, x))
    else:
        arrays, function = qvariables, jax.jit(lambda v, x: apply_quantized(graph, v, x))
    text = export.export(function, platforms=(platform,))(arrays, x).mlir_module()
    assert platform == "cpu" or DEPTHWISE in text


def test_gradients_under_scan_and_vmap_are_those_of_the_network():
    graph, variables, x = separable()
    net = Separable()

    def loss(apply):
        return lambda v, x: jnp.sum(jnp.square(apply(v, x)))

    def own(v, x):
        return run(graph, v, x)

    def looped(apply):
        step = jax.grad(loss(apply), argnums=1)
        return jax.jit(lambda v, x: jax.lax.scan(lambda x, _: (x - 0.1 * step(v, x), None), x, length=2)[0])

    np.testing.assert_allclose(looped(own)(variables, x), looped(net.apply)(variables, x), rtol=1e-4, atol=1e-5)
    mapped = jax.jit(jax.vmap(jax.grad(loss(own)), (None, 0)))(variables, x[:, None].repeat(2, 1))
    expected = jax.jit(jax.vmap(jax.grad(loss(net.apply)), (None, 0)))(variables, x[:, None].repeat(2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mapped, expected)


def test_what_ran_by_rules_traces_to_the_same_layers():
    graph, variables, x = separable()
    again = trace(lambda v, x: run(graph, v, x), variables, x.shape)
    assert again.layers == graph.layers and again.digest == graph.digest


def test_platform_of():
    device = jax.devices("cpu")[0]
    assert platform_of({"a": np.ones(2), "b": jax.device_put(jnp.ones(2), device)}) == "cpu"
    with jax.default_device(device):
        assert platform_of(np.ones(2)) == "cpu"
    assert platform_of() == jax.default_backend()
