"""Exporters to StableHLO, LiteRT and Qwix: what comes out of the file is what the simulation computes."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from test_runtime import quantized

from dfq_jax.export import get_exporter
from dfq_jax.export.qwix import QwixExporter, to_qwix
from dfq_jax.export.stablehlo import StableHLOExporter
from dfq_jax.export.tflite import PYTHON_VARIABLE, TFLiteExporter
from dfq_jax.graph import apply_quantized
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.stages.convention import Convention


@functools.cache
def network(name: str, bits: str = "w8a8", shortcuts: str = "float", count: int = 16) -> Quantized:
    """A network of the grid, as `quantize` would give it, without a report."""
    build = getattr(model_grid, name)
    graph, variables, x, _ = quantized(build, bits, shortcuts)
    images = np.random.default_rng(5).normal(size=(count, *x.shape[1:])).astype(np.float32)
    images[: len(x)] = x
    convention = Convention.parse(bits, shortcuts=shortcuts)
    return Quantized(
        variables=variables, graph=graph, report=None, recipe=None, convention=convention, images=jnp.asarray(images)
    )


@functools.cache
def simulated(name: str, bits: str = "w8a8", shortcuts: str = "float") -> np.ndarray:
    net = network(name, bits, shortcuts)
    run = jax.jit(functools.partial(apply_quantized, net.graph))
    return np.asarray(net.graph.logits(run(net.variables, net.images)))


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float((found.argmax(-1) == expected.argmax(-1)).mean())


def files(folder: Any) -> list[str]:
    return sorted(os.listdir(folder))


# --- StableHLO ---


@pytest.mark.parametrize(
    ("name", "bits"),
    [("cifar_resnet8", "w8a8"), pytest.param("mobilenet_v2", "w4a4", marks=pytest.mark.slow),
     pytest.param("dict_outputs", "w4a16", marks=pytest.mark.slow)],
)  # fmt: skip
def test_stablehlo_round_trip(name, bits, tmp_path):
    pytest.importorskip("flatbuffers")
    net, path = network(name, bits), tmp_path / "net.stablehlo"
    exporter = get_exporter("stablehlo")
    exporter.write(net, path)
    assert files(tmp_path) == ["net.stablehlo"]
    runner, expected = exporter.open(path), simulated(name, bits)
    for count in (1, 16):
        np.testing.assert_allclose(
            runner(np.asarray(net.images[:count])), expected[:count], atol=0.02 * np.abs(expected).max()
        )
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "xi8>" in program.mlir_module() or bits.endswith("a16")


def test_stablehlo_runs_without_this_library(tmp_path):
    pytest.importorskip("flatbuffers")
    net, path = network("cifar_resnet8"), tmp_path / "net.stablehlo"
    StableHLOExporter(platforms=("cpu",)).write(net, path)
    np.save(tmp_path / "x.npy", np.asarray(net.images[:2]))
    code = textwrap.dedent(f"""
        import sys, jax.export, numpy as np
        program = jax.export.deserialize(bytearray(open({os.fspath(path)!r}, "rb").read()))
        np.save({os.fspath(tmp_path / "y.npy")!r}, program.call(np.load({os.fspath(tmp_path / "x.npy")!r})))
        assert "dfq_jax" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    expected = simulated("cifar_resnet8")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected[:2], atol=0.02 * np.abs(expected).max())


def test_stablehlo_refusals(tmp_path):
    pytest.importorskip("flatbuffers")
    with pytest.raises(ValueError, match="platforms: expected some of"):
        StableHLOExporter(platforms=("cpu", "abacus"))
    (tmp_path / "text").write_text("nothing of the kind, though long enough to be read as one")
    with pytest.raises(ValueError, match=r"not a program serialized by jax\.export"):
        StableHLOExporter().open(tmp_path / "text")
    with pytest.raises(OSError, match="missing"):
        StableHLOExporter().write(network("mlp"), tmp_path / "missing" / "net")
    StableHLOExporter().write(network("mlp"), tmp_path / "net")
    with pytest.raises(ValueError, match=r"x: the file takes \[N, 7\], found \(2, 3\)"):
        StableHLOExporter().open(tmp_path / "net")(np.zeros((2, 3), np.float32))


# --- LiteRT ---


@functools.cache
def litert() -> str | None:
    """An interpreter that has the LiteRT packages."""
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    check = "import ai_edge_litert, ai_edge_quantizer, litert_converter"
    if shutil.which(python) is None:
        return None
    return python if subprocess.run([python, "-c", check], capture_output=True).returncode == 0 else None


needs_litert = pytest.mark.skipif("not __import__('test_export_formats').litert()", reason="no LiteRT packages")


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"), [("cifar_resnet8", "w8a8"), ("mobilenet_v2", "w4a8"), ("cifar_resnet8", "w4a16"), ("vgg", "w8a8")]
)
def test_tflite_round_trip(name, bits, tmp_path):
    net, path = network(name, bits), tmp_path / "net.tflite"
    exporter = TFLiteExporter()
    exporter.write(net, path)
    found, expected = exporter.open(path)(np.asarray(net.images)), simulated(name, bits)
    error = np.square(found - expected).sum() / np.square(expected).sum()
    assert 10 * np.log10(1 / error) > (15 if bits.endswith("a8") else 30)
    assert files(tmp_path) == ["net.tflite"]


def test_ranges_are_extremes_over_images():
    from dfq_jax.export.tflite_worker import extremes

    class Job:
        """Calibration on one image at a time; a tensor may have nothing to calibrate."""

        def calibrate(self, data, num_threads):
            (image,) = (example["x"] for example in data["serving_default"])
            return {"y": {"min": np.array([image.min()]), "max": np.array([image.max()])}, "index": {}}

    images = np.array([[0.0, 1.0], [-5.0, 0.5], [0.2, 7.0]])
    found = extremes(Job(), images)
    assert found["y"] == {"min": np.array([-5.0]), "max": np.array([7.0])} and found["index"] == {}


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_resnet20", "fashion_mobilenet"])
def test_tflite_predicts_as_the_simulation_of_the_bundled_networks(name, tmp_path):
    import dfq_jax
    from dfq_jax.data import load_data
    from dfq_jax.zoo import load_model

    model = load_model(name)
    recipe = dfq_jax.RECIPES["fast"].replace(synthesis_steps=50, synthesis_num_images=32)
    net = dfq_jax.quantize(model.module, model.variables, input_shape=model.input_shape, recipe=recipe)
    x = model.preprocessing(load_data("bundled", limit=500).images)
    TFLiteExporter().write(net, tmp_path / "net.tflite")
    assert agreement(TFLiteExporter().open(tmp_path / "net.tflite")(x), np.asarray(net(x))) >= 0.99


def stand_in(folder: Any, body: str) -> str:
    """An interpreter that runs a script of ours in place of the worker."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return os.fspath(path)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("exec sleep 60", TimeoutError, "took longer than 2 s"),
        ("echo 'segmentation fault' >&2; kill -11 $$", ValueError, "no reply: .*segmentation fault"),
        (
            'echo \'{"missing": "litert_converter"}\' > $3/result.json',
            ImportError,
            "litert_converter.*dfq_jax\\[tflite",
        ),
        ('echo \'{"error": "op fft"}\' > $3/result.json', ValueError, "cannot convert this network: op fft"),
    ],
)
def test_a_converter_that_fails_leaves_no_file(body, error, message, tmp_path):
    (tmp_path / "out").mkdir()
    exporter = TFLiteExporter(python=stand_in(tmp_path, body), timeout=2.0)
    with pytest.raises(error, match=message):
        exporter.write(network("mlp"), tmp_path / "out" / "net.tflite")
    assert files(tmp_path / "out") == []


def test_tflite_refusals(tmp_path):
    with pytest.raises(ValueError, match="4-bit activations; LiteRT has 8-bit ones"):
        TFLiteExporter().write(network("mlp", "w4a4"), tmp_path / "net.tflite")
    with pytest.raises(ValueError, match=r"quantized\.images: None"):
        TFLiteExporter().write(dataclasses.replace(network("mlp"), images=None), tmp_path / "net.tflite")
    with pytest.raises(ImportError, match=f"{PYTHON_VARIABLE}: .* cannot be run"):
        TFLiteExporter(python=os.fspath(tmp_path / "nothing")).write(network("mlp"), tmp_path / "net.tflite")
    with pytest.raises(ValueError, match="timeout: expected a positive number"):
        TFLiteExporter(timeout=0)
    with pytest.raises(ValueError, match="max_images: expected an integer"):
        TFLiteExporter(max_images=0)
    with pytest.raises(ValueError, match="headroom: expected a finite number"):
        TFLiteExporter(headroom=0.5)
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="not a LiteRT file"):
        TFLiteExporter().open(tmp_path / "text")
    assert files(tmp_path) == ["text"]


# --- Qwix ---


@pytest.mark.parametrize(
    ("name", "bits"), [("mlp", "w8a8"), pytest.param("cifar_resnet8", "w4a8", marks=pytest.mark.slow)]
)
def test_qwix_computes_what_the_simulation_does(name, bits, tmp_path):
    pytest.importorskip("qwix")
    net, path = network(name, bits), tmp_path / "net.safetensors"
    exporter = QwixExporter(module=getattr(model_grid, name)().model)
    exporter.write(net, path)
    found, expected = exporter.open(path)(np.asarray(net.images)), simulated(name, bits)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert np.median(np.abs(found - expected)) < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["mlp", "cifar_resnet8"])
def test_qwix_takes_inputs_of_numpy(name):
    pytest.importorskip("qwix")
    net = network(name)
    module, variables = to_qwix(net, getattr(model_grid, name)().model)
    x = np.asarray(net.images)
    np.testing.assert_array_equal(module.apply(variables, x), module.apply(variables, jnp.asarray(x)))


def test_qwix_holds_our_codes():
    pytest.importorskip("qwix")
    net = network("mlp")
    _, variables = to_qwix(net, model_grid.mlp().model)
    layer = net.graph.first_layer
    own = net.graph.leaf(net.variables, layer.kernel)
    params = net.variables["quantization"]["tensors"][layer.tensor]
    theirs = variables["params"]["dense0"]
    np.testing.assert_array_equal(theirs["kernel"].array.qvalue, own.qvalue)
    np.testing.assert_array_equal(theirs["kernel"].array.scale, own.scale)
    np.testing.assert_array_equal(np.ravel(theirs["dot_general0_lhs_scale"].array), np.ravel(params.scale))
    assert int(np.ravel(theirs["dot_general0_lhs_zero_point"])[0]) == int(params.zero_point) - 128


def test_qwix_refusals(tmp_path):
    pytest.importorskip("qwix")
    with pytest.raises(ValueError, match="module: Qwix needs the model's code"):
        QwixExporter().write(network("mlp"), tmp_path / "net")
    with pytest.raises(TypeError, match="module: expected a Linen module"):
        to_qwix(network("mlp"), model_grid.nnx_resnet().model)
    with pytest.raises(ValueError, match="4-bit activations; Qwix has 8-bit ones"):
        to_qwix(network("mlp", "w4a4"), model_grid.mlp().model)
    with pytest.raises(ValueError, match="quantized for a residual sum too"):
        to_qwix(network("cifar_resnet8", "w8a8", "quantized"), model_grid.cifar_resnet8().model)
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        QwixExporter(module=model_grid.mlp().model).open(tmp_path / "text")
