"""Compiled integer execution: the same network as the simulation, by integer products, whatever the policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import GRID, function_case

from dfq_jax.graph import apply_quantized, record_tensors
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.program import sub_jaxprs
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers import dequantized, pack, qtensor, unpack
from dfq_jax.runtime import IntegerPlan, apply_plan, compile_integer
from dfq_jax.runtime.policy import FLOAT, INT8, WEIGHT_ONLY, Policy, default_policy
from dfq_jax.stages.convention import Convention, quantize_params

# All that can run as int8 does, and nothing is compiled to find out whether it should.
EVERYTHING = Policy(self_test=False)


@functools.cache
def quantized(build: Callable[[], model_grid.Case], bits: str, shortcuts: str) -> tuple[Graph, Any, jax.Array, Any]:
    """Graph, quantized variables, images and the outputs of the simulation."""
    case = build()
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    convention = Convention.parse(bits, shortcuts=shortcuts, weight_range="min_max")

    @jax.jit
    def everything(variables, x):
        _, recorded = record_tensors(graph, variables, x)
        ranges = {name: (value.min(), value.max()) for name, value in recorded.items()}
        qvariables = quantize_params(graph, variables, ranges, convention)
        return qvariables, apply_quantized(graph, qvariables, x)

    qvariables, outputs = everything(variables, x)
    return graph, qvariables, x, jax.tree.map(np.asarray, outputs)


def run_integer(plan: IntegerPlan, ivariables: Any, x: jax.Array) -> Any:
    return jax.tree.map(np.asarray, jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x))


def assert_same_network(found: Any, expected: Any, flips: float) -> None:
    """Equal to float rounding almost everywhere; a code that lies between two steps may fall to the other side."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference, span = np.abs(a - b), np.abs(b).max()
        assert np.median(difference) <= flips / 10 * span
        assert difference.max() <= flips * span


def check(build: Callable[[], model_grid.Case], bits: str, shortcuts: str, **policy: Any) -> IntegerPlan:
    graph, qvariables, x, expected = quantized(build, bits, shortcuts)
    plan, ivariables = compile_integer(graph, qvariables, dataclasses.replace(EVERYTHING, **policy))
    assert_same_network(run_integer(plan, ivariables, x), expected, 0.02)
    return plan


FAST = ("cifar_resnet8", "mobilenet_v2", "general_dense", "channels_first", "shared_kernel")
FAST_GRID = [case for case in GRID if case.id in FAST]


@pytest.mark.parametrize("build", FAST_GRID)
def test_integer_equals_simulation(build):
    plan = check(build, "w8a8", "quantized")
    assert all(layer.decision.runs == INT8 for layer in plan.layers)


@pytest.mark.parametrize("shortcuts", ["quantized", "float"])
def test_codes_in_int8_between_layers_are_the_same(shortcuts):
    graph, qvariables, x, _ = quantized(model_grid.cifar_resnet8, "w4a8", shortcuts)
    compiled = (
        compile_integer(graph, qvariables, dataclasses.replace(EVERYTHING, backend=backend))
        for backend in ("cpu", "tpu")
    )
    np.testing.assert_array_equal(*(run_integer(plan, ivariables, x) for plan, ivariables in compiled))


@pytest.mark.slow
@pytest.mark.parametrize("build", GRID)
@pytest.mark.parametrize(
    ("bits", "shortcuts", "policy"),
    [
        ("w8a8", "quantized", {}),
        ("w4a4", "float", {"storage": "memory"}),
        ("w8a8", "float", {"accumulator": "float32"}),
        ("w4a8", "quantized", dataclasses.asdict(default_policy("cpu")) | {"self_test": False}),
        ("w4a16", "float", {}),
    ],
)
def test_integer_equals_simulation_in_every_convention(build, bits, shortcuts, policy):
    check(build, bits, shortcuts, **policy)


def test_predictions_are_those_of_the_simulation():
    case = model_grid.cifar_resnet8()
    graph, qvariables, _, _ = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1000, *case.input_shape[1:])), jnp.float32)
    found = run_integer(plan, ivariables, x)
    expected = np.asarray(jax.jit(functools.partial(apply_quantized, graph))(qvariables, x))
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.999
    # One code of the last layer's input moves an output by that step times the largest weight. A code that falls to the
    # other side in an early layer, in one of thousands of images, may move a few of them.
    kernel = graph.leaf(qvariables, graph.last_layer.kernel)
    step = ivariables["tensors"][graph.last_layer.tensor]["scale"] * np.abs(kernel.dequantize()).max()
    difference = np.abs(found - expected).max(-1)
    assert np.quantile(difference, 0.99) <= step and difference.max() <= 4 * step


# --- what is computed ---


def products(jaxpr: Any) -> list[tuple[str, ...]]:
    """Types of the operands and results of all products in a program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            found.append(tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)))
        for inner, _ in sub_jaxprs(eqn.params):
            found += products(inner)
    return found


@pytest.mark.parametrize(("accumulator", "bits"), [("int32", "w8a8"), ("float32", "w4a4")])
def test_one_integer_product_for_each_layer(accumulator, bits):
    graph, qvariables, x, _ = quantized(model_grid.cifar_resnet8, bits, "quantized")
    plan, ivariables = compile_integer(graph, qvariables, dataclasses.replace(EVERYTHING, accumulator=accumulator))
    jaxpr = jax.make_jaxpr(functools.partial(apply_plan, plan))(ivariables, x).jaxpr
    assert products(jaxpr) == [("int8", "int8", accumulator)] * len(graph.layers)
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    assert not names & {"rsqrt", "sqrt"}  # BatchNorms are in the multipliers


def test_layers_give_codes_where_nothing_reads_the_float_between():
    graph, qvariables, _, _ = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    found = {layer.name: layer.requantizes for layer in plan.layers}
    for block in ("layer1_0", "layer2_0", "layer3_0"):
        assert found[f"{block}/conv1"] == f"{block}/conv2"
        assert found[f"{block}/conv2"] is None  # a residual sum reads it
    assert not ivariables["leaves"]  # nothing is left to read of BatchNorms and biases


@pytest.mark.parametrize("between", ["batch norm", "multiple", "nothing"])
def test_two_clips_are_one_only_where_nothing_is_between(between):
    def apply_fn(v, x):
        y = jax.nn.relu(x @ v["first"]["kernel"])
        if between == "batch norm":
            y = (y - v["bn"]["mean"]) * jax.lax.rsqrt(v["bn"]["var"] + 1e-5) + v["bn"]["bias"]
        elif between == "multiple":
            y = 2 * y - 1
        return jax.nn.relu(y) @ v["second"]["kernel"]

    norm = {name: (6,) for name in ("mean", "var", "bias")} if between == "batch norm" else {}
    shapes = {"first": {"kernel": (5, 6)}, "bn": norm, "second": {"kernel": (6, 4)}}
    plan = check(lambda: function_case(between, apply_fn, shapes, (16, 5)), "w8a8", "quantized")
    assert (plan.layers[0].requantizes is not None) == (between == "nothing")


def test_multiplier_and_offset_in_float64():
    """One layer, worked out by hand: s_x s_w gamma / sqrt(var + eps) / s_y, and what is left for the offset."""
    graph, qvariables, _, _ = quantized(model_grid.mobilenet_v2, "w8a8", "quantized")
    _, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    layer = graph.layer("block1/expand")
    bn = graph.batch_norm(layer.batch_norm)
    kernel = graph.leaf(qvariables, layer.kernel)
    mean, var, gamma, beta = (
        np.asarray(graph.leaf(qvariables, p), np.float64) for p in (bn.mean, bn.var, bn.scale, bn.bias)
    )
    collection = qvariables["quantization"]["tensors"]
    source, target = collection[layer.tensor], collection["block1/depthwise"]
    factor = gamma / np.sqrt(var + bn.epsilon)
    multiplier = float(source.scale) * np.asarray(kernel.scale, np.float64).reshape(-1) * factor / float(target.scale)
    zero = float(source.zero_point) - 128
    sums = np.asarray(kernel.centered(), np.float64).sum((0, 1, 2))
    offset = (beta - mean * factor) / float(target.scale) - zero * sums * multiplier
    own = ivariables["layers"][layer.name]
    np.testing.assert_allclose(own["multiplier"].reshape(-1), multiplier, rtol=1e-6)
    np.testing.assert_allclose(own["offset"].reshape(-1), offset, rtol=1e-5, atol=1e-5)
    six = ivariables["tensors"]["block1/depthwise"]["high"]  # relu6 is in the clip
    assert float(six) == min(255 - float(target.zero_point), round(6 / float(target.scale)))


@pytest.mark.parametrize("shape", [(3, 16, 16, 3), (1, 24, 20, 3)])
def test_other_batch_and_image_size(shape):
    graph, qvariables, _, _ = quantized(model_grid.cifar_resnet8, "w4a4", "float")
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    expected = jax.jit(functools.partial(apply_quantized, graph))(qvariables, x)
    assert_same_network(run_integer(plan, ivariables, x), np.asarray(expected), 0.02)


# --- storage ---


@pytest.mark.parametrize("bits", ["w4a8", "w2a8"])
def test_packed_weights(bits):
    graph, qvariables, x, expected = quantized(model_grid.cifar_resnet8, bits, "quantized")
    _, unpacked = compile_integer(graph, qvariables, EVERYTHING)
    plan, packed = compile_integer(graph, qvariables, dataclasses.replace(EVERYTHING, storage="memory"))
    inner = graph.layers[2]
    size, small = unpacked["layers"][inner.name]["kernel"], packed["layers"][inner.name]["kernel"]
    assert small.dtype == jnp.uint8 and size.nbytes == small.nbytes * 8 // int(bits[1])
    assert_same_network(run_integer(plan, packed, x), expected, 0.02)


@pytest.mark.parametrize("storage", ["speed", "memory"])
def test_weights_of_4_bits_as_int4(storage):
    graph, qvariables, x, _ = quantized(model_grid.cifar_resnet8, "w4a8", "quantized")
    ranges = dict.fromkeys((tensor.name for tensor in graph.tensors), (-1.0, 6.0))
    edge, inner = graph.layers[0].name, graph.layers[2].name  # of 8 and of 4 bits

    def compiled(symmetric, int4):
        convention = Convention.parse("w4a8", weight_range="min_max", symmetric_weights=symmetric)
        own = quantize_params(graph, dequantized(qvariables), ranges, convention)
        return compile_integer(graph, own, dataclasses.replace(EVERYTHING, storage=storage, int4=int4))

    narrow, wide = (compiled(True, int4) for int4 in (True, False))
    types = [{n: variables["layers"][n]["kernel"].dtype for n in (edge, inner)} for _, variables in (narrow, wide)]
    assert types[0] == {edge: jnp.int8, inner: jnp.int4}
    assert types[1] == {edge: jnp.int8, inner: jnp.int8 if storage == "speed" else jnp.uint8}
    np.testing.assert_array_equal(run_integer(*narrow, x), run_integer(*wide, x))
    _, variables = compiled(False, True)  # codes less their zero point need 5 bits
    assert variables["layers"][inner]["kernel"].dtype == types[1][inner]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_unpack_is_the_inverse_of_pack_inside_a_compiled_function(width, signed):
    low, high = qtensor.bounds(width, signed)
    codes = np.random.default_rng(0).integers(low, high + 1, (3, 7))
    found = jax.jit(unpack, static_argnums=(1, 2, 3))(pack(codes, width), width, codes.shape, signed)
    np.testing.assert_array_equal(found, codes)


def test_layers_that_share_a_kernel_share_its_buffer():
    graph, qvariables, _, _ = quantized(model_grid.shared_kernel, "w8a8", "quantized")
    _, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    by_kernel: dict[str, set[int]] = {}
    for layer in graph.layers:
        by_kernel.setdefault(layer.kernel, set()).add(id(ivariables["layers"][layer.name]["kernel"]))
    assert len(graph.layers) > len(by_kernel) and all(len(ids) == 1 for ids in by_kernel.values())


def test_float_activations_keep_int8_weights():
    plan = check(model_grid.mlp, "w4a16", "float")
    assert {layer.decision.runs for layer in plan.layers} == {WEIGHT_ONLY}


def test_codes_in_float_where_8_bit_weights_have_a_zero_point():
    case = function_case("dense", lambda v, x: x @ v["w"], {"w": (6, 4)}, (3, 6))
    graph = trace(*case.function(), case.input_shape)
    x, collection = case.images(), qtensor.params_from_range(-2.0, 3.0, bits=8)
    w = case.variables["w"] + 1.5
    params = qtensor.params_from_range(w.min(0, keepdims=True), w.max(0, keepdims=True), bits=8)
    kernel = qtensor.quantize_tensor(w, params)
    qvariables = {"w": kernel, "quantization": {"tensors": {graph.tensors[0].name: collection}, "operands": {}}}
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    assert plan.layers[0].decision.runs == FLOAT and "do not fit int8" in plan.layers[0].decision.reason
    expected = qtensor.fake_quant(x, collection) @ kernel.dequantize()
    np.testing.assert_allclose(run_integer(plan, ivariables, x), expected, rtol=1e-5, atol=1e-5)


# --- bad input ---


def test_unquantized_variables_are_refused():
    case = model_grid.mlp()
    apply_fn, variables = case.function()
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        compile_integer(trace(apply_fn, variables, case.input_shape), variables)


def test_an_input_of_another_rank_is_refused():
    graph, qvariables, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    with pytest.raises(GraphError, match="x: expected an array like"):
        apply_plan(plan, ivariables, jnp.zeros((2, 3, 7)))


# --- types narrower than float32 ---


class Residual(nn.Module):
    dtype: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm():
            return nn.BatchNorm(use_running_average=True, **kinds)

        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False, **kinds)(x)))
        y = nn.relu(nn.Conv(8, (3, 3), **kinds)(x))
        y = norm()(nn.Conv(8, (3, 3), use_bias=False, **kinds)(y))
        x = nn.relu(x + y)
        return nn.Dense(5, **kinds)(nn.relu(nn.Dense(8, **kinds)(x.mean((1, 2)))))


def residual(dtype, param_dtype=jnp.float32):
    return model_grid.linen_case("residual", Residual(dtype, param_dtype), (4, 8, 8, 3))


NARROW = {
    "grid": model_grid.bfloat16,
    "bfloat16": functools.partial(residual, jnp.bfloat16),
    "parameters": functools.partial(residual, jnp.bfloat16, jnp.bfloat16),
    "float16": functools.partial(residual, jnp.float16),
}


@pytest.mark.parametrize(
    ("name", "bits", "shortcuts"),
    [
        ("bfloat16", "w8a8", "quantized"),
        ("parameters", "w4a4", "float"),
        ("float16", "w4a4", "quantized"),
        *(
            pytest.param(name, bits, shortcuts, marks=pytest.mark.slow)
            for name in NARROW
            for bits in ("w8a8", "w4a4")
            for shortcuts in ("float", "quantized")
        ),
    ],
)
def test_narrow_types_round_where_the_simulation_does(name, bits, shortcuts):
    """The program rounds between layers, which moves codes of 8 bits: the integers must round in the same places."""
    graph, qvariables, x, expected = quantized(NARROW[name], bits, shortcuts)
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    assert plan.fusion.bare == {layer.name for layer in graph.layers} and not plan.fusion.requantizes
    found = run_integer(plan, ivariables, x)
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-8 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_types_with_float_activations(name):
    graph, qvariables, x, expected = quantized(NARROW[name], "w8a16", "float")
    plan, ivariables = compile_integer(graph, qvariables, EVERYTHING)
    found, expected = (np.asarray(a, np.float64) for a in (run_integer(plan, ivariables, x), expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-6 * np.abs(expected).max())
