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
    recipe = RECIPES["noise"].replace(synthesis_num_images=16)
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_read_only_folder(saved, tmp_path, capsys):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(capsys, [saved, "--to", "onnx", "--output", tmp_path / "net.onnx"], "not writable", tmp_path)
