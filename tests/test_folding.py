"""Folding keeps the tree and the function, on every layout of the grid."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import every_third, linen_case, traced

import dfq_jax
from dfq_jax.graph.graph import trace
from dfq_jax.stages.folding import fold_batch_norm, foldable

# Networks whose every BatchNorm directly follows a layer of its own, and has a bias to take the offset.
ALL_FOLD = {
    "resnet18", "resnet50", "bfloat16", "odd_sizes", "frozen_dict", "cifar_resnet8", "nnx_resnet", "mobilenet_v2",
    "mobilenet_v3", "efficientnet", "vgg", "inception", "transposed_conv", "dilated_grouped", "conv_1d", "conv_3d",
    "mlp", "general_dense", "dict_outputs", "tuple_outputs", "private_batch_norm", "remat", "custom_vjp",
    "plain_function",
    "channels_first",
}  # fmt: skip


@pytest.mark.parametrize("build", every_third(2))
def test_fold_keeps_tree_and_function(build):
    case = build()
    apply_fn, variables = case.function()
    graph, x = traced(build), case.images()
    # One program: folding can be traced, and the network runs on what comes out of it.
    folded, before, after = jax.jit(
        lambda v, x: (fold := fold_batch_norm(graph, v), apply_fn(v, x), apply_fn(fold, x))
    )(variables, x)

    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(variables), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    narrow = any(aval.dtype == jnp.bfloat16 for aval in graph.program.avals.values())
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=(2e-2 if narrow else 1e-5) * np.abs(b).max())

    leaves = dict(zip(graph.leaf_paths, graph.leaves(folded), strict=True))
    done = [graph.batch_norm(layer.batch_norm) for layer in graph.layers if foldable(graph, layer)]
    for bn in done:  # what is left of a folded one adds its bias
        assert not np.any(leaves[bn.mean]) and (bn.scale is None or np.all(np.asarray(leaves[bn.scale]) == 1))
        np.testing.assert_allclose(np.asarray(leaves[bn.var], np.float64) + bn.epsilon, 1, rtol=1e-6)
    if case.name in ALL_FOLD:
        assert len(done) == len(graph.batch_norms)
    none = ("no_batch_norm", "weight_standardized", "transformer", "vit", "convnext", "scanned_vit")
    assert bool(done) == (case.name not in none)


def folds(name: str) -> dict[str, bool]:
    case = getattr(model_grid, name)()
    graph = trace(*case.function(), case.input_shape)
    return {layer.name: foldable(graph, layer) for layer in graph.layers}


def test_what_cannot_be_folded():
    # A BatchNorm without a bias has no place for the offset.
    assert folds("conv_bias_bn") == {"conv1": True, "conv2": False, "conv3": False, "head": False}
    # A kernel that two BatchNorms follow.
    assert folds("shared_kernel") == {"stem": True, "shared": False, "shared#2": False, "head": False}
    # BatchNorm before the layer: only the one between two convolutions of a block directly follows a layer.
    found = folds("pre_activation_resnet")
    assert [name for name, fold in found.items() if fold] == ["conv1_0", "conv1_1", "conv1_2"]


class SharedBatchNorm(nn.Module):
    """One BatchNorm behind two layers: as a bias it could serve only one of them."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="bn")
        return norm(nn.Dense(4, name="second")(nn.relu(norm(nn.Dense(4, name="first")(x)))))


def test_batch_norm_of_two_places_is_left_as_it_is():
    case = linen_case("shared_bn", SharedBatchNorm(), (3, 4))
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    assert len(graph.batch_norms) == 2
    folded = fold_batch_norm(graph, variables)
    np.testing.assert_allclose(apply_fn(folded, x), apply_fn(variables, x), rtol=1e-5, atol=1e-5)


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(nn.Conv(4, (1, 1), name="conv")(x))


def test_values_in_closed_form():
    case = linen_case("sequence", Sequence(), (2, 3, 3, 2))
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    folded = jax.jit(functools.partial(fold_batch_norm, graph))(variables)
    params, statistics = variables["params"], variables["batch_stats"]["bn"]
    factor = np.asarray(params["bn"]["scale"]) / np.sqrt(np.asarray(statistics["var"]) + 1e-3)
    kernel = np.asarray(params["conv"]["kernel"]) * factor
    bias = (
        np.asarray(params["bn"]["bias"])
        + (np.asarray(params["conv"]["bias"]) - np.asarray(statistics["mean"])) * factor
    )
    np.testing.assert_allclose(folded["params"]["conv"]["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(folded["params"]["bn"]["bias"], bias, rtol=1e-5, atol=1e-6)
    assert not np.any(folded["params"]["conv"]["bias"])


def test_folding_twice_changes_nothing_more():
    case = model_grid.mlp()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    fold = jax.jit(functools.partial(fold_batch_norm, graph))
    once = fold(variables)
    for a, b in zip(jax.tree.leaves(fold(once)), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_a_batch_norm_along_another_axis_is_not_folded(kind, axis):
    """All sizes are equal, so that nothing but the axis tells."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8) if kind == "dense" else (8, 8, 8, 8)), jnp.float32)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x) if kind == "dense" else nn.Conv(8, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, axis=axis)(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    case = linen_case("axes", Network(), x.shape)
    function, variables = case.function()
    graph = trace(function, variables, x.shape)
    assert (graph.batch_norms[0].layer is not None) == (axis in (-1, x.ndim - 1))
    folded = fold_batch_norm(graph, variables)
    expected = np.asarray(function(variables, x))
    np.testing.assert_allclose(function(folded, x), expected, atol=1e-5 * np.abs(expected).max())
    equalized = dfq_jax.equalize(graph, variables)
    np.testing.assert_allclose(function(equalized, x), expected, atol=1e-4 * np.abs(expected).max())
