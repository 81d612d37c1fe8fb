"""`dfq-jax export` from a saved network to files that run elsewhere."""

import json
import os
import stat

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")
pytest.importorskip("onnxruntime")

from dfq_jax import RECIPES, quantize
from dfq_jax.cli import main
from dfq_jax.zoo import load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = load_model("fashion_resnet20")
    recipe = RECIPES["noise"].replace(synthesis_num_images=16, synthesis_steps=2)
    result = quantize(model.module, model.variables, input_shape=model.input_shape, recipe=recipe, bits="w8a8")
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    result.save(path, model="fashion_resnet20")
    return path


@pytest.mark.parametrize("format_", ["onnx", "stablehlo"])
def test_written_and_verified(saved, format_, tmp_path, capsys):
    if format_ == "stablehlo":
        pytest.importorskip("flatbuffers")
    out, report = tmp_path / f"net.{format_}", tmp_path / "report.json"
    arguments = ["--to", format_, "--output", str(out), "--verify", "bundled", "--limit", "150", "--json", str(report)]
    assert main(["export", str(saved), *arguments]) == 0
    content = json.loads(report.read_text())
    assert content["n"] == 150 and content["format"] == format_ and content["bytes"] == out.stat().st_size
    assert content["agreement"] >= 99 and content["sqnr"] > 25
    assert f"{content['agreement']:.2f}" in capsys.readouterr().out
    float_bytes = 4 * sum(leaf.size for leaf in _leaves())
    assert out.stat().st_size < 0.6 * float_bytes  # codes, not float weights


def _leaves():
    import jax

    return jax.tree.leaves(load_model("fashion_resnet20").variables)


def refused(capsys, arguments, message, folder):
    before = sorted(folder.iterdir())
    assert main(["export", *map(str, arguments)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_bad_input_leaves_nothing(saved, tmp_path, capsys, monkeypatch):
    out = tmp_path / "net.onnx"
    to = [saved, "--to", "onnx", "--output"]
    refused(capsys, [tmp_path / "missing.safetensors", *to[1:], out], "missing.safetensors", tmp_path)
    refused(capsys, [saved, "--to", "caffe", "--output", out], "caffe", tmp_path)
    refused(capsys, [*to, tmp_path / "no" / "net.onnx"], "there is no folder", tmp_path)
    np.savez(tmp_path / "wide.npz", images=np.zeros((3, 40, 40, 1), np.uint8), labels=np.zeros(3, np.uint8))
    refused(capsys, [*to, out, "--verify", f"npz:{tmp_path / 'wide.npz'}"], "28", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    refused(capsys, [*to, out], "dfq_jax[onnx]", tmp_path)


# --- LiteRT, whose converter is a process of its own ---


def stand_in(folder, monkeypatch, body):
    """A converter of ours; $2 is what it is asked for."""
    folder.mkdir()
    (folder / "python").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("DFQ_JAX_TFLITE_PYTHON", str(folder / "python"))


DONE = """echo '{"unmatched": []}' > $3/result.json"""


def test_images_for_litert_are_made_anew(saved, tmp_path, monkeypatch, capsys):
    body = f"""if [ $2 = convert ]; then cp $3/inputs.npz {tmp_path}; echo file > $3/model.tflite; fi; {DONE}"""
    stand_in(tmp_path / "bin", monkeypatch, body)
    assert main(["export", str(saved), "--to", "tflite", "--output", str(tmp_path / "net.tflite")]) == 0
    assert (tmp_path / "net.tflite").read_text() == "file\n"
    images = np.load(tmp_path / "inputs.npz")["images"]
    assert images.shape == (64, 28, 28, 1) and np.isfinite(images).all() and images.std() > 0.1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("""echo '{"missing": "litert_converter"}' > $3/result.json""", "dfq_jax[tflite]"),
        (f"if [ $2 = convert ]; then echo 'segmentation fault' >&2; kill -11 $$; fi; {DONE}", "segmentation fault"),
        (f"if [ $2 = convert ]; then exec sleep 60; fi; {DONE}", "took longer than 3 s"),
    ],
    ids=["missing", "crash", "hang"],
)
def test_a_converter_that_fails_leaves_no_file(saved, body, message, tmp_path, monkeypatch, capsys):
    from dfq_jax.cli import export
    from dfq_jax.export.tflite import TFLiteExporter

    stand_in(tmp_path / "bin", monkeypatch, body)
    monkeypatch.setattr(export, "get_exporter", lambda name: TFLiteExporter(timeout=3.0))
    refused(capsys, [saved, "--to", "tflite", "--output", tmp_path / "net.tflite"], message, tmp_path)


# --- Qwix, whose files have no network ---


@pytest.mark.slow
def test_qwix_writes_the_variables_and_runs_them(saved, tmp_path, capsys):
    pytest.importorskip("qwix")
    out = tmp_path / "net.safetensors"
    arguments = ["--to", "qwix", "--output", str(out), "--verify", "bundled", "--limit", "100"]
    assert main(["export", str(saved), *arguments, "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["agreement"] == 100


def test_qwix_missing(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    refused(capsys, [saved, "--to", "qwix", "--output", tmp_path / "net"], "dfq_jax[qwix]", tmp_path)


# --- operations and folders ---

SORTS = """
import jax.numpy as jnp


def build():
    variables = {"a": jnp.ones((3, 4)) / 2, "b": jnp.ones((4, 2))}
    return lambda v, x: jnp.sort(x @ v["a"]) @ v["b"], variables, (2, 3)
"""


def test_an_operation_that_a_format_lacks_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "sorting.py").write_text(SORTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import sorting

    function, variables, shape = sorting.build()
    recipe = RECIPES["noise"].replace(synthesis_num_images=4)
    path = tmp_path / "net.safetensors"
    quantize(function, variables, input_shape=shape, recipe=recipe).save(path, model="sorting:build")
    refused(capsys, [path, "--to", "onnx", "--output", tmp_path / "net.onnx"], "`sort`", tmp_path)


def test_a_folder_that_cannot_be_written_to(saved, tmp_path, capsys, monkeypatch):
    from dfq_jax.base import files

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "replace", denied)
    for name in ("onnx", "stablehlo"):
        refused(capsys, [saved, "--to", name, "--output", tmp_path / "net"], "Permission denied", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_read_only_folder(saved, tmp_path, capsys):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(capsys, [saved, "--to", "onnx", "--output", tmp_path / "net.onnx"], "not writable", tmp_path)
