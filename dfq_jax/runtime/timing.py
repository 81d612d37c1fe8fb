"""Int8 against float on the machine at hand, kernel by kernel and as a whole network."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.graph import Graph
from dfq_jax.runtime.policy import Policy
from dfq_jax.runtime.self_test import integer_sums, layer_call, random_codes, signature

# Seconds that one timed round of one kernel takes at least, so that the clock's grain and the dispatch do not count.
MIN_ROUND = 0.005
HOPELESS = 5.0  # an int8 kernel this much slower than float is not timed any further


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
    codes, kernel = random_codes(graph, name, np.random.default_rng(0))
    call = layer_call(graph, name)
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
