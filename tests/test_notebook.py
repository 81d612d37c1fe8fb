"""The notebook runs from top to bottom, with fewer images and steps than a reader would use."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    for name, value in {"STEPS": 20, "IMAGES": 16, "LIMIT": 500}.items():
        monkeypatch.setenv(f"DFQ_JAX_NOTEBOOK_{name}", str(value))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "store notebooks without outputs"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "largest difference of simulated and int8 execution" in text
    assert (tmp_path / "fashion_resnet20_w4a4.safetensors").exists()
