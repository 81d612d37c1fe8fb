"""Every step composes with JAX: jit, vmap, grad, trees, checkpoints, and batches sharded over devices.

Run as a script, this module does the sharded part on the devices it finds and prints what it found as JSON; the test
runs it with eight simulated ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import optax
import pytest

from dfq_jax.graph import apply_quantized
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.stages.batch_norm import BatchNormConfig, adapt_batch_norm, batch_norm_moments
from dfq_jax.stages.bias_correction import correct_bias
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.folding import fold_batch_norm
from dfq_jax.stages.ranges import estimate_ranges, summarize
from dfq_jax.synthesis import SynthesisConfig, advance_batch, init_batch, synthesize
from dfq_jax.synthesis.source import image_optimizer

# Listeners cannot be taken off by public means in all versions of JAX, so there is one for the whole module.
COMPILED: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _count(name: str, duration: float, **_: Any) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


class Work(NamedTuple):
    graph: Graph
    variables: Any
    images: jax.Array
    ranges: Any
    qvariables: Any


CONVENTION = Convention(weight_range="min_max")
SYNTHESIS = SynthesisConfig(num_images=8, batch_size=8, steps=4, flip=True)


def traced() -> tuple[Graph, Any]:
    """A residual network with plain, dilated and grouped convolutions, small enough to compile in a second."""
    case = model_grid.dilated_grouped()
    apply_fn, variables = case.function()
    return trace(apply_fn, variables, case.input_shape), variables


def other_variables(variables: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 1.25 + 0.01, variables)


def noise(graph: Graph, count: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, *graph.input.shape[1:]))


@functools.cache
def work() -> Work:
    graph, variables = traced()
    images = noise(graph, 16)
    ranges = estimate_ranges(graph, variables, images, CONVENTION, estimator="max")
    qvariables = jitted_quantize()(graph, variables, ranges, CONVENTION)
    return Work(graph, variables, images, ranges, qvariables)


@functools.cache
def jitted_quantize():
    return jax.jit(quantize_params, static_argnums=(0, 3))


@functools.cache
def jitted_adapt():
    return jax.jit(adapt_batch_norm, static_argnums=(0, 4))


@functools.cache
def jitted_apply():
    return jax.jit(apply_quantized, static_argnums=0, static_argnames="integer")


def assert_trees_close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure and types; integers equal, floats close."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=str(path))


# --- jit ---


@pytest.mark.parametrize("weight_range", ["min_max", pytest.param("lp", marks=pytest.mark.slow)])
def test_jit_of_quantize_params(weight_range):
    graph, variables, _, ranges, _ = work()
    convention = Convention(weight_range=weight_range)
    jitted = jitted_quantize()(graph, variables, ranges, convention)
    assert_trees_close(jitted, quantize_params(graph, variables, ranges, convention))


@pytest.mark.parametrize(
    "config",
    [
        BatchNormConfig(),
        BatchNormConfig(method="absolute", prior_images=16),
        BatchNormConfig(method="regression"),
        pytest.param(BatchNormConfig(order="all_at_once"), marks=pytest.mark.slow),
    ],
)
def test_jit_of_adapt_batch_norm(config):
    graph, variables, images, _, qvariables = work()
    jitted = jitted_adapt()(graph, variables, qvariables, images, config)
    assert_trees_close(jitted, adapt_batch_norm(graph, variables, qvariables, images, config), rtol=1e-4, atol=1e-5)
    changed = [
        path
        for path, a, b in zip(graph.leaf_paths, graph.leaves(jitted), graph.leaves(qvariables), strict=True)
        if not isinstance(a, QTensor) and not np.array_equal(a, b)
    ]
    assert set(changed) == {path for bn in graph.batch_norms for path in (bn.mean, bn.var)}


def test_jit_of_the_whole_way():
    """Ranges aside, everything between float variables and outputs can be one program."""
    graph, variables, images, ranges, qvariables = work()

    @jax.jit
    def everything(variables, ranges, images):
        q = quantize_params(graph, variables, ranges, CONVENTION)
        q = adapt_batch_norm(graph, variables, q, images)
        return apply_quantized(graph, q, images)

    adapted = jitted_adapt()(graph, variables, qvariables, images, BatchNormConfig())
    expected = jitted_apply()(graph, adapted, images)
    found = everything(variables, ranges, images)
    # Statistics summed in another order may move a code over a rounding tie.
    np.testing.assert_allclose(found, expected, atol=1e-2 * float(jnp.abs(expected).max()))
    assert float(jnp.median(jnp.abs(found - expected))) < 1e-5


# --- compilations ---


def test_nothing_compiles_twice():
    """Weights, ranges and images are arguments of every stage, and a graph is equal to another trace of its network."""

    def once(graph, variables, seed):
        images = noise(graph, 16, seed)
        summaries = summarize(graph, variables, images)
        ranges = estimate_ranges(graph, variables, images, CONVENTION)
        qvariables = quantize_params(graph, variables, ranges, CONVENTION)
        adapted = adapt_batch_norm(graph, variables, qvariables, images)
        corrected = correct_bias(graph, variables, adapted, images)
        folded = jax.jit(fold_batch_norm, static_argnums=0)(graph, variables)
        outputs = [jitted_apply()(graph, corrected, images, integer=integer) for integer in (False, True)]
        jitted = jitted_quantize()(graph, variables, ranges, CONVENTION)
        adapted = jitted_adapt()(graph, variables, jitted, images, BatchNormConfig())
        return jax.block_until_ready((summaries, folded, outputs, adapted))

    graph, variables = traced()
    other = other_variables(variables)
    before = len(COMPILED)
    once(graph, variables, 0)
    first = len(COMPILED)
    assert first > before  # the counter counts
    once(graph, other, 1)
    assert len(COMPILED) == first
    again, _ = traced()
    assert again is not graph
    once(again, other, 2)
    assert len(COMPILED) == first


def test_synthesis_compiles_once():
    """One program of optimizer steps for all batches and steps, and none more for other variables and another key."""
    graph, variables = traced()
    other = other_variables(variables)
    traces = []
    inner = image_optimizer(SYNTHESIS)

    def update(*arguments):
        traces.append(len(traces))
        return inner.update(*arguments)

    optimizer = optax.GradientTransformation(inner.init, update)
    for chunk in (1, 2):
        config = dataclasses.replace(SYNTHESIS, num_images=24, chunk=chunk)
        traces.clear()
        result = synthesize(graph, variables, jax.random.key(0), config, optimizer=optimizer)
        assert len(result.losses) == 3 and len(traces) == int(chunk == 1)
        first = len(COMPILED)
        synthesize(graph, other, jax.random.key(1), config, optimizer=optimizer)
        assert len(COMPILED) == first and len(traces) == int(chunk == 1)


# --- vmap and grad ---


def test_vmap_of_a_synthesis_step_over_keys():
    graph, variables = traced()
    optimizer = image_optimizer(SYNTHESIS)

    def step(key):
        init_key, step_key = jax.random.split(key)
        state, targets = init_batch(graph, SYNTHESIS, optimizer, init_key)
        return advance_batch(graph, SYNTHESIS, optimizer, 1, variables, state, targets, step_key)

    keys = jax.random.split(jax.random.key(3), 3)
    states, results = jax.jit(jax.vmap(step))(keys)
    single = jax.jit(step)
    for i, key in enumerate(keys):
        state, result = single(key)
        np.testing.assert_allclose(results.loss[i], result.loss, rtol=1e-5)
        np.testing.assert_allclose(results.layer_losses[i], result.layer_losses, rtol=1e-4, atol=1e-6)
        # Adam's first update is the sign of the gradient: only where that is almost 0 may it differ.
        apart = jax.tree.map(lambda many, one, i=i: jnp.ravel(many[i] - one), states.parameters, state.parameters)
        difference = np.abs(np.concatenate(jax.tree.leaves(apart)))
        assert (difference > 1e-3).mean() < 0.01 and difference.max() <= 2.01 * SYNTHESIS.learning_rate
    finest = jax.tree.leaves(states.parameters)[0]
    assert not np.allclose(finest[0], finest[1])


def test_grad_and_vmap_of_the_quantized_network():
    graph, _, images, _, qvariables = work()

    def loss(qvariables, x):
        return jnp.square(apply_quantized(graph, qvariables, x)).sum()

    whole = jax.jit(jax.grad(loss, argnums=1))(qvariables, images)
    each = jax.jit(jax.vmap(jax.grad(lambda q, x: loss(q, x[None]), argnums=1), in_axes=(None, 0)))(qvariables, images)
    assert bool(jnp.isfinite(whole).all()) and bool(jnp.any(whole != 0))
    np.testing.assert_allclose(each, whole, rtol=1e-3, atol=1e-4 * float(jnp.abs(whole).max()))


def test_vmap_over_quantized_variables():
    """Several quantized networks at once: trees of codes and scales stack like others."""
    graph, variables, images, ranges, qvariables = work()
    other = jitted_quantize()(graph, other_variables(variables), ranges, CONVENTION)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), qvariables, other)
    found = jax.jit(jax.vmap(functools.partial(apply_quantized, graph), in_axes=(0, None)))(stacked, images)
    for result, tree in zip(found, (qvariables, other), strict=True):
        expected = jitted_apply()(graph, tree, images)
        np.testing.assert_allclose(result, expected, atol=1e-2 * float(jnp.abs(expected).max()))
        assert float(jnp.median(jnp.abs(result - expected))) < 1e-5


# --- trees ---


def test_tree_functions():
    graph, _, images, _, qvariables = work()
    expected = jitted_apply()(graph, qvariables, images)

    def check(tree):
        assert jax.tree.structure(tree) == jax.tree.structure(qvariables)
        np.testing.assert_array_equal(jitted_apply()(graph, tree, images), expected)

    check(jax.tree.map(lambda leaf: leaf, qvariables))
    leaves, treedef = jax.tree.flatten(qvariables)
    check(jax.tree.unflatten(treedef, leaves))
    check(jax.device_put(qvariables, jax.devices()[0]))
    check(jax.device_get(qvariables))
    assert all(hasattr(leaf, "shape") for leaf in leaves)


def test_eval_shape():
    graph, variables, images, ranges, qvariables = work()
    make = functools.partial(quantize_params, graph, convention=CONVENTION)
    shapes = jax.eval_shape(make, jax.eval_shape(lambda: variables), jax.eval_shape(lambda: ranges))
    assert jax.tree.structure(shapes) == jax.tree.structure(qvariables)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(qvariables), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    outputs = jax.eval_shape(functools.partial(apply_quantized, graph), shapes, images)
    assert outputs.shape == (16, 5)
    adapted = jax.eval_shape(functools.partial(adapt_batch_norm, graph), variables, shapes, images)
    assert jax.tree.structure(adapted) == jax.tree.structure(qvariables)


def test_orbax_round_trip(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    graph, variables, images, ranges, qvariables = work()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", qvariables)
    make = functools.partial(quantize_params, graph, convention=CONVENTION)
    target = jax.eval_shape(make, variables, ranges)  # what to restore into needs no quantized weights
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert jax.tree.structure(restored) == jax.tree.structure(qvariables)
    assert isinstance(restored["params"]["plain"]["kernel"], QTensor)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(qvariables), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for integer in (False, True):
        np.testing.assert_array_equal(
            jitted_apply()(graph, restored, images, integer=integer),
            jitted_apply()(graph, qvariables, images, integer=integer),
        )


# --- sharding ---


def sharded_work() -> dict[str, Any]:
    """Largest relative difference of each stage between one device and the batch over all devices."""
    devices = jax.devices()
    # Axes left to the compiler. Explicit ones (newer JAX has them by default in `jax.make_mesh`) would ask for the
    # sharding of every intermediate result, which a network traced without a mesh does not have.
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graph, variables = traced()
    images = noise(graph, 16)
    report: dict[str, Any] = {"devices": len(devices)}

    def difference(found: Any, expected: Any) -> float:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in pairs)

    def stages(images: jax.Array, variables: Any) -> dict[str, Any]:
        ranges = estimate_ranges(graph, variables, images, CONVENTION, estimator="max")
        qvariables = jitted_quantize()(graph, variables, ranges, CONVENTION)
        found = {
            "summaries": summarize(graph, variables, images),
            "ranges": ranges,
            "quantized": qvariables,
            "moments": batch_norm_moments(graph, variables, images),
            "adapted": adapt_batch_norm(graph, variables, qvariables, images),
            "fitted": adapt_batch_norm(graph, variables, qvariables, images, BatchNormConfig(method="regression")),
            "applied": jitted_apply()(graph, qvariables, images),
            "integer": jitted_apply()(graph, qvariables, images, integer=True),
        }
        settings: dict[str, Any] = {"source": "pixels", "steps": 4, "optimizer": "sgd", "learning_rate": 1.0}
        config = SynthesisConfig(num_images=16, batch_size=16, **settings)
        optimizer = image_optimizer(config)
        state, targets = init_batch(graph, config, optimizer, jax.random.key(5))
        spread = images.sharding if len(images.sharding.device_set) > 1 else None
        if spread is not None:
            place = functools.partial(
                jax.tree.map, lambda leaf: jax.device_put(leaf, spread if leaf.ndim else everywhere)
            )
            state, targets = place(state), place(targets)
        for _ in range(3):
            state, result = advance_batch(graph, config, optimizer, 1, variables, state, targets, jax.random.key(6))
        return {**found, "synthesized": state.parameters, "evaluation": result}

    alone = stages(images, variables)
    spread = stages(jax.device_put(images, by_batch), jax.device_put(variables, everywhere))
    report["differences"] = {name: difference(spread[name], alone[name]) for name in alone}
    report["still_sharded"] = {
        name: spread[name].sharding.is_equivalent_to(by_batch, spread[name].ndim)
        for name in ("applied", "integer", "synthesized")
    }
    report["one_shard"] = {
        name: list(spread[name].addressable_shards[0].data.shape) for name in ("applied", "synthesized")
    }
    # Were statistics per device, they would be those of two images: far from those of all.
    report["per_device"] = difference(batch_norm_moments(graph, variables, images[:2]), alone["moments"])
    return report


def test_batch_sharded_over_eight_devices():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["devices"] == 8
    assert report["per_device"] > 0.1
    assert {name: value for name, value in report["differences"].items() if value > 1e-4} == {}
    assert all(report["still_sharded"].values())
    assert report["one_shard"] == {"applied": [2, 5], "synthesized": [2, 8, 8, 3]}


if __name__ == "__main__":
    print(json.dumps(sharded_work()))
