"""Sensitivities, against networks that `quantize_params` makes with one layer quantized, or all but one."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from compilations import Compilations
from random_networks import random_network

from dfq_jax.graph import GraphError
from dfq_jax.quantizers import fake_quant, quantization, with_quantization
from dfq_jax.quantizers.collection import ActivationQuantizers
from dfq_jax.stages import Convention, LayerRule, analytic_comparison, compare, estimate_ranges, quantize_params
from dfq_jax.stages.analytic import analytic_summaries
from dfq_jax.stages.mixed import MixedNetwork
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator
from dfq_jax.stages.sensitivity import Sensitivity, sensitivity

BUILDERS = (
    model_grid.cifar_resnet8,
    model_grid.mobilenet_v2,
    model_grid.densenet,
    model_grid.shared_kernel,
    model_grid.no_batch_norm,
    model_grid.dict_outputs,
    functools.partial(random_network, 49),
)
BITS = (2, 4)


def uniform(convention, bits):
    """So many bits for all weights and activations."""
    same = {"edge_bits": None, "edge_input_bits": None, "second_input_bits": None}
    return dataclasses.replace(convention, weight_bits=bits, activation_bits=bits, **same)


@functools.cache
def parts(build):
    return model_grid.network_of(build())


def left_float(graph, qvariables, variables, *, kernels=(), tensors=()):
    """The quantized network with some kernels and tensors in float again."""
    floats, quantizers = graph.leaves_by_path(variables), quantization(qvariables)
    changed = graph.replace(qvariables, {path: floats[path] for path in kernels})
    rest = [{n: p for n, p in part.items() if n not in tensors} for part in (quantizers.for_all, quantizers.for_layers)]
    return with_quantization(changed, ActivationQuantizers(*rest))


def one_by_one(graph, variables, compared, ranges, convention, bits):
    """`{(part, layer, bits): divergence}` by whole networks of `quantize_params`, each compared by itself."""
    found = {}
    for b in bits:
        whole = quantize_params(graph, variables, ranges(uniform(convention, b)), uniform(convention, b))
        kernels, tensors = list(graph.kernels), [tensor.name for tensor in graph.tensors]
        for layer in graph.layers[::3]:
            own = graph.together(layer.kernel)
            others, unread = [p for p in kernels if p not in own], [t for t in tensors if t != layer.tensor]
            networks = {
                "weights": {"kernels": others, "tensors": tensors},
                "both": {"kernels": others, "tensors": unread},
                "without": {"kernels": own, "tensors": [layer.tensor]},
            }
            for part, left in networks.items():
                found[part, layer.name, b] = compared(left_float(graph, whole, variables, **left))
    return found


@pytest.mark.parametrize("place", range(len(BUILDERS)))
def test_as_networks_one_by_one(place):
    graph, variables, images = parts(BUILDERS[place])
    convention = Convention(shortcuts=("float", "quantized")[place % 2])
    found = sensitivity(graph, variables, images, bits=BITS, convention=convention)

    def ranges(convention):
        return estimate_ranges(graph, variables, images, convention)

    def divergence(qvariables):
        return compare(graph, variables, qvariables, images, batch_size=8).divergence

    expected = one_by_one(graph, variables, divergence, ranges, convention, BITS)
    # What is quantized for layers alone is so for those with a quantized kernel: there the networks are not the same.
    alone = {
        t.name for t in graph.tensors if len(t.layers) > 1 and uniform(convention, 2).is_for_layers_alone(graph, t)
    }
    for (part, name, bits), value in expected.items():
        if part == "weights" or graph.layer(name).tensor not in alone:
            i, j = found.layers.index(name), BITS.index(bits)
            np.testing.assert_allclose(getattr(found, part)[i, j], value, rtol=5e-3, atol=1e-6)
    for j, bits in enumerate(BITS):
        whole = quantize_params(graph, variables, ranges(uniform(convention, bits)), uniform(convention, bits))
        np.testing.assert_allclose(found.total[j], divergence(whole), rtol=5e-3, atol=1e-6)


def test_without_images():
    graph, variables, _ = parts(model_grid.cifar_resnet8)
    found = sensitivity(graph, variables, bits=(2,))
    summaries = analytic_summaries(graph, variables)

    def ranges(convention):
        return apply_estimator(graph, summaries, convention, ESTIMATORS["lp"])

    def divergence(qvariables):
        return analytic_comparison(graph, variables, qvariables).divergence

    expected = one_by_one(graph, variables, divergence, ranges, Convention(), (2,))
    for (part, name, _), value in expected.items():
        i, j = found.layers.index(name), 0
        if part == "weights" or len(graph.tensor(graph.layer(name).tensor).layers) == 1:
            np.testing.assert_allclose(getattr(found, part)[i, j], value, rtol=5e-3, atol=1e-6)
    assert "noise" in found.measured_on
    with pytest.raises(GraphError, match="no BatchNorm"):
        sensitivity(*parts(model_grid.no_batch_norm)[:2])


def test_inputs_alone():
    graph, variables, images = parts(model_grid.mlp)
    found = sensitivity(graph, variables, images, bits=(2,), convention=Convention(shortcuts="quantized"))
    ranges = estimate_ranges(graph, variables, images, uniform(Convention(), 2))
    quantizers = quantization(quantize_params(graph, variables, ranges, uniform(Convention(), 2))).by_tensor
    for layer, value in zip(graph.layers, found.input[:, 0], strict=True):
        quantized = with_quantization(variables, ActivationQuantizers({layer.tensor: quantizers[layer.tensor]}))
        np.testing.assert_allclose(value, compare(graph, variables, quantized, images).divergence, rtol=1e-3)
    first = fake_quant(images, quantizers[graph.first_layer.tensor])
    outputs = (np.asarray(graph.logits(graph.apply_fn(variables, x)), np.float64) for x in (images, first))
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in outputs)
    np.testing.assert_allclose(found.input[0, 0], (np.exp(p) * (p - q)).sum(1).mean(), rtol=1e-3)


@pytest.mark.parametrize("source", ["images", "noise"])
def test_two_compilations(source):
    graph, variables, images = parts(model_grid.mobilenet_v2)
    jax.clear_caches()
    with Compilations() as compiled:
        sensitivity(graph, variables, images if source == "images" else None, bits=(2, 3, 4, 6, 8))
    assert compiled["_outputs"] == 1 and compiled["_recorded"] == 1
    with Compilations() as compiled:
        sensitivity(graph, variables, images if source == "images" else None, bits=(5, 7))
    assert compiled["_outputs"] == 0 and compiled["_recorded"] == 0


def test_only_what_follows_a_change_is_run():
    graph, variables, images = parts(model_grid.cifar_resnet8)
    network = MixedNetwork(graph, variables, images, BITS, Convention(), "lp")
    whole = {part: 2 for part in (*network.weights.values(), *network.inputs.values())}
    late = whole | {network.weights[graph.last_layer.name]: 4}
    from_there, from_start = (network.divergences([late], start) for start in (network.record(whole), None))
    np.testing.assert_allclose(from_there, from_start, rtol=1e-4)
    # What enters the blocks before it is not looked at.
    broken = network.record(whole)
    inputs = [[jnp.full_like(x, jnp.nan) for x in values[:-1]] + values[-1:] for values in broken.inputs]
    broken = type(broken)(widths=broken.widths, inputs=inputs)
    assert network.divergences([late], broken) == from_there


def test_what_rules_say_holds_at_every_width():
    graph, variables, images = parts(model_grid.cifar_resnet8)
    names = [layer.name for layer in graph.layers]
    rules = (LayerRule(pattern=names[2], weight_bits=8), LayerRule(pattern=names[3], weight_bits=None))
    found = sensitivity(graph, variables, images, bits=BITS, convention=Convention(rules=rules))
    assert found.layers == (*names[:3], *names[4:])
    assert found.weights[2, 0] == found.weights[2, 1]
    plain = sensitivity(graph, variables, images, bits=(8,))
    np.testing.assert_allclose(found.weights[2, 0], plain.weights[2, 0], rtol=1e-3, atol=1e-7)


def test_weights_alone():
    graph, variables, images = parts(model_grid.cifar_resnet8)
    found = sensitivity(graph, variables, images, bits=(2,), convention=Convention(activation_bits=None))
    assert not found.input.any() and (found.both == found.weights).all() and found.weights.all()


def test_record():
    graph, variables, images = parts(model_grid.mlp)
    seen = []
    found = sensitivity(graph, variables, images, bits=(4, 2), on_progress=seen.append)
    assert found.bits == (2, 4) and len(seen) == 2 * len(graph.layers)
    assert (seen[-1].done, seen[-1].batch, seen[-1].eta) == (len(seen), 2, 0)
    again = Sensitivity.from_json(found.to_json())
    assert again.to_json() == found.to_json() and again.layers == found.layers
    np.testing.assert_array_equal(again.both, found.both)
    assert all(name in found.table() for name in found.layers)
    with pytest.raises(ValueError, match="text: expected what"):
        Sensitivity.from_json("[1]")
    with pytest.raises(ValueError, match="text: expected what"):
        Sensitivity.from_json(json.dumps({**json.loads(found.to_json()), "both": [[1.0]]}))


def test_bad_input():
    graph, variables, images = parts(model_grid.mlp)
    for bits in ((), (1,), (4, 9), 4, (True,)):
        with pytest.raises(ValueError, match="bits: expected integers from 2 to 8"):
            sensitivity(graph, variables, images, bits=bits)
    with pytest.raises(ValueError, match="estimator"):
        sensitivity(graph, variables, images, estimator="median")
    with pytest.raises(ValueError, match="images: expected an array"):
        sensitivity(graph, variables, images[:, :2])
