"""ONNX files in ONNX Runtime against the network in JAX."""

import collections
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_grid import (
    GRID,
    audio,
    cifar_resnet8,
    conv_1d,
    convnext,
    general_dense,
    mlp,
    no_batch_norm,
    unet,
    vgg,
    video,
    vit,
)

import dfq_jax
from dfq_jax.export import get_exporter
from dfq_jax.stages.comparison import sqnr

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from dfq_jax.export.onnx import export_onnx, open_onnx, to_onnx  # noqa: E402


@functools.cache
def setup(build):
    case = build()
    function, variables = case.function()
    graph = dfq_jax.trace(function, variables, case.input_shape)
    x = np.random.default_rng(1).normal(size=(8, *case.input_shape[1:])).astype(np.float32)
    return graph, variables, x


def quantized(graph, variables, x, bits, **fields):
    convention = dfq_jax.Convention.parse(bits, **{"weight_range": "min_max"} | fields)
    ranges = {}
    if convention.activation_bits is not None:
        ranges = dfq_jax.estimate_ranges(graph, variables, jnp.asarray(x), convention, estimator="max")
    return dfq_jax.quantize_params(graph, variables, ranges, convention)


def plain(model, x):
    """The logits of a model in a session with default options, of some examples three by three, of the others alone."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    parts = np.split(x, [3, 6, *range(7, len(x))])
    return np.concatenate([session.run(["logits"], {"input": part})[0] for part in parts])


def simulated(graph, qvariables, x):
    apply = jax.jit(lambda v, x: dfq_jax.apply_quantized(graph, v, x))
    return np.asarray(graph.logits(apply(qvariables, x)), np.float32)


def check_float(build):
    graph, variables, x = setup(build)
    expected = np.asarray(graph.logits(jax.jit(graph.apply_fn)(variables, x)), np.float32)
    tolerance = 2e-2 if build().name == "bfloat16" else 1e-5
    found = plain(to_onnx(graph, variables), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def check_w8a8(build):
    graph, variables, x = setup(build)
    qvariables = quantized(graph, variables, x, "w8a8")
    expected = simulated(graph, qvariables, x)
    # In deep networks a code that the rounding of biases changes changes many others: up to the noise of quantization.
    assert sqnr(expected, plain(to_onnx(graph, qvariables), x)) > (35 if len(graph.layers) > 20 else 40)
    if build().name != "bfloat16":
        assert sqnr(expected, plain(to_onnx(graph, qvariables, float_bias=True), x)) > 100


# What they are made of is in no other network here: the rest of the grid is slow.
FORMS = (vit, convnext, unet, audio, video)


@pytest.mark.parametrize("build", FORMS, ids=lambda b: b.__name__)
def test_networks_of_many_kinds_in_a_plain_session(build):
    check_float(build)
    check_w8a8(build)


@pytest.mark.slow
@pytest.mark.parametrize("build", GRID)
def test_the_grid_in_a_plain_session(build):
    check_float(build)
    check_w8a8(build)


def one_sign():
    """Large weights of one sign: pairs of products exceed 16 bits, in which some kernels for x86 add them up."""
    rng = np.random.default_rng(0)
    variables = {
        "conv": jnp.asarray(rng.uniform(0.5, 1, (3, 3, 16, 16)), jnp.float32),
        "dense": jnp.asarray(rng.uniform(0.5, 1, (16, 12)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32),
    }

    def apply_fn(v, x):
        x = jax.lax.conv_general_dilated(x, v["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(jax.nn.relu(x) @ v["dense"]).mean((1, 2)) @ v["head"]

    x = rng.uniform(0, 1, (8, 6, 6, 16)).astype(np.float32)
    return dfq_jax.trace(apply_fn, variables, (2, 6, 6, 16)), variables, x


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w8a4"])
def test_integer_sums_do_not_saturate(bits):
    graph, variables, x = one_sign()
    qvariables = quantized(graph, variables, x, bits)
    assert sqnr(simulated(graph, qvariables, x), plain(to_onnx(graph, qvariables), x)) > 40


def stored(model):
    """Types of activations and weights of each product, and the weights' codes less their zero points."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    types, codes = set(), []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            x, kernel = (producers[name] for name in node.input[:2])
            while x.op_type == "Transpose":
                x = producers[x.input[0]]
            types.add((arrays[x.input[2]].dtype.name, arrays[kernel.input[0]].dtype.name))
            weights, zero = (arrays[kernel.input[i]].astype(int) for i in (0, 2))
            axis = kernel.attribute[0].i
            codes.append(weights - zero.reshape([-1 if a == axis else 1 for a in range(weights.ndim)]))
    return types, codes


def test_types_of_integers_are_those_asked_for_and_codes_the_same():
    graph, variables, x = one_sign()
    qvariables = quantized(graph, variables, x, "w8a8")
    default, codes = stored(to_onnx(graph, qvariables))
    assert default == {("uint8", "uint8")}
    kernels = [np.asarray(qvariables[name].centered()) for name in ("conv", "dense", "head")]
    np.testing.assert_array_equal(codes[0], kernels[0].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(codes[1], kernels[1])
    for integers, types in (("u8s8", ("uint8", "int8")), ("s8s8", ("int8", "int8"))):
        found, others = stored(to_onnx(graph, qvariables, integers=integers))
        assert found == {types}
        for a, b in zip(codes, others, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("integers", ["u8s8", "s8s8"])
def test_seven_bits_saturate_in_no_type(integers):
    graph, variables, x = one_sign()
    qvariables = quantized(graph, variables, x, "w7a8", edge_bits=None, symmetric_weights=True)
    model = to_onnx(graph, qvariables, integers=integers)
    assert sqnr(simulated(graph, qvariables, x), plain(model, x)) > 40


def test_weights_with_zero_points_of_their_own():
    """Eight bits with one zero point for each channel, which no recipe gives but anyone may."""
    graph, variables, x = one_sign()
    qvariables = dict(quantized(graph, variables, x, "w8a8"))
    for name in variables:
        kernel = qvariables[name]
        zero = np.random.default_rng(1).integers(0, 100, kernel.scale.shape)
        codes = np.clip(np.asarray(kernel.qvalue, int) + zero, 0, 255).astype(np.uint8)
        qvariables[name] = dataclasses.replace(
            kernel, qvalue=jnp.asarray(codes), zero_point=jnp.asarray(zero, jnp.float32), signed=False
        )
    assert sqnr(simulated(graph, qvariables, x), plain(to_onnx(graph, qvariables), x)) > 40


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("build", [vgg, mlp], ids=lambda b: b.__name__)
def test_a_float_kernel_between_codes_stays_in_float(build, layer):
    graph, variables, x = setup(build)
    path = graph.layers[layer].kernel
    qvariables = quantized(graph, variables, x, "w8a8", weight_range="lp")
    qvariables = graph.replace(qvariables, {path: graph.leaf(variables, path)})
    assert sqnr(simulated(graph, qvariables, x), plain(to_onnx(graph, qvariables), x)) > 100


def test_a_bias_that_does_not_fit_integers():
    """Where the input of a layer is dead its scale is tiny, and the bias is all that there is."""
    graph, variables, x = setup(vgg)
    bn = graph.batch_norms[0]
    dead = {bn.scale: jnp.zeros(bn.channels), bn.bias: jnp.full(bn.channels, -1.0)}
    variables = graph.replace(variables, dead)
    qvariables = quantized(graph, variables, x, "w8a8")
    expected = simulated(graph, qvariables, x)
    found = plain(to_onnx(graph, qvariables), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("bits", ["w4a16", "w8a16"])
def test_float_activations_stay_in_float(bits):
    graph, variables, x = setup(mlp)
    qvariables = quantized(graph, variables, x, bits)
    for opset, int4 in ((18, False), (21, True)):
        model = to_onnx(graph, qvariables, opset=opset, int4=int4)
        assert sqnr(simulated(graph, qvariables, x), plain(model, x)) > 100


@pytest.mark.parametrize("bits, fields, decibel", [
    ("w8a8", {}, 50),  # biases are rounded to int32 steps of the accumulator
    ("w4a4", {"edge_bits": 4, "per_channel": False}, 100),
    ("w4a4", {"shortcuts": "quantized", "edge_bits": None}, 100),
    ("w4a16", {}, 100),
])  # fmt: skip
@pytest.mark.parametrize("build", [no_batch_norm, general_dense], ids=lambda b: b.__name__)
def test_quantized_network_is_the_simulated_one(build, bits, fields, decibel, tmp_path):
    graph, variables, x = setup(build)
    qvariables = quantized(graph, variables, x, bits, **fields)
    export_onnx((graph, qvariables), tmp_path / "net.onnx")
    expected = graph.logits(jax.jit(lambda v, x: dfq_jax.apply_quantized(graph, v, x))(qvariables, x))
    assert sqnr(expected, open_onnx(tmp_path / "net.onnx")(x)) > decibel


@pytest.mark.parametrize("build", [vgg, conv_1d], ids=lambda b: b.__name__)
def test_folded_batch_norm_of_a_quantized_network(build, tmp_path):
    graph, variables, x = setup(build)
    qvariables = quantized(graph, variables, x, "w4a4")
    expected = graph.logits(jax.jit(lambda v, x: dfq_jax.apply_quantized(graph, v, x))(qvariables, x))
    for opset, int4 in ((18, False), (21, True)):
        export_onnx((graph, qvariables), tmp_path / "net.onnx", opset=opset, int4=int4)
        # Scales rounded after folding may move a result across the boundary of two codes, but hardly any.
        assert sqnr(expected, open_onnx(tmp_path / "net.onnx")(x)) > 30


def test_negative_batch_norm_scales_and_dead_channels_fold(tmp_path):
    graph, variables, x = setup(mlp)
    paths = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    bn, layer = graph.batch_norms[0], graph.layers[0]
    new = {bn.scale: -paths[bn.scale], layer.kernel: paths[layer.kernel].at[:, 0].set(0)}
    variables = graph.replace(variables, new)
    qvariables = quantized(graph, variables, x, "w8a8")
    export_onnx((graph, qvariables), tmp_path / "net.onnx")
    expected = graph.logits(jax.jit(lambda v, x: dfq_jax.apply_quantized(graph, v, x))(qvariables, x))
    assert sqnr(expected, open_onnx(tmp_path / "net.onnx")(x)) > 35


def test_a_residual_network_has_one_transposition():
    graph, variables, x = setup(cifar_resnet8)
    for tree in (variables, quantized(graph, variables, x, "w8a8")):
        counts = collections.Counter(node.op_type for node in to_onnx(graph, tree).graph.node)
        assert counts["Transpose"] == 1
        assert counts["Conv"] == sum(layer.kind == "conv" for layer in graph.layers)


def test_what_onnx_cannot_express_is_refused_by_name_and_place(tmp_path):
    variables = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    graph = dfq_jax.trace(lambda v, x: jnp.sort(x @ v["a"]["kernel"]) @ v["b"]["kernel"], variables, (2, 3))
    with pytest.raises(dfq_jax.GraphError, match=r"`sort`.*after layer a"):
        export_onnx((graph, variables), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    ({"opset": 11}, "opset"), ({"int4": True}, "opset=21"), ({"integers": "s8u8"}, "integers: .*'s8u8'"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    graph, variables, _ = setup(mlp)
    with pytest.raises(ValueError, match=message):
        to_onnx(graph, variables, **arguments)


def test_a_missing_package_names_its_extra(monkeypatch):
    graph, variables, _ = setup(mlp)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"dfq_jax\[onnx\]"):
        to_onnx(graph, variables)


def test_bad_files_and_formats(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(ValueError, match="no ONNX file"):
        get_exporter("onnx").open(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="one of"):
        get_exporter("caffe")


def test_the_runner_refuses_other_shapes(tmp_path):
    graph, variables, x = setup(mlp)
    export_onnx((graph, variables), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="x: the file takes"):
        open_onnx(tmp_path / "net.onnx")(x[:, :3])
