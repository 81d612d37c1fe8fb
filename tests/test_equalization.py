"""Equalization keeps the function and the tree, and brings ranges together."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import linen_case

from dfq_jax.equalization import absorb_high_bias, equalize, find_pairs
from dfq_jax.graph import trace


def prepared(case):
    apply_fn, variables = case.function()
    return trace(apply_fn, variables, case.input_shape), apply_fn, variables


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("cifar_resnet8", 3), ("no_batch_norm", 2), ("mlp", 2), ("transposed_conv", 2), ("channels_first", 1),
        ("dilated_grouped", 3), ("conv_1d", 2), ("shared_kernel", 0),
        pytest.param("mobilenet_v2", None, marks=pytest.mark.slow),
        pytest.param("vgg", None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("balance", ["weights", "activations"])
def test_keeps_function_and_tree(name, pairs, balance):
    case = getattr(model_grid, name)()
    graph, apply_fn, variables = prepared(case)
    found, skipped = find_pairs(graph)
    print(found, skipped)
    if pairs is not None:
        assert len(found) == pairs
    assert {p.first for p in found} | {s.name for s in skipped} == {layer.name for layer in graph.layers}
    assert all(s.reason for s in skipped)
    new, before, after = jax.jit(
        lambda v, x: (new := equalize(graph, v, balance=balance), apply_fn(v, x), apply_fn(new, x))
    )(variables, case.images())
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(variables), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    changed = any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (new, variables)), strict=True))
    with_norm = any(graph.layer(pair.first).batch_norm for pair in found)
    assert changed == (bool(found) if balance == "weights" else with_norm)
