"""Each script of docs/figures draws its figure, and the figures of the documentation say what they should."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import dfq_jax

pytest.importorskip("matplotlib")

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in sorted((DOCS / "method").glob("*.md"))}
# What the text of each figure holds.
SAYS = {
    "steps": ["trace", "synthesize", "equalize", "reconstruct", "judge"],
    "images": ["pyramid", "pixels", "loss", "step 0", "60"],
    "ranges": [*dfq_jax.ESTIMATORS, "lp, analytic", "4 bits", "8 bits", "synthesized images", "real images"],
    "adaptation": ["mean of each channel", "standard deviation of each channel", "quantized", "after adaptation"],
    "rounding": ["undecided", "% of weights"],
    "overview": ["float network", "synthesized images", "quantized network", "MB, top-1", "agrees on"],
}
FAST = {"steps"}  # the others synthesize images
LARGEST = 200_000  # bytes


def texts(path):
    """The pieces of text of an SVG file."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def holds(found, wanted):
    return any(wanted in piece for piece in found)


def test_every_script_is_tested():
    scripts = {path.stem for path in (DOCS / "figures").glob("*.py")} - {"drawing"}
    assert scripts == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_figures_of_the_documentation_say_what_they_should(name):
    path = DOCS / "figures" / f"{name}.svg"
    assert [wanted for wanted in SAYS[name] if not holds(texts(path), wanted)] == []
    assert path.stat().st_size < LARGEST
    assert "dc:date" not in path.read_text()


def test_pages_show_the_figures_that_there_are():
    shown = {name for text in PAGES.values() for name in re.findall(r"\]\(\.\./figures/(.*?)\.svg\)", text)}
    assert shown == set(SAYS) - {"overview"}


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_code_that_there_is(page):
    text, root = PAGES[page], DOCS.parent
    files = re.findall(r"`((?:dfq_jax|tests|benchmarks)/[\w/.]+\.\w+)`", text)
    files += re.findall(r"python ((?:benchmarks|docs)/[\w/]+\.py)", text)
    places = {"dfq_jax": Path(dfq_jax.__file__).parent.parent}  # which may be installed elsewhere
    assert [name for name in files if not (places.get(name.split("/")[0], root) / name).is_file()] == []
    assert [name for name in re.findall(r"`dfq_jax\.(\w+)`", text) if not hasattr(dfq_jax, name)] == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SAYS])
def test_scripts_draw(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "figures")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--folder", str(tmp_path)])
    script, drawing = importlib.import_module(name), importlib.import_module("drawing")
    drawing.main(name, script.measure, script.draw)
    found = texts(tmp_path / f"{name}.svg")
    assert [wanted for wanted in SAYS[name] if not holds(found, wanted)] == []
