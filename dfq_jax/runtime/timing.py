"""Int8 against float on the machine at hand, kernel by kernel and as a whole network."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base import check_field, platform_of
from dfq_jax.graph import Graph
from dfq_jax.quantizers import check_quantized, dequantized
from dfq_jax.runtime.compiler import compile_integer
from dfq_jax.runtime.execution import apply_plan
from dfq_jax.runtime.plan import IntegerPlan
from dfq_jax.runtime.policy import Policy, default_policy
from dfq_jax.runtime.self_test import integer_sums, random_codes, signature

# Seconds that one timed round of one kernel takes at least, so that the clock's grain and the dispatch do not count.
MIN_ROUND = 0.005
HOPELESS = 5.0  # an int8 kernel this much slower than float is not timed any further
CLEARLY = 1.2  # an int8 kernel this much faster than float is thought to be so in the network too
SLACK = 1.05  # a network may take so much of the float network's time

Timer = Callable[[Sequence[Callable[[], Any]], int], list[list[float]]]


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


def measure_policy(
    graph: Graph, qvariables: Any, policy: Policy | None = None, *, rounds: int = 7, timer: Timer | None = None
) -> Policy:
    """Choose what runs as int8 by the clock: no network under the policy is slower than the float one by over 5 %.

    First every layer shape is timed as int8 and as float, each kernel with what integer execution does around it:
    codes in, requantized codes out. Kernels that are faster alone may not be in the network, where codes change type
    between them. So whole networks are timed against the float one, `jax.jit(apply_fn)` on dequantized weights: with
    all int8 layers that are faster, with those that are `CLEARLY` faster, and with none. The fastest is taken. Where
    even that takes more than `SLACK` of the float network's time, activations stay in float (`Policy.activations`): the
    float network's own products, with BatchNorms folded. `Policy.network` says what the choice measured.

    Takes the compilation of each distinct kernel and of four or five networks.

    Args:
      graph: the network at the shape to be served: `graph.at((32, 224, 224, 3))`.
      qvariables: its quantized variables.
      policy: what else to decide by; by default that of the device which `qvariables` are on.
      rounds: of timing; what is compared takes turns in each, and a median is taken over them.
      timer: gives the seconds of each function in each round; `paired_times` by default.

    Returns:
      The policy with `measured`, `min_speedup`, `activations` and `network` filled in, for this machine and shape.

    Raises:
      ValueError: `rounds` is no positive integer, or `qvariables` are not quantized.
    """
    check_field("rounds", rounds, "an integer of at least 1", lambda v: type(v) is int and v >= 1)
    check_quantized(qvariables)
    policy = default_policy(platform_of(qvariables)) if policy is None else policy
    policy = measure_kernels(graph, policy, rounds=rounds, timer=timer)
    x = jnp.zeros(graph.input.shape, graph.input.dtype)
    reference = functools.partial(jax.jit(graph.apply_fn), dequantized(qvariables), x)
    candidates: dict[tuple[str, ...], tuple[Policy, Callable[[], Any]]] = {}
    for min_speedup in (1.0, CLEARLY, math.inf):
        candidate = dataclasses.replace(policy, min_speedup=min_speedup, activations="codes")
        plan, function = _network(graph, qvariables, candidate, x)
        candidates.setdefault(tuple(layer.decision.runs for layer in plan.layers), (candidate, function))
    chosen = list(candidates.values())
    ratios = _ratios(timer, reference, [function for _, function in chosen], rounds)
    ratio, (best, _) = max(zip(ratios, chosen, strict=True), key=lambda item: item[0])
    if ratio < 1 / SLACK:
        best = dataclasses.replace(policy, activations="float")
        (ratio,) = _ratios(timer, reference, [_network(graph, qvariables, best, x)[1]], rounds)
    return dataclasses.replace(best, network=ratio)


def _network(graph: Graph, qvariables: Any, policy: Policy, x: jax.Array) -> tuple[IntegerPlan, Callable[[], Any]]:
    plan, variables = compile_integer(graph, qvariables, policy)
    return plan, functools.partial(jax.jit(apply_plan, static_argnums=0), plan, variables, x)


def _ratios(
    timer: Timer | None, reference: Callable[[], Any], functions: Sequence[Callable[[], Any]], rounds: int
) -> list[float]:
    """Time of the reference over that of each function, medians over rounds."""
    own, *others = (timer or paired_times)([reference, *functions], rounds)
    return [float(statistics.median(a / b for a, b in zip(own, other, strict=True))) for other in others]


def measure_kernels(graph: Graph, policy: Policy, *, rounds: int = 7, timer: Timer | None = None) -> Policy:
    """The policy with `measured` filled in: every layer shape timed as int8 and as float.

    Args:
      graph: traced at the shape that is served.
      policy: the policy to begin with.
      rounds: measurements of each kernel.
      timer: as in `measure_policy`.
    """
    ratios: dict[tuple[Any, ...], float] = {}
    measured = []
    for layer in graph.layers:
        key = signature(graph, layer.name, policy.accumulator)
        if key not in ratios:
            ratios[key] = _speed_ratio(graph, layer.name, policy, rounds, timer)
        measured.append((layer.name, ratios[key]))
    return dataclasses.replace(policy, measured=tuple(measured))


def _speed_ratio(graph: Graph, name: str, policy: Policy, rounds: int, timer: Timer | None) -> float:
    """Time of the float kernel over that of the int8 kernel."""
    codes, kernel = random_codes(graph, name, np.random.default_rng(0))
    form = graph.form(graph.layer(name))
    step = jnp.float32(1.0 / (127.0 * np.sqrt(kernel.size)))

    def requantized(total: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(total * scale, -128, 127))

    def integer(codes: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return requantized(integer_sums(form, codes, kernel, policy.accumulator), scale).astype(jnp.int8)

    def floating(codes: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return requantized(form.float32_product(codes, kernel), scale)

    small = tuple(map(jnp.asarray, (codes, kernel, step)))
    wide = (small[0].astype(jnp.float32), small[1].astype(jnp.float32), step)
    functions = [functools.partial(jax.jit(f), *args) for f, args in ((floating, wide), (integer, small))]
    # The first round of few finds kernels that are out of the question, and take seconds.
    for count in (1, rounds):
        (ratio,) = _ratios(timer, functions[0], functions[1:], count)
        if ratio < 1 / HOPELESS:
            break
    return ratio
