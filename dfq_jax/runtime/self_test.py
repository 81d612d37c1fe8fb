"""The int8 kernels of a backend put to the test: are their sums right?

Compilers change faster than tables of what works, and cards differ. So the sums of each layer's shape are compared
with integers held in float32, once for each shape and process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.graph import Graph, LayerForm
from dfq_jax.runtime.policy import Policy

_PASSED: dict[tuple[Any, ...], bool] = {}


def signature(graph: Graph, name: str, accumulator: str) -> tuple[Any, ...]:
    """What two layers have in common whose kernels are the same program."""
    form = graph.form(graph.layer(name))
    op = form.op
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "dimension_numbers")
    params = tuple(repr(op.params[n]) for n in names if n in op.params)
    return (op.name, form.layer.kernel_operand, form.shapes, params, accumulator)


def _device(backend: str) -> jax.Device | None:
    """A device of the policy's backend; None for the default one where this machine has none of these."""
    try:
        return jax.local_devices(backend=backend)[0]
    except RuntimeError:
        return None


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
    device = _device(policy.backend)
    keys = {name: (device, *signature(graph, name, policy.accumulator)) for name in names}
    new: dict[tuple[Any, ...], str] = {}
    for name, key in keys.items():
        if key not in _PASSED:
            new.setdefault(key, name)
    if new:
        rng = np.random.default_rng(0)
        operands = [random_codes(graph, name, rng) for name in new.values()]
        sums = functools.partial(_both_sums, graph, tuple(new.values()), policy.accumulator)
        with jax.default_device(device):
            found = jax.jit(sums)(operands)
        for key, (integer, exact) in zip(new, found, strict=True):
            _PASSED[key] = bool(np.array_equal(np.asarray(integer), np.asarray(exact)))
    return {name: _PASSED[key] for name, key in keys.items()}


def random_codes(graph: Graph, name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int8 operands of a layer: its input and its kernel."""
    form = graph.form(graph.layer(name))
    side = form.layer.kernel_operand
    return tuple(rng.integers(-128, 128, form.shapes[i], np.int8) for i in (1 - side, side))


def integer_sums(form: LayerForm, codes: jax.Array, kernel: jax.Array, accumulator: str) -> jax.Array:
    """The int8 kernel of a layer, as integer execution calls it."""
    return form.integer_product(codes, kernel, None, jnp.dtype(accumulator)).astype(jnp.float32)


def _both_sums(
    graph: Graph, names: tuple[str, ...], accumulator: str, operands: list[tuple[jax.Array, jax.Array]]
) -> list[tuple[jax.Array, jax.Array]]:
    result = []
    for name, (codes, kernel) in zip(names, operands, strict=True):
        form = graph.form(graph.layer(name))
        exact = form.float32_product(codes.astype(jnp.float32), kernel.astype(jnp.float32))
        result.append((integer_sums(form, codes, kernel, accumulator), exact))
    return result
