"""ONNX files in ONNX Runtime against the network in JAX."""

import collections
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_grid import GRID, cifar_resnet8, conv_1d, general_dense, mlp, no_batch_norm, vgg

import dfq_jax
from dfq_jax.evaluation import sqnr
from dfq_jax.export import get_exporter

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dfq_jax.export.onnx import export_onnx, open_onnx, to_onnx  # noqa: E402


def setup(build):
    case = build()
    function, variables = case.function()
    graph = dfq_jax.trace(function, variables, case.input_shape)
    x = np.random.default_rng(1).normal(size=(8, *case.input_shape[1:])).astype(np.float32)
    return graph, variables, x


def quantized(graph, variables, x, bits, **fields):
    convention = dfq_jax.Convention.parse(bits, **fields)
    ranges = {}
    if convention.activation_bits is not None:
        ranges = dfq_jax.estimate_ranges(graph, variables, jnp.asarray(x), convention, estimator="max")
    return dfq_jax.quantize_params(graph, variables, ranges, convention)


def check_float(build, tmp_path):
    graph, variables, x = setup(build)
    export_onnx((graph, variables), tmp_path / "net.onnx")
    run = open_onnx(tmp_path / "net.onnx")
    expected = np.asarray(graph.logits(jax.jit(graph.apply_fn)(variables, x)), np.float32)
    tolerance = 2e-2 if build().name == "bfloat16" else 1e-5
    np.testing.assert_allclose(run(x), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(run(x[:1]), expected[:1], rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("build", GRID)
def test_float_network_gives_the_same_logits_at_any_batch_size(build, tmp_path):
    check_float(build, tmp_path)


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
    ({"opset": 11}, "opset"), ({"int4": True}, "opset=21"),
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
