"""JAX's switches: whatever a project sets for itself, every recipe, execution and export work under it.

The network is tiny and its budgets are tinier: what is asked is whether things run, and whether the answer is the one
without the switch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_grid import linen_case

import dfq_jax
from dfq_jax.export import get_exporter
from dfq_jax.stages.comparison import sqnr

SWITCHES: dict[str, Any] = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_infs": True,
    "jax_debug_nans": True,
    "jax_enable_x64": True,
    "jax_check_tracer_leaks": True,
    "jax_disable_jit": True,
    "jax_transfer_guard": "disallow",
    "jax_default_matmul_precision": "bfloat16",
    "jax_threefry_partitionable": not jax.config.jax_threefry_partitionable,
}
# The others are fast with "noise", the recipe of the fewest operations.
FAST_WITH_INSTANT = ("jax_numpy_rank_promotion", "jax_numpy_dtype_promotion", "jax_enable_x64")
SIZES = {"synthesis_num_images": 16, "synthesis_batch_size": 8, "synthesis_steps": 2}
RECIPES = {
    **{name: dfq_jax.RECIPES[name].replace(**SIZES) for name in ("noise", "instant", "paper")},
    "fast": dfq_jax.RECIPES["fast"].replace(**SIZES, reconstruction_steps=2),
    "gptq": dfq_jax.RECIPES["fast"].replace(**SIZES, rounding="gptq", reconstruction=None),
    "best": dfq_jax.RECIPES["best"].replace(**SIZES, reconstruction_steps=2),
    "finetune": dfq_jax.RECIPES["finetune"].replace(**SIZES, finetune_steps=2),
}


class Network(nn.Module):
    """A convolution, a depthwise convolution in a residual branch, BatchNorms, a dense layer."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="bn1")(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)))
        y = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = x + nn.relu6(norm(name="bn2")(y))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


@functools.cache
def case():
    return linen_case("switches", Network(), (2, 6, 6, 3))


@contextlib.contextmanager
def switched(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def outputs(recipe: str, path: Any) -> list[np.ndarray]:
    """What the network of a recipe computes, as it is, with integers, and from a file; it is exported, too."""
    own = case()
    x = jax.device_put(np.random.default_rng(0).normal(size=own.input_shape).astype(np.float32))
    q = dfq_jax.quantize(own.model, own.variables, input_shape=own.input_shape, recipe=RECIPES[recipe])
    q.save(path / "q.safetensors")
    loaded = dfq_jax.load(path / "q.safetensors", own.model, own.variables)
    results = [q(x), jax.jit(q.apply_integer)(q.variables, x), q.integer()(x), loaded(x)]
    assert all(result.dtype == jnp.float32 for result in results)
    for name in ("stablehlo", "onnx"):
        with contextlib.suppress(ImportError):
            get_exporter(name).write(q, path / name)
    return list(map(np.asarray, results))


@functools.cache
def without(recipe: str, path: Any) -> np.ndarray:
    return outputs(recipe, path)[0]


def cases():
    for switch in SWITCHES:
        fast = "instant" if switch in FAST_WITH_INSTANT else "noise"
        yield from (pytest.param(r, switch, marks=[] if r == fast else pytest.mark.slow) for r in RECIPES)


@pytest.mark.parametrize(("recipe", "switch"), list(cases()))
def test_switch(recipe, switch, tmp_path, tmp_path_factory):
    case()  # what the user has, made without the switch
    with switched(switch, SWITCHES[switch]):
        results = outputs(recipe, tmp_path)
    expected = results[0]
    if recipe == "instant" or (recipe == "noise" and "threefry" not in switch):  # the numbers drawn are the same
        expected = without(recipe, tmp_path_factory.getbasetemp())
    for result in results:
        assert np.isfinite(result).all()
        assert sqnr(expected, result) > 25
