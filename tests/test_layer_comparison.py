"""Errors layer by layer, against runs of the float and the quantized network in float64 NumPy or by rules."""

import functools
import math

import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

from dfq_jax import Quantized
from dfq_jax.graph import record_tensors
from dfq_jax.quantizers import dequantized, fake_quant, quantization
from dfq_jax.stages import (
    Convention,
    LayerComparison,
    LayerError,
    LayerRule,
    compare_layers,
    equalize,
    estimate_ranges,
    quantize_params,
    sqnr,
    stretch_channels,
)


@functools.cache
def parts(build, **fields):
    graph, variables, images = model_grid.network_of(build())
    convention = Convention(weight_bits=4, activation_bits=4, edge_bits=None, **fields)
    ranges = estimate_ranges(graph, variables, images, convention)
    return graph, variables, quantize_params(graph, variables, ranges, convention), images


def test_dense_layers_in_numpy():
    graph, variables, qvariables, images = parts(model_grid.mlp)
    found = compare_layers(graph, variables, qvariables, images, batch_size=4)
    floats, weights = graph.leaves_by_path(variables), graph.leaves_by_path(dequantized(qvariables))
    quantizers = quantization(qvariables).by_tensor
    inputs = record_tensors(graph, variables, images)[1]
    x = images  # of the quantized network
    for layer, error in zip(graph.layers, found.layers, strict=True):

        def output(x, leaves, layer=layer):
            own = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
            result = np.asarray(x, np.float64) @ own[layer.kernel] + (0 if layer.bias is None else own[layer.bias])
            if layer.batch_norm is None:
                return result
            bn = graph.batch_norm(layer.batch_norm)
            return (result - own[bn.mean]) / np.sqrt(own[bn.var] + bn.epsilon) * own[bn.scale] + own[bn.bias]

        params, seen = quantizers[layer.tensor], inputs[layer.tensor]
        wanted = output(seen, floats)
        assert error.name == layer.name
        assert error.own == pytest.approx(sqnr(wanted, output(fake_quant(seen, params), weights)), abs=1e-2)
        if layer is graph.first_layer:
            assert error.carried == np.inf or error.carried > 100
        else:
            assert error.carried == pytest.approx(sqnr(wanted, output(x, floats)), abs=1e-2)
        result = output(fake_quant(x, params), weights)
        assert error.sqnr == pytest.approx(sqnr(wanted, result), abs=1e-2)
        if layer.activation == "relu":
            x = jnp.maximum(jnp.asarray(result, jnp.float32), 0)


@pytest.mark.parametrize("build", [model_grid.cifar_resnet8, model_grid.mobilenet_v2, model_grid.shared_kernel])
def test_a_broken_layer_is_found(build):
    graph, variables, _, images = parts(build)
    broken = graph.layers[len(graph.layers) // 2]
    rules = (LayerRule(pattern=f"(?!{broken.name}$).*", weight_bits=8, activation_bits=8),)
    ruined = Convention(weight_bits=2, activation_bits=2, edge_bits=None, rules=rules)
    ranges = estimate_ranges(graph, variables, images, ruined)
    found = compare_layers(graph, variables, quantize_params(graph, variables, ranges, ruined), images)
    assert found.falls_at == broken.name
    assert "falls here" in found.table()
    (layer,) = (error for error in found.layers if error.name == broken.name)
    assert layer.own < layer.carried - 10 and abs(layer.own - layer.sqnr) < 1


def test_a_table_where_nothing_falls():
    errors = (
        LayerError(name="a", sqnr=30.0, own=30.0, carried=math.inf),
        LayerError(name="b", sqnr=29.0, own=31, carried=33),
    )
    found = LayerComparison(layers=errors)
    assert found.falls_at is None
    assert [line.split() for line in found.table().splitlines()] == [
        ["layer", "SQNR", "dB", "own", "carried"],
        ["a", "30.0", "30.0", "inf"],
        ["b", "29.0", "31.0", "33.0"],
    ]


def test_the_float_network_and_bad_input():
    graph, variables, qvariables, images = parts(model_grid.cifar_resnet8)
    convention = Convention(activation_bits=None, rules=(LayerRule(weight_bits=None),))
    same = compare_layers(graph, variables, quantize_params(graph, variables, {}, convention), images)
    assert same.falls_at is None and all(error.sqnr > 100 for error in same.layers)
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        compare_layers(graph, variables, variables, images)
    with pytest.raises(ValueError, match="images: expected an array"):
        compare_layers(graph, variables, qvariables, images[:, :, :, :1])


def test_a_network_is_compared_with_what_was_quantized():
    """Recipes equalize weights and stretch channels first; who compares has the variables from before."""
    graph, variables, images = model_grid.network_of(model_grid.mobilenet_v2())
    convention = Convention(weight_bits=4, activation_bits=8, edge_bits=None)
    equalized = equalize(graph, variables)
    for form in (variables, equalized, *(stretch_channels(graph, v, convention) for v in (variables, equalized))):
        qvariables = quantize_params(graph, form, estimate_ranges(graph, form, images, convention), convention)
        facts = {"report": None, "recipe": None, "images": None, "graph": graph, "convention": convention}
        found = Quantized(variables=qvariables, **facts).compare_layers(variables, images)
        assert found == compare_layers(graph, form, qvariables, images)
        assert min(layer.own for layer in found.layers) > 8
