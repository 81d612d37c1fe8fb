"""Kernels that several layers read, in other directions too: one quantizer that is right for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from model_grid import function_case

import dfq_jax
from dfq_jax.graph import apply_quantized, run
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import dequantized
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.weights import quantize_kernel
from dfq_jax.runtime import apply_plan, compile_integer
from dfq_jax.stages import equalize, find_pairs
from dfq_jax.stages.comparison import sqnr
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.finetuning import FinetuneConfig, finetune
from dfq_jax.stages.folding import fold_batch_norm, foldable
from dfq_jax.stages.ranges import estimate_ranges
from dfq_jax.stages.rounding import GPTQConfig, ReconstructionConfig, gptq, reconstruct, squant
from dfq_jax.stages.rounding.codes import common_form

NORM = {"scale": (8,), "bias": (8,), "mean": (8,), "var": (8,)}


def batch_norm(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def conv(x, kernel, strides=1, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def autoencoder():
    """x @ w, then h @ w.T."""

    def net(v, x):
        return jax.nn.relu(x @ v["w"]) @ v["w"].T

    return function_case("autoencoder", net, {"w": (12, 20)}, (4, 12))


def deep_autoencoder():
    """Two tied pairs with biases and a BatchNorm."""

    def net(v, x):
        h = jax.nn.relu(batch_norm(v["bn"], x @ v["a"] + v["a_bias"]))
        h = jax.nn.relu(h @ v["b"] + v["b_bias"])
        h = jax.nn.relu(h @ v["b"].T + v["c_bias"])
        return h @ v["a"].T + v["d_bias"]

    shapes = {"a": (12, 8), "b": (8, 6), "a_bias": (8,), "b_bias": (6,), "c_bias": (8,), "d_bias": (12,), "bn": NORM}
    return function_case("deep_autoencoder", net, shapes, (4, 12))


def square():
    """A square kernel read both ways: no shape tells the directions apart."""

    def net(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["stem"]) @ v["w"]) @ v["w"].T @ v["head"]

    return function_case("square", net, {"stem": (6, 9), "w": (9, 9), "head": (9, 4)}, (4, 6))


def transposed_once():
    """w.T computed once and read twice."""

    def net(v, x):
        turned = v["w"].T
        h = jax.nn.relu(batch_norm(v["bn"], x @ turned))
        return jax.nn.relu(h @ turned) @ v["head"]

    return function_case("transposed_once", net, {"w": (8, 8), "head": (8, 5), "bn": NORM}, (4, 8))


def einsums():
    """Three axes, of which two layers have one output channel axis in common."""

    def net(v, x):
        h = jax.nn.relu(jnp.einsum("bi,ihd->bhd", x, v["w"]))
        return jnp.einsum("bd,ihd->bih", h.mean(1), v["w"]).reshape(x.shape[0], -1) @ v["head"]

    return function_case("einsums", net, {"w": (6, 4, 5), "head": (24, 3)}, (4, 6))


def convolution_and_its_transpose():
    def net(v, x):
        h = jax.nn.relu(conv(x, v["w"], 2))
        y = lax.conv_transpose(h, v["w"], (2, 2), "SAME", transpose_kernel=True)
        return jax.nn.relu(y).mean((1, 2)) @ v["head"]

    return function_case("conv_transpose", net, {"w": (3, 3, 6, 8), "head": (6, 4)}, (2, 8, 8, 6))


def transposed_with_the_same_channels():
    """A transposed convolution that reads the kernel as the plain one does."""

    def net(v, x):
        h = jax.nn.relu(conv(x, v["w"]))
        y = lax.conv_transpose(h, v["w"], (2, 2), "SAME")
        return jax.nn.relu(y).mean((1, 2)) @ v["head"]

    return function_case("transposed_same", net, {"w": (3, 3, 8, 8), "head": (8, 4)}, (2, 6, 6, 8))


def depthwise_and_plain():
    def net(v, x):
        h = jax.nn.relu(conv(x, v["w"]))
        h = jax.nn.relu(conv(h, v["w"], groups=8))
        return h.mean((1, 2)) @ v["head"]

    return function_case("depthwise_and_plain", net, {"w": (3, 3, 1, 8), "head": (8, 4)}, (2, 8, 8, 1))


def two_strides():
    def net(v, x):
        h = jax.nn.relu(conv(conv(x, v["stem"]), v["w"]))
        return jax.nn.relu(conv(h, v["w"], 2)).mean((1, 2)) @ v["head"]

    return function_case("two_strides", net, {"stem": (3, 3, 3, 8), "w": (3, 3, 8, 8), "head": (8, 4)}, (2, 8, 8, 3))


TIED = [
    autoencoder, deep_autoencoder, square, transposed_once, einsums, convolution_and_its_transpose,
    transposed_with_the_same_channels, depthwise_and_plain, two_strides,
]  # fmt: skip
FORMS = {  # scale axes of the shared kernels, and whether all layers see the same matrix
    "autoencoder": {"w": ((), False)},
    "deep_autoencoder": {"a": ((), False), "b": ((), False)},
    "square": {"w": ((), False)},
    "transposed_once": {"w": ((0,), True)},
    "einsums": {"w": ((1,), False)},
    "conv_transpose": {"w": ((), False)},
    "transposed_same": {"w": ((3,), True)},
    "depthwise_and_plain": {"w": ((3,), False)},
    "two_strides": {"w": ((3,), True)},
}


def networks(*fast):
    """Parametrizes over all networks; those that are not named run as slow tests."""
    marked = [build if build in fast else pytest.param(build, marks=pytest.mark.slow) for build in TIED]
    return pytest.mark.parametrize("build", marked, ids=lambda build: build.__name__)


every = networks(*TIED)


def spread(leaf):
    """Kernels whose channels differ in size along every axis, so that a scale of the wrong one shows."""
    if leaf.ndim < 2:
        return leaf
    for axis, size in enumerate(leaf.shape):
        factors = np.random.default_rng(axis).permutation(np.geomspace(0.2, 5.0, size)).astype(np.float32)
        leaf = leaf * factors.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
    return leaf


def setup(build, bits, **fields):
    case = build()
    function, variables = case.function()
    variables = jax.tree.map(spread, variables)
    graph = trace(function, variables, case.input_shape)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, *case.input_shape[1:])), jnp.float32)
    convention = Convention.parse(bits, weight_range="min_max", **fields)
    ranges = {}
    if convention.activation_bits is not None:
        ranges = estimate_ranges(graph, variables, x, convention, estimator="max")
    return graph, variables, quantize_params(graph, variables, ranges, convention), x


def simulated(graph, qvariables, x):
    return np.asarray(jax.jit(apply_quantized, static_argnums=0)(graph, qvariables, x))


def near(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


def check_right(graph, qvariables, x):
    """Float activations: the quantized network is the float one on dequantized weights."""
    near(simulated(graph, qvariables, x), np.asarray(graph.apply_fn(dequantized(qvariables), x)))


# --- scales and bits ---


@every
def test_scale_axes_are_channels_to_all_layers(build):
    graph, _, qvariables, _ = setup(build, "w4a16")
    shared = {path: layers for path, layers in graph.kernels.items() if len(layers) > 1}
    expected = FORMS[build().name]
    assert shared.keys() == expected.keys()
    for path, layers in shared.items():
        kernel, (axes, same) = graph.leaf(qvariables, path), expected[path]
        assert tuple(a for a, size in enumerate(kernel.scale.shape) if size > 1) == axes
        assert Convention().scale_axes(graph, layers[-1]) == axes
        assert (common_form(graph, path) is not None) == same


@pytest.mark.parametrize("bits", [pytest.param("w8a16", marks=pytest.mark.slow), "w3a16"])
@every
def test_float_activations_give_the_float_network_on_dequantized_weights(build, bits):
    graph, _, qvariables, x = setup(build, bits)
    check_right(graph, qvariables, x)
    plan, ivariables = compile_integer(graph, qvariables)
    near(np.asarray(apply_plan(plan, ivariables, x)), simulated(graph, qvariables, x))


@pytest.mark.parametrize("bits", ["w8a8", pytest.param("w4a4", marks=pytest.mark.slow)])
@networks(autoencoder, einsums, transposed_with_the_same_channels, depthwise_and_plain)
def test_integers_agree_with_the_simulation_and_with_numpy(build, bits):
    graph, variables, qvariables, x = setup(build, bits)
    expected = simulated(graph, qvariables, x)
    near(jax.jit(lambda q, x: apply_quantized(graph, q, x, integer=True))(qvariables, x), expected)
    plan, ivariables = compile_integer(graph, qvariables)
    assert sqnr(expected, np.asarray(apply_plan(plan, ivariables, x))) > (60 if bits == "w8a8" else 40)
    if bits == "w8a8":
        assert sqnr(np.asarray(graph.apply_fn(variables, x)), expected) > 20


def test_tied_autoencoder_against_float64_numpy():
    graph, _, qvariables, x = setup(autoencoder, "w8a8")
    kernel, quantizers = qvariables["w"], qvariables["quantization"]["tensors"]
    w = np.asarray(kernel.qvalue, np.float64) * np.asarray(kernel.scale, np.float64)

    def rounded(value, name):
        params = quantizers[name]
        zero = float(params.zero_point)
        codes = np.clip(np.round(value / float(params.scale)) + zero, 0, 255)
        return (codes - zero) * float(params.scale)

    first, second = (layer.tensor for layer in graph.layers)
    hidden = np.maximum(rounded(np.asarray(x, np.float64), first) @ w, 0)
    near(simulated(graph, qvariables, x), rounded(hidden, second) @ w.T, 2e-3)  # a code of the hidden layer may move


def test_the_last_layer_has_its_bits_where_it_shares_its_kernel():
    def net(v, x):
        h = jax.nn.relu(x @ v["a"])
        return jax.nn.relu(h @ v["w"]) @ v["w"]

    shapes = {"a": (6, 6), "w": (6, 6)}
    graph, _, qvariables, _ = setup(lambda: function_case("edges", net, shapes, (4, 6)), "w4a4", edge_bits=7)
    assert [qvariables[path].bits for path in ("a", "w")] == [7, 7]
    graph, _, qvariables, _ = setup(lambda: function_case("edges", net, shapes, (4, 6)), "w4a4")
    assert qvariables["w"].bits == 8 and qvariables["w"].zero_point is None  # as 8-bit weights are
    assert {Convention().layer_bits(graph, layer) for layer in graph.layers} == {8}


# --- a scale that is wrong is refused ---


@pytest.mark.parametrize("build", [autoencoder, convolution_and_its_transpose], ids=lambda build: build.__name__)
def test_scale_along_an_axis_that_a_layer_sums_over_is_refused(build):
    graph, variables, qvariables, x = setup(build, "w8a8")
    first = graph.kernels["w"][0]
    own = quantize_kernel(variables["w"], bits=8, symmetric=True, channel_axes=first.channel_axes)
    wrong = graph.replace(qvariables, {"w": own})
    for integer in (False, True):
        with pytest.raises(GraphError, match="'w#2' has output channels along axes"):
            apply_quantized(graph, wrong, x, integer=integer)
    with pytest.raises(GraphError, match="Quantize the float network again"):
        compile_integer(graph, wrong)


# --- what changes codes ---


@networks(deep_autoencoder, transposed_once)
def test_squant_and_gptq_leave_codes_that_mean_different_matrices(build):
    graph, variables, qvariables, x = setup(build, "w4a16", edge_bits=None)
    for found in (squant(graph, variables, qvariables), gptq(graph, variables, qvariables, x, GPTQConfig())):
        check_right(graph, found, x)
        for path in graph.kernels:
            changed = bool(jnp.any(graph.leaf(found, path).qvalue != graph.leaf(qvariables, path).qvalue))
            assert not changed or common_form(graph, path) is not None


def test_gptq_adds_up_the_inputs_of_layers_of_one_form():
    graph, variables, qvariables, x = setup(two_strides, "w3a16", edge_bits=None)
    better = gptq(graph, variables, qvariables, x, GPTQConfig(centered=False))["w"]

    def error(kernel):
        """Of the results of both layers, on the inputs that they have in the quantized network."""
        errors = []

        def note(call):
            if call.layer.kernel == "w":
                results = [call.form.product(call.operand, w) for w in (variables["w"], kernel.dequantize())]
                errors.append(jnp.sum(jnp.square(results[0] - results[1])))
            return call.default()

        run(graph, qvariables, x, layer=note)
        assert len(errors) == 2
        return float(sum(errors))

    assert error(better) < 0.7 * error(qvariables["w"])


@networks()
def test_reconstruction_and_finetuning_keep_one_quantizer(build):
    graph, variables, qvariables, x = setup(build, "w4a4", edge_bits=None)
    key = jax.random.key(0)
    config = ReconstructionConfig(steps=20, batch_size=4, drop=0.0, min_layers=1)
    learned, _ = reconstruct(graph, variables, qvariables, x, key, config)
    tuned, _ = finetune(graph, variables, qvariables, x, key, FinetuneConfig(steps=4, batch_size=4, crop=0, flip=False))
    for found in (learned, tuned):
        for path, layers in graph.kernels.items():
            kernel = graph.leaf(found, path)
            assert isinstance(kernel, QTensor) and kernel.scale.shape == graph.leaf(qvariables, path).scale.shape
            for layer in layers:
                layer.check_scale(kernel.scale.shape)
        check_right(graph, {**found, "quantization": {"tensors": {}, "operands": {}}}, x)


def test_reconstruction_leaves_kernels_that_other_blocks_read_otherwise():
    graph, variables, qvariables, x = setup(deep_autoencoder, "w4a4", edge_bits=None)
    assert len(graph.blocks) > 1
    learned, _ = reconstruct(
        graph, variables, qvariables, x, jax.random.key(0), ReconstructionConfig(steps=20, batch_size=4, min_layers=1)
    )
    np.testing.assert_array_equal(learned["a"].qvalue, qvariables["a"].qvalue)


# --- folding and equalization ---


@networks(deep_autoencoder, transposed_once)
@pytest.mark.parametrize("change", [fold_batch_norm, equalize])
def test_folding_and_equalization_keep_the_function(build, change):
    graph, variables, _, x = setup(build, "w4a16")
    near(graph.apply_fn(change(graph, variables), x), np.asarray(graph.apply_fn(variables, x)), 1e-4)


def test_what_serves_two_layers_by_way_of_one_value_does_not_change():
    graph, *_ = setup(transposed_once, "w4a16")
    assert graph.program.readers(graph.layers[0].kernel_index) == 1  # the transposition alone
    assert not any(foldable(graph, layer) for layer in graph.layers)
    assert all("w" not in (graph.layer(pair.first).kernel, *pair.readers) for pair in find_pairs(graph)[0])


# --- files ---


@pytest.mark.parametrize("bits", ["w8a8", "w4a16"])
@networks(autoencoder, convolution_and_its_transpose)
def test_onnx_file_is_the_simulation(build, bits, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from dfq_jax.export.onnx import export_onnx, open_onnx

    graph, _, qvariables, x = setup(build, bits)
    export_onnx((graph, qvariables), tmp_path / "net.onnx")
    found = open_onnx(tmp_path / "net.onnx")(np.asarray(x))
    assert sqnr(simulated(graph, qvariables, x), found) > (35 if bits == "w8a8" else 90)


@pytest.mark.parametrize("build", [autoencoder, convolution_and_its_transpose], ids=lambda build: build.__name__)
def test_whole_pipeline(build, tmp_path):
    case = build()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, *case.input_shape[1:])), jnp.float32)
    variables = jax.tree.map(spread, case.variables)
    q = dfq_jax.quantize(case.model, variables, input_shape=case.input_shape, recipe="noise", bits="w8a8", images=x)
    expected = np.asarray(q(x))
    assert sqnr(np.asarray(q.graph.apply_fn(variables, x)), expected) > 20
    assert sqnr(expected, np.asarray(q.integer()(x))) > 60
    q.save(tmp_path / "net.safetensors")
    again = dfq_jax.load(tmp_path / "net.safetensors", case.model, variables)
    np.testing.assert_array_equal(again(x), expected)
    size = q.report.size
    assert size["quantized"] < size["float"]
