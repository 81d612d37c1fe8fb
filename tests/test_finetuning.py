"""Fine-tuning: losses against NumPy, gradients against closed forms, and students that come nearer their teacher."""

import dataclasses
import functools
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from flax import nnx
from model_grid import Case, cifar_resnet8, function_case, linen_case, mlp, shared_kernel

from dfq_jax import (
    RECIPES,
    Convention,
    FinetuneConfig,
    apply_quantized,
    estimate_ranges,
    finetune,
    quantize,
    quantize_params,
    squant,
    trace,
)
from dfq_jax.base import init_state
from dfq_jax.quantizers.collection import QUANTIZATION
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.weights import quantize_kernel
from dfq_jax.recipes.recipe import Recipe, recipe_from
from dfq_jax.stages.comparison import Comparison, compare, kl_divergence
from dfq_jax.stages.finetuning import loop
from dfq_jax.stages.finetuning.losses import (
    Outputs,
    attention_distance,
    channel_attention,
    distillation_loss,
    relative_error,
    restricted_cross_entropy,
)
from dfq_jax.stages.finetuning.step import advance_student, augment_minibatch, student_optimizer
from dfq_jax.stages.finetuning.student import (
    StudentParameters,
    hard_student,
    init_codes,
    init_student,
    project,
    rounded,
    soft_kernels,
    soft_student,
    student_outputs,
    teacher_outputs,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 6, 5)) * 3
T, S = jnp.asarray(LOGITS, jnp.float32)


# --- networks ---


class Net(nn.Module):
    """A residual block between two layers, or the same without BatchNorm, or with a depthwise convolution."""

    norm: bool = True
    groups: int = 1
    outputs: int = 5

    @nn.compact
    def __call__(self, x, train: bool = False):
        def unit(x, name, groups=1):
            x = nn.Conv(6, (3, 3), use_bias=not self.norm, feature_group_count=groups, name=name)(x)
            return nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x) if self.norm else x

        x = nn.relu(unit(x, "conv1"))
        x = nn.relu(x + unit(x, "conv2", self.groups))
        return nn.Dense(self.outputs, name="head")(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))


SHAPE = (2, 6, 6, 3)


def small():
    return linen_case("small", Net(), SHAPE)


def no_norm():
    return linen_case("no_norm", Net(norm=False), SHAPE)


def depthwise():
    return linen_case("depthwise", Net(groups=6), SHAPE)


def regression():
    return linen_case("regression", Net(norm=False, outputs=1), SHAPE)


def dense_classes():
    return function_case("dense", lambda v, x: x @ v["kernel"], {"kernel": (6, 5)}, (2, 6))


def nnx_net():
    return Case("nnx_net", NNXNet(nnx.Rngs(0)), None, SHAPE)


def images_of(case: Case, count: int = 40) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, *case.input_shape[1:])), jnp.float32)


@functools.cache
def start_of(build, bits="w2a3", shortcuts="float"):
    """A graph, float variables, quantized ones, images."""
    case = build()
    apply_fn, variables = case.function()
    graph, images = trace(apply_fn, variables, case.input_shape), images_of(case)
    convention = Convention.parse(bits, edge_bits=None, shortcuts=shortcuts)
    ranges = estimate_ranges(graph, variables, images, convention)
    # Rounding that is not to nearest, so that codes and float weights disagree.
    qvariables = squant(graph, variables, quantize_params(graph, variables, ranges, convention))
    return graph, variables, qvariables, images


CONFIG = FinetuneConfig(
    steps=42,
    batch_size=16,
    weight_rate=3e-3,
    step_rate=0.0,
    affine_rate=3e-3,
    trust=0.0,
    feature_weight=100.0,
    attention_weight=1.0,
    label_weight=0.01,
    crop=1,
    held_out=0.25,
    evaluations=3,
)
EVERYTHING = dataclasses.replace(CONFIG, scale_rate=1e-3, step_rate=1e-3)


@functools.cache
def tuned():
    graph, variables, qvariables, images = start_of(small)
    return finetune(graph, variables, qvariables, images, jax.random.key(0), CONFIG)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- losses ---


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence(temperature):
    p, q = (softmax(x / temperature) for x in LOGITS)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    np.testing.assert_allclose(kl_divergence(T, S, temperature), expected, rtol=1e-5)
    assert abs(float(kl_divergence(T, T, temperature))) < 1e-6


def test_divergence_at_high_temperature_is_the_squared_error_of_centered_logits():
    d = LOGITS[0] - LOGITS[1]
    d = d - d.mean(-1, keepdims=True)
    np.testing.assert_allclose(kl_divergence(T, S, 1e3), np.square(d).sum(-1).mean() / 10, rtol=1e-2)


def test_relative_error():
    expected = np.square(LOGITS[0] - LOGITS[1]).sum() / np.square(LOGITS[0]).sum()
    np.testing.assert_allclose(relative_error(T, S), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (4, 6)])
def test_attention(shape):
    first, second = RNG.normal(size=(2, *shape))
    first[0] *= 1e15  # in float32 the squares of its squares are infinite

    def attention(f):
        v = np.square(f).mean(tuple(range(1, f.ndim - 1)))
        return v / np.sqrt(np.square(v).sum(-1, keepdims=True))

    a, b = (jnp.asarray(f, jnp.float32) for f in (first, second))
    np.testing.assert_allclose(channel_attention(a), attention(first), rtol=1e-4)
    expected = np.square(attention(first) - attention(second)).sum(-1).mean()
    np.testing.assert_allclose(attention_distance(a, b), expected, rtol=1e-4)


def test_attention_of_zeros_has_a_finite_gradient():
    gradient = jax.grad(attention_distance, argnums=1)(jnp.ones((2, 3, 3, 4)), jnp.zeros((2, 3, 3, 4)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_labels_count_on_easy_images_alone(difficulty):
    labels = RNG.integers(0, 5, 6)
    p, q = (softmax(x)[np.arange(6), labels] for x in LOGITS)
    easy = 1 - p < difficulty
    assert difficulty != 0.5 or 0 < easy.sum() < 6
    expected = -(easy * np.log(q)).sum() / 6
    found = restricted_cross_entropy(T, S, jnp.asarray(labels), difficulty)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_total_is_the_weighted_sum_of_the_terms():
    features = [jnp.asarray(RNG.normal(size=(6, 2, 2, 3)), jnp.float32) for _ in range(4)]
    teacher, student = Outputs(T, tuple(features[:2])), Outputs(S, tuple(features[2:]))
    config = FinetuneConfig(
        divergence_weight=2.0, feature_weight=7.0, attention_weight=3.0, label_weight=5.0, temperature=4.0
    )
    found = distillation_loss(config, 5, teacher, student)
    error, attention = (
        (distance(features[0], features[2]) + distance(features[1], features[3])) / 2
        for distance in (relative_error, attention_distance)
    )
    labeled = restricted_cross_entropy(T, S, T.argmax(-1), 0.5)
    np.testing.assert_allclose(found[1:], [kl_divergence(T, S, 4.0), error, attention, labeled], rtol=1e-6)
    np.testing.assert_allclose(found.total, 2 * found.divergence + 7 * error + 3 * attention + 5 * labeled, rtol=1e-6)
    given = distillation_loss(config, 5, teacher, student, T.argmin(-1))
    np.testing.assert_allclose(given.cross_entropy, restricted_cross_entropy(T, S, T.argmin(-1), 0.5), rtol=1e-6)


# --- the student ---


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (8, True)])
@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_codes_start_where_they_are(bits, symmetric, trust):
    weight = jnp.asarray(RNG.normal(size=(3, 3, 4, 8)), jnp.float32)
    kernel = quantize_kernel(weight, bits=bits, symmetric=symmetric, channel_axes=(3,))
    low, high = (1, 2**bits - 2) if not symmetric else (-127, 126)
    shifted = jnp.clip(kernel.qvalue + RNG.integers(-1, 2, kernel.shape), low, high).astype(kernel.qvalue.dtype)
    kernel = dataclasses.replace(kernel, qvalue=shifted)  # rounded otherwise
    u = init_codes(weight, kernel, trust)
    np.testing.assert_array_equal(rounded(u, kernel), kernel.centered())
    if trust == 1:
        np.testing.assert_array_equal(u, kernel.centered())
    if trust == 0:  # float weights within the cells of their codes are kept
        kept = np.abs(weight / kernel.scale - kernel.centered()) < 0.49
        assert kept.any()
        np.testing.assert_allclose(u[kept], (weight / kernel.scale)[kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "shortcuts"),
    [
        (small, "float"),
        (small, "quantized"),
        (no_norm, "float"),
        (depthwise, "float"),
        (nnx_net, "float"),
        *(pytest.param(build, "float", marks=pytest.mark.slow) for build in (mlp, shared_kernel, cifar_resnet8)),
    ],
)
def test_at_first_the_student_is_the_network_it_was_made_of(build, shortcuts):
    graph, variables, qvariables, images = start_of(build, shortcuts=shortcuts)
    parameters = init_student(graph, EVERYTHING, variables, qvariables)
    assert len(parameters.kernels) == len({layer.kernel for layer in graph.layers})
    same(hard_student(graph, qvariables, parameters), qvariables)
    same(project(parameters, graph, qvariables), parameters)

    @jax.jit
    def both(x):
        student = student_outputs(graph, soft_student(graph, qvariables, parameters), x, soft_kernels(parameters))
        teacher = teacher_outputs(graph, variables, x)
        expected = graph.logits(apply_quantized(graph, qvariables, x)), graph.logits(graph.apply_fn(variables, x))
        return (student.scores, teacher.scores), expected, (student.features, teacher.features)

    found, expected, features = both(images[: graph.input.shape[0]])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))
    assert [len(f) for f in features] == [len(graph.blocks) - 1] * 2


def dense_start():
    """One matrix product with one output, so that gradients have a closed form."""
    variables = {"kernel": jnp.asarray(RNG.normal(size=(6, 1)), jnp.float32), "bias": jnp.asarray([0.4])}
    graph = trace(lambda v, x: x @ v["kernel"] + v["bias"], variables, (8, 6))
    images = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
    convention = Convention.parse("w3a3", edge_bits=None)
    qvariables = quantize_params(graph, variables, estimate_ranges(graph, variables, images, convention), convention)
    return graph, variables, qvariables, images


def test_gradients_against_the_closed_form():
    graph, variables, qvariables, x = dense_start()
    config = FinetuneConfig(scale_rate=1.0, step_rate=1.0)
    parameters = init_student(graph, config, variables, qvariables)
    target = np.asarray(graph.apply_fn(variables, x), np.float64)

    def loss(parameters):
        student = student_outputs(graph, soft_student(graph, qvariables, parameters), x, soft_kernels(parameters))
        return distillation_loss(config, 1, Outputs(jnp.asarray(target, jnp.float32), ()), student).total

    gradient = jax.grad(loss)(parameters)
    (params,) = (p for part in qvariables[QUANTIZATION].values() for p in part.values())
    scale, zero = float(params.scale), float(params.zero_point)
    ratio = np.asarray(x, np.float64) / scale
    codes = np.clip(np.round(ratio), -zero, 7 - zero)
    kernel = qvariables["kernel"]
    w = np.asarray(kernel.dequantize(), np.float64)
    found = scale * codes @ w + 0.4
    to_output = 2 * (found - target) / np.square(target).sum()
    to_weight = (scale * codes).T @ to_output
    np.testing.assert_allclose(gradient.kernels["kernel"], to_weight * np.asarray(kernel.scale), rtol=1e-4)
    np.testing.assert_allclose(gradient.scales["kernel"], [[(to_weight * w).sum()]], rtol=1e-4)
    np.testing.assert_allclose(gradient.affine["bias"], [0.4 * to_output.sum()], rtol=1e-4)
    # Learned step size (arXiv 1902.08153): round(v) - v inside, the clipped code outside.
    inside = (ratio > -zero) & (ratio < 7 - zero)
    to_step = np.where(inside, codes - ratio, codes)
    expected = scale * (to_step * (to_output @ w.T)).sum()
    np.testing.assert_allclose(next(iter(gradient.steps.values())), expected, rtol=1e-4)


def test_clipped_weights_come_back():
    graph, variables, qvariables, _ = dense_start()
    parameters = init_student(graph, CONFIG, variables, qvariables)
    far = parameters._replace(kernels={"kernel": parameters.kernels["kernel"] + 100})
    held = project(far, graph, qvariables).kernels["kernel"]
    kernel = qvariables["kernel"]
    np.testing.assert_allclose(held, np.full((6, 1), 7.5 - float(kernel.zero_point.item())), atol=0.01)
    assert (jax.grad(lambda u: rounded(u, kernel).sum())(held) == 1).all()
    hard = hard_student(graph, qvariables, parameters._replace(kernels={"kernel": held}))["kernel"]
    assert (hard.qvalue == 7).all()


# --- fine-tuning ---


def test_the_student_comes_nearer_its_teacher():
    graph, variables, qvariables, images = start_of(small)
    learned, info = tuned()
    assert info.completed and [e.step for e in info.evaluations] == [0, 14, 28, 42]
    assert info.best == min(info.evaluations, key=lambda e: e.divergence) and info.best.step > 0
    assert info.best.divergence < 0.7 * info.evaluations[0].divergence and 0 < info.changed < 1
    for v, expected in ((qvariables, info.evaluations[0]), (learned, info.best)):
        found = compare(graph, variables, v, images[30:], batch_size=16)
        np.testing.assert_allclose((found.divergence, found.agreement), (expected.divergence, expected.agreement))


def test_structure_types_and_statistics_are_kept():
    graph, _, qvariables, images = start_of(small)
    learned, _ = tuned()
    assert jax.tree.structure(learned) == jax.tree.structure(qvariables)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), learned) == jax.tree.map(lambda a: (a.shape, a.dtype), qvariables)
    same(learned["batch_stats"], qvariables["batch_stats"])
    same(learned[QUANTIZATION], qvariables[QUANTIZATION])  # steps are learned on request
    for layer in graph.layers:
        before, after = (graph.leaf(v, layer.kernel) for v in (qvariables, learned))
        assert isinstance(after, QTensor)
        same((before.scale, before.zero_point), (after.scale, after.zero_point))
    simulated, integer = (apply_quantized(graph, learned, images[:2], integer=i) for i in (False, True))
    np.testing.assert_allclose(simulated, integer, rtol=0, atol=1e-5 * float(jnp.abs(simulated).max()))


def test_the_same_key_gives_the_same_network_and_nothing_compiles_twice():
    graph, variables, qvariables, images = start_of(small)
    expected, _ = tuned()
    with Compilations() as compiled:
        again, _ = finetune(graph, variables, qvariables, images, jax.random.key(0), CONFIG)
        other, _ = finetune(graph, variables, qvariables, images, jax.random.key(1), CONFIG)
    assert compiled["advance_student"] == 0
    same(again, expected)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(again), strict=True))


def test_one_compilation_serves_all_steps_and_chunks_change_nothing():
    graph, variables, qvariables, images = start_of(small)
    config = dataclasses.replace(CONFIG, chunk=7)
    with Compilations() as compiled:
        learned, info = finetune(graph, variables, qvariables, images, jax.random.key(0), config)
    assert compiled["advance_student"] == 1
    first, again = (i.evaluations[1] for i in (tuned()[1], info))  # later, rounding has made different networks of them
    assert first.step == again.step
    np.testing.assert_allclose((again.divergence, again.loss), (first.divergence, first.loss), rtol=0.05)
    assert jax.tree.structure(learned) == jax.tree.structure(qvariables)


@pytest.mark.parametrize("build", [regression, pytest.param(depthwise, marks=pytest.mark.slow)])
def test_networks_of_other_kinds(build):
    graph, variables, qvariables, images = start_of(build)
    learned, info = finetune(graph, variables, qvariables, images, jax.random.key(0), EVERYTHING)
    assert info.best.step > 0 and info.best.divergence < info.evaluations[0].divergence
    assert (info.best.agreement is None) == (build is regression)
    assert jax.tree.structure(learned) == jax.tree.structure(qvariables)
    assert any(
        (a.scale != b.scale).any()
        for a, b in zip(graph.leaves(learned), graph.leaves(qvariables), strict=True)
        if isinstance(a, QTensor)
    )


def test_optimizers_and_schedules():
    parameters = StudentParameters({"k": jnp.zeros(2)}, {}, {}, {"b": jnp.zeros(3)})
    ones = jax.tree.map(jnp.ones_like, parameters)

    def moves(**fields):
        """What four steps add, by kind, for gradients of 1."""
        optimizer = student_optimizer(FinetuneConfig(steps=4, weight_rate=0.1, affine_rate=1.0, **fields))
        state, found = optimizer.init(parameters), []
        for _ in range(4):
            updates, state = optimizer.update(ones, state, parameters)
            found.append((-float(updates.kernels["k"][0]), -float(updates.affine["b"][0])))
        return np.asarray(found).T

    np.testing.assert_allclose(moves(schedule="constant"), [[0.1] * 4, [1.0] * 4], rtol=1e-4)
    cosine = (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose(moves(), np.outer([0.1, 1.0], cosine), rtol=1e-4)
    velocity = np.cumsum(0.9 ** np.arange(4))
    expected = (1 + 0.9 * velocity) * 0.1 ** np.arange(4)  # Nesterov: the gradient, and the momentum after it
    np.testing.assert_allclose(moves(optimizer="sgd", schedule="step"), np.outer([0.1, 1.0], expected), rtol=1e-4)


def test_labels_are_those_of_the_images_drawn():
    """The labels that the teacher would choose give what it gives without, and others something else."""
    graph, variables, qvariables, images = start_of(dense_classes)
    labels = np.asarray(graph.apply_fn(variables, images).argmax(1))
    graph = graph.at((16, *images.shape[1:]))
    config = dataclasses.replace(CONFIG, difficulty=1.0)
    found = []
    for given in (None, labels, (labels + 1) % 5):
        state = init_state(student_optimizer(config), init_student(graph, config, variables, qvariables))
        _, losses = advance_student(graph, config, 1, variables, qvariables, images, given, state, jax.random.key(0))
        found.append(float(losses.cross_entropy))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[2] > found[0]


@pytest.mark.parametrize(("divergences", "best"), [((1, 2, 0.5, 0.7), 28), ((1, 2, 3, 1), 0), ((1, 2, np.nan), None)])
def test_the_best_of_what_was_seen_is_taken(divergences, best, monkeypatch):
    graph, variables, qvariables, images = start_of(small)
    seen, found = [], iter(divergences)

    def fake(qvariables):
        seen.append(qvariables)
        return Comparison(agreement=0.0, sqnr=0.0, divergence=next(found))

    monkeypatch.setattr(loop, "comparer", lambda *_, **__: fake)
    arguments = graph, variables, qvariables, images, jax.random.key(0), CONFIG
    if best is None:
        with pytest.raises(FloatingPointError, match=r"by step 28 of fine-tuning\. Try a lower weight_rate"):
            finetune(*arguments)
        return
    learned, info = finetune(*arguments)
    assert info.best.step == best and info.completed
    same(learned, seen[[e.step for e in info.evaluations].index(best)])
    assert (info.changed > 0) == (best > 0)


def test_an_interrupted_run_keeps_what_there_is():
    graph, variables, qvariables, images = start_of(small)
    reports = []

    def interrupt(progress):
        reports.append(progress)
        signal.raise_signal(signal.SIGINT)

    learned, info = finetune(graph, variables, qvariables, images, jax.random.key(0), CONFIG, on_progress=interrupt)
    # The call that was on its way is not lost.
    assert not info.completed and [e.step for e in info.evaluations] == [0, 11] and len(reports) == 1
    assert (reports[0].step, reports[0].steps, reports[0].num_batches) == (10, 42, 1) and reports[0].eta > 0
    assert info.best.step > 0 and jax.tree.structure(learned) == jax.tree.structure(qvariables)


@pytest.mark.parametrize("at", [10, 30, 42])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, at):
    graph, variables, qvariables, images = start_of(small)
    path, reports = tmp_path / "work.npz", []

    def interrupt(progress):
        if progress.step == at:
            signal.raise_signal(signal.SIGINT)

    arguments = graph, variables, qvariables, images, jax.random.key(0), CONFIG
    _, info = finetune(*arguments, checkpoint=path, on_progress=interrupt, keep_checkpoint=True)
    assert info.completed == (at == 42) and os.listdir(tmp_path) == ["work.npz"]
    resumed, info = finetune(*arguments, checkpoint=path, on_progress=reports.append)
    expected, whole = tuned()
    same(resumed, expected)
    assert dataclasses.replace(info, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)
    assert all(report.step > at for report in reports)  # did not start anew
    assert os.listdir(tmp_path) == []


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "work.npz"
    graph, variables, qvariables, images = start_of(small)
    work = {"variables": variables, "qvariables": qvariables, "images": images, "key": jax.random.key(0)}
    config = dataclasses.replace(CONFIG, steps=2, evaluations=1)
    finetune(graph, **work, config=config, checkpoint=path, keep_checkpoint=True)
    others = {
        "key": jax.random.key(1),
        "config": dataclasses.replace(config, weight_rate=1e-3),
        "variables": jax.tree.map(lambda leaf: leaf + 1e-3, variables),
        "images": images[::-1],
        "labels": jnp.zeros(len(images), jnp.int32),
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=r"checkpoint: '.*work\.npz' belongs to other work"):
            finetune(graph, **{"config": config, **work, name: value}, checkpoint=path)


def test_images_change_from_step_to_step():
    images = images_of(small())
    found = augment_minibatch(FinetuneConfig(), jax.random.key(0), images)
    assert found.shape == images.shape and (found != images).any()
    same(augment_minibatch(FinetuneConfig(flip=False, crop=0), jax.random.key(0), images), images)
    vectors = jnp.ones((4, 7))
    same(augment_minibatch(FinetuneConfig(), jax.random.key(0), vectors), vectors)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"steps": 0}, "steps: expected an integer"),
        ({"crop": -1}, "crop: expected an integer"),
        ({"weight_rate": float("nan")}, "weight_rate: expected a finite number"),
        ({"difficulty": 2}, "difficulty: expected a number from 0 to 1"),
        ({"temperature": 0}, "temperature: expected a positive"),
        ({"flip": 1}, "flip: expected True or False"),
        ({"held_out": 1.0}, "held_out: expected a number above 0"),
        ({"optimizer": "lion"}, "optimizer: expected one of"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"divergence_weight": 0, "feature_weight": 0, "attention_weight": 0, "label_weight": 0}, "all are 0"),
    ],
)
def test_bad_settings_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        FinetuneConfig(**fields)


def test_bad_input_is_refused():
    graph, variables, qvariables, images = start_of(small)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="found float variables"):
        finetune(graph, variables, variables, images, key)
    with pytest.raises(ValueError, match="expected at least 2"):
        finetune(graph, variables, qvariables, images[:1], key)
    with pytest.raises(ValueError, match="images: expected an array"):
        finetune(graph, variables, qvariables, images[..., :2], key)
    with pytest.raises(ValueError, match="do not match the traced network"):
        finetune(graph, {"params": variables["params"]}, qvariables, images, key)
    for labels, match in (
        (np.zeros(3, int), "labels: expected 40 integers"),
        (np.zeros(40), "labels: expected 40 integers"),
        (np.full(40, 5), "labels: expected classes from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=match):
            finetune(graph, variables, qvariables, images, key, labels=labels)
    graph, variables, qvariables, images = start_of(regression)
    with pytest.raises(ValueError, match="no class scores"):
        finetune(graph, variables, qvariables, images, key, labels=np.zeros(40, int))


# --- the recipe ---


def test_the_recipe_fine_tunes_from_fast():
    case = small()
    fields = {f"finetune_{name}": value for name, value in dataclasses.asdict(CONFIG).items()}
    recipe = RECIPES["finetune"].replace(held_out=0.25, **fields)
    assert recipe.finetune == CONFIG
    stages, reports = [], []
    q = quantize(
        case.model,
        case.variables,
        input_shape=case.input_shape,
        recipe=recipe,
        bits="w2a3",
        edge_bits=None,
        images=images_of(case),
        on_stage=stages.append,
        on_progress=reports.append,
    )
    assert stages[-4:] == ["adapt", "fine-tuning", "instant", "compare"] and reports[-1].step == CONFIG.steps
    assert q.report.steps[-2].startswith("fine-tuning: kept, held-out divergence")
    assert recipe_from(q.report.settings) == recipe


def test_fine_tuning_needs_images():
    with pytest.raises(ValueError, match="finetune: takes images"):
        Recipe(name="none", source="analytic", finetune=FinetuneConfig())


@pytest.mark.slow
def test_a_residual_network_comes_nearer_its_teacher():
    graph, variables, qvariables, images = start_of(cifar_resnet8)
    _, info = finetune(graph, variables, qvariables, images, jax.random.key(0), CONFIG)
    assert info.best.divergence < info.evaluations[0].divergence
