"""What the README shows is run as it stands, commands and both blocks of Python, and benchmarks printed its numbers."""

import re
import shlex
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import dfq_jax
from dfq_jax.zoo import load_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Those that install are run by `.ci/run`; the demo by tests/test_cli.py, too.
RAW = "https://raw.githubusercontent.com/dfq-jax/dfq_jax/main/"
FIRST, TESTS = "pip install '.[cli]' && dfq-jax demo", "pip install '.[test]' && python -m pytest -q -n 2"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[:2] == [FIRST, TESTS]
    return lines[2:]


def test_it_is_short():
    assert len(README.splitlines()) <= 120
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert all(len(line) <= 130 for line in text.splitlines() if not line.startswith("!"))


def test_commands_are_known(capsys):
    pytest.importorskip("tyro")
    from dfq_jax.cli import main
    from dfq_jax.cli.commands import COMMANDS

    for command in commands():
        program, name, *words = shlex.split(command)
        assert program == "dfq-jax" and name in COMMANDS
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--")), command


def test_links_work_outside_the_repository():
    """The README is the project's page of the package index, too, where links within the repository lead nowhere."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    links, places = re.findall(r"\]\((\S+?)\)", README), {f"{source}/blob/main/", RAW}
    assert RAW.endswith(source.removeprefix("https://github.com") + "/main/")
    own = [link for link in links if any(link.startswith(place) for place in places)]
    assert all(link in own or link == "https://arxiv.org/abs/2204.04215" for link in links)
    for link in own:
        assert (ROOT / re.sub("|".join(map(re.escape, places)), "", link)).is_file(), link


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch):
    from dfq_jax.cli import main

    monkeypatch.chdir(tmp_path)
    for command in commands():
        assert not main(shlex.split(command)[1:]), command


# What differs from one machine to the next.
TIMES, NUMBER = re.compile(r"^time .*?(?=^\S)", re.MULTILINE | re.DOTALL), re.compile(r"\d+\.\d+")


def test_six_lines_print_what_stands_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, (expected,) = blocks("python")[0], blocks("text")
    assert len([line for line in code.splitlines() if line]) == 6
    exec(code, {})
    found, expected = (TIMES.sub("", text).split() for text in (capsys.readouterr().out, expected))
    assert [NUMBER.sub("#", word) for word in found] == [NUMBER.sub("#", word) for word in expected]
    numbers = [np.array(NUMBER.findall(" ".join(side)), np.float64) for side in (found, expected)]
    np.testing.assert_allclose(*numbers, rtol=0.1)
    assert (tmp_path / "net.safetensors").exists()


@pytest.mark.slow
def test_networks_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    linen, nnx = load_model("fashion_resnet20"), load_model("fashion_mobilenet")
    apply_fn, variables = dfq_jax.as_function(linen.module, linen.variables)
    x = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)
    names = {"module": linen.module, "nnx_module": nnx.module, "variables": variables, "apply_fn": apply_fn, "x": x}
    names |= {"dfq_jax": dfq_jax, "jax": jax}
    # The README's shapes are those of ImageNet.
    exec(blocks("python")[1].replace("(1, 224, 224, 3)", "(1, 28, 28, 1)"), names)
    assert names["outputs"].shape == (4, 10) and (tmp_path / "report.html").exists()


# --- numbers ---


def rows(title):
    """Cells of the table below a title, without its head."""
    lines = [line for line in README.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def measured(file):
    """Float accuracies, and drops by the words before them, that a benchmark printed."""
    text = (ROOT / "benchmarks" / file).read_text()
    floats = re.findall(r"^float: top-1 ([\d.]+) on", text, re.MULTILINE)
    return set(floats), {float(drop) for drop in re.findall(r": (-?\d+\.\d+) \([\d.]+\) / [\d.]+ \(", text)}


def test_results_are_those_of_the_benchmark():
    floats, drops = measured("recipes.txt")
    table = rows("Results")
    assert len(table) == 5
    for name, before, *cells, _ in table:
        assert before in floats, name
        for cell in filter(lambda cell: cell != "-", cells[:2]):
            top1, drop = map(float, re.fullmatch(r"([\d.]+) \((-?[\d.]+)\)", cell).groups())
            assert drop in drops and abs(float(before) - drop - top1) < 0.006, (name, cell)
        if cells[2] != "-":
            top1, drop = re.match(r"([\d.]+) \((-?[\d.]+)\)", cells[2]).groups()
            assert re.search(rf"^mixed +{drop} ", (ROOT / "benchmarks/mixed.txt").read_text(), re.MULTILINE), name
            assert abs(float(before) - float(drop) - float(top1)) < 0.006, name


def test_recipes_are_those_there_are():
    _, drops = measured("recipes.txt")
    table = rows("Which recipe when")
    assert len(table) == 4
    for name, _, needs, _, lost in table:
        recipe = dfq_jax.RECIPES[name.split("`")[1]]
        images = recipe.synthesis.num_images if recipe.source == "synthesis" else "no"
        assert f"makes {images} images" in needs and float(lost) in drops, name


def test_a_benchmark_for_each_file_named():
    for name in re.findall(r"`(benchmarks/[\w.]+)`", README):
        assert (ROOT / name).exists(), name
