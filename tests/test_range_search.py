"""Ranges searched by the network's outputs, against runs of whole networks."""

import functools

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from compilations import Compilations
from random_networks import random_network

from dfq_jax.graph import as_function
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers import quantization
from dfq_jax.stages import (
    Convention,
    RangeSearchConfig,
    candidate_ranges,
    compare,
    quantize_params,
    search_ranges,
    sensitivity,
    with_ranges,
)

BUILDERS = (
    model_grid.cifar_resnet8,
    model_grid.mobilenet_v2,
    model_grid.densenet,
    model_grid.no_batch_norm,
    model_grid.mlp,
    model_grid.dict_outputs,
    functools.partial(random_network, 49),
    functools.partial(random_network, 303),
)
CONFIG = RangeSearchConfig(estimators=("lp", "max"), factors=(0.5,), batch_size=4)


@functools.cache
def parts(build, shortcuts="float"):
    """A network quantized with the ranges of the first of some sets."""
    case = build()
    model = case.apply_fn if hasattr(case, "apply_fn") else case.model
    apply_fn, variables = as_function(model, case.variables)
    graph = trace(apply_fn, variables, (1, *case.input_shape[1:]))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, *case.input_shape[1:])), jnp.float32)
    convention = Convention.parse("w4a3", edge_bits=None, shortcuts=shortcuts)
    sets = candidate_ranges(graph, variables, images, convention, CONFIG)
    return graph, variables, images, sets, quantize_params(graph, variables, next(iter(sets.values())), convention)


def divergence(graph, variables, qvariables, images):
    return compare(graph, variables, qvariables, images, batch_size=8).divergence


@pytest.mark.parametrize("place", range(len(BUILDERS)))
def test_what_is_found(place):
    graph, variables, images, sets, qvariables = parts(BUILDERS[place], ("float", "quantized")[place % 2])
    better, found = search_ranges(graph, variables, qvariables, images, sets, CONFIG)
    for network, expected in ((qvariables, found.before), (better, found.after)):
        np.testing.assert_allclose(divergence(graph, variables, network, images), expected, rtol=2e-3, atol=1e-6)
    assert found.after <= found.before and (found.after < found.before) == bool(found.changed)
    wanted = dict(next(iter(sets.values())))
    for tensor, which in found.changed.items():
        params = quantization(qvariables).by_tensor[tensor]
        wanted[tensor] = (0.5 * params.lo, 0.5 * params.hi) if which == "0.5 times" else sets[which][tensor]
    # Nothing but ranges has changed, and they are those that are named.
    jax.tree.map(np.testing.assert_array_equal, better, with_ranges(qvariables, wanted))


def test_a_tensor_is_mended_by_the_set_that_has_it_right():
    graph, variables, images, sets, qvariables = parts(model_grid.cifar_resnet8)
    right = sets["image lp"]
    broken = {name: (1e-4 * lo, 1e-4 * hi) for name, (lo, hi) in right.items()}
    tensor = graph.tensors[3].name
    start = with_ranges(qvariables, {**right, tensor: broken[tensor]})
    other = {"one is right": {**broken, tensor: right[tensor]}}
    better, found = search_ranges(graph, variables, start, images, other, RangeSearchConfig(factors=(), least_gain=0.3))
    assert found.changed == {tensor: "one is right"} and found.after < 0.9 * found.before
    jax.tree.map(np.testing.assert_array_equal, better, with_ranges(qvariables, right))


def test_a_small_gain_changes_nothing():
    graph, variables, images, sets, qvariables = parts(model_grid.cifar_resnet8)
    config = RangeSearchConfig(least_gain=0.999)
    _, found = search_ranges(graph, variables, qvariables, images, sets, config)
    assert found.changed == {} and found.after == found.before


def test_compiled_once_for_all_ranges():
    graph, variables, images, sets, qvariables = parts(model_grid.cifar_resnet8)
    search_ranges(graph, variables, qvariables, images, sets, CONFIG)
    wider = {name: {t: (2 * lo, 2 * hi) for t, (lo, hi) in ranges.items()} for name, ranges in sets.items()}
    with Compilations() as compiled:
        search_ranges(graph, variables, qvariables, images, wider, CONFIG)
    assert compiled["apply_jitted"] == 0


def test_what_cannot_be_searched():
    graph, variables, images, sets, qvariables = parts(model_grid.mlp)
    tensor = graph.tensors[0].name
    lacking = {name: other for name, other in sets["image lp"].items() if name != tensor}
    with pytest.raises(ValueError, match=f"candidates: 'short' has no range for tensor '{tensor}'"):
        search_ranges(graph, variables, qvariables, images, {"short": lacking})
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        search_ranges(graph, variables, variables, images, sets)
    with pytest.raises(ValueError, match=r"factors: expected positive numbers, found \(0,\)"):
        RangeSearchConfig(factors=(0,))
    with pytest.raises(ValueError, match="estimators: expected some of"):
        RangeSearchConfig(estimators=("median",))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"nowhere": (0.0, 1.0)}, "ranges: tensor 'nowhere' has no quantizer; expected some of"),
        ({"dense1": (0.0, np.nan)}, r"ranges: expected finite ends, found \(0.0, nan\) for tensor 'dense1'"),
    ],
)
def test_ranges_that_cannot_be_taken(ranges, message):
    _, variables, _, sets, qvariables = parts(model_grid.mlp)
    ranges = {name: tuple(map(jnp.float32, ends)) for name, ends in ranges.items()}
    with pytest.raises(ValueError, match=message):
        with_ranges(qvariables, ranges)
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        with_ranges(variables, sets["image lp"])


def test_images_of_another_size_are_taken():
    """Each block sees what the whole network does at that size."""
    graph, variables, _, _, qvariables = parts(model_grid.cifar_resnet8)
    images = jax.random.normal(jax.random.key(1), (8, 24, 40, 3))
    sets = candidate_ranges(graph, variables, images, Convention.parse("w4a3", edge_bits=None), CONFIG)
    better, found = search_ranges(graph, variables, qvariables, images, sets, CONFIG)
    np.testing.assert_allclose(divergence(graph, variables, better, images), found.after, rtol=2e-3)
    layers = [layer.name for layer in graph.layers]
    assert list(sensitivity(graph, variables, images, bits=(2, 8)).layers) == layers
