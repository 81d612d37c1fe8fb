"""Ranges in the forms of other tools, each given to the tool itself where it is installed."""

from __future__ import annotations

import json
import pickle
import subprocess

import model_grid
import numpy as np
import pytest
from test_export_formats import litert, needs_litert, network

import dfq_jax
from dfq_jax.export.interchange import from_aimet, onnx_names, ranges_of, to_aimet, to_litert, to_onnxruntime, to_qwix

RANGES = {"a": (-1.0, 3.0), "b": (0.0, 6.0)}


def float_network(name):
    case = getattr(model_grid, name)()
    function, variables = case.function()
    return case, dfq_jax.trace(function, variables, case.input_shape), variables


def grid_ranges(graph):
    """A different range for each tensor, so that none can be taken for another."""
    return {tensor.name: (-0.5 - i / 8, 2.0 + i / 4) for i, tensor in enumerate(graph.tensors)}


@pytest.mark.parametrize("name", ["mlp", "cifar_resnet8"])
def test_onnxruntime_quantizes_with_our_ranges(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    from dfq_jax.export.onnx import export_onnx

    _, graph, variables = float_network(name)
    export_onnx((graph, variables), tmp_path / "float.onnx")
    names = onnx_names(tmp_path / "float.onnx")
    assert set(names) == {tensor.name for tensor in graph.tensors}
    ranges = grid_ranges(graph)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = [np.random.default_rng(0).normal(size=graph.input.shape).astype(np.float32)]

        def get_next(self):
            return {"input": self.left.pop()} if self.left else None

    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        extra_options={
            "TensorQuantOverrides": to_onnxruntime(ranges, names),
            "QDQKeepRemovableActivations": True,
        },
    )
    model = onnx.load(tmp_path / "int8.onnx")
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {
        node.input[0]: (constants[node.input[1]], constants[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    for tensor, (low, high) in ranges.items():
        own = [found[name] for name in names[tensor] if name in found]
        assert own
        for scale, zero in own:
            np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6)
            assert int(zero) - np.iinfo(zero.dtype).min == round(-low / float(scale))


@needs_litert
@pytest.mark.slow
def test_litert_quantizes_with_our_ranges(tmp_path):
    from dfq_jax.export.tflite import TFLiteExporter

    case, graph, variables = float_network("cifar_resnet8")
    model, names = TFLiteExporter().float_model(graph, variables, np.asarray(case.images()))
    ranges = grid_ranges(graph)
    assert all(names[tensor] for tensor in ranges)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((model, to_litert(ranges, names), np.asarray(case.images()))))
    script = """
import pickle, sys
from ai_edge_quantizer import quantizer, recipe
from ai_edge_litert.interpreter import Interpreter
model, ours, images = pickle.load(open(sys.argv[1], "rb"))
job = quantizer.Quantizer(bytearray(model), recipe.static_wi8_ai8())
result = job.calibrate({"serving_default": [{"x": images[:1]}]}, num_threads=1)
assert all(name in result for name in ours)
result.update(ours)
interpreter = Interpreter(model_content=bytes(job.quantize(result).quantized_model))
details = {d["name"]: d["quantization_parameters"] for d in interpreter.get_tensor_details()}
pickle.dump({k: (v["scales"], v["zero_points"]) for k, v in details.items()}, open(sys.argv[1], "wb"))
"""
    subprocess.run([litert(), "-c", script, str(tmp_path / "job.pickle")], check=True, capture_output=True)
    details = pickle.loads((tmp_path / "job.pickle").read_bytes())
    for tensor, (low, high) in ranges.items():
        found = [details[name] for name in names[tensor] if name in details and len(details[name][0]) == 1]
        assert found
        for scale, zero in found:
            np.testing.assert_allclose(scale[0], (high - low) / 255, rtol=1e-5)
            assert int(zero[0]) == round(-128 - low / float(scale[0]))


def test_qwix_computes_its_scales_from_our_ranges():
    qwix = pytest.importorskip("qwix")
    from dfq_jax.export.qwix import activation_scales, qwix_template

    case, graph, variables = float_network("mlp")
    ranges = grid_ranges(graph)
    stats = to_qwix(graph, ranges, case.model)
    _, template = qwix_template(case.model, graph.input)
    params = qwix.quantize_params(variables["params"], template["params"], stats)
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(params)
    for layer, path in activation_scales(graph, flatten_dict(template["params"]), graph.layers):
        low, high = ranges[layer.tensor]
        np.testing.assert_allclose(np.ravel(flat[path].array), (high - low) / 255, rtol=1e-6)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_aimet_encodings_follow_their_format(bits, tmp_path):
    net = network("mlp", bits)
    names = {tensor.name: f"t{i}" for i, tensor in enumerate(net.graph.tensors)}
    encodings = to_aimet(net.graph, net.variables, names)
    assert encodings["version"] == "0.6.1"
    assert set(encodings["activation_encodings"]) == set(names.values())
    assert set(encodings["param_encodings"]) == {layer.kernel for layer in net.graph.layers}
    for items in (*encodings["activation_encodings"].values(), *encodings["param_encodings"].values()):
        for item in items:
            assert set(item) == {"bitwidth", "dtype", "is_symmetric", "max", "min", "offset", "scale"}
            assert item["min"] == pytest.approx(item["scale"] * item["offset"])
            assert item["max"] - item["min"] == pytest.approx(item["scale"] * (2 ** item["bitwidth"] - 1))
            assert item["min"] <= 0 <= item["max"] and item["is_symmetric"] in ("True", "False")
    # Weights by these encodings are the weights.
    layer = net.graph.first_layer
    kernel = net.graph.leaf(net.variables, layer.kernel)
    items = encodings["param_encodings"][layer.kernel]
    weights = np.asarray(kernel.dequantize())
    for c, item in enumerate(items):
        codes = weights[:, c] / item["scale"] - item["offset"]
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
        assert codes.min() > -0.1 and codes.max() < 2 ** item["bitwidth"] - 0.9
    # And the ranges come back, from the file as from the dict.
    (tmp_path / "net.encodings").write_text(json.dumps(encodings))
    for source in (encodings, tmp_path / "net.encodings"):
        back = from_aimet(source, names)
        for tensor, (low, high) in ranges_of(net.variables).items():
            np.testing.assert_allclose(back[tensor], (low, high), rtol=1e-6)
    again = dfq_jax.quantize_params(net.graph, float_network("mlp")[2], back, net.convention)
    for tensor, params in net.variables["quantization"]["tensors"].items():
        np.testing.assert_allclose(again["quantization"]["tensors"][tensor].scale, params.scale, rtol=1e-6)


def test_names_and_ranges_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="names: no name for tensor 'b'; known are a"):
        to_onnxruntime(RANGES, {"a": "x"})
    with pytest.raises(ValueError, match="ranges: expected finite lo <= hi"):
        to_litert({"a": (1.0, float("nan"))}, {"a": "x"})
    assert set(to_litert(RANGES, {"a": ["x", "y"], "b": []})) == {"x", "y"}
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        ranges_of({"params": {}})
    case, graph, _ = float_network("mlp")
    pytest.importorskip("qwix")
    with pytest.raises(ValueError, match="ranges: no range for tensor"):
        to_qwix(graph, {}, case.model)
    net = network("mlp")
    with pytest.raises(ValueError, match="kernel_names: no name for kernel"):
        to_aimet(graph, net.variables, {tensor.name: tensor.name for tensor in graph.tensors}, {})


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        ({"version": "1.0.0", "activation_encodings": []}, "of version 0.6.1, found version '1.0.0'"),
        ({"version": "0.6.1", "activation_encodings": {}}, "one integer encoding of activation 'x'"),
        ({"version": "0.6.1", "activation_encodings": {"x": [{"dtype": "float", "bitwidth": 16}]}}, "integer encoding"),
    ],
)
def test_encodings_that_cannot_be_read(encodings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_aimet(encodings, {"a": "x"})
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="not a JSON file"):
        from_aimet(tmp_path / "text", {"a": "x"})


def test_onnx_files_of_others_have_no_names(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="no ONNX file"):
        onnx_names(tmp_path / "text")
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", 1, [1])
    other = helper.make_model(helper.make_graph([], "other", [value], [value]))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not written by this library"):
        onnx_names(tmp_path / "other.onnx")
