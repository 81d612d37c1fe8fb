"""Notebooks hold their outputs, and run from top to bottom with smaller settings than a reader would use."""

import json
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

CHECKOUT = pathlib.Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted((CHECKOUT / "notebooks").glob("*.ipynb"))}
MOST_BYTES = 700_000
COLAB = "https://colab.research.google.com/github/dfq-jax/dfq_jax/blob/main/notebooks/{}.ipynb"

# By notebook, what takes the place of its parameters, and what it prints at the end of what it shows.
SMALL = {
    "quickstart": ("IMAGES, STEPS, BLOCK_STEPS, LIMIT = 16, 4, 2, 100", "largest difference of ONNX Runtime and JAX"),
    "own_network": (
        "EPOCHS, WIDTH, TRAINING, IMAGES, BLOCK_STEPS = 1, 4, 200, 8, 2",
        "ONNX Runtime and JAX give",
    ),
    "layers_and_bits": ("IMAGES, STEPS, WIDTHS, LIMIT = 8, 2, (2, 4, 8), 100", "target: mixed W"),
    "deploy": ("BATCHES, ROUNDS, LIMIT = (1, 8), 1, 100", "StableHLO: "),
    "research": (
        f"NETWORKS, IMAGES, STEPS, LIMIT, CHECKOUT = 2, 8, 2, 100, {str(CHECKOUT)!r}",
        "best of the drawn codes",
    ),
}
FAST = ("deploy",)
RUNS = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SMALL]


def printed(cells):
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_all_are_run():
    assert set(PATHS) == set(SMALL)


@pytest.mark.parametrize("name", PATHS)
def test_outputs_are_stored(name):
    content = PATHS[name].read_text()
    assert len(content) < MOST_BYTES
    assert COLAB.format(name) in content
    cells = nbformat.reads(content, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert SMALL[name][1] in printed(cells)
    assert not re.findall(r"Traceback|/home/|/root/|/tmp/", json.dumps([cell.outputs for cell in code]))
    for link in re.findall(r"\]\((\w+)\.ipynb\)", content):
        assert link in PATHS


@pytest.mark.parametrize("name", RUNS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    parameters, expected = SMALL[name]
    notebook = nbformat.read(PATHS[name], as_version=4)
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    names = re.findall(r"^([A-Z_]+) = ", notebook.cells[place].source, re.MULTILINE)
    assert names == parameters.partition(" = ")[0].split(", ")
    notebook.cells[place].source = parameters
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert expected in printed(notebook.cells)


BAR = """
from dfq_jax import Progress, progress_bar

with progress_bar() as bar:
    bar.on_stage("trace")
    bar.on_stage("images")
    bar.on_progress(Progress(1, 2, 50, 100, 0.125, 3.0, 90.0, 50))
    bar.on_stage("ranges")
"""


def test_progress_is_a_bar_that_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BAR)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    (output,) = notebook.cells[0].outputs
    for words in ("making images", "100%", "loss 0.125"):  # the next stage has begun: it was done early
        assert words in output.data["text/html"]
    assert "tracing" not in output.data["text/html"]  # what does not count is not left
