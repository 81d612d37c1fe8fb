"""What every estimator, step, rounding and exporter must keep to; a new row of their tables is held to it too."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import GRID

from dfq_jax.export import FORMATS, get_exporter
from dfq_jax.graph import apply_quantized
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.quantizers import dequantized
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.weights import WEIGHT_RANGES, quantize_kernel
from dfq_jax.recipes.images import Images
from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.recipe import NESTED, ROUNDINGS, Recipe
from dfq_jax.recipes.steps import STEPS, Work
from dfq_jax.stages import BatchNormConfig, find_pairs
from dfq_jax.stages.analytic import analytic_comparison
from dfq_jax.stages.comparison import sqnr
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.ranges import BINS, ESTIMATORS, Summary, apply_estimator, summarize

# --- range estimators on one tensor ---


def summary_of(values: np.ndarray) -> Summary:
    """A summary made by NumPy, `[images, values]`."""
    values = values.astype(np.float32)
    lo, hi = values.min(), values.max()
    counts, _ = np.histogram(values, BINS, (lo, hi) if lo < hi else (lo, lo + 1))
    numbers = (values.min(1), values.max(1), counts.astype(np.float32), lo, hi)
    return Summary(*map(jnp.asarray, numbers))


@functools.cache
def summaries() -> dict[str, Summary]:
    normal = np.random.default_rng(0).normal(size=(8, 512))
    values = {
        "gaussian": normal + 0.3,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(4 * normal, 0, 6),
        "swish": normal / (1 + np.exp(-normal)),
        "outlier": np.where(np.arange(512) == 100, 30.0, normal),
        "positive": 1 + np.abs(normal),
        "negative": -1 - np.abs(normal),
        "dead": np.zeros_like(normal),
    }
    return {name: summary_of(value) for name, value in values.items()}


@functools.cache
def jitted(name: str) -> Any:
    """The estimator, compiled once for all summaries of this module."""
    return jax.jit(ESTIMATORS[name], static_argnames="bits")


def widened(ends: Any) -> np.ndarray:
    """The range as a quantizer takes it: an end on the wrong side of zero is free."""
    return np.array([min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_range_estimator(estimator):
    for bits in (4, 8):
        for name, summary in summaries().items():
            found = jitted(estimator)(summary, bits=bits)
            lo, hi = found
            where = f"{name}, {bits} bits"
            assert all(end.shape == () and end.dtype == jnp.float32 for end in found), where
            # Inside what was seen, widened to zero as the quantizer widens it; up to the rounding of the search.
            slack = 1e-5 * max(abs(float(summary.lo)), abs(float(summary.hi)))
            assert min(float(summary.lo), 0) - slack <= lo <= hi <= max(float(summary.hi), 0) + slack, where
            np.testing.assert_array_equal(found, jitted(estimator)(summary, bits=bits), err_msg=where)
            # A histogram has any positive total, and a range has the unit of the tensor.
            fewer = Summary(**{**vars(summary), "counts": summary.counts / 2**14})
            same = widened(jitted(estimator)(fewer, bits=bits))
            np.testing.assert_allclose(same, widened(found), rtol=1e-4, err_msg=where)
            scaled = widened(jitted(estimator)(jax.tree.map(lambda leaf: leaf * 4, summary), bits=bits))
            np.testing.assert_allclose(scaled, 4 * widened(found), rtol=1e-4, err_msg=where)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_range_estimator_jit_equals_eager(estimator):
    for name in ("swish", "relu"):
        eager = ESTIMATORS[estimator](summaries()[name], bits=4)
        np.testing.assert_allclose(jitted(estimator)(summaries()[name], bits=4), eager, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_range_estimator_under_vmap(estimator):
    """Many tensors at once; here two."""
    pair = [summaries()["gaussian"], summaries()["outlier"]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    found = jax.jit(jax.vmap(functools.partial(ESTIMATORS[estimator], bits=4)))(stacked)
    for i, summary in enumerate(pair):
        np.testing.assert_allclose([end[i] for end in found], jitted(estimator)(summary, bits=4), rtol=1e-4)


# --- weight estimators on one kernel ---


@functools.cache
def kernels() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(3, 3, 4, 6))
    values = {
        "plain": plain,
        "outlier": np.where(np.arange(plain.size).reshape(plain.shape) == 50, 12.0, plain),
        "dead channel": plain * (np.arange(6) != 2),
        "positive": np.abs(plain) + 0.5,
        "negative": -np.abs(plain) - 0.5,
        "tiny": plain * 1e-12,
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


@functools.cache
def jitted_range(method: str) -> Any:
    return jax.jit(WEIGHT_RANGES[method], static_argnames=("bits", "symmetric", "channel_axes"))


@pytest.mark.parametrize("channel_axes", [(3,), ()])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", WEIGHT_RANGES)
def test_weight_estimator(method, symmetric, channel_axes):
    shape = (1, 1, 1, 6) if channel_axes else (1, 1, 1, 1)
    axes = (0, 1, 2) if channel_axes else None
    estimate = functools.partial(jitted_range(method), bits=4, symmetric=symmetric, channel_axes=channel_axes)
    for name, kernel in kernels().items():
        found = estimate(kernel)
        lo, hi = map(np.asarray, found)
        smallest, largest = (np.asarray(f(kernel, axis=axes)).reshape(shape) for f in (jnp.min, jnp.max))
        assert lo.shape == hi.shape == shape and lo.dtype == hi.dtype == np.float32, name
        assert (lo <= 0).all() and (hi >= 0).all(), name
        assert (lo >= np.minimum(smallest, 0)).all() and (hi <= np.maximum(largest, 0)).all(), name
        assert ((hi > lo) == (largest != smallest)).all(), name  # only a dead channel has a range of no width
        np.testing.assert_array_equal(found, estimate(kernel), err_msg=name)
        np.testing.assert_allclose(estimate(kernel * 4), 4 * np.asarray(found), rtol=1e-5, err_msg=name)
    # Each channel by itself: the order of channels does not matter.
    if channel_axes:
        flipped = estimate(kernels()["plain"][..., ::-1])
        np.testing.assert_array_equal([end[..., ::-1] for end in flipped], estimate(kernels()["plain"]))


@pytest.mark.parametrize("method", WEIGHT_RANGES)
def test_weight_estimator_jit_equals_eager(method):
    kernel = kernels()["outlier"]
    arguments = {"bits": 4, "symmetric": False, "channel_axes": (3,)}
    eager = WEIGHT_RANGES[method](kernel, **arguments)
    np.testing.assert_allclose(jitted_range(method)(kernel, **arguments), eager, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", WEIGHT_RANGES)
def test_quantized_kernels_keep_shape_and_type(method, dtype):
    kernel = kernels()["plain"].astype(dtype)
    make = functools.partial(quantize_kernel, bits=8, symmetric=True, channel_axes=(3,), method=method)
    shapes = jax.eval_shape(make, kernel)
    assert isinstance(shapes, QTensor) and shapes.shape == kernel.shape and shapes.dtype == dtype
    back = jax.eval_shape(lambda w: make(w).dequantize(), kernel)
    assert (back.shape, back.dtype) == (kernel.shape, kernel.dtype)


# --- both on networks ---


class Network:
    """A network of the grid on sixteen images of noise; what is compiled serves all estimators."""

    def __init__(self, build: Any):
        case = build()
        self.apply_fn, self.variables = case.function()
        self.graph: Graph = trace(self.apply_fn, self.variables, case.input_shape)
        self.images = jax.random.normal(jax.random.key(0), (16, *case.input_shape[1:]))
        self.summaries = summarize(self.graph, self.variables, self.images)
        self.expected = jax.jit(self.apply_fn)(self.variables, self.images)
        self.apply = jax.jit(functools.partial(apply_quantized, self.graph))
        self.quantize = jax.jit(functools.partial(quantize_params, self.graph), static_argnames="convention")

    def ranges(self, estimator: str, convention: Convention) -> dict[str, Any]:
        return apply_estimator(self.graph, self.summaries, convention, jitted(estimator))

    def worst_sqnr(self, qvariables: Any) -> float:
        found = self.apply(qvariables, self.images)
        return min(sqnr(a, b) for a, b in zip(jax.tree.leaves(self.expected), jax.tree.leaves(found), strict=True))


@functools.cache
def network(build: Any) -> Network:
    return Network(build)


W8A8 = Convention.parse("w8a8", weight_range="min_max")
# Decibel of the outputs, where it is not 25. The mean peak clips the larger half of the images by design, and where a
# network is as small as here, pooled features are so few that it clips much of what there is.
QUIET = {"mean_peak": 10}
FAST = ("dilated_grouped", "bfloat16")
FAST_GRID = [pytest.param(*p.values, id=p.id, marks=[] if p.id in FAST else [pytest.mark.slow]) for p in GRID]


@pytest.mark.parametrize("build", FAST_GRID)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_range_estimator_on_a_network(estimator, build):
    net = network(build)
    ranges = net.ranges(estimator, W8A8)
    assert set(ranges) == {tensor.name for tensor in net.graph.tensors}
    assert all(lo.dtype == hi.dtype == jnp.float32 and lo.shape == hi.shape == () for lo, hi in ranges.values())
    assert net.worst_sqnr(net.quantize(net.variables, ranges, convention=W8A8)) > QUIET.get(estimator, 25)


@pytest.mark.parametrize("build", FAST_GRID)
@pytest.mark.parametrize("method", WEIGHT_RANGES)
def test_weight_estimator_on_a_network(method, build):
    net = network(build)
    ranges = net.ranges("max", W8A8)
    convention = Convention.parse("w8a8", weight_range=method)
    qvariables = net.quantize(net.variables, ranges, convention=convention)
    plain = net.quantize(net.variables, ranges, convention=W8A8)
    assert jax.tree.structure(qvariables) == jax.tree.structure(plain)
    for path, a, b in zip(net.graph.leaf_paths, *map(net.graph.leaves, (qvariables, net.variables)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, path
    assert net.worst_sqnr(qvariables) > 25


# --- steps of recipes, and roundings ---


ROWS = [name for name in STEPS if name != "rounding"] + [f"rounding {name}" for name in ROUNDINGS]
# Their loops run on the host, or so does the judge; all others can be traced.
ON_THE_HOST = {"equalization", "range search", "reconstruction", "fine-tuning", "instant"}
# All steps that a field asks for, with the settings that they have by default, as short as they go.
ASKED = {step.field: NESTED.get(step.field, lambda: True)() for step in STEPS.values() if step.field}
RECIPE = Recipe(name="conformance", estimator="max", weight_range="min_max", **ASKED | {"rounding": "nearest"})
RECIPE = RECIPE.replace(
    reconstruction_steps=2,
    reconstruction_batch_size=4,
    bias_correction=True,
    batch_norm=BatchNormConfig(),
    finetune_steps=2,
    finetune_batch_size=4,
)


def work_on(net: Network, row: str, bits: str) -> Work:
    return Work(
        graph=net.graph,
        variables=net.variables,
        recipe=RECIPE.replace(
            rounding=row.removeprefix("rounding ") if row not in STEPS else "nearest",
            range_search=RECIPE.range_search if row == "range search" else None,
        ),
        convention=Convention.parse(bits, weight_range="min_max"),
        images=Images(net.images, "noise", num_fitted=len(net.images)),
        keys={name: jax.random.key(i) for i, name in enumerate(STEPS)},
    )


def step_of(row: str) -> Any:
    return STEPS[row if row in STEPS else "rounding"].run


def nearest(work: Work, start: Candidate) -> Candidate:
    """With ranges and the nearest codes, where they are not there already."""
    return STEPS["weights"].run(work, STEPS["ranges"].run(work, start))


@functools.cache
def taken(row: str, build: Any, bits: str = "w4a4") -> tuple[Work, Candidate, Candidate]:
    """The work, the candidate before the step, and the one after it."""
    net = network(build)
    work, start = work_on(net, row, bits), Candidate(variables=net.variables)
    if row == "weights":
        start = STEPS["ranges"].run(work, start)
    elif row not in ("equalization", "ranges"):
        start = nearest(work, start)
    return work, start, step_of(row)(work, start)


def assert_same_types(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


def assert_equal(found: Any, expected: Any) -> None:
    assert_same_types(found, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


SLOW_BUILDS = (model_grid.conv_bias_bn, model_grid.bfloat16)
STEP_GRID = [model_grid.mlp, *(pytest.param(build, marks=pytest.mark.slow) for build in SLOW_BUILDS)]
LEARNED = ("reconstruction", "fine-tuning")
FAST_ROWS = [pytest.param(row, marks=[pytest.mark.slow] if row in LEARNED else []) for row in ROWS]


@pytest.mark.parametrize("build", STEP_GRID)
@pytest.mark.parametrize("row", ROWS)
def test_step_keeps_the_tree(row, build):
    work, start, found = taken(row, build)
    assert find_pairs(work.graph)[0]  # there is something to equalize
    assert_same_types(found.variables, start.variables)
    if start.quantized is not None:
        assert_same_types(found.quantized, start.quantized)
    complete = nearest(work, found)
    leaves = map(work.graph.leaves, (complete.quantized, start.variables))
    for path, a, b in zip(work.graph.leaf_paths, *leaves, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, path
    assert set(complete.ranges) == {tensor.name for tensor in work.graph.tensors}
    assert start.decisions == found.decisions[: len(start.decisions)]


@pytest.mark.parametrize("row", ROWS)
def test_step_gives_the_same_again(row):
    work, start, found = taken(row, model_grid.mlp)
    again = step_of(row)(work, start)
    assert (again.decisions, again.divergence) == (found.decisions, found.divergence)
    for name in ("variables", "ranges", "quantized"):
        assert_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ON_THE_HOST])
def test_step_jit_equals_eager(row):
    work, start, found = taken(row, model_grid.mlp)

    @jax.jit
    def step(images, variables, ranges, quantized):
        on_images = dataclasses.replace(work, images=work.images._replace(images=images))
        before = dataclasses.replace(start, variables=variables, ranges=ranges, quantized=quantized)
        after = step_of(row)(on_images, before)
        return after.variables, after.ranges, after.quantized

    jitted = step(work.images.images, start.variables, start.ranges, start.quantized)
    expected = (found.variables, found.ranges, found.quantized)
    assert_same_types(jitted, expected)
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.integer):
            assert (a != b).mean() < 0.01  # what lies between two codes may go to either
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", FAST_ROWS)
def test_step_with_nothing_to_do(row):
    """No pairs to equalize, activations in float, and weights that lie on their codes."""
    net = network(model_grid.dilated_grouped)
    work = work_on(net, row, "w4a16")
    assert not find_pairs(work.graph)[0]
    exact = dequantized(nearest(work, Candidate(variables=net.variables)).quantized)
    start = Candidate(variables=exact)
    if row in ("equalization", "ranges", "weights"):
        start = start if row == "equalization" else nearest(work, start)
        assert step_of(row)(work, start) is start
        assert start.ranges is None or start.ranges == {}
        return
    start = nearest(work, start)
    found = step_of(row)(work, start).quantized
    assert_same_types(found, start.quantized)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(start.quantized), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", FAST_ROWS)
def test_step_at_eight_bits(row):
    work, _, found = taken(row, model_grid.mlp, "w8a8")
    net, qvariables = network(model_grid.mlp), nearest(work, found).quantized
    if row in ("range search", "instant"):
        # Their ranges are from BatchNorm parameters, whose moments these images do not have.
        assert analytic_comparison(net.graph, found.variables, qvariables).sqnr > 25
    else:
        assert net.worst_sqnr(qvariables) > 25


# --- exporters ---


@functools.cache
def exported() -> Quantized:
    net = network(model_grid.mlp)
    work = work_on(net, "weights", "w8a8")
    qvariables = nearest(work, Candidate(variables=net.variables)).quantized
    return Quantized(
        variables=qvariables,
        graph=net.graph,
        report=None,
        recipe=work.recipe,
        convention=work.convention,
        images=net.images,
    )


def exporter_of(name: str) -> Any:
    """The exporter; Qwix's files have parameters alone, so that it takes the model's code, too."""
    exporter = get_exporter(name)
    return dataclasses.replace(exporter, module=model_grid.mlp().model) if name == "qwix" else exporter


def written(name: str, path: Any) -> Any:
    """What runs the network from a file; the test is skipped where the format's libraries are missing."""
    try:
        exporter_of(name).write(exported(), path)
        return exporter_of(name).open(path)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FORMATS)
def test_exporter_computes_what_the_simulation_does(name, tmp_path):
    run, net = written(name, tmp_path / "net"), exported()
    expected = np.asarray(net.graph.logits(net(net.images)))
    for count in (1, 16):
        found = run(np.asarray(net.images[:count]))
        assert found.shape == (count, net.graph.num_classes) and found.dtype == np.float32
        assert sqnr(expected[:count], found) > 20
    with pytest.raises(ValueError, match="x: "):
        run(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_exporter_leaves_one_file_or_none(name, tmp_path):
    written(name, tmp_path / "net")
    assert os.listdir(tmp_path) == ["net"]
    with pytest.raises(OSError):
        exporter_of(name).write(exported(), tmp_path / "missing" / "net")
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("name", FORMATS)
def test_exporter_refuses_other_files(name, tmp_path):
    (tmp_path / "text").write_text("nothing of the kind, though long enough to be read as one")
    try:
        with pytest.raises(ValueError):
            exporter_of(name).open(tmp_path / "text")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FORMATS)
def test_exporter_is_what_it_is_called(name):
    assert get_exporter(name).name == name
    assert get_exporter(name).extra
