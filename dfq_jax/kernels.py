"""The int8 kernels of a backend put to the test: are their sums right, and are they faster than float?

Compilers change faster than tables of what works, and cards differ. So the sums of each layer's shape are compared
with integers held in float32 (`self_test`), and each can be timed both ways (`measure_policy`).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.execute import LayerCall
from dfq_jax.graph import Graph
from dfq_jax.policy import INT8, Policy

if TYPE_CHECKING:
    from dfq_jax.integer import IntegerPlan

# Seconds that one timed round of one kernel takes at least, so that the clock's grain and the dispatch do not count.
MIN_ROUND = 0.005
HOPELESS = 5.0  # an int8 kernel this much slower than float is not timed any further

_PASSED: dict[tuple[Any, ...], bool] = {}


def signature(graph: Graph, name: str, accumulator: str) -> tuple[Any, ...]:
    """What two layers have in common whose kernels are the same program."""
    layer = graph.layer(name)
    op = graph.program.ops[layer.op]
    shapes = tuple(graph.program.avals[v].shape for v in op.inputs)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "dimension_numbers")
    params = tuple(repr(op.params[n]) for n in names if n in op.params)
    return (jax.default_backend(), op.name, layer.kernel_operand, shapes, params, accumulator)


def self_test(graph: Graph, names: Sequence[str], policy: Policy) -> dict[str, bool]:
    """Whether the int8 kernels of layers give the right sums on this machine.

    Random codes are multiplied once in int8 and once in float32, where these sums are exact. The results are kept for
    the process; the shapes not tested yet are compiled together.

    Args:
      graph: the network.
      names: of layers.
      policy: gives the type of sums.

    Returns:
      By layer, whether all sums are equal.
    """
    keys = {name: signature(graph, name, policy.accumulator) for name in names}
    new: dict[tuple[Any, ...], str] = {}
    for name, key in keys.items():
        if key not in _PASSED:
            new.setdefault(key, name)
    if new:
        rng = np.random.default_rng(0)
        operands = [_random_codes(graph, name, rng) for name in new.values()]
        sums = functools.partial(_both_sums, graph, tuple(new.values()), policy.accumulator)
        for key, (integer, exact) in zip(new, jax.jit(sums)(operands), strict=True):
            _PASSED[key] = bool(np.array_equal(np.asarray(integer), np.asarray(exact)))
    return {name: _PASSED[key] for name, key in keys.items()}


def _call(graph: Graph, name: str) -> LayerCall:
    layer = graph.layer(name)
    return LayerCall(layer, graph.program.ops[layer.op], graph, None, None, None)


def _random_codes(graph: Graph, name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int8 operands of a layer: its input and its kernel."""
    op, side = graph.program.ops[graph.layer(name).op], graph.layer(name).kernel_operand
    shapes = [graph.program.avals[op.inputs[i]].shape for i in (1 - side, side)]
    return tuple(rng.integers(-128, 128, shape, np.int8) for shape in shapes)


def integer_sums(call: LayerCall, codes: jax.Array, kernel: jax.Array, accumulator: str) -> jax.Array:
    """The int8 kernel of a layer, as integer execution calls it."""
    return call.integer_product(codes, kernel, None, jnp.dtype(accumulator)).astype(jnp.float32)


def _both_sums(
    graph: Graph, names: tuple[str, ...], accumulator: str, operands: list[tuple[jax.Array, jax.Array]]
) -> list[tuple[jax.Array, jax.Array]]:
    result = []
    for name, (codes, kernel) in zip(names, operands, strict=True):
        call = _call(graph, name)
        exact = call.float32_product(codes.astype(jnp.float32), kernel.astype(jnp.float32))
        result.append((integer_sums(call, codes, kernel, accumulator), exact))
    return result


# --- time ---


def paired_times(functions: Sequence[Callable[[], Any]], rounds: int = 7) -> list[list[float]]:
    """Seconds of each function in each of several rounds, the functions taking turns.

    A loaded machine slows neighbours in time alike, so ratios within a round mean something where times do not.

    Args:
      functions: without arguments; their results are waited for. They are called once before.
      rounds: how many.
    """
    repeats = []
    for function in functions:
        jax.block_until_ready(function())
        began = time.perf_counter()
        jax.block_until_ready(function())
        repeats.append(max(1, round(MIN_ROUND / max(time.perf_counter() - began, 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for own, function, count in zip(times, functions, repeats, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                result = function()
            jax.block_until_ready(result)
            own.append((time.perf_counter() - began) / count)
    return times


def measure_policy(graph: Graph, policy: Policy, *, rounds: int = 7) -> Policy:
    """Time every layer shape as int8 and as float, at the batch and image size of the graph.

    Each kernel is timed with what integer execution does around it: codes in, requantized codes out. Takes a few
    seconds for compilation and about `rounds` times 10 ms for each distinct shape.

    Args:
      graph: the network at the shape to be served: `graph.at((32, 224, 224, 3))`.
      policy: what else to decide by.
      rounds: of timing, a median is taken over them.

    Returns:
      The policy with `measured` filled in: layers run the faster way, on this machine.

    Raises:
      ValueError: `rounds` is no positive integer.
    """
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds: expected an integer of at least 1, found {rounds!r}.")
    ratios: dict[tuple[Any, ...], float] = {}
    measured = []
    for layer in graph.layers:
        key = signature(graph, layer.name, policy.accumulator)
        if key not in ratios:
            ratios[key] = _speed_ratio(graph, layer.name, policy, rounds)
        measured.append((layer.name, ratios[key]))
    return dataclasses.replace(policy, measured=tuple(measured))


def _speed_ratio(graph: Graph, name: str, policy: Policy, rounds: int) -> float:
    """Time of the float kernel over that of the int8 kernel."""
    codes, kernel = _random_codes(graph, name, np.random.default_rng(0))
    call = _call(graph, name)
    step = jnp.float32(1.0 / (127.0 * np.sqrt(kernel.size)))

    def requantized(total: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(total * scale, -128, 127))

    def integer(codes: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return requantized(integer_sums(call, codes, kernel, policy.accumulator), scale).astype(jnp.int8)

    def floating(codes: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return requantized(call.float32_product(codes, kernel), scale)

    small = tuple(map(jnp.asarray, (codes, kernel, step)))
    wide = (small[0].astype(jnp.float32), small[1].astype(jnp.float32), step)
    functions = [functools.partial(jax.jit(f), *args) for f, args in ((floating, wide), (integer, small))]
    # The first round of few finds kernels that are out of the question, and take seconds.
    for count in (1, rounds):
        times = paired_times(functions, count)
        ratio = statistics.median(f / i for f, i in zip(*times, strict=True))
        if ratio < 1 / HOPELESS:
            break
    return float(ratio)


# --- report ---

HEADER = ("layer", "kind", "kernel", "runs as", "float / int8 time", "sums below", "why")


def kernels(plan: IntegerPlan) -> list[tuple[str, ...]]:
    """One row for each layer, under `HEADER`: what it runs as, the measured speed, the bound on its sums, and why."""
    rows = []
    for own in plan.layers:
        layer, decision = plan.graph.layer(own.name), own.decision
        ratio = plan.policy.ratio(own.name)
        runs = decision.runs + (f" ({plan.policy.accumulator} sums)" if decision.runs == INT8 else "")
        bound = "-" if not decision.largest_sum else f"2^{np.log2(decision.largest_sum):.1f}"
        rows.append(
            (
                layer.name,
                layer.kind + (f"/{layer.groups}" if layer.groups > 1 else ""),
                "x".join(map(str, layer.kernel_shape)),
                runs,
                "-" if ratio is None else f"{ratio:.2f}",
                bound,
                decision.reason or "-",
            )
        )
    return rows


def kernel_table(plan: IntegerPlan) -> str:
    """The rows of `kernels` as plain text."""
    rows = [HEADER, *kernels(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
