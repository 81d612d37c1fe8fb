"""Examples in docstrings are run as they stand, and every public function has one.

An example begins with the names of its module, and these: `dfq_jax`, `jax`, `jnp` and `np`; `apply_fn` and `variables`
of a small network on `[N, 6]`, its `graph` and eight `images`; its `convention`, `ranges` and `qvariables` of 4 bits.
"""

import doctest
import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dfq_jax

PACKAGE = pathlib.Path(dfq_jax.__file__).parent
MODULES = [
    ".".join(["dfq_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]
FUNCTIONS = [name for name in dfq_jax.__all__ if inspect.isfunction(getattr(dfq_jax, name))]


def apply_fn(variables, x):
    """Two dense layers with a BatchNorm and a ReLU between them."""
    x = x @ variables["dense1"]["kernel"]
    mean, var, scale, bias = (variables["bn1"][name] for name in ("mean", "var", "scale", "bias"))
    x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias)
    return x @ variables["dense2"]["kernel"] + variables["dense2"]["bias"]


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def names():
    def batch_norm(c):
        return {
            "mean": jnp.full(c, 0.1),
            "var": jnp.full(c, 1.2),
            "scale": jnp.linspace(0.5, 1.5, c),
            "bias": jnp.ones(c),
        }

    variables = {
        "dense1": {"kernel": array(6, 4) / 5},
        "bn1": batch_norm(4),
        "dense2": {"kernel": array(4, 3), "bias": jnp.zeros(3)},
    }
    images, convention = array(8, 6, seed=1), dfq_jax.Convention.parse("w4a4", edge_bits=None)
    graph = dfq_jax.trace(apply_fn, variables, (1, 6))
    ranges = dfq_jax.estimate_ranges(graph, variables, images, convention, estimator="max")
    return {
        "dfq_jax": dfq_jax,
        "jax": jax,
        "jnp": jnp,
        "np": np,
        "apply_fn": apply_fn,
        "variables": variables,
        "graph": graph,
        "images": images,
        "convention": convention,
        "ranges": ranges,
        "qvariables": dfq_jax.quantize_params(graph, variables, ranges, convention),
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    own = importlib.import_module(module)
    for test in doctest.DocTestFinder().find(own, globs={**vars(own), **names()}):
        report = []
        runner.run(test, out=report.append)
        assert not "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(dfq_jax, name))
