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

from dfq_jax.qtensor import params_from_range, quantize_tensor
from dfq_jax.runtime import apply_integer, compile_integer, kernel_table, measure_policy, policy, timing
from dfq_jax.runtime import self_test as testing
from dfq_jax.runtime.policy import FLOAT, INT8, UNQUANTIZED, WEIGHT_ONLY, Policy, decide, default_policy, largest_sum
from dfq_jax.runtime.self_test import self_test, signature
from dfq_jax.runtime.table import HEADER
from dfq_jax.runtime.timing import paired_times


@pytest.mark.parametrize(
    ("build", "backend", "expected"),
    [
        (model_grid.mobilenet_v2, "cpu", {"stem": "input channels", "block1/depthwise": "depthwise", "head": "input"}),
        (model_grid.mobilenet_v2, "tpu", {"stem": "", "block1/depthwise": "", "classifier": ""}),
        (model_grid.mobilenet_v2, "cuda", {"block1/depthwise": "depthwise", "classifier": ""}),
        (model_grid.channels_first, "cpu", {"conv1": "input channels", "conv2": "channels-first", "fc": ""}),
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
    found = jax.jit(apply_integer, static_argnums=0)(plan, ivariables, x)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


# --- measuring ---


def test_the_faster_kernel_is_chosen(monkeypatch):
    graph, qvariables, _, _ = quantized(model_grid.mlp, "w8a8", "quantized")
    ratios = iter([2.0, 0.5])  # the two inner layers have one shape; the last another
    monkeypatch.setattr(timing, "_speed_ratio", lambda *_: next(ratios, 0.25))
    measured = measure_policy(graph, EVERYTHING)
    by_layer = dict(measured.measured)
    plan, _ = compile_integer(graph, qvariables, measured)
    assert set(by_layer) == {layer.name for layer in graph.layers}
    for layer in plan.layers:
        assert layer.decision.runs == (INT8 if by_layer[layer.name] > 1 else FLOAT)
    table = kernel_table(plan)
    assert all(title in table for title in HEADER) and "int8 measured at 2.00 of the float time" in table
    assert "int8 (int32 sums)" in table and "2.00" in table


@pytest.mark.slow
def test_measured_policy_is_no_slower_than_all_float():
    graph, qvariables, _, _ = quantized(model_grid.resnet18, "w8a8", "quantized")
    measured = measure_policy(graph, default_policy(), rounds=3)
    assert all(ratio > 0 for _, ratio in measured.measured)
    everything_float = dataclasses.replace(
        measured, measured=tuple((name, 0.0 + 1e-9) for name, _ in measured.measured)
    )
    apply = jax.jit(apply_integer, static_argnums=0)
    x = jnp.zeros(graph.input.shape)
    functions = []
    for chosen in (everything_float, measured):
        plan, ivariables = compile_integer(graph, qvariables, chosen)
        functions.append(lambda plan=plan, ivariables=ivariables: apply(plan, ivariables, x))
    slow, fast = paired_times(functions, 9)
    assert np.median(np.array(fast) / np.array(slow)) < 1.25  # a loaded machine; the benchmark has the figure


def test_paired_times_take_turns():
    order = []
    times = paired_times([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert [len(t) for t in times] == [3, 3] and all(value > 0 for t in times for value in t)
    text = "".join(order).lstrip("a").lstrip("b")  # after the first calls
    assert text.startswith("a") and text.endswith("b")
    assert sum(a != b for a, b in itertools.pairwise(text)) == 5


# --- bad input ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "metal"}, "backend: expected one of"),
        ({"accumulator": "int64"}, "accumulator: expected one of"),
        ({"storage": "disk"}, "storage: expected one of"),
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
        measure_policy(graph, Policy(), rounds=0)
