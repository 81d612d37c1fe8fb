"""Blocks run by themselves, one after the other, are the network; equal blocks are equal graphs."""

import jax
import numpy as np
import pytest
from model_grid import GRID, cifar_resnet8, resnet50, traced, vgg

from dfq_jax import run_block, trace
from dfq_jax.graph.subnetwork import subnetwork
from dfq_jax.graph.tracing.blocks import merge_blocks
from dfq_jax.graph.tracing.structure import GraphError

FAST = ("cifar_resnet8", "vgg", "inception", "shared_kernel", "remat", "general_dense", "dict_outputs")
PARAMS = [
    pytest.param(*p.values, id=p.id, marks=[] if p.id in FAST else [pytest.mark.slow])
    for p in GRID  # compiling is what takes the time
]


@pytest.mark.parametrize("build", PARAMS)
def test_blocks_one_after_the_other_are_the_network(build):
    case = build()
    apply_fn, variables = case.function()
    graph, x = traced(build), case.images()

    def by_blocks(variables, x):
        for block in graph.blocks:
            x = run_block(graph, block, variables, x)
        return x

    def by_subnetworks(variables, x):
        for block in graph.blocks:
            sub = subnetwork(graph, block, x.shape[0])
            x = sub.graph.apply_fn(sub.select(graph, variables), x)
        return x

    @jax.jit
    def everything(variables, x):
        return apply_fn(variables, x), by_blocks(variables, x), by_subnetworks(variables, x)

    expected, *others = everything(variables, x)
    for found in others:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("build", GRID)
def test_blocks_traced_by_themselves_have_their_layers(build):
    graph = traced(build)
    for block in graph.blocks:
        own = subnetwork(graph, block, 2).graph.layers
        assert [layer.kind for layer in own] == [graph.layer(name).kind for name in block.layers]


def test_equal_blocks_are_equal_graphs():
    case = resnet50()
    graph = trace(*case.function(), case.input_shape)
    subs = [subnetwork(graph, block, 2) for block in graph.blocks]
    assert len(subs) == 18 and len({sub.graph for sub in subs}) == 11
    assert len({sub.leaves for sub in subs}) == 18


def test_merged_blocks():
    case = vgg()
    graph = trace(*case.function(), case.input_shape)
    merged = merge_blocks(graph.blocks, 3)
    assert [len(b.layers) for b in merged] == [3, 1]
    assert merge_blocks(graph.blocks, 1) == graph.blocks
    assert len(subnetwork(graph, merged[0], 2).graph.layers) == 3


def test_foreign_blocks_and_wrong_inputs_are_refused():
    case = cifar_resnet8()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    other = trace(*vgg().function(), vgg().input_shape)
    with pytest.raises(GraphError, match="no block of this network"):
        run_block(graph, other.blocks[0], variables, case.images())
    with pytest.raises(GraphError, match="takes a value of shape"):
        run_block(graph, graph.blocks[1], variables, case.images())
