"""What the documentation shows is run, page by page; its links lead somewhere; and Sphinx builds it without a warning.

A page's blocks of Python share one namespace. ` ```python requires=keras ` needs a package, without which the page is
skipped from there on. What is printed before a block ` ```text output ` is compared with it but for its numbers.
"""

import contextlib
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dfq_jax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if not {"_build", "notebooks"} & set(path.parts)]
README = ROOT / "README.md"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"] + "/blob/main/"
BLOCK = re.compile(r"^```(\S+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FAST = {"index.md", "start.md", "guides/recipes.md", "guides/report.md"}  # seconds each; the others are slow


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def blocks(page, *languages):
    """(language, what else stands behind it, text) of each block."""
    return [found for found in BLOCK.findall(page.read_text()) if found[0] in languages]


def shape_of(text):
    """Words without numbers, and without how they are laid out: tables may be in the order of their numbers."""
    return sorted(re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?|-?\binf\b", "#", text).split())


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if name_of(page) in FAST else pytest.mark.slow, id=name_of(page))
        for page in PAGES
        if blocks(page, "python")
    ],
)
@pytest.mark.filterwarnings("default")  # of networks with random weights, and of other packages
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    # A class is looked up in its module by those who ask for its source or its annotations.
    module = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", module)
    printed = ""
    for language, rest, text in blocks(page, "python", "text"):
        if language == "text":
            if rest.strip() == "output":
                assert shape_of(printed) == shape_of(text), printed
            continue
        if needed := re.search(r"requires=(\S+)", rest):
            pytest.importorskip(needed[1])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(text, page.name, "exec"), module.__dict__)
        printed = output.getvalue()


def test_commands_are_known(capsys):
    pytest.importorskip("tyro")
    from dfq_jax.cli import main

    lines = [line for page in PAGES for _, _, text in blocks(page, "bash") for line in text.splitlines()]
    commands = [line.partition("dfq-jax ")[2] for line in lines if "dfq-jax " in line]
    helped = {}
    for words in map(shlex.split, commands):
        if words[0] not in helped and not words[0].startswith("-"):
            assert main([words[0], "--help"]) == 0
            helped[words[0]] = capsys.readouterr().out
        options = {word for word in words if word.startswith("--")} - {"--debug", "--no-cache", "--version"}
        assert all(option in helped[words[0]] for option in options), words
    assert set(helped) >= {"demo", "inspect", "sensitivity", "quantize", "report", "evaluate", "export"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]*)(?:#[^)\s]*)?\)", text) + re.findall(r"(?:src|href)=\"([^\"#]*)", text)
    for link in links:
        if link.startswith(REPOSITORY):
            assert (ROOT / link.removeprefix(REPOSITORY)).exists(), link
        elif link and "://" not in link and not link.startswith("mailto:"):
            # Notebooks have a place of their own in the built pages.
            target = (page.parent / link).resolve()
            if DOCS / "notebooks" in target.parents:
                target = ROOT / "notebooks" / target.name
            assert target.exists(), link


ROOMS = ["dfq_jax", *(f"dfq_jax.{page.stem}" for page in sorted((DOCS / "api").glob("*.md")) if page.stem != "index")]
ROOMS.append("dfq_jax.export.interchange")


@pytest.mark.parametrize("room", ROOMS)
def test_reference_has_every_public_name(room):
    described = []
    for page in (DOCS / "api").glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(), re.MULTILINE):
            module = name if directive == "currentmodule" else module
            if directive.startswith(("auto", "data")):
                described.append(f"{module}.{name}")
    assert len(described) == len(set(described))
    module = importlib.import_module(room)
    names = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    if module is not dfq_jax:
        names = {name for name in names if getattr(dfq_jax, name, None) is not getattr(module, name)}
    assert {name for name in described if name.rpartition(".")[0] == room} == {f"{room}.{name}" for name in names}


@pytest.mark.slow
def test_documentation_builds(tmp_path):
    for package in ("sphinx", "myst_nb", "sphinx_book_theme"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "html"]
    done = subprocess.run([*command, "-d", tmp_path / "trees"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quantize" in (tmp_path / "html" / "index.html").read_text()
