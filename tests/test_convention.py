"""What is quantized to how many bits: names, checks, edges, and the tree that `quantize_params` makes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax.core import FrozenDict
from model_grid import GRID

from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import OPERANDS, QUANTIZATION, TENSORS, without_quantization
from dfq_jax.quantizers.qtensor import QTensor, QuantizerParams
from dfq_jax.quantizers.weights import WEIGHT_RANGES
from dfq_jax.stages import (
    ESTIMATORS,
    Budget,
    allocator,
    apply_estimator,
    candidate_ranges,
    choices_within,
    estimate_ranges,
    find_stretchable,
    sensitivity,
    stretch_channels,
    summarize,
)
from dfq_jax.stages.convention import Convention, quantize_params


@functools.cache
def traced(build: Any) -> tuple[Graph, Any]:
    return model_grid.traced(build), build().function()[1]


def unit_ranges(graph: Graph) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {tensor.name: (jnp.float32(-0.5), jnp.float32(1.5)) for tensor in graph.tensors}


def quantized_shapes(graph: Graph, variables: Any, convention: Convention) -> Any:
    """The quantized tree without its arrays: structure, shapes and bits, at no cost."""
    make = functools.partial(quantize_params, graph, convention=convention)
    return jax.eval_shape(make, variables, unit_ranges(graph))


def kernels(graph: Graph, qvariables: Any) -> dict[str, QTensor]:
    return {layer.name: graph.leaf(qvariables, layer.kernel) for layer in graph.layers}


def quantizers(qvariables: Any) -> dict[str, QuantizerParams]:
    return {**qvariables[QUANTIZATION][TENSORS], **qvariables[QUANTIZATION][OPERANDS]}


# --- names and checks ---


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits"),
    [("w4a4", 4, 4), ("W8A8", 8, 8), (" w2a4 ", 2, 4), ("w3a16", 3, None), ("w8a16", 8, None)],
)
def test_parse(name, weight_bits, activation_bits):
    convention = Convention.parse(name)
    assert convention == Convention(weight_bits=weight_bits, activation_bits=activation_bits, edge_bits=8)
    assert convention.name == name.strip().lower()
    assert Convention.parse(convention.name) == convention


@pytest.mark.untyped
@pytest.mark.parametrize("wrong", ["w4a4", None, {"weight_bits": 4}])
def test_what_is_no_convention_is_refused_by_name(wrong):
    graph, variables, images = model_grid.network_of(model_grid.mlp())
    calls = [
        lambda: estimate_ranges(graph, variables, images, wrong),
        lambda: candidate_ranges(graph, variables, images, wrong),
        lambda: apply_estimator(graph, summarize(graph, variables, images), wrong, ESTIMATORS["max"]),
        lambda: quantize_params(graph, variables, {}, wrong),
        lambda: stretch_channels(graph, variables, wrong),
        lambda: find_stretchable(graph, wrong),
        lambda: sensitivity(graph, variables, images, convention=wrong),
        lambda: allocator(graph, variables, None, images, convention=wrong),
        lambda: choices_within(graph, Budget(average_weight_bits=4), wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="convention: expected a Convention, found "):
            call()


def test_parse_takes_the_other_fields():
    convention = Convention.parse("w4a4", edge_bits=None, per_channel=False, shortcuts="quantized", weight_range="mse")
    assert convention == Convention(edge_bits=None, per_channel=False, shortcuts="quantized", weight_range="mse")


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["", "4", "w4", "a4w4", "w4a4x", "w-4a4", "w4.0a4", None, 8])
def test_parse_refuses_other_names(name):
    with pytest.raises(ValueError, match="expected a name like 'w4a4'"):
        Convention.parse(name)


@pytest.mark.parametrize(
    ("name", "field"), [("w1a4", "weight_bits"), ("w9a4", "weight_bits"), ("w16a4", "weight_bits"),
                        ("w4a1", "activation_bits"), ("w4a9", "activation_bits"), ("w4a32", "activation_bits")]
)  # fmt: skip
def test_parse_refuses_bits_out_of_range(name, field):
    with pytest.raises(ValueError, match=f"{field}: expected an integer from 2 to 8"):
        Convention.parse(name)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "field", ["weight_bits", "activation_bits", "edge_bits", "edge_input_bits", "second_input_bits"]
)
@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, 16])
def test_bits_are_checked(field, bits):
    with pytest.raises(ValueError, match=f"{field}: expected an integer from 2 to 8"):
        Convention(**{field: bits})


@pytest.mark.untyped
def test_none_is_for_activations_and_edges_only():
    Convention(activation_bits=None, edge_bits=None)
    with pytest.raises(ValueError, match="weight_bits"):
        Convention(weight_bits=None)


def test_choices_are_checked():
    with pytest.raises(ValueError, match=r"weight_range: expected one of \['lp', 'min_max', 'mse'\], found 'max'"):
        Convention(weight_range="max")
    with pytest.raises(ValueError, match="shortcuts: expected one of"):
        Convention(shortcuts="int8")


def test_is_static():
    """A convention is a static argument of `jax.jit`: hashable, and equal by its fields."""
    assert hash(Convention()) == hash(Convention()) and Convention() != Convention(weight_bits=3)
    with pytest.raises(AttributeError):
        Convention().weight_bits = 8


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        (
            Convention(),
            "W4A4, first and last layer 8-bit, per-channel asymmetric weights, "
            "per-tensor static activations, float shortcuts",
        ),
        (
            Convention().with_default("min_max"),
            "W4A4, first and last layer 8-bit, per-channel asymmetric weights (min_max ranges), "
            "per-tensor static activations, float shortcuts",
        ),
        (
            Convention(activation_bits=None, edge_bits=None, per_channel=False, symmetric_weights=True),
            "W4A16, edges as all layers, per-tensor symmetric weights, float activations",
        ),
        (
            Convention(weight_bits=2, activation_bits=8, edge_bits=4, weight_range="mse", shortcuts="quantized"),
            "W2A8, first and last layer 4-bit, per-channel asymmetric weights (mse ranges), "
            "per-tensor static activations, quantized shortcuts",
        ),
    ],
)
def test_describe(convention, expected):
    assert convention.describe() == expected


def test_description_tells_conventions_apart():
    changes = [{}, {"weight_bits": 3}, {"activation_bits": 3}, {"activation_bits": None}, {"edge_bits": None},
               {"edge_bits": 4}, {"per_channel": False}, {"symmetric_weights": True}, {"weight_range": "mse"},
               {"shortcuts": "quantized"}, {"edge_input_bits": 8},
               {"edge_bits": None, "edge_input_bits": 8}, {"second_input_bits": 8}]  # fmt: skip
    assert len({Convention(**change).describe() for change in changes}) == len(changes)


# --- bits ---


def test_bits_of_layers_and_tensors():
    graph, _ = traced(model_grid.cifar_resnet8)
    first, last = graph.first_layer.name, graph.last_layer.name
    convention = Convention.parse("w4a3")
    assert {x.name: convention.layer_bits(graph, x) for x in graph.layers} == {
        x.name: 8 if x.name in (first, last) else 4 for x in graph.layers
    }
    edges = (graph.first_layer.tensor, graph.last_layer.tensor)
    assert {t.name: convention.tensor_bits(graph, t) for t in graph.tensors} == {
        t.name: 8 if t.name in edges else 3 for t in graph.tensors
    }
    same = Convention.parse("w4a3", edge_bits=None)
    assert {same.layer_bits(graph, x) for x in graph.layers} == {4}
    assert {same.tensor_bits(graph, t) for t in graph.tensors} == {3}


def test_inputs_of_edges():
    """The image may keep its 8 bits where all weights have as many as anywhere."""
    graph, _ = traced(model_grid.cifar_resnet8)
    convention = Convention.parse("w4a3", edge_bits=None, edge_input_bits=8)
    edges = (graph.first_layer.tensor, graph.last_layer.tensor)
    assert {convention.layer_bits(graph, x) for x in graph.layers} == {4}
    assert {t.name: convention.tensor_bits(graph, t) for t in graph.tensors} == {
        t.name: 8 if t.name in edges else 3 for t in graph.tensors
    }
    assert "edges as all layers with 8-bit inputs" in convention.describe()


@pytest.mark.parametrize("build", [model_grid.cifar_resnet8, model_grid.mobilenet_v2, model_grid.vgg])
def test_input_of_the_second_layer(build):
    graph, _ = traced(build)
    plain, convention = Convention.parse("w4a3"), Convention.parse("w4a3", second_input_bits=8)
    changed = [t for t in graph.tensors if convention.tensor_bits(graph, t) != plain.tensor_bits(graph, t)]
    assert [t.name for t in changed] == [graph.layers[1].tensor] and convention.tensor_bits(graph, changed[0]) == 8
    assert all(convention.layer_bits(graph, x) == plain.layer_bits(graph, x) for x in graph.layers)
    assert "second layer's input 8-bit" in convention.describe()


def test_narrow_edges():
    """Edges may have fewer bits in their weights; a tensor never gets fewer than the other layers ask for."""
    graph, _ = traced(model_grid.cifar_resnet8)
    convention = Convention(weight_bits=4, activation_bits=6, edge_bits=2)
    assert convention.layer_bits(graph, graph.first_layer) == 2
    assert convention.tensor_bits(graph, graph.tensor(graph.first_layer.tensor)) == 6


def test_weight_only_has_no_activation_bits():
    graph, variables = traced(model_grid.mlp)
    convention = Convention.parse("w4a16")
    assert [convention.tensor_bits(graph, t) for t in graph.tensors] == [None] * 3
    make = functools.partial(quantize_params, graph, ranges={}, convention=convention)  # no ranges needed
    qvariables = jax.eval_shape(make, variables)
    assert qvariables[QUANTIZATION] == {TENSORS: {}, OPERANDS: {}}


def test_tensor_shared_with_an_edge_layer_has_the_bits_of_the_edge():
    def apply_fn(v, x):
        return x @ v["a"]["kernel"] + x @ v["b"]["kernel"] @ v["c"]["kernel"]

    shapes = {"a": {"kernel": (4, 5)}, "b": {"kernel": (4, 3)}, "c": {"kernel": (3, 5)}}
    case = model_grid.function_case("branches", apply_fn, shapes, (2, 4))
    graph = trace(*case.function(), case.input_shape)
    convention = Convention()
    assert [convention.layer_bits(graph, graph.layer(name)) for name in "abc"] == [8, 4, 8]
    assert {t.layers: convention.tensor_bits(graph, t) for t in graph.tensors} == {("a", "b"): 8, ("c",): 8}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("edge_bits", [8, None])
def test_eight_bit_weights_are_symmetric(symmetric, edge_bits):
    graph, variables = traced(model_grid.mlp)
    convention = Convention.parse("w4a8", edge_bits=edge_bits, symmetric_weights=symmetric)
    qvariables = quantized_shapes(graph, variables, convention)
    for kernel in kernels(graph, qvariables).values():
        is_symmetric = symmetric or kernel.bits == 8
        assert kernel.signed == is_symmetric and (kernel.zero_point is None) == is_symmetric
    # Activations always have a zero point: a ReLU's output would waste half of a symmetric quantizer.
    assert all(not q.signed and q.zero_point is not None for q in quantizers(qvariables).values())


# --- the quantized tree ---


@pytest.mark.parametrize(
    ("build", "shortcuts"),
    [  # in turns, the other half under `slow`
        pytest.param(*param.values, kind, id=f"{param.id}-{kind}", marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for i, param in enumerate(GRID)
        for j, kind in enumerate(("float", "quantized"))
    ],
)
def test_structure(build, shortcuts):
    graph, variables = traced(build)
    convention = Convention(shortcuts=shortcuts)
    qvariables = quantized_shapes(graph, variables, convention)
    assert type(qvariables) is type(variables)
    assert set(qvariables) == {*variables, QUANTIZATION}
    bits = {}
    for layer in graph.layers:
        bits.setdefault(layer.kernel, (convention.layer_bits(graph, layer), convention.scale_axes(graph, layer)))
    found = dict(zip(graph.leaf_paths, graph.leaves(qvariables), strict=True))
    for path, before in zip(graph.leaf_paths, graph.leaves(variables), strict=True):
        after = found[path]
        assert after.shape == before.shape
        if path not in bits:
            assert not isinstance(after, QTensor) and after.dtype == before.dtype
            continue
        assert isinstance(after, QTensor) and after.bits == bits[path][0] and after.dtype == before.dtype
        kept = [size if axis in bits[path][1] else 1 for axis, size in enumerate(before.shape)]
        assert after.scale.shape == tuple(kept) and after.scale.dtype == jnp.float32
    collection = qvariables[QUANTIZATION]
    assert set(collection) == {TENSORS, OPERANDS}
    for_layers = {t.name for t in graph.tensors if t.shared and shortcuts == "float"}
    assert set(collection[OPERANDS]) == for_layers
    assert set(collection[TENSORS]) == {t.name for t in graph.tensors} - for_layers
    for name, params in quantizers(qvariables).items():
        assert params.scale.shape == () and params.bits == convention.tensor_bits(graph, graph.tensor(name))


def test_known_ranges_within_a_trace():
    """Ranges may be known where variables are traced, and the other way around."""
    graph, variables = traced(model_grid.mlp)
    convention, ranges = Convention(), unit_ranges(graph)
    expected = quantize_params(graph, variables, ranges, convention)
    for found in (
        jax.jit(lambda v: quantize_params(graph, v, ranges, convention))(variables),
        jax.jit(lambda r: quantize_params(graph, variables, r, convention))(ranges),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_per_tensor_weights():
    graph, variables = traced(model_grid.dilated_grouped)
    qvariables = quantized_shapes(graph, variables, Convention(per_channel=False))
    assert all(kernel.scale.size == 1 for kernel in kernels(graph, qvariables).values())


@pytest.mark.parametrize("weight_range", sorted(WEIGHT_RANGES))
def test_values(weight_range):
    graph, variables = traced(model_grid.mlp)
    convention = Convention(weight_range=weight_range)
    qvariables = jax.jit(functools.partial(quantize_params, graph, convention=convention))(
        variables, unit_ranges(graph)
    )
    for layer in graph.layers:
        kernel, before = graph.leaf(qvariables, layer.kernel), graph.leaf(variables, layer.kernel)
        span = before.max(0) - before.min(0)
        error = jnp.abs(kernel.dequantize() - before).max(0)
        # Half a step, and for the searched ranges what they clip.
        assert bool((error <= span / 15 * (0.51 if weight_range == "min_max" else 3)).all())
        params = quantizers(qvariables)[layer.tensor]
        step = 2.0 / (2**params.bits - 1)
        np.testing.assert_allclose([params.lo, params.hi], [-0.5, 1.5], atol=0.51 * step)
    plain = without_quantization(qvariables)
    for path, a, b in zip(graph.leaf_paths, graph.leaves(plain), graph.leaves(variables), strict=True):
        if not isinstance(a, QTensor):
            np.testing.assert_array_equal(a, b, err_msg=path)


def test_frozen_dict_stays_frozen():
    graph, variables = traced(model_grid.frozen_dict)
    qvariables = quantized_shapes(graph, variables, Convention())
    assert isinstance(qvariables, FrozenDict)


def test_shared_kernel_is_quantized_once():
    graph, variables = traced(model_grid.shared_kernel)
    qvariables = quantized_shapes(graph, variables, Convention())
    found = [leaf for leaf in graph.leaves(qvariables) if isinstance(leaf, QTensor)]
    assert len(found) == len({layer.kernel for layer in graph.layers}) == len(graph.layers) - 1


def test_missing_range():
    graph, variables = traced(model_grid.mlp)
    ranges = unit_ranges(graph)
    del ranges["dense1"]
    with pytest.raises(ValueError, match="no range for tensor 'dense1'"):
        quantize_params(graph, variables, ranges, Convention())


def test_other_variables_are_refused():
    graph, variables = traced(model_grid.mlp)
    with pytest.raises(GraphError, match="missing"):
        quantize_params(graph, {"params": variables["params"]}, unit_ranges(graph), Convention())
