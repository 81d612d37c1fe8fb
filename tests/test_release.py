"""What a release is made of: one version, a wheel with all its files, a workflow that runs what `.ci/run` runs."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import dfq_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parsed(path):
    return pytest.importorskip("yaml").safe_load((ROOT / path).read_text())


def test_one_version():
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {PROJECT["version"], *cited} == {dfq_jax.__version__} and len(cited) == 1
    assert importlib.metadata.version("dfq_jax") == dfq_jax.__version__
    assert f"## {dfq_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_names_the_paper():
    citation = parsed("CITATION.cff")
    assert citation["license"] == PROJECT["license"] and citation["keywords"] == PROJECT["keywords"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    (paper,) = citation["references"]
    assert paper["title"] == (
        "Data-Free Quantization with Accurate Activation Clipping and Adaptive Batch Normalization"
    )
    assert paper["url"] == "https://arxiv.org/abs/2204.04215"


def test_the_workflow_runs_what_ci_runs():
    workflow = parsed(".github/workflows/ci.yml")
    job = workflow["jobs"]["run"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    oldest, newest = job["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={oldest}"
    minors = [line.rpartition("3.")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert minors == [str(minor) for minor in range(int(oldest[2:]), int(newest[2:]) + 1)]


def test_the_package_has_all_its_files():
    """Installed from a wheel, as in `.ci/run`, this compares the wheel with its source."""
    source = next(path for path in (ROOT / "dfq_jax.source", ROOT / "dfq_jax") if path.exists())
    installed = Path(dfq_jax.__file__).parent
    files = [
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 200 and [file for file in files if not (installed / file).exists()] == []
