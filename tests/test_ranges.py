"""Clipping ranges: every estimator against NumPy in float64 on the raw values, and closed forms for BatchNorm alone."""

import math

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.qtensor import fake_quant, params_from_range
from dfq_jax.stages import ranges
from dfq_jax.stages.analytic import analytic_summaries
from dfq_jax.stages.convention import Convention
from dfq_jax.stages.ranges import ESTIMATORS, estimate_ranges, optimal_clip, summarize
from dfq_jax.stages.rules import LayerRule

WIDTH = 64


def network(v, x):
    return jax.nn.relu(x @ v["a"] + v["b"]) @ v["c"]


VARIABLES = model_grid.function_case("net", network, {"a": (WIDTH, 8), "b": (8,), "c": (8, 3)}, (1, WIDTH)).variables
GRAPH = trace(network, VARIABLES, (1, WIDTH))


def summary_of(values, **arguments):
    """Of the tensor that the first layer reads: the images themselves."""
    return summarize(GRAPH, VARIABLES, jnp.asarray(values, jnp.float32), **arguments)[GRAPH.first_layer.tensor]


def samples(name, count=128):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(count, WIDTH))
    values = {
        "gaussian": normal + 0.3,
        "relu": np.maximum(normal, 0),
        "swish": 3 * normal / (1 + np.exp(-3 * normal)),
        "laplace": rng.laplace(size=normal.shape),
        "exponential": np.maximum(rng.laplace(size=normal.shape), 0),
        "positive": 0.5 + rng.uniform(size=normal.shape) ** 4,
        "negative": -np.abs(normal),
        "outlier": np.where(np.arange(normal.size).reshape(normal.shape) == 1000, 40.0, normal),
        "zero": np.zeros_like(normal),
        "constant": np.full_like(normal, 3.0),
        "negative constant": np.full_like(normal, -2.0),
    }[name]
    return np.asarray(np.asarray(values, np.float32), np.float64)


SPREAD = ("gaussian", "relu", "swish", "laplace", "exponential", "positive", "negative", "outlier")
CONSTANT = ("zero", "constant", "negative constant")


# --- estimators ---


@pytest.mark.parametrize("name", [*SPREAD, *CONSTANT])
def test_maximum_and_mean_of_peaks(name):
    x = samples(name)
    summary = summary_of(x)
    assert ranges.maximum(summary, bits=4) == (x.min(), x.max())
    np.testing.assert_allclose(ranges.mean_peak(summary, bits=4), (x.min(1).mean(), x.max(1).mean()), rtol=1e-5)


@pytest.mark.parametrize("percent", [99.9, 99.0, 80.0])
@pytest.mark.parametrize("name", SPREAD)
def test_percentile(name, percent):
    x = samples(name)
    lo, hi = ranges.percentile(summary_of(x), bits=4, percent=percent)
    tail = 1 - percent / 100
    if x.min() < 0 < x.max():
        tail /= 2
    width = (x.max() - x.min()) / ranges.BINS
    wanted_lo = np.quantile(x, tail, method="inverted_cdf") if x.min() < 0 else x.min()
    wanted_hi = np.quantile(x, 1 - tail, method="inverted_cdf") if x.max() > 0 else x.max()
    np.testing.assert_allclose(lo, wanted_lo, atol=1.01 * width)
    np.testing.assert_allclose(hi, wanted_hi, atol=1.01 * width)


def quantization_error(x, lo, hi, bits, p):
    """Mean |x - Q(x)|^p, written out."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (2**bits - 1)
    zero = np.round(-lo / scale)
    codes = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
    return (np.abs(x - scale * (codes - zero)) ** p).mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize(("estimator", "p"), [("mse", 2.0), ("lp", 2.4)])
def test_searches(estimator, p, name, bits):
    x = samples(name, 32)
    lo, hi = map(float, ESTIMATORS[estimator](summary_of(x), bits=bits))
    assert min(x.min(), 0) - 1e-5 <= lo <= hi <= max(x.max(), 0) + 1e-5
    fractions = np.linspace(0.02, 1, 50)
    lows = fractions if x.min() < 0 else [1.0]
    highs = fractions if x.max() > 0 else [1.0]
    best = min(quantization_error(x, x.min() * a, x.max() * b, bits, p) for a in lows for b in highs)
    # The search moves one end at a time, on a histogram: nearly as good as all pairs of ends on all values.
    assert quantization_error(x, lo, hi, bits, p) <= 1.06 * best


GAUSSIAN = {2: (1.50, 1.96), 3: (2.06, 2.48), 4: (2.52, 2.90), 5: (2.92, 3.28), 6: (3.28, 3.60), 8: (3.92, 4.22)}
LAPLACE = {2: (2.30, 3.48), 3: (3.62, 4.82), 4: (4.88, 6.10), 5: (6.14, 7.36), 6: (7.38, 8.62), 8: (9.88, 11.16)}


@pytest.mark.parametrize("bits", GAUSSIAN)
@pytest.mark.parametrize(("family", "table"), [("gaussian", GAUSSIAN), ("laplace", LAPLACE)])
def test_optimal_clips(family, table, bits):
    """Against an independent computation by quadrature: signed, and rectified."""
    for rectified in (False, True):
        found = optimal_clip(family, bits, rectified)
        np.testing.assert_allclose(found, table[bits][rectified], atol=0.05)


def test_aciq_is_the_optimal_clip_of_the_measured_spread():
    x = samples("gaussian", 1024)
    lo, hi = ranges.aciq_gaussian(summary_of(x), bits=4)
    np.testing.assert_allclose([lo, hi], [x.mean() - 2.52 * x.std(), x.mean() + 2.52 * x.std()], atol=0.06)
    x = samples("laplace", 1024)
    lo, hi = ranges.aciq_laplace(summary_of(x), bits=3)
    b = np.abs(x - x.mean()).mean()
    np.testing.assert_allclose([lo, hi], [x.mean() - 3.62 * b, x.mean() + 3.62 * b], atol=0.08)
    lo, hi = ranges.aciq_gaussian(summary_of(samples("relu", 1024)), bits=4)
    np.testing.assert_allclose([lo, hi], [0, 2.90], atol=0.06)
    lo, hi = ranges.aciq_laplace(summary_of(samples("exponential", 1024)), bits=4)
    np.testing.assert_allclose([lo, hi], [0, 6.10], atol=0.15)
    # Where the distribution is the assumed one, it is what the search finds.
    for name in ("relu", "gaussian"):
        summary = summary_of(samples(name, 1024))
        np.testing.assert_allclose(
            ranges.aciq_gaussian(summary, bits=4), ranges.mse(summary, bits=4), rtol=0.08, atol=0.08
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", [*SPREAD, *CONSTANT])
def test_every_estimator_on_every_distribution(name, estimator):
    x = samples(name, 16)
    for bits in (2, 8):
        lo, hi = ESTIMATORS[estimator](summary_of(x), bits=bits)
        assert np.isfinite(lo) and np.isfinite(hi) and lo <= hi
        assert lo >= min(x.min(), 0) - 1e-5 and hi <= max(x.max(), 0) + 1e-5
    params = params_from_range(lo, hi, bits=8)
    error = np.abs(fake_quant(jnp.asarray(x, jnp.float32), params) - x)
    if name in CONSTANT:
        np.testing.assert_allclose(error, 0, atol=0.02)
    assert np.isfinite(error).all()


# --- summaries ---


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 12, 100])
def test_summaries_do_not_depend_on_the_batch_size(batch_size):
    x = samples("swish", 12)
    whole, parts = summary_of(x), summary_of(x, batch_size=batch_size)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert whole.counts.sum() == x.size
    np.testing.assert_array_equal(whole.peak_hi, x.max(1))
    edges = np.linspace(x.min(), x.max(), ranges.BINS + 1)
    expected, _ = np.histogram(x, edges)
    # Bins are the same up to values within rounding of an edge.
    assert np.abs(np.cumsum(expected) - np.cumsum(whole.counts)).max() <= 3
    np.testing.assert_allclose(whole.centers, (edges[:-1] + edges[1:]) / 2, rtol=1e-4, atol=1e-5)


def test_batches_cover_all_images():
    for count in (1, 7, 12, 13, 65, 127, 128):
        for batch_size in (1, 4, 5, 64):
            parts = list(ranges.batches(np.arange(count), batch_size))
            assert np.concatenate(parts).tolist() == list(range(count))
            assert max(map(len, parts)) <= batch_size
            assert len({len(p) for p in parts}) <= 2
            assert len(parts) <= 4 * math.ceil(count / batch_size)


def test_thinned_histograms_weigh_images_alike(monkeypatch):
    monkeypatch.setattr(ranges, "MAX_SAMPLES", 200)
    x = np.zeros((9, WIDTH))
    x[8] = 1.0  # alone in the last batch, which is thinned less
    summary = summary_of(x, batch_size=8)
    np.testing.assert_allclose(summary.counts[-1] / summary.counts.sum(), 1 / 9, rtol=0.05)


def test_thinning_visits_every_channel():
    for shape in ((64, 56, 56, 64), (64, 7, 7, 2048), (8, 512), (1, 1000, 1000, 3)):
        stride = ranges._stride(shape)
        size = math.prod(shape)
        assert size / stride <= ranges.MAX_SAMPLES
        visited = np.unique(np.arange(0, size, stride) % shape[-1])
        assert len(visited) == min(shape[-1], len(np.arange(0, size, stride)))


# --- the whole ---


def hidden(x):
    a, b = np.asarray(VARIABLES["a"], np.float64), np.asarray(VARIABLES["b"], np.float64)
    return np.maximum(np.asarray(x, np.float64) @ a + b, 0)


def test_estimate_ranges_of_a_network():
    x = jnp.asarray(samples("gaussian", 24), jnp.float32)
    found = estimate_ranges(GRAPH, VARIABLES, x, Convention(), estimator="max", batch_size=5)
    assert list(found) == [t.name for t in GRAPH.tensors]
    (lo, hi), (hidden_lo, hidden_hi) = found.values()
    assert (lo, hi) == (x.min(), x.max())
    np.testing.assert_allclose((hidden_lo, hidden_hi), (0, hidden(x).max()), rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}

    asked = []

    def estimator(summary, *, bits):
        asked.append(bits)
        return summary.lo, 2 * bits

    found = estimate_ranges(GRAPH, VARIABLES, x, Convention(edge_bits=6), estimator=estimator)
    assert asked == [6, 6]  # the input of the first and of the last layer
    assert [hi for _, hi in found.values()] == [12, 12]
    assert estimate_ranges(GRAPH, VARIABLES, x, Convention(activation_bits=None)) == {}


def test_other_image_sizes_are_taken():
    case = model_grid.resnet18()
    graph = trace(*case.function(), case.input_shape)
    images = jnp.zeros((3, 40, 24, 3))
    assert estimate_ranges(graph, case.variables, images, Convention(), estimator="max")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, WIDTH), np.float32), "found none; pass at least one"),
        (np.zeros((4, 3), np.float32), r"like \[N, 64\], found \(4, 3\)"),
        (np.zeros((4, 2, WIDTH), np.float32), r"found \(4, 2, 64\)"),
        (np.full((2, WIDTH), np.nan, np.float32), "NaN or infinite"),
        (np.full((2, WIDTH), np.inf, np.float32), "NaN or infinite"),
        (np.zeros((2, WIDTH), np.uint8), "expected preprocessed floating-point images, found uint8"),
        ([[0.0] * WIDTH], "found ()"),
    ],
    ids=["none", "channels", "rank", "nan", "inf", "integers", "list"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=f"^images: .*{message}"):
        estimate_ranges(GRAPH, VARIABLES, images, Convention())


@pytest.mark.untyped
def test_other_errors():
    x = jnp.zeros((2, WIDTH))
    with pytest.raises(ValueError, match=r"estimator: expected a function or one of \['aciq.*found 'median'"):
        estimate_ranges(GRAPH, VARIABLES, x, Convention(), estimator="median")
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, found 0"):
        estimate_ranges(GRAPH, VARIABLES, x, Convention(), batch_size=0)
    case = model_grid.vgg()  # its flattened features fix the image size
    graph = trace(*case.function(), case.input_shape)
    with pytest.raises(GraphError, match=r"^images: .*\[N, 8, 8, 3\], found \(2, 12, 12, 3\).* shape \(2, 12, 12, 3\)"):
        estimate_ranges(graph, case.variables, jnp.zeros((2, 12, 12, 3)), Convention())


# --- from BatchNorm parameters alone ---


def phi(x):
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


Phi = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))


def relu_moments(mean, std):
    """First and second moment of max(x, 0), x ~ N(mean, std^2)."""
    z = mean / std
    return mean * Phi(z) + std * phi(z), (mean**2 + std**2) * Phi(z) + mean * std * phi(z)


def clip_mean(mean, std, a, b):
    """Mean of clip(x, a, b), x ~ N(mean, std^2)."""
    za, zb = (a - mean) / std, (b - mean) / std
    return std * (phi(za) - phi(zb)) + mean * (Phi(zb) - Phi(za)) + a * Phi(za) + b * (1 - Phi(zb))


def branching(v, x):
    """Layers that read a ReLU, a ReLU6, and a residual sum of the two before it."""

    def norm(p, x):
        return (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) * p["scale"] + p["bias"]

    y = jax.nn.relu(norm(v["n1"], x @ v["k1"]))
    z = jnp.clip(norm(v["n2"], y @ v["k2"]), 0, 6)
    u = norm(v["n3"], z @ v["k3"])
    return ((y + u) @ v["k4"]).mean((1, 2))


def branching_case():
    norm = {k: (6,) for k in ("mean", "var", "scale", "bias")}
    shapes = {"k1": (3, 6), "n1": norm, "k2": (6, 6), "n2": norm, "k3": (6, 6), "n3": norm, "k4": (6, 4)}
    case = model_grid.function_case("branching", branching, shapes, (1, 6, 6, 3))
    rng = np.random.default_rng(5)
    for name, mean, std in (("n1", 0.2, 1.0), ("n2", 3.0, 2.5), ("n3", -0.5, 1.0)):
        case.variables[name] |= {
            "bias": jnp.asarray(rng.normal(mean, 0.5, 6), jnp.float32),
            "scale": jnp.asarray(std * rng.uniform(0.5, 1.5, 6) * [1, 1, 1, 1, -1, 1], jnp.float32),
        }
    return trace(branching, case.variables, case.input_shape), case.variables


def moment(summary, power):
    weight = np.asarray(summary.counts, np.float64) / np.asarray(summary.counts, np.float64).sum()
    return (weight * np.asarray(summary.centers, np.float64) ** power).sum()


def test_analytic_moments_are_the_closed_forms():
    graph, variables = branching_case()
    summaries = dict(zip(("input", "relu", "relu6", "sum"), analytic_summaries(
        graph, variables, num_samples=600).values(), strict=True))  # fmt: skip
    mean, std = ({n: np.asarray(variables[n][k], np.float64) for n in ("n1", "n2", "n3")} for k in ("bias", "scale"))
    std = {n: np.abs(s) for n, s in std.items()}
    np.testing.assert_allclose(moment(summaries["input"], 1), 0, atol=0.02)
    np.testing.assert_allclose(moment(summaries["input"], 2), 1, rtol=0.02)
    first, second = relu_moments(mean["n1"], std["n1"])
    np.testing.assert_allclose(moment(summaries["relu"], 1), first.mean(), rtol=0.02)
    np.testing.assert_allclose(moment(summaries["relu"], 2), second.mean(), rtol=0.03)
    np.testing.assert_allclose(moment(summaries["relu6"], 1), clip_mean(mean["n2"], std["n2"], 0, 6).mean(), rtol=0.02)
    assert summaries["relu6"].hi == 6 and summaries["relu6"].lo == 0
    # The summands come from different BatchNorms and are independent.
    np.testing.assert_allclose(moment(summaries["sum"], 1), (first + mean["n3"]).mean(), atol=0.03)
    total = second - first**2 + std["n3"] ** 2 + (first + mean["n3"]) ** 2
    np.testing.assert_allclose(moment(summaries["sum"], 2), total.mean(), rtol=0.03)


def chained(v, x):
    """A layer behind a BatchNorm, in the middle."""
    for norm, kernel in (("n1", "k2"), ("n2", "k3")):
        x = (x - v[norm]["mean"]) * jax.lax.rsqrt(v[norm]["var"] + 1e-3) * v[norm]["scale"] + v[norm]["bias"]
        x = x @ v[kernel]
    return x


@pytest.mark.parametrize(("bits", "excess"), [(4, 0.0), (6, 1.875), (8, 1.875), (None, 0.0)])
def test_analytic_tails(bits, excess):
    """A quarter of Laplacian noise's variance is common to pixels: its excess kurtosis is 3 (0.25^2 + 0.75^2)."""
    norm = {k: (6,) for k in ("mean", "var", "scale", "bias")}
    shapes = {"n1": norm, "k2": (6, 6), "n2": norm, "k3": (6, 4)}
    case = model_grid.function_case("chained", chained, shapes, (1, 6))
    case.variables["n2"] |= {"scale": jnp.full(6, 2.0), "bias": jnp.full(6, 50.0), "var": jnp.full(6, 1e6)}
    graph = trace(chained, case.variables, case.input_shape)
    convention = None if bits is None else Convention(activation_bits=bits, edge_bits=None)
    summary = analytic_summaries(graph, case.variables, convention, num_samples=60_000)[graph.last_layer.tensor]
    weight = np.asarray(summary.counts, np.float64) / np.asarray(summary.counts, np.float64).sum()
    centered = (np.asarray(summary.centers, np.float64) - 50) / 2
    np.testing.assert_allclose((weight * centered).sum(), 0.0, atol=0.01)
    np.testing.assert_allclose((weight * centered**2).sum(), 1.0, rtol=0.01)
    np.testing.assert_allclose((weight * centered**4).sum() - 3, excess, atol=0.1)


def test_analytic_tails_of_each_tensor():
    graph, variables = branching_case()
    mixed = analytic_summaries(graph, variables, Convention(activation_bits=4, edge_bits=8), num_samples=16)
    heavy, light = (
        analytic_summaries(graph, variables, Convention(activation_bits=bits, edge_bits=None), num_samples=16)
        for bits in (8, 4)
    )
    edges = {graph.first_layer.tensor, graph.last_layer.tensor}
    for name, summary in mixed.items():
        jax.tree.map(np.testing.assert_array_equal, summary, (heavy if name in edges else light)[name])
    assert any(float(heavy[name].hi) != float(light[name].hi) for name in edges)
    rule = LayerRule(pattern=graph.last_layer.name, activation_bits=None)
    partly = analytic_summaries(graph, variables, Convention(rules=(rule,)), num_samples=16)
    assert set(mixed) - set(partly) == {graph.last_layer.tensor}
    with pytest.raises(TypeError, match="convention"):
        analytic_summaries(graph, variables, "w4a4")


def test_analytic_summaries_need_the_parameters_alone():
    graph, variables = branching_case()
    once = analytic_summaries(graph, variables)
    rng = np.random.default_rng(1)
    others = {
        name: v if name.startswith("n") or name == "k4" else jnp.asarray(rng.normal(size=v.shape), jnp.float32)
        for name, v in variables.items()
    }
    jax.tree.map(np.testing.assert_array_equal, once, analytic_summaries(graph, others))
    found = ranges.apply_estimator(graph, once, Convention(), ranges.lp)
    assert set(found) == {t.name for t in graph.tensors}


def test_analytic_summaries_need_batch_norm():
    with pytest.raises(GraphError, match="no BatchNorm, so nothing is known of its activations"):
        analytic_summaries(GRAPH, VARIABLES)
