"""What every range estimator and every weight estimator must keep to; a new entry of the tables is held to it too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_grid import GRID

from dfq_jax.graph import apply_quantized
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.weights import WEIGHT_RANGES, quantize_kernel
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
