"""What the README shows is run as it stands: the commands, and both blocks of Python."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

import dfq_jax
from dfq_jax.zoo import load_model

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("dfq-jax ")]


def test_commands_are_known(capsys):
    pytest.importorskip("tyro")
    from dfq_jax.cli import main

    known = {"models", "inspect", "sensitivity", "quantize", "report", "evaluate", "export"}
    assert {c.split()[1] for c in commands()} == known
    for command in commands():
        words = shlex.split(command)
        assert main([words[1], "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--")), command


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch):
    from dfq_jax.cli import main

    monkeypatch.chdir(tmp_path)
    for command in commands():
        if "ORG/REPO" in command:
            continue  # a placeholder
        assert not main(shlex.split(command)[1:]), command


@pytest.mark.slow
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    linen, nnx = load_model("fashion_resnet20"), load_model("fashion_mobilenet")
    apply_fn, variables = dfq_jax.as_function(linen.module, linen.variables)
    x = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)
    names = {
        "dfq_jax": dfq_jax,
        "jax": jax,
        "module": linen.module,
        "nnx_module": nnx.module,
        "variables": variables,
        "apply_fn": apply_fn,
        "key": jax.random.key(0),
        "x": x,
    }
    own_network, steps = blocks("python")
    # The README's shapes are those of ImageNet and CIFAR networks.
    exec(own_network.replace("(1, 224, 224, 3)", "(1, 28, 28, 1)"), names)
    exec(steps.replace("(1, 32, 32, 3)", "(1, 28, 28, 1)"), names)
    assert names["outputs"].shape == (4, 10)
