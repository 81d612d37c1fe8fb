"""Synthesis: its loss against NumPy in float64, determinism, and what happens when it is interrupted or fails."""

import dataclasses
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import optax
import pytest
from compilations import Compilations

from dfq_jax.base import loop
from dfq_jax.base.checkpoint import Checkpoint
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.stages.batch_norm import batch_norm_moments
from dfq_jax.synthesis import (
    SynthesisConfig,
    SynthesisError,
    augment,
    init_batch,
    objective,
    source,
    step,
    synthesize,
    synthesize_sets,
)
from dfq_jax.synthesis import loop as synthesis_loop
from dfq_jax.synthesis.objective import OffsetMoments, Targets

SHAPE = (4, 12, 12, 3)
CONFIG = SynthesisConfig(
    num_images=8,
    batch_size=4,
    source="pixels",
    steps=20,
    optimizer="adam",
    learning_rate=0.1,
    b2=0.999,
    schedule="cosine",
    input_weight=1.0,
    chunk=1,
)
CLASSES = 5


# --- a tiny network, in JAX and in NumPy ---


def network(v, x):
    for name in ("unit1", "unit2"):
        p = v[name]
        x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu((x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"])
    return x.mean((1, 2)) @ v["head"]["kernel"] + v["head"]["bias"]


def reference(v, x):
    """The inputs of the BatchNorms and the class scores, in float64."""
    v, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (v, x))
    inputs = []
    for name in ("unit1", "unit2"):
        p = v[name]
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        x = np.einsum("nhwcij,ijcd->nhwd", windows, p["kernel"])
        inputs.append(x)
        x = np.maximum((x - p["mean"]) / np.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"], 0)
    return inputs, x.mean((1, 2)) @ v["head"]["kernel"] + v["head"]["bias"]


def statistics(tensors):
    """Mean and standard deviation of each BatchNorm's input."""
    return [(x.mean((0, 1, 2)), x.std((0, 1, 2))) for x in tensors]


def natural_images(count, seed=0):
    """Images that are smooth, as natural ones are: white noise matches nothing of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *SHAPE[1:])) @ rng.normal(size=(3, 3))
    for axis in (1, 2):
        x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis)
    return (x - x.mean()) / x.std()


def build():
    """Graph and variables, with the BatchNorm statistics of natural images."""

    def unit(cin, cout):
        return {"kernel": (3, 3, cin, cout), **{k: (cout,) for k in ("mean", "var", "scale", "bias")}}

    shapes = {"unit1": unit(3, 4), "unit2": unit(4, 6), "head": {"kernel": (6, CLASSES), "bias": (CLASSES,)}}
    variables = model_grid.function_case("tiny", network, shapes, SHAPE).variables
    images = natural_images(64)
    for i, name in enumerate(("unit1", "unit2")):
        inputs, _ = reference(variables, images)
        mean, std = statistics(inputs)[i]
        variables[name] |= {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(std**2, jnp.float32)}
    return trace(network, variables, SHAPE), variables


GRAPH, VARIABLES = build()
KEY = jax.random.key(0)


def make(config=CONFIG, key=KEY, **arguments):
    return synthesize(GRAPH, VARIABLES, key, config, **arguments)


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Batches take turns in the same order on all machines; a test of lanes asks for more."""

    def use(count):
        monkeypatch.setattr(synthesis_loop, "usable_cores", lambda: count)

    use(1)
    return use


@pytest.fixture(scope="module")
def finished():
    """What an uninterrupted run gives."""
    return make()


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("source", ["fourier", "pyramid"])
def test_sources_of_sequences_and_vectors(source):
    config = dataclasses.replace(CONFIG, num_images=4, source=source, steps=2)
    for build_case in (model_grid.conv_1d, model_grid.mlp):
        case = build_case()
        graph = trace(*case.function(), case.input_shape)
        images = synthesize(graph, case.variables, KEY, config).images
        assert images.shape == (4, *case.input_shape[1:])
        assert np.isfinite(images).all()
    # Vectors have no waves and one resolution: their values themselves are optimized.
    pixels = synthesize(graph, case.variables, KEY, dataclasses.replace(config, source="pixels")).images
    assert same_bits(images, pixels)


# What the same loop does with other sources of images, and with everything that changes images on the way.
PYRAMID = {"source": "pyramid", "learning_rate": 0.2}
FOURIER = {"source": "fourier", "spectrum_exponent": 0.8, "swing": True}
GENERATOR = {"source": "generator", "learning_rate": 0.1, "schedule": "plateau", "swing": True}
LARGER = {"extra_pixels": 3, "smoothing": 1.25, "flip": True, "pixel_range": ((-2.0,) * 3, (2.0,) * 3)}


# --- the loss ---


def expected_loss(config, variables, x, labels, level=-np.inf):
    """The loss of a batch, written out in NumPy, with the BatchNorm term of each layer."""
    inputs, logits = reference(variables, x)
    x = np.asarray(x, np.float64)
    axes = (1, 2) if config.statistics == "image" else (0, 1, 2)
    layers = []
    for tensor, name in zip(inputs, ("unit1", "unit2"), strict=True):
        stored_mean, stored_std = (np.asarray(variables[name][k], np.float64) for k in ("mean", "var"))
        mean_term = np.square(tensor.mean(axes) - stored_mean)
        std_term = np.square(tensor.std(axes) - np.sqrt(stored_std))
        unit = {"none": 1, "layer": stored_std.mean(), "channel": np.maximum(stored_std, 0.1 * stored_std.mean())}
        terms = config.mean_weight * mean_term + config.std_weight * std_term
        layers.append((terms / unit[config.normalization]).mean())
    weights = {"uniform": [1, 1], "first": [10, 1], "deep": [0.2, 1], "shallow": [1, 0.2]}[config.layer_weighting]
    loss = np.dot(layers, weights)
    loss += config.input_weight * (np.square(x.mean((1, 2))) + np.square(x.std((1, 2)) - 1)).sum(-1).mean()
    variation = sum(np.square(np.diff(x, axis=a)).mean() for a in (1, 2))
    loss += config.total_variation_weight * variation
    own = logits[np.arange(len(x)), labels]
    loss += config.class_weight * (np.log(np.exp(logits).sum(1)) - own).mean()
    others = np.array([np.delete(row, label) for row, label in zip(logits, labels, strict=True)])
    margins = own - np.log(np.exp(others).sum(1))
    loss += config.response_weight * np.maximum(level - margins, 0).mean()
    return loss, layers


evaluate = jax.jit(objective.evaluate, static_argnames=("graph", "config"))
LABELS = np.array([0, 3, 1, 4])
LOSSES = {
    "batch": {},
    "image": {"statistics": "image", "layer_weighting": "deep"},
    "weights": {"mean_weight": 0.3, "std_weight": 2.0, "input_weight": 0.5, "layer_weighting": "first"},
    "classes": {"class_weight": 0.7, "total_variation_weight": 3.0, "layer_weighting": "shallow"},
    "response": {"response_weight": 0.2, "input_weight": 0.0},
    "layers alike": {"normalization": "layer"},
    "channels alike": {"normalization": "channel", "statistics": "image"},
}


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_loss_and_its_gradient(fields):
    config = dataclasses.replace(CONFIG, **fields)
    x = np.random.default_rng(1).normal(size=SHAPE)
    level = -1.1  # above some margins, below others
    targets = Targets(jnp.asarray(LABELS), jnp.float32(level))

    def loss(images):
        result = evaluate(GRAPH, config, VARIABLES, images, targets)
        return result.loss, result

    (found, result), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x, jnp.float32))
    x = np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    wanted, layers = expected_loss(config, VARIABLES, x, LABELS, level)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(result.layer_losses, layers, rtol=2e-5)
    if config.uses_classes:
        _, logits = reference(VARIABLES, x)
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        p = probabilities[np.arange(4), LABELS]
        np.testing.assert_allclose(result.margins, np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
        assert result.margins.min() < level < result.margins.max()

    for seed in range(3):  # slopes along random directions; NumPy's loss has the digits for small steps
        direction = np.random.default_rng(seed).normal(size=SHAPE)
        step = 1e-6
        above, below = (expected_loss(config, VARIABLES, x + s * direction, LABELS, level)[0] for s in (step, -step))
        slope = np.vdot(gradient, direction)
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=2e-3, atol=1e-4)


def test_statistics_of_a_set_are_those_of_all_its_images():
    config = dataclasses.replace(CONFIG, statistics="set", input_weight=0.0)
    parts = [jnp.asarray(natural_images(4, seed), jnp.float32) for seed in (1, 2)]
    targets = Targets(jnp.asarray(LABELS), jnp.float32(-jnp.inf))
    zeros = {bn.name: OffsetMoments(jnp.zeros(bn.channels), jnp.zeros(bn.channels)) for bn in GRAPH.batch_norms}
    first = evaluate(GRAPH, config, VARIABLES, parts[0], targets, zeros, 1.0)
    others = jax.tree.map(lambda m: 0.5 * m, first.moments)
    both = evaluate(GRAPH, config, VARIABLES, parts[1], targets, others, 0.5)
    wanted, layers = expected_loss(config, VARIABLES, np.concatenate(parts), np.tile(LABELS, 2))
    np.testing.assert_allclose(both.layer_losses, layers, rtol=1e-4)
    np.testing.assert_allclose(both.loss, wanted, rtol=1e-4)


def test_hard_images_count_for_more():
    logits = np.random.default_rng(0).normal(size=(4, CLASSES)) * 3
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(4), LABELS]
    for focus in (0.0, 0.5, 2.0):
        found = objective.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(LABELS), focus)
        np.testing.assert_allclose(found, -((1 - p) ** focus * np.log(p)).mean(), rtol=1e-5)
    sure = jnp.asarray([[100.0, 0.0]])
    gradient = jax.grad(lambda z: objective.cross_entropy(z, jnp.asarray([0]), 0.5))(sure)
    assert np.isfinite(gradient).all()


def test_marginal_distance():
    features = np.random.default_rng(0).normal(size=(6, 7)) + 1
    labels = np.array([0, 1, 0, 1, 1, 2])
    centers = np.stack([features[labels == label].mean(0) for label in labels])
    cosine = (features * centers).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(centers, axis=1)
    distance = 1 - cosine
    low, high = np.quantile(distance, [0.4, 0.7])
    wanted = (np.maximum(low - distance, 0) + np.maximum(distance - high, 0)).mean()
    arguments = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    np.testing.assert_allclose(objective.marginal_distance(*arguments, low, high), wanted, rtol=1e-4)
    np.testing.assert_allclose(objective.marginal_distance(*arguments, 0.0, 2.0), 0, atol=1e-6)
    gradient = jax.grad(lambda f: objective.marginal_distance(f, arguments[1], 0.5, 0.8))(arguments[0])
    np.testing.assert_allclose(gradient[5], 0, atol=1e-5)  # alone in its class
    assert (jnp.abs(gradient[:5]).max(1) > 0).all()
    config = dataclasses.replace(CONFIG, distance_weight=0.5, distance_range=(0.3, 0.4))
    targets = Targets(jnp.asarray([0, 0, 1, 1]), jnp.float32(-jnp.inf))
    images = jnp.asarray(natural_images(4), jnp.float32)
    with_term, without = (evaluate(GRAPH, c, VARIABLES, images, targets).loss for c in (config, CONFIG))
    assert with_term > without


def test_the_response_stops_at_its_level():
    logits = jnp.asarray([[2.0, 0.0, -1.0], [0.3, 0.1, 0.2], [9.0, 1.0, 0.0]])
    labels = jnp.asarray([0, 2, 0])
    margins = objective.class_margin(logits, labels)
    wanted = [2 - np.log(1 + np.exp(-1)), 0.2 - np.log(np.exp(0.3) + np.exp(0.1)), 9 - np.log(np.e + 1)]
    np.testing.assert_allclose(margins, wanted, rtol=1e-5)

    def response(logits, level):
        return objective.response(objective.class_margin(logits, labels), jnp.float32(level))

    np.testing.assert_allclose(response(logits, 3.0), np.maximum(3 - np.array(wanted), 0).mean(), rtol=1e-5)
    gradient = jax.grad(response)(logits, 3.0)
    assert (gradient[2] == 0).all()  # beyond the level: no pull at all
    assert gradient[0, 0] < 0 < gradient[0, 1]  # below: the own logit up, the others down
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)  # which leaves the sum of logits alone
    assert response(logits, -jnp.inf) == 0
    assert (jax.grad(response)(logits, -jnp.inf) == 0).all()


def test_response_level_is_a_quantile_of_the_margins():
    images = jnp.asarray(natural_images(8), jnp.float32)
    _, logits = reference(VARIABLES, images)
    p = np.exp(logits).max(1) / np.exp(logits).sum(1)
    labels = jnp.zeros(8, jnp.int32)
    for relabel in (True, False):
        targets = step.response_targets(GRAPH, VARIABLES, images, labels, quantile=0.7, relabel=relabel)
        level = max(np.quantile(np.log(p / (1 - p)), 0.7), 0)
        np.testing.assert_allclose(targets.response_level, level, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(targets.labels, logits.argmax(1) if relabel else labels)


def test_a_constant_channel_has_a_finite_gradient():
    targets = Targets(jnp.asarray(LABELS), jnp.float32(-jnp.inf))
    gradient = jax.grad(lambda x: evaluate(GRAPH, CONFIG, VARIABLES, x, targets).loss)(jnp.zeros(SHAPE))
    assert np.isfinite(gradient).all()


# --- optimization ---


def test_images_come_to_match_the_statistics(finished):
    result = make(dataclasses.replace(CONFIG, steps=100, num_images=4))
    start, _ = init_batch(GRAPH, CONFIG, optax.sgd(1.0), jax.random.split(jax.random.fold_in(KEY, 0))[0])
    before, _ = expected_loss(CONFIG, VARIABLES, start.parameters, LABELS)
    after, _ = expected_loss(CONFIG, VARIABLES, result.images, LABELS)
    assert after < 0.02 * before
    np.testing.assert_allclose(result.losses[0], after, rtol=0.1)
    moments = batch_norm_moments(GRAPH, VARIABLES, result.images)
    for bn in GRAPH.batch_norms:
        mean, var = moments[bn.name]
        std = np.sqrt(GRAPH.leaf(VARIABLES, bn.var))
        np.testing.assert_allclose(mean / std, GRAPH.leaf(VARIABLES, bn.mean) / std, atol=0.12)
        np.testing.assert_allclose(np.sqrt(var) / std, np.ones(bn.channels), atol=0.12)
    assert result.completed and result.seconds > 0
    assert set(result.layer_losses) == {bn.name for bn in GRAPH.batch_norms}
    # Batches are independent of each other, and of how many follow.
    assert np.square(finished.images[:4] - finished.images[4:]).mean() > 0.1


def test_the_same_key_gives_the_same_bits(finished):
    again = make()
    assert again.images.shape == (8, *SHAPE[1:])
    assert again.images.dtype == jnp.float32
    assert same_bits(finished.images, again.images)
    assert again.losses == finished.losses
    other = make(key=jax.random.key(1))
    assert np.square(other.images - finished.images).mean() > 0.1


def test_synthesis_does_not_touch_its_arguments():
    before = jax.tree.map(np.array, VARIABLES)
    make(key=KEY)
    jax.tree.map(np.testing.assert_array_equal, before, VARIABLES)
    assert not KEY.is_deleted()


def test_any_optax_optimizer():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.05))
    result = make(optimizer=optimizer)
    again = make(optimizer=optimizer)
    assert same_bits(result.images, again.images)
    assert result.losses[0] < 10


@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
@pytest.mark.parametrize("name", ["adam", "radam", "sgd"])
def test_optimizers_and_schedules(name, schedule):
    config = SynthesisConfig(steps=10, learning_rate=0.2, optimizer=name, schedule=schedule)
    optimizer = source.image_optimizer(config)
    assert source.image_optimizer(dataclasses.replace(config)) is optimizer  # compilation is keyed on it
    updates = []
    state = optimizer.init(jnp.zeros(1))
    for _ in range(11):
        update, state = optimizer.update(jnp.ones(1), state)
        updates.append(float(-update[0]))
    if name == "adam":  # of a constant gradient Adam's update is the learning rate
        np.testing.assert_allclose(updates[0], 0.2, rtol=1e-4)
        last = {"constant": 0.2, "cosine": 0.0, "exponential": 0.01}[schedule]
        np.testing.assert_allclose(updates[-1], last, rtol=1e-3, atol=1e-6)
    assert all(u >= -1e-7 for u in updates)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"statistics": "set"},
        {"response_weight": 0.1, "class_weight": 0.1, "flip": True, "jitter": 1, "crop": 1},
        PYRAMID,
        FOURIER,
        GENERATOR,
    ],
    ids=["batch", "set", "everything", "pyramid", "fourier", "generator"],
)
def test_chunks_give_the_same_images_and_compile_once(fields):
    results, other_key = {}, jax.random.key(7)
    for chunk in (1, 5):
        # A learning rate of its own: nothing is compiled yet.
        config = dataclasses.replace(CONFIG, **{"num_images": 12, "chunk": chunk, "learning_rate": 0.0999} | fields)
        with Compilations() as compiled:
            results[chunk] = make(config).images
        assert compiled["advance_batch"] == compiled["init_batch"] == int(chunk == 1)  # one program for all chunks
        assert compiled["response_targets"] <= 1
        with Compilations() as compiled:
            make(config, other_key)
        assert not compiled
    if config.statistics != "set":  # batches that share statistics take turns after each chunk
        assert same_bits(results[1], results[5])


def test_other_weights_compile_nothing():
    make()
    variables = jax.tree.map(lambda leaf: 1.1 * leaf, VARIABLES)
    graph = trace(network, variables, (1, *SHAPE[1:]))
    with Compilations() as compiled:
        synthesize(graph, variables, KEY, CONFIG)
    assert compiled["advance_batch"] == 0 and compiled["init_batch"] == 0


def test_any_number_of_steps_takes_few_calls_of_one_program(monkeypatch):
    lengths = []
    inner = synthesis_loop.advance_batch

    def advance(graph, config, optimizer, steps, *arguments):
        lengths.append(steps)
        return inner(graph, config, optimizer, steps, *arguments)

    monkeypatch.setattr(synthesis_loop, "advance_batch", advance)
    config = dataclasses.replace(
        CONFIG, num_images=4, steps=29, chunk=8, learning_rate=0.0997, response_weight=0.1, response_start=0.45
    )
    with Compilations() as compiled:
        result = make(config)
    assert lengths == [8, 5, 8, 8] and compiled["advance_batch"] == 1  # the response begins at step 13
    whole = make(dataclasses.replace(config, chunk=29))
    assert lengths[4:] == [13, 16] and same_bits(result.images, whole.images)


def test_a_last_batch_that_is_not_full(finished):
    result = make(dataclasses.replace(CONFIG, num_images=6))
    assert result.images.shape[0] == 6 and result.labels.shape == (6,)
    assert len(result.losses) == 2
    assert same_bits(result.images, finished.images[:6])


def test_statistics_over_the_set():
    config = dataclasses.replace(CONFIG, statistics="set", num_images=12, steps=60, input_weight=0.0)
    result = make(config)
    _, layers = expected_loss(config, VARIABLES, result.images, np.tile(LABELS, 3))
    _, parts = expected_loss(config, VARIABLES, result.images[:4], LABELS)
    assert sum(layers) < 0.3 * sum(parts)  # the whole matches, its parts are left free
    np.testing.assert_allclose(sum(result.layer_losses.values()), sum(layers), atol=0.02)


def test_labels_are_balanced_and_reach_all_classes():
    case = model_grid.mlp()
    graph = trace(*case.function(), case.input_shape)  # 5 classes
    many = SynthesisConfig(batch_size=15)
    labels = np.asarray(init_batch(graph, many, optax.sgd(1.0), KEY)[1].labels)
    assert (np.bincount(labels, minlength=5) == 3).all()
    few = SynthesisConfig(batch_size=2)
    keys = [jax.random.key(i) for i in range(20)]
    seen = {int(c) for key in keys for c in init_batch(graph, few, optax.sgd(1.0), key)[1].labels}
    assert seen == set(range(5))


def test_the_response_term_raises_responses():
    def margins(result):
        logits = reference(VARIABLES, result.images)[1]
        p = np.exp(logits).max(1) / np.exp(logits).sum(1)
        return np.log(p / (1 - p))

    config = dataclasses.replace(CONFIG, num_images=4, steps=40, response_weight=1.0, response_quantile=1.0)
    with_response = make(config)
    without = make(dataclasses.replace(config, response_weight=0.0))
    assert margins(with_response).mean() > margins(without).mean() + 0.02
    logits = reference(VARIABLES, with_response.images)[1]
    assert (logits.argmax(1) == with_response.labels).mean() >= 0.75
    assert (without.labels == 0).all()


def test_early_stop_on_a_plateau():
    steps = []
    config = dataclasses.replace(CONFIG, steps=400, patience=20, min_improvement=0.5)
    result = make(config, on_progress=lambda p: steps.append((p.batch, p.step)))
    assert result.completed
    assert result.images.shape[0] == 8
    assert all(max(s for b, s in steps if b == batch) < 400 for batch in (1, 2))


def test_no_plateau_before_the_response_begins():
    """The response term raises the loss as it begins, which is no reason to stop."""
    steps = []
    config = dataclasses.replace(
        CONFIG, num_images=4, steps=200, patience=10, min_improvement=0.9, response_weight=5.0, response_start=0.5
    )
    make(config, on_progress=lambda p: steps.append(p.step))
    assert 110 < steps[-1] < 200


def test_progress_reports():
    reports = []
    make(on_progress=reports.append)
    assert [(r.batch, r.step) for r in reports] == [(1, 10), (1, 20), (2, 10), (2, 20)]
    assert all((r.num_batches, r.steps) == (2, 20) for r in reports)
    assert all(math.isfinite(r.loss) and math.isfinite(r.eta) and r.eta >= 0 for r in reports)
    assert reports[-1].eta == 0
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(reports))
    assert reports[0].loss > reports[1].loss


# --- batches side by side ---


@pytest.mark.parametrize("fields", [{}, PYRAMID, FOURIER], ids=["pixels", "pyramid", "fourier"])
def test_lanes_change_nothing(cores, fields):
    config = dataclasses.replace(CONFIG, num_images=12, chunk=6, response_weight=0.1, jitter=1, **fields)
    one, reports = make(config), []
    for count in (2, 3):
        cores(count)
        result = make(config, on_progress=reports.append)
        assert same_bits(result.images, one.images) and same_bits(result.labels, one.labels)
        assert (result.losses, result.layer_losses) == (one.losses, one.layer_losses)
    order = [(r.batch, r.step) for r in reports]
    # The response begins at step 10, where a call ends.
    assert order[:4] == [(1, 10), (2, 10), (1, 20), (2, 20)] and order[4:6] == [(3, 10), (3, 20)]
    assert order[6:] == [(1, 10), (2, 10), (3, 10), (1, 20), (2, 20), (3, 20)]
    assert [r.done for r in reports[:6]] == [20, 20, 40, 40, 50, 60]
    assert all(a.eta >= 0 for a in reports) and reports[-1].eta == 0


def test_lanes_compile_once(cores):
    cores(4)
    config = dataclasses.replace(
        CONFIG, num_images=16, learning_rate=0.0998, response_weight=0.1, response_quantile=0.8
    )
    with Compilations() as compiled:
        make(config)
    names = ("init_batch", "advance_batch", "batch_images", "response_targets")
    assert {name: compiled[name] for name in names} == dict.fromkeys(names, 1)
    with Compilations() as compiled, jax.default_matmul_precision("high"):
        make(config)
        assert compiled["advance_batch"] == 1  # a setting of this thread holds in the others
        make(config, key=jax.random.key(5))
    assert compiled["advance_batch"] == 1


def test_lanes_keep_plateaus(cores):
    config = dataclasses.replace(CONFIG, num_images=12, steps=400, patience=20, min_improvement=0.5)
    one = make(config)
    cores(2)
    assert same_bits(make(config).images, one.images)


def test_lanes_name_the_batch_at_fault(cores):
    cores(2)
    with pytest.raises(SynthesisError, match="at step 10 of batch 1"):
        make(dataclasses.replace(CONFIG, learning_rate=1e30))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3)])
def test_any_number_of_lanes_resumes(tmp_path, cores, before, after):
    config = dataclasses.replace(CONFIG, num_images=16)
    cores(before)
    path = interrupted(tmp_path / "work.npz", config, at=(1, 10))
    cores(after)
    reports = []
    assert same_bits(make(config, checkpoint=path, on_progress=reports.append).images, make(config).images)
    assert (reports[0].batch, reports[0].step) == (1, 20)


def test_ctrl_c_waits_for_all_lanes(finished, cores):
    cores(2)
    result = make(on_progress=interrupt_at(1, 10))
    assert not result.completed and result.images.shape[0] == 8
    with pytest.raises(KeyboardInterrupt):
        make(on_progress=interrupt_at(1, 10, times=2))


def test_lanes_fit_the_memory(monkeypatch, cores):
    cores(8)
    assert synthesis_loop.default_lanes(GRAPH, "cpu", 5) == 5
    assert synthesis_loop.default_lanes(GRAPH, "cpu", 50) == 8
    assert synthesis_loop.default_lanes(GRAPH, "gpu", 5) == 1
    monkeypatch.setattr(synthesis_loop, "memory_size", lambda: 100_000)
    assert 1 <= synthesis_loop.default_lanes(GRAPH, "cpu", 50) < 8
    monkeypatch.setattr(synthesis_loop, "memory_size", lambda: 1)
    assert synthesis_loop.default_lanes(GRAPH, "cpu", 50) == 1


# --- sets side by side ---

SETS = [
    (jax.random.key(1), dataclasses.replace(CONFIG, num_images=12, chunk=6, response_weight=0.1, **PYRAMID)),
    (jax.random.key(2), dataclasses.replace(CONFIG, num_images=3, batch_size=3, response_weight=0.1, **FOURIER)),
    (jax.random.key(3), dataclasses.replace(CONFIG, num_images=4, response_weight=0.1, **PYRAMID)),
]


def make_sets(sets=SETS, **arguments):
    return synthesize_sets(GRAPH, VARIABLES, sets, **arguments)


def same_sets(made, sets=SETS):
    """Whether they are as if each were made alone."""
    alone = [make(config, key) for key, config in sets]
    results = [
        same_bits(a.images, b.images) and same_bits(a.labels, b.labels) and a.layer_losses == b.layer_losses
        for a, b in zip(made, alone, strict=True)
    ]
    return all(results) and all(found.completed for found in made)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sets_change_nothing(cores, count):
    cores(count)
    reports = []
    assert same_sets(make_sets(on_progress=reports.append))
    assert {r.num_batches for r in reports} == {5} and [r.done for r in reports][-1] == 100
    assert sorted({(r.batch, r.step) for r in reports}) == [(b, s) for b in range(1, 6) for s in (10, 20)]
    assert all(a.done <= b.done for a, b in itertools.pairwise(reports)) and reports[-1].eta == 0


def test_sets_that_share_statistics_of_their_own(cores):
    cores(2)
    sets = [(key, dataclasses.replace(config, statistics="set")) for key, config in SETS]
    assert same_sets(make_sets(sets), sets)


def test_a_program_of_two_sets_is_compiled_once(cores):
    cores(4)
    config = dataclasses.replace(CONFIG, learning_rate=0.0997)
    other = dataclasses.replace(config, source="pyramid")
    with Compilations() as compiled:
        make_sets([(jax.random.key(1), config), (jax.random.key(2), config), (KEY, other)])
    assert compiled["advance_batch"] == 2


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 3)])
def test_sets_resume(tmp_path, cores, before, after):
    path = tmp_path / "work.npz"
    cores(before)
    made = make_sets(checkpoint=path, on_progress=interrupt_at(3, 10))
    assert not any(found.completed for found in made)
    cores(after)
    reports = []
    assert same_sets(make_sets(checkpoint=path, keep_checkpoint=True, on_progress=reports.append))
    assert len(reports) < 10 and os.listdir(tmp_path) == ["work.npz"]
    assert same_sets(make_sets(checkpoint=path, on_progress=lambda _: pytest.fail("images are made again")))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="belongs to other work"):
        make_sets(checkpoint=interrupted(path), sets=SETS[:2])


def test_sets_name_the_batch_at_fault():
    with pytest.raises(SynthesisError, match="at step 10 of batch 1"):
        make_sets([SETS[0], (KEY, dataclasses.replace(CONFIG, learning_rate=1e30))])


# --- augmentation ---


IMAGES = jnp.asarray(natural_images(6, 3), jnp.float32)


def test_flip_mirrors_some_images():
    flipped = augment.random_flip(jax.random.key(1), IMAGES)
    mirrored = [bool((a == b[:, ::-1]).all()) for a, b in zip(flipped, IMAGES, strict=True)]
    kept = [bool((a == b).all()) for a, b in zip(flipped, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert any(mirrored) and any(kept)
    vectors = IMAGES[:, 0, 0]
    assert same_bits(augment.random_flip(jax.random.key(1), vectors), vectors)


def test_shift_is_cyclic_and_bounded():
    seen = set()
    for seed in range(30):
        shifted = np.asarray(augment.random_shift(jax.random.key(seed), IMAGES, 2))
        distances = itertools.product(range(-2, 3), repeat=2)
        matches = [d for d in distances if (np.roll(IMAGES, d, (1, 2)) == shifted).all()]
        assert len(matches) == 1
        seen.update(matches)
    assert {d[0] for d in seen} == {d[1] for d in seen} == set(range(-2, 3))


def test_crop_is_a_window_of_the_padded_images():
    padded = np.pad(IMAGES, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    for seed in range(5):
        cropped = np.asarray(augment.random_crop(jax.random.key(seed), IMAGES, 2))
        windows = (padded[:, i : i + 12, j : j + 12] for i in range(5) for j in range(5))
        assert sum((w == cropped).all() for w in windows) == 1


def test_augmentation_depends_on_the_key_alone():
    config = dataclasses.replace(CONFIG, flip=True, jitter=2, crop=2)
    first = augment.augment(config, KEY, IMAGES)
    assert first.shape == IMAGES.shape and first.dtype == IMAGES.dtype
    assert same_bits(first, jax.jit(augment.augment, static_argnums=0)(config, KEY, IMAGES))
    assert not same_bits(first, augment.augment(config, jax.random.key(1), IMAGES))
    assert same_bits(augment.augment(CONFIG, KEY, IMAGES), IMAGES)


def test_smoothing_is_a_gaussian_of_three_taps():
    taps = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * 1.25**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(np.asarray(IMAGES, np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_allclose(augment.smooth(IMAGES, 1.25), np.einsum("nhwcij,ij->nhwc", windows, kernel), atol=1e-5)


def test_larger_images_are_cut_to_the_input():
    config = dataclasses.replace(CONFIG, extra_pixels=5)
    cut = augment.augment(config, KEY, IMAGES)
    assert cut.shape == (6, 7, 7, 3)
    windows = (IMAGES[:, i : i + 7, j : j + 7] for i in range(6) for j in range(6))
    assert sum(bool((w == cut).all()) for w in windows) == 1
    assert (augment.finish(config, IMAGES) == IMAGES[:, 2:9, 2:9]).all()
    result = make(dataclasses.replace(CONFIG, num_images=4, statistics="set", **LARGER))
    assert result.images.shape == SHAPE
    assert result.losses[0] < 3


def test_clipped_pixels_keep_their_gradient():
    limits = ((-1.0, -0.5, -2.0), (1.0, 0.5, 2.0))
    config = dataclasses.replace(CONFIG, pixel_range=limits)
    wanted = np.clip(IMAGES, *np.array(limits, np.float32))
    np.testing.assert_allclose(augment.augment(config, KEY, IMAGES), wanted, atol=1e-6)
    assert same_bits(augment.finish(config, IMAGES), wanted)
    gradient = jax.grad(lambda x: augment.augment(config, KEY, x).sum())(IMAGES)
    assert (gradient == 1).all()
    with pytest.raises(ValueError, match=r"^pixel_range: has 2 channels"):
        make(dataclasses.replace(CONFIG, pixel_range=((-1.0, -1.0), (1.0, 1.0))))


def test_low_pass_filter(finished):
    found = augment.low_pass(IMAGES[:, :, :9], 2.5)
    x = np.asarray(IMAGES[:, :, :9], np.float64)
    rows, columns = np.minimum(np.arange(12), 12 - np.arange(12)), np.minimum(np.arange(9), 9 - np.arange(9))
    mask = np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * 2.5**2))
    wanted = np.stack(
        [[np.fft.ifft2(np.fft.fft2(image[..., c]) * mask).real for c in range(3)] for image in x]
    ).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(augment.low_pass(jnp.full((1, 5, 6, 2), 3.0), 1.0), 3.0, rtol=1e-6)
    filtered = make(dataclasses.replace(CONFIG, low_pass=3.0)).images
    np.testing.assert_allclose(filtered, augment.low_pass(finished.images, 3.0), atol=1e-5)


def test_vectors_and_sequences():
    for build_case in (model_grid.mlp, model_grid.conv_1d):
        case = build_case()
        graph = trace(*case.function(), case.input_shape)
        config = SynthesisConfig(num_images=4, batch_size=4, steps=2, flip=True, jitter=1, crop=1)
        images = synthesize(graph, case.variables, KEY, config).images
        assert images.shape == (4, *case.input_shape[1:])
        assert np.isfinite(images).all()


# --- failures ---


def test_divergence_is_reported():
    with pytest.raises(SynthesisError, match=r"became (inf|nan) at step 10 of batch 1, .* learning_rate than 1e\+30"):
        make(dataclasses.replace(CONFIG, learning_rate=1e30))


def changed(path, value):
    """The variables with another leaf."""
    unit, name = path.split("/")
    return VARIABLES | {unit: VARIABLES[unit] | {name: jnp.asarray(value, jnp.float32)}}


def test_the_first_layer_at_fault_is_named():
    second = GRAPH.batch_norms[1].name
    variables = changed("unit2/kernel", VARIABLES["unit2"]["kernel"] * 1e25)
    with pytest.raises(SynthesisError, match=f"first at BatchNorm '{second}'"):
        synthesize(GRAPH, variables, KEY, CONFIG)
    variables = changed("head/kernel", np.tile([3e38, -3e38, 0, 0, 0], (6, 1)))
    config = dataclasses.replace(CONFIG, class_weight=1.0)
    with pytest.raises(SynthesisError, match="outside the BatchNorm terms"):
        synthesize(GRAPH, variables, KEY, config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unit1/kernel", np.full((3, 3, 3, 4), np.nan), "'unit1/kernel' holds NaN or infinite"),
        ("head/bias", np.full(CLASSES, np.inf), "'head/bias' holds NaN or infinite"),
        ("unit2/var", np.full(6, -0.5), "'unit2/var' has a negative variance"),
    ],
)
def test_impossible_variables_are_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        synthesize(GRAPH, changed(path, value), KEY, CONFIG)


def test_networks_without_statistics_or_classes_are_refused():
    case = model_grid.no_batch_norm()
    graph = trace(*case.function(), case.input_shape)
    with pytest.raises(GraphError, match=r"no BatchNorm.*'w4a16'.*'noise'.*images="):
        synthesize(graph, case.variables, KEY, CONFIG)
    case = model_grid.transposed_conv()  # its output is an image
    graph = trace(*case.function(), case.input_shape)
    with pytest.raises(GraphError, match="class scores"):
        synthesize(graph, case.variables, KEY, dataclasses.replace(CONFIG, class_weight=1.0))


@pytest.mark.untyped
@pytest.mark.parametrize(
    "fields",
    [
        {"num_images": 0}, {"batch_size": 2.0}, {"steps": True}, {"chunk": -1}, {"learning_rate": 0}, {"patience": 1.5},
        {"class_weight": -1}, {"mean_weight": math.nan}, {"response_quantile": 1.1}, {"response_start": "half"},
        {"optimizer": "adamw"}, {"schedule": ""}, {"statistics": "batches"}, {"layer_weighting": None},
        {"low_pass": math.inf}, {"source": "noise"}, {"extra_pixels": -1}, {"smoothing": -1}, {"swing": 1},
        {"class_focus": -1}, {"distance_range": (0.8, 0.1)}, {"pixel_range": ((0.0,), (0.0, 1.0))},
        {"pixel_range": (1.0, -1.0)}, {"generator_learning_rate": 0}, {"b2": 1.0},
        {"spectrum_exponent": -1}, {"normalization": "batch"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        SynthesisConfig(**fields)


# --- interruption ---


def interrupt_at(batch, step, times=1):
    def on_progress(report):
        if (report.batch, report.step) == (batch, step):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return on_progress


def test_ctrl_c_returns_what_there_is(finished):
    handler = signal.getsignal(signal.SIGINT)
    result = make(on_progress=interrupt_at(2, 10))
    assert not result.completed
    assert result.images.shape[0] == 8
    assert same_bits(result.images[:4], finished.images[:4])  # the finished batch
    assert not same_bits(result.images[4:], finished.images[4:])
    assert make(on_progress=interrupt_at(1, 10)).images.shape[0] == 4
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_after_the_last_step_is_too_late(finished):
    result = make(on_progress=interrupt_at(2, 20))
    assert result.completed
    assert same_bits(result.images, finished.images)


def test_the_second_ctrl_c_raises():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make(on_progress=interrupt_at(1, 10, times=2))
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads(finished):
    results = []
    thread = threading.Thread(target=lambda: results.append(make()))
    thread.start()
    thread.join()
    assert same_bits(results[0].images, finished.images)


# --- checkpoints ---


@pytest.fixture
def always_save(monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_SECONDS", 0.0)


def interrupted(path, config=CONFIG, at=(2, 10), **arguments):
    """An unfinished checkpoint at `path`."""
    result = make(config, checkpoint=path, on_progress=interrupt_at(*at), **arguments)
    assert not result.completed
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"statistics": "set"},
        {"response_weight": 0.1, "patience": 10, "jitter": 1},
        PYRAMID | LARGER,
        FOURIER | LARGER,
        GENERATOR | LARGER,
    ],
    ids=["batch", "set", "everything", "pyramid", "fourier", "generator"],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, fields):
    config = dataclasses.replace(CONFIG, num_images=12, **fields)
    path = interrupted(tmp_path / "work.npz", config)
    assert os.listdir(tmp_path) == ["work.npz"]
    reports, whole = [], []
    resumed = make(config, checkpoint=path, on_progress=reports.append)
    expected = make(config, on_progress=whole.append)
    assert same_bits(resumed.images, expected.images) and same_bits(resumed.labels, expected.labels)
    assert resumed.losses == expected.losses and resumed.layer_losses == expected.layer_losses
    assert resumed.completed
    found, order = ([(report.batch, report.step) for report in given] for given in (reports, whole))
    assert found == order[-len(found) :] and (2, 10) in order[: -len(found)]  # did not start anew
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
import test_synthesis as t

t.loop.CHECKPOINT_EVERY_SECONDS = 0.0
t.synthesis_loop.usable_cores = lambda: 1  # batches one after the other, whatever the machine

def on_progress(report):
    if kill and (report.batch, report.step) == (2, 10):
        os.kill(os.getpid(), signal.SIGKILL)
    print(report.batch, report.step)

path, kill = sys.argv[1], sys.argv[2] == "kill"
result = t.make(checkpoint=path, on_progress=on_progress)
t.np.save(path + ".images.npy", result.images)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path, finished):
    path = tmp_path / "work.npz"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent)}

    def run(*arguments):
        command = [sys.executable, "-c", KILLED, str(path), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    killed = run("kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(tmp_path) == ["work.npz"]
    resumed = run("finish")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split("\n")[0] == "2 10"  # the first batch is not made again
    assert sorted(os.listdir(tmp_path)) == ["work.npz.images.npy"]
    assert same_bits(np.load(tmp_path / "work.npz.images.npy"), finished.images)


def test_a_killed_save_leaves_nothing_behind(tmp_path, finished):
    path = tmp_path / "work.npz"
    (tmp_path / "work.npz.tmp").write_bytes(b"half a file")
    assert same_bits(make(checkpoint=path).images, finished.images)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, always_save):
    path = interrupted(tmp_path / "work.npz")
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        make(checkpoint=path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["work.npz"]


def test_a_checkpoint_of_other_work_is_refused(tmp_path):
    path = interrupted(tmp_path / "work.npz")
    before = path.read_bytes()
    others = {
        "key": {"key": jax.random.key(1)},
        "config": {"config": dataclasses.replace(CONFIG, learning_rate=0.05)},
        "optimizer": {"optimizer": optax.lion(0.1)},
    }
    for arguments in others.values():
        with pytest.raises(ValueError, match=r"checkpoint: '.*work\.npz' belongs to other work"):
            make(checkpoint=path, **arguments)
    with pytest.raises(ValueError, match="belongs to other work"):
        synthesize(GRAPH, changed("head/bias", np.ones(CLASSES)), KEY, CONFIG, checkpoint=path)
    assert path.read_bytes() == before


def damage(data):
    """Ways in which a file can be no checkpoint."""
    yield b""
    yield b"not a checkpoint at all"
    for length in (10, len(data) // 2, len(data) - 10):
        yield data[:length]
    middle = len(data) // 2
    yield data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 64]) + data[middle + 64 :]


def test_damaged_checkpoints_are_refused(tmp_path):
    path = interrupted(tmp_path / "work.npz")
    for data in damage(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"checkpoint: '.*work\.npz' cannot be read .*delete it"):
            make(checkpoint=path)
        assert path.read_bytes() == data
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))  # an array, but no archive
    with pytest.raises(ValueError, match=r"work\.npz' cannot be read"):
        make(checkpoint=path)
    with open(path, "wb") as file:
        np.savez(file, header=np.array("[1, 2]"))
    with pytest.raises(ValueError, match=r"work\.npz' cannot be read"):
        make(checkpoint=path)
    assert os.listdir(tmp_path) == ["work.npz"]


def test_impossible_places_for_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        make(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        make(checkpoint=tmp_path / "none" / "work.npz")


def test_checkpoints_hold_any_optimizer_state(tmp_path):
    state = {
        "half": jnp.arange(3, dtype=jnp.bfloat16), "key": jax.random.key(3), "count": jnp.int32(2), "empty": (),
    }  # fmt: skip
    checkpoint = Checkpoint(tmp_path / "work.npz", "identity")
    checkpoint.save({2: state}, position=7)
    work, meta = checkpoint.load(lambda batch, facts: jax.eval_shape(lambda: state))
    assert meta["position"] == 7
    assert jax.tree.structure(work[2]) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(work[2]), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
