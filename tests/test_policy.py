"""Which layers run as int8, and the tests that kernels must pass."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from test_runtime import EVERYTHING, quantized

from dfq_jax.quantizers.collection import dequantized
from dfq_jax.quantizers.qtensor import params_from_range, quantize_tensor
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.runtime import apply_plan, compile_integer, kernel_table, measure_policy, policy, timing
from dfq_jax.runtime import self_test as testing
from dfq_jax.runtime.policy import FLOAT, INT8, UNQUANTIZED, WEIGHT_ONLY, Policy, decide, default_policy, largest_sum
from dfq_jax.runtime.self_test import self_test, signature
from dfq_jax.runtime.table import HEADER
from dfq_jax.runtime.timing import measure_kernels, paired_times


@pytest.mark.parametrize(
    ("build", "backend", "expected"),
    [
        (model_grid.mobilenet_v2, "cpu", {"stem": "input channels", "block1/depthwise": "depthwise", "head": "input"}),
        (model_grid.mobilenet_v2, "tpu", {"stem": "", "block1/depthwise": "", "classifier": ""}),
        (model_grid.mobilenet_v2, "cuda", {"block1/depthwise": "depthwise", "classifier": ""}),
        (model_grid.channels_first, "cpu", {"conv1": "channels-first", "conv2": "channels-first", "fc": ""}),
        (model_grid.channels_first, "cuda", {"conv2": ""}),
        (model_grid.dilated_grouped, "cuda", {"grouped": "not trusted on cuda"}),
        (model_grid.dilated_grouped, "tpu", {"grouped": ""}),
    ],
)
def test_default_decisions(build, backend, expected):
    graph, qvariables, _, _ = quantized(build, "w8a8", "quantized")
    plan, _ = compile_integer(graph, qvariables, dataclasses.replace(default_policy(backend), self_test=False))
    for name, reason in expected.items():
        decision = plan.layer(name).decision
        assert decision.runs == (FLOAT if reason else INT8), name
        assert reason in decision.reason


def test_layers_in_float_change_no_bit():
    """Convolutions of few channels run as float by default on CPU: their sums are the integers that int8 gives."""
    graph, qvariables, x, _ = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    plan, variables = compile_integer(graph, qvariables, default_policy("cpu"))
    few = [layer for layer in plan.layers if graph.layer(layer.name).kernel_shape[-2] <= 16]
    assert len(few) > 3 and all(layer.decision.runs == FLOAT and layer.decision.exact for layer in few)
    integer, integers = compile_integer(graph, qvariables, EVERYTHING)
    assert all(layer.decision.runs == INT8 for layer in integer.layers)
    run = jax.jit(apply_plan, static_argnums=0)
    np.testing.assert_array_equal(run(plan, variables, x), run(integer, integers, x))


def test_accumulators_of_backends():
    assert [default_policy(b).accumulator for b in ("cpu", "gpu", "cuda", "tpu")] == [
        "int32", "float32", "float32", "int32",
    ]  # fmt: skip
    assert default_policy() == default_policy(jax.default_backend())


def test_what_is_not_quantized_says_so():
    graph, qvariables, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    layer = graph.first_layer
    kernel, params = graph.leaf(qvariables, layer.kernel), qvariables["quantization"]["tensors"][layer.tensor]
    assert decide(EVERYTHING, graph, layer, kernel, params).runs == INT8
    assert decide(EVERYTHING, graph, layer, kernel, None).runs == WEIGHT_ONLY
    assert decide(EVERYTHING, graph, layer, kernel.dequantize(), params).runs == UNQUANTIZED


# --- bounds of sums ---


def test_largest_sum_is_reached():
    graph, _, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    layer = graph.first_layer
    w = np.random.default_rng(0).normal(size=layer.kernel_shape).astype(np.float32)
    kernel = quantize_tensor(
        jnp.asarray(w), params_from_range(-np.abs(w).max(), np.abs(w).max(), bits=8, symmetric=True)
    )
    params = params_from_range(0.0, 1.0, bits=8)
    codes = np.asarray(kernel.qvalue, np.int64)
    worst = max(np.abs(255 * np.where(sign * codes > 0, codes, 0).sum(0)).max() for sign in (1, -1))
    bound = largest_sum(layer, kernel, params)
    assert worst <= bound == 255 * np.abs(codes).sum(0).max()


def test_sums_beyond_int32_run_as_float(monkeypatch):
    graph, qvariables, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    layer = graph.first_layer
    kernel, params = graph.leaf(qvariables, layer.kernel), qvariables["quantization"]["tensors"][layer.tensor]
    bound = largest_sum(layer, kernel, params)
    monkeypatch.setattr(policy, "INT32_LIMIT", bound)
    decision = decide(EVERYTHING, graph, layer, kernel, params)
    assert decision.runs == FLOAT and decision.reason == f"its sums may reach {bound}, beyond int32"
    assert decision.exact
    monkeypatch.setattr(policy, "FLOAT32_LIMIT", bound)
    assert not decision.exact


# --- the self-test ---


def test_self_test_runs_once_for_each_shape(monkeypatch):
    graph, _, _, _ = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    monkeypatch.setattr(testing, "_PASSED", {})
    calls = []
    original = testing.integer_sums
    monkeypatch.setattr(testing, "integer_sums", lambda *args: calls.append(args) or original(*args))
    names = [layer.name for layer in graph.layers]
    assert all(self_test(graph, names, EVERYTHING).values())
    shapes = {signature(graph, name, "int32") for name in names}
    assert len(calls) == len(shapes) < len(names) + 1
    assert all(self_test(graph, names, EVERYTHING).values()) and len(calls) == len(shapes)


def test_self_test_catches_a_wrong_kernel(monkeypatch):
    """As if this backend computed strided convolutions without their last input channel."""
    graph, qvariables, x, expected = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    monkeypatch.setattr(testing, "_PASSED", {})
    original = testing.integer_sums

    def wrong(call, codes, kernel, accumulator):
        codes = codes.at[..., -1].set(0) if 2 in call.layer.strides else codes
        return original(call, codes, kernel, accumulator)

    monkeypatch.setattr(testing, "integer_sums", wrong)
    plan, ivariables = compile_integer(graph, qvariables, Policy())
    for layer in graph.layers:
        decision = plan.layer(layer.name).decision
        assert decision.runs == (FLOAT if 2 in layer.strides else INT8)
        assert ("wrong sums" in decision.reason) == (2 in layer.strides)
    found = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


# --- measuring ---


def test_the_faster_kernel_is_chosen(monkeypatch):
    graph, qvariables, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    ratios = iter([2.0, 0.5])  # the two inner layers have one shape; the last another
    monkeypatch.setattr(timing, "_speed_ratio", lambda *_: next(ratios, 0.25))
    measured = measure_kernels(graph, EVERYTHING)
    by_layer = dict(measured.measured)
    plan, _ = compile_integer(graph, qvariables, measured)
    assert set(by_layer) == {layer.name for layer in graph.layers}
    for layer in plan.layers:
        assert layer.decision.runs == (INT8 if by_layer[layer.name] > 1 else FLOAT)
    table = kernel_table(plan)
    assert all(title in table for title in HEADER) and "int8 measured at 2.00 of the float time" in table
    assert "int8 (int32 sums)" in table and "2.00" in table and "whole network" not in table


class Timer:
    """In place of the clock: int8 makes one layer 1.1 and others 3 times as fast, and networks take given times."""

    def __init__(self, monkeypatch, by_int8_layers, float_activations=1.0):
        self.seconds, self.float_activations, self.timed = by_int8_layers, float_activations, []
        monkeypatch.setattr(timing, "_speed_ratio", lambda graph, name, *_: 1.1 if "dense1" in name else 3.0)

    def __call__(self, functions, rounds):
        times = [10.0]  # the float network comes first
        for function in functions[1:]:
            plan = function.args[0]
            count = sum(layer.decision.runs == INT8 for layer in plan.layers)
            floating = plan.policy.activations == "float"
            self.timed.append("float" if floating else count)
            times.append(10.0 * (self.float_activations if floating else self.seconds[count]))
        assert len(functions) > 1
        # A slow moment of the machine in one round: medians of ratios within rounds do not see it.
        return [[t * (5.0 if r == 1 else 1.0) for r in range(rounds)] for t in times]


@pytest.mark.parametrize(
    ("seconds", "int8_layers", "ratio"),
    [
        ({3: 0.5, 2: 0.8, 0: 1.0}, 3, 2.0),  # all int8 layers pay
        ({3: 0.9, 2: 0.8, 0: 1.0}, 2, 1.25),  # those that hardly do are back in float
        ({3: 1.3, 2: 1.2, 0: 0.8}, 0, 1.25),  # none does once they are in a network
        ({3: 1.3, 2: 1.04, 0: 1.2}, 2, 1 / 1.04),  # within the 5 %
    ],
)
def test_the_fastest_network_is_chosen(monkeypatch, seconds, int8_layers, ratio):
    graph, qvariables, x, expected = quantized(model_grid.mlp, "w8a8", "quantized")
    timer = Timer(monkeypatch, seconds)
    measured = measure_policy(graph, qvariables, EVERYTHING, timer=timer)
    assert timer.timed == [3, 2, 0]
    assert measured.activations == "codes" and measured.network == pytest.approx(ratio)
    plan, ivariables = compile_integer(graph, qvariables, measured)
    assert sum(layer.decision.runs == INT8 for layer in plan.layers) == int8_layers
    assert f"the whole network: {ratio:.2f} times as fast" in kernel_table(plan)
    assert ("gains nothing by it" in kernel_table(plan)) == (int8_layers < 3)
    found = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_activations_stay_in_float_where_codes_are_slow(monkeypatch):
    graph, qvariables, x, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    timer = Timer(monkeypatch, {3: 1.5, 2: 1.2, 0: 1.06})
    measured = measure_policy(graph, qvariables, EVERYTHING, timer=timer)
    assert timer.timed == [3, 2, 0, "float"]
    assert measured.activations == "float" and measured.network == pytest.approx(1.0)
    plan, ivariables = compile_integer(graph, qvariables, measured)
    assert {layer.decision.runs for layer in plan.layers} == {WEIGHT_ONLY}
    assert "no network on codes measured as fast" in kernel_table(plan)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(ivariables)}
    assert dtypes == {jnp.dtype("float32")}  # nothing is left to convert in every call
    found = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)
    weights_alone = graph.apply_fn(dequantized(qvariables), x)
    np.testing.assert_allclose(found, weights_alone, rtol=1e-4, atol=1e-4 * np.abs(weights_alone).max())


@pytest.mark.slow
def test_measured_policy_is_no_slower_than_the_float_network():
    graph, qvariables, _, _ = quantized(model_grid.resnet18, "w8a8", "quantized")
    measured = measure_policy(graph, qvariables, rounds=3)
    assert all(ratio > 0 for _, ratio in measured.measured)
    assert measured.network > 0.8  # a loaded machine; the benchmark has the figure


def test_paired_times_take_turns():
    order = []
    times = paired_times([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert [len(t) for t in times] == [3, 3] and all(value > 0 for t in times for value in t)
    text = "".join(order).lstrip("a").lstrip("b")  # after the first calls
    assert text.startswith("a") and text.endswith("b")
    assert sum(a != b for a, b in itertools.pairwise(text)) == 5


# --- a quantized network ---


@pytest.mark.untyped
def test_integer_network_and_its_kernels(monkeypatch):
    graph, qvariables, x, expected = quantized(model_grid.cifar_resnet8, "w8a8", "quantized")
    net = Quantized(variables=qvariables, graph=graph, report=None, recipe=None, convention=None, images=None)
    monkeypatch.setattr(testing, "_PASSED", {})
    integer = net.integer(default_policy("cpu"))
    tested = len(testing._PASSED)
    wide = [layer.name for layer in graph.layers if layer.kernel_shape[-2] > 16]
    assert tested == len({signature(graph, name, "int32") for name in wide}) > 2
    np.testing.assert_allclose(integer(x), expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_array_equal(jax.jit(integer.apply)(integer.variables, x), integer(x))
    table = net.kernels(default_policy("cpu"))
    assert table == integer.kernels() and len(testing._PASSED) == tested
    stem = next(line for line in table.splitlines() if line.startswith(graph.first_layer.name))
    assert "float" in stem and "3 input channels" in stem
    timer = Timer(monkeypatch, dict.fromkeys(range(len(graph.layers) + 1), 0.5))
    monkeypatch.setattr(timing, "paired_times", timer)
    policy = net.measure_policy((2, *x.shape[1:]), rounds=3)
    assert policy.network == pytest.approx(2.0) and len(policy.measured) == len(graph.layers)


# --- bad input ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "metal"}, "backend: expected one of"),
        ({"accumulator": "int64"}, "accumulator: expected one of"),
        ({"storage": "disk"}, "storage: expected one of"),
        ({"activations": "int8"}, "activations: expected one of"),
        ({"min_speedup": float("nan")}, "min_speedup: expected a ratio"),
        ({"min_input_channels": 0}, "min_input_channels: expected an integer of at least 1, found 0"),
    ],
)
def test_policies_that_mean_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**fields)


def test_unknown_backend_and_rounds():
    with pytest.raises(ValueError, match="backend: expected one of"):
        default_policy("abacus")
    graph, _, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    with pytest.raises(ValueError, match="rounds: expected an integer of at least 1"):
        measure_policy(graph, None, Policy(), rounds=0)
    with pytest.raises(ValueError, match="qvariables: expected quantized variables"):
        measure_policy(graph, {"params": {}}, Policy())
