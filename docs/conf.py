"""How Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build`. It needs no network, and runs no code."""

import os
import shutil
from pathlib import Path

import dfq_jax

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/dfq-jax/dfq_jax"

project = "dfq_jax"
author = "the authors of dfq_jax"
copyright = author
release = version = dfq_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = True
# Names in docstrings are links where they are known. Fields, shapes and words stand between backticks, too.
default_role = "py:obj"
# Classes that no room exports have no place in the reference.
nitpick_ignore_regex = [(r"py:obj", r".*"), (r"py:\w+", r"(?!dfq_jax\.).*|dfq_jax\.\w+\.\w+\..*")]

if os.environ.get("DFQ_JAX_DOCS_LINKS"):  # to the pages of other projects: asks the network for their indices
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

# --- pages and notebooks ---

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs and pictures are in the notebooks
suppress_warnings = ["mystnb.unknown_mime_type"]

# --- docstrings ---

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and words are in the docstrings
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), ("Warns", "returns_style")]  # of frozen records
toc_object_entries_show_parents = "hide"

# --- looks ---

html_theme = "sphinx_book_theme"
html_title = "dfq_jax"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],  # the sidebar has a search field
    "show_toc_level": 2,
}


def setup(app):
    """Put the notebooks where Sphinx finds them, as they are in the repository."""
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("*.py", ".*"))
