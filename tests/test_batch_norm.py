"""Adaptation of BatchNorm statistics and biases, against NumPy in float64 and by its defining properties."""

import functools

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

from dfq_jax.graph import affine, apply_quantized, batch_norm_parameters
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers.collection import QUANTIZATION
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.stages.batch_norm import METHODS, BatchNormConfig, adapt_batch_norm, batch_norm_moments
from dfq_jax.stages.bias_correction import correct_bias
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.ranges import estimate_ranges

SHAPE = (1, 8, 8, 3)
UNITS = ("unit1", "unit2")
EPSILON = 1e-3


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network(v, x):
    """Two convolutions with BatchNorm, the second with a bias of its own and statistics that broadcast as they are."""
    for name in UNITS:
        p = v[name]
        y = convolve(x, p["kernel"]) + p.get("bias", 0)
        x = jax.nn.relu((y - p["mean"]) * jax.lax.rsqrt(p["var"] + EPSILON) * p["gamma"] + p["beta"])
    return x.mean((1, 2)) @ v["head"]["kernel"] + v["head"]["bias"]


def build():
    def statistics(*shape):
        return dict.fromkeys(("mean", "var", "gamma", "beta"), shape)

    shapes = {
        "unit1": {"kernel": (3, 3, 3, 4), **statistics(4)},
        "unit2": {"kernel": (3, 3, 4, 6), "bias": (6,), **statistics(1, 1, 1, 6)},
        "head": {"kernel": (6, 5), "bias": (5,)},
    }
    variables = model_grid.function_case("network", network, shapes, SHAPE).variables
    return trace(network, variables, SHAPE), variables


GRAPH, VARIABLES = build()
IMAGES = jnp.asarray(np.random.default_rng(0).normal(0.2, 1.3, (12, *SHAPE[1:])), jnp.float32)


@functools.cache
def quantized(bits="w3a3", edge_bits=None):
    convention = Convention.parse(bits, edge_bits=edge_bits)
    ranges = estimate_ranges(GRAPH, VARIABLES, IMAGES, convention, estimator="percentile")
    return quantize_params(GRAPH, VARIABLES, ranges, convention)


def statistics_of(variables):
    """Mean and variance of both units, in float64."""
    return {n: tuple(np.asarray(variables[n][k], np.float64).reshape(-1) for k in ("mean", "var")) for n in UNITS}


# --- the same in NumPy ---


def dequantized(leaf):
    return np.asarray(leaf.dequantize() if isinstance(leaf, QTensor) else leaf, np.float64)


def quantize_activations(x, params):
    zero = np.float64(params.zero_point)
    codes = np.clip(np.round(x / np.float64(params.scale)) + zero, 0, 2**params.bits - 1)
    return np.float64(params.scale) * (codes - zero)


def forward(variables, x, choose):
    """Inputs of the BatchNorms; `choose(unit, input)` gives the statistics to normalize by."""
    collection = variables.get(QUANTIZATION, {})
    quantizers = {**collection.get("tensors", {}), **collection.get("operands", {})}
    x = np.asarray(x, np.float64)
    inputs = {}
    for name, layer in zip(UNITS, GRAPH.layers, strict=False):
        p = variables[name]
        if layer.tensor in quantizers:
            x = quantize_activations(x, quantizers[layer.tensor])
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        y = np.einsum("nhwcij,ijcd->nhwd", windows, dequantized(p["kernel"])) + dequantized(p.get("bias", np.zeros(1)))
        inputs[name] = y
        mean, var = choose(name, y)
        gamma, beta = (np.asarray(p[k], np.float64).reshape(-1) for k in ("gamma", "beta"))
        x = np.maximum((y - mean) / np.sqrt(var + EPSILON) * gamma + beta, 0)
    return inputs


def moments(inputs):
    return {name: (y.mean((0, 1, 2)), y.var((0, 1, 2))) for name, y in inputs.items()}


def fitted_slope(x, y):
    """Of the line from each channel of x to that of y: least squares, with a ridge of epsilon a value about 1."""
    x, y = (np.moveaxis(z - z.mean((0, 1, 2)), 3, 0).reshape(z.shape[3], -1) for z in (x, y))
    ridge = np.sqrt(EPSILON * x.shape[1])
    rows = [(np.append(a, ridge)[:, None], np.append(b, ridge)) for a, b in zip(x, y, strict=True)]
    return np.concatenate([np.linalg.lstsq(*row)[0] for row in rows])


def expected(config, variables, qvariables, x):
    """The new statistics, written out."""
    stored = statistics_of(variables)
    reference = forward(variables, x, lambda name, *_: stored[name])
    trust = len(x) / (len(x) + config.prior_images)
    new = {}

    def adapt(name, y):
        (old_mean, old_var), wanted = stored[name], reference[name]
        (wanted_mean, wanted_var), (mean, var) = ((z.mean((0, 1, 2)), z.var((0, 1, 2))) for z in (wanted, y))
        if config.method == "absolute":
            new[name] = old_mean + trust * (mean - old_mean), old_var + trust * (var - old_var)
            return new[name]
        ratio = (var + EPSILON) / (wanted_var + EPSILON)
        shift = mean - wanted_mean
        if config.method == "regression":
            slope = (1 - config.blend) * fitted_slope(y, wanted) + config.blend / np.sqrt(ratio)
            ratio = 1 / np.maximum(slope, 1e-9) ** 2
        ratio = np.clip(ratio, 1 / config.max_ratio, config.max_ratio) ** trust
        if config.method == "regression":
            shift = mean + (old_mean - wanted_mean) * np.sqrt(ratio) - old_mean
        new[name] = old_mean + trust * shift, (old_var + EPSILON) * ratio - EPSILON
        return new[name]

    forward(qvariables, x, adapt)
    return new


def assert_statistics(found, wanted, **tolerance):
    for name, values in statistics_of(found).items():
        for value, target in zip(values, wanted[name], strict=True):
            np.testing.assert_allclose(value, target, **tolerance)


CONFIGS = [
    BatchNormConfig(method="absolute"),
    BatchNormConfig(method="absolute", prior_images=5.0),
    BatchNormConfig(),
    BatchNormConfig(prior_images=5.0),
    BatchNormConfig(max_ratio=1.05),
    BatchNormConfig(method="regression"),
    BatchNormConfig(method="regression", blend=0.5, prior_images=5.0),
    BatchNormConfig(method="regression", blend=1.0),
    BatchNormConfig(method="regression", max_ratio=1.05),
]
IDS = [
    "absolute", "absolute-prior", "differential", "prior", "max-ratio",
    "least-squares", "half-prior", "equal-variances", "regression-max-ratio",
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_statistics_are_those_of_numpy(config):
    found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config)
    # A value within rounding of the middle of a step may be quantized to the other side.
    assert_statistics(found, expected(config, VARIABLES, quantized(), IMAGES), rtol=2e-3, atol=2e-3)
    assert np.abs(statistics_of(found)["unit2"][0] - statistics_of(VARIABLES)["unit2"][0]).max() > 0.05


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_moments_are_those_of_all_images_together(batch_size):
    stored = statistics_of(VARIABLES)
    for variables, tolerance in ((VARIABLES, 1e-5), (quantized(), 2e-3)):
        found = batch_norm_moments(GRAPH, variables, IMAGES, batch_size=batch_size)
        wanted = moments(forward(variables, IMAGES, lambda name, *_: stored[name]))
        for bn, name in zip(GRAPH.batch_norms, UNITS, strict=True):
            for value, target in zip(found[bn.name], wanted[name], strict=True):
                np.testing.assert_allclose(value, target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["differential", "regression"])
def test_without_quantization_nothing_changes(method):
    config = BatchNormConfig(method=method)
    found = adapt_batch_norm(GRAPH, VARIABLES, VARIABLES, IMAGES, config)
    assert_statistics(found, statistics_of(VARIABLES), rtol=1e-5, atol=2e-6)
    found = adapt_batch_norm(GRAPH, VARIABLES, quantized("w8a8"), IMAGES, config)
    assert_statistics(found, statistics_of(VARIABLES), rtol=0.02, atol=0.02)


def calibrated():
    """Variables whose statistics are those of the images."""
    return adapt_batch_norm(GRAPH, VARIABLES, VARIABLES, IMAGES, BatchNormConfig(method="absolute"))


def test_methods_of_moments_agree_on_images_that_match_the_statistics():
    variables = calibrated()
    q = {**quantized(), **{n: {**quantized()[n], **{k: variables[n][k] for k in ("mean", "var")}} for n in UNITS}}
    found = [
        adapt_batch_norm(GRAPH, variables, q, IMAGES, BatchNormConfig(method=m, max_ratio=100.0))
        for m in ("absolute", "differential")
    ]
    assert_statistics(found[0], statistics_of(found[1]), rtol=1e-4, atol=1e-5)


def test_absolute_adaptation_is_a_fixed_point():
    config = BatchNormConfig(method="absolute")
    found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config)
    measured = batch_norm_moments(GRAPH, found, IMAGES)
    assert_statistics(found, dict(zip(UNITS, measured.values(), strict=True)), rtol=1e-4, atol=1e-5)
    again = adapt_batch_norm(GRAPH, VARIABLES, found, IMAGES, config)
    assert_statistics(again, statistics_of(found), rtol=1e-4, atol=1e-5)


LAYOUTS = [
    model_grid.pre_activation_resnet, model_grid.private_batch_norm, model_grid.channels_first, model_grid.mlp,
    pytest.param(model_grid.mobilenet_v2, marks=pytest.mark.slow),
    pytest.param(model_grid.densenet, marks=pytest.mark.slow),
    pytest.param(model_grid.resnet18, marks=pytest.mark.slow),
    pytest.param(model_grid.nnx_resnet, marks=pytest.mark.slow),
    pytest.param(model_grid.shared_kernel, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("build_case", LAYOUTS, ids=lambda b: b.__name__)
def test_differential_adaptation_moves_by_the_difference(build_case):
    """Behind it, every BatchNorm's mean has moved by as much as its input has, those before it included."""
    case = build_case()
    function, variables = case.function()
    graph = trace(function, variables, case.input_shape)
    images = jax.random.normal(jax.random.key(0), (8, *case.input_shape[1:]))
    convention = Convention.parse("w4a8", weight_range="min_max")
    ranges = estimate_ranges(graph, variables, images, convention, estimator="max")
    q = quantize_params(graph, variables, ranges, convention)
    found = adapt_batch_norm(graph, variables, q, images, BatchNormConfig(max_ratio=1e6))
    before, after = (batch_norm_moments(graph, v, images) for v in (variables, found))
    for bn in graph.batch_norms:
        stored, new = (
            [np.asarray(graph.leaf(v, path)).reshape(-1) for path in (bn.mean, bn.var)] for v in (variables, found)
        )
        (mean, var), (new_mean, new_var) = before[bn.name], after[bn.name]
        scale = np.sqrt(stored[1])
        np.testing.assert_allclose((new[0] - stored[0]) / scale, (new_mean - mean) / scale, atol=5e-3)
        ratio = (new_var + bn.epsilon) / (var + bn.epsilon)
        np.testing.assert_allclose((new[1] + bn.epsilon) / (stored[1] + bn.epsilon), ratio, rtol=2e-2)
    changes = [graph.leaf(found, bn.mean) - graph.leaf(variables, bn.mean) for bn in graph.batch_norms]
    assert max(np.abs(c).max() for c in changes) > 1e-3


def normalized_error(variables, unit):
    """Squared error per channel of what is behind a unit's BatchNorm."""
    stored = {"float": statistics_of(VARIABLES), "quantized": statistics_of(variables)}
    behind = []
    for v, statistics in zip((VARIABLES, variables), stored.values(), strict=True):
        inputs = forward(v, IMAGES, lambda name, _, statistics=statistics: statistics[name])
        mean, var = statistics[unit]
        behind.append((inputs[unit] - mean) / np.sqrt(var + EPSILON))
    return np.square(behind[0] - behind[1]).mean((0, 1, 2))


def test_least_squares_have_the_least_error():
    """No other scale or offset is nearer to the float network; other methods and blends are not."""
    least = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, BatchNormConfig(method="regression"))
    error = normalized_error(least, "unit1")
    for config in (*CONFIGS[:3], BatchNormConfig(method="regression", blend=0.5)):
        found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config)
        assert (error <= normalized_error(found, "unit1") + 1e-4).all()
    for change in (0.97, 1.03):
        unit = {**least["unit1"], "mean": least["unit1"]["mean"] + change - 1}
        assert (error < normalized_error({**least, "unit1": unit}, "unit1")).all()
        unit = {**least["unit1"], "var": least["unit1"]["var"] * change}
        assert (error < normalized_error({**least, "unit1": unit}, "unit1") + 1e-5).all()


def test_equal_variances_are_those_of_the_float_network():
    equal = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, BatchNormConfig(method="regression", blend=1.0))
    found, wanted = (batch_norm_moments(GRAPH, v, IMAGES) for v in (equal, VARIABLES))
    for name, bn in zip(UNITS, GRAPH.batch_norms, strict=True):
        deviations = [
            np.sqrt((moments[bn.name][1] + EPSILON) / (statistics_of(v)[name][1] + EPSILON))
            for moments, v in ((found, equal), (wanted, VARIABLES))
        ]
        np.testing.assert_allclose(*deviations, rtol=1e-3)


def test_a_channel_that_runs_backwards_fades():
    """Where the quantized values have nothing of the float ones, the slope is the least there may be, and positive."""
    config = BatchNormConfig(method="regression")
    found = adapt_batch_norm(GRAPH, VARIABLES, stretched(-1.0), IMAGES, config)
    (_, old), (_, new) = statistics_of(VARIABLES)["unit2"], statistics_of(found)["unit2"]
    np.testing.assert_allclose((new + EPSILON) / (old + EPSILON), 4.0, rtol=1e-4)


def stretched(factor):
    """A "quantized" network whose second unit's results are larger."""
    kernel = factor * VARIABLES["unit2"]["kernel"]
    return {**VARIABLES, "unit2": {**VARIABLES["unit2"], "kernel": kernel}}


def test_the_variance_changes_by_a_limited_ratio():
    for factor, ratio in ((1.5, 2.25), (0.8, 0.64), (10.0, 4.0), (0.01, 0.25)):
        for method in ("differential", "regression"):
            found = adapt_batch_norm(GRAPH, VARIABLES, stretched(factor), IMAGES, BatchNormConfig(method=method))
            (_, old), (_, new) = statistics_of(VARIABLES)["unit2"], statistics_of(found)["unit2"]
            np.testing.assert_allclose((new + EPSILON) / (old + EPSILON), ratio, rtol=5e-3)
    absolute = adapt_batch_norm(GRAPH, VARIABLES, stretched(10.0), IMAGES, BatchNormConfig(method="absolute"))
    assert (statistics_of(absolute)["unit2"][1] > 10).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_channel_keeps_its_statistics(method):
    dead = {**VARIABLES["unit1"], "kernel": VARIABLES["unit1"]["kernel"].at[..., 1].set(0)}
    dead |= {k: VARIABLES["unit1"][k].at[1].set(0) for k in ("mean", "var")}
    variables = {**VARIABLES, "unit1": dead}
    found = adapt_batch_norm(GRAPH, variables, variables, IMAGES, BatchNormConfig(method=method))
    mean, var = statistics_of(found)["unit1"]
    assert mean[1] == 0 and abs(var[1]) < 1e-6


def test_the_prior_shrinks_the_change():
    method = "absolute"
    full = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, BatchNormConfig(method=method))
    half = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, BatchNormConfig(method=method, prior_images=12.0))
    for found, target, stored in zip(*(statistics_of(v)["unit1"] for v in (half, full, VARIABLES)), strict=True):
        np.testing.assert_allclose(found - stored, (target - stored) / 2, rtol=1e-3, atol=1e-5)
    for method in METHODS:
        config = BatchNormConfig(method=method, prior_images=1e9)
        none = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config)
        assert_statistics(none, statistics_of(VARIABLES), rtol=1e-5, atol=1e-5)


def test_orders():
    whole = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES)
    config = BatchNormConfig(order="all_at_once")
    for batch_size in (12, 100):
        found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config, batch_size=batch_size)
        jax.tree.map(np.testing.assert_array_equal, statistics_of(found), statistics_of(whole))
    # Smaller batches: each by itself, then the average.
    found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config, batch_size=6)
    halves = [expected(BatchNormConfig(), VARIABLES, quantized(), x) for x in (IMAGES[:6], IMAGES[6:])]
    assert_statistics(found, jax.tree.map(lambda a, b: (a + b) / 2, *halves), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("order", ["layer_by_layer", "all_at_once"])
def test_the_order_of_images_does_not_matter(order):
    config = BatchNormConfig(order=order)
    found = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, config, batch_size=6)
    swapped = jnp.concatenate([IMAGES[6:], IMAGES[:6][::-1]])
    other = adapt_batch_norm(GRAPH, VARIABLES, quantized(), swapped, config, batch_size=6)
    assert_statistics(other, statistics_of(found), rtol=1e-4, atol=1e-4)


def test_shared_statistics_serve_all_their_places_alike():
    def twice(v, x):
        for kernel in ("k1", "k2"):
            x = jax.nn.relu((x @ v[kernel] - v["mean"]) * jax.lax.rsqrt(v["var"] + EPSILON) * v["scale"] + v["bias"])
        return x @ v["k3"]

    shapes = {"k1": (5, 5), "k2": (5, 5), "k3": (5, 3), **dict.fromkeys(("mean", "var", "scale", "bias"), (5,))}
    case = model_grid.function_case("twice", twice, shapes, (1, 5))
    graph = trace(twice, case.variables, case.input_shape)
    assert len(graph.batch_norms) == 2
    x = jax.random.normal(jax.random.key(0), (16, 5))
    found = adapt_batch_norm(graph, case.variables, case.variables, x)
    np.testing.assert_allclose(found["mean"], case.variables["mean"], atol=1e-5)
    larger = {**case.variables, "k2": 1.2 * case.variables["k2"]}
    found = adapt_batch_norm(graph, case.variables, larger, x)
    ratio = (found["var"] + EPSILON) / (case.variables["var"] + EPSILON)
    np.testing.assert_allclose(ratio, (1 + 1.44) / 2, rtol=1e-3)
    corrected = correct_bias(graph, case.variables, larger, x)
    jax.tree.map(np.testing.assert_array_equal, corrected, larger)  # no one value corrects both


# --- contract ---


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("function", [adapt_batch_norm, correct_bias])
def test_only_what_is_adapted_changes(function):
    q = quantized()
    before = jax.tree.map(np.array, (VARIABLES, q))
    found = function(GRAPH, VARIABLES, q, IMAGES)
    same(before, (VARIABLES, q))
    assert jax.tree.structure(found) == jax.tree.structure(q)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(q), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    for name in (*UNITS, "head"):
        assert isinstance(found[name]["kernel"], QTensor)
        same(found[name]["kernel"], q[name]["kernel"])
    same(found[QUANTIZATION], q[QUANTIZATION])
    changed = {
        f"{unit}/{k}" for unit in (*UNITS, "head") for k in q[unit]
        if k != "kernel" and (found[unit][k] != q[unit][k]).any()
    }  # fmt: skip
    statistics = {"unit1/mean", "unit2/mean"}
    assert changed == statistics | ({"head/bias"} if function is correct_bias else {"unit1/var", "unit2/var"})


def test_narrow_leaves_stay_narrow():
    half = {**VARIABLES, "unit1": {**VARIABLES["unit1"], "mean": VARIABLES["unit1"]["mean"].astype(jnp.bfloat16)}}
    graph = trace(network, half, SHAPE)
    found = adapt_batch_norm(graph, half, half, IMAGES)
    assert found["unit1"]["mean"].dtype == jnp.bfloat16


def test_both_can_be_traced():
    def both(variables, q, images):
        q = adapt_batch_norm(GRAPH, variables, q, images, BatchNormConfig(prior_images=2.0))
        return correct_bias(GRAPH, variables, q, images, normalized=False)

    eager = both(VARIABLES, quantized(), IMAGES)
    traced = jax.jit(both)(VARIABLES, quantized(), IMAGES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), eager, traced)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.float32), "found none"),
        (np.zeros((4, 8, 8, 1), np.float32), r"like \[N, 8, 8, 3\], found \(4, 8, 8, 1\)"),
        (np.zeros((8, 8, 3), np.float32), r"found \(8, 8, 3\)"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "NaN or infinite"),
    ],
    ids=["none", "channels", "rank", "nan"],
)
@pytest.mark.parametrize("function", [adapt_batch_norm, correct_bias])
def test_bad_images(function, images, message):
    with pytest.raises(ValueError, match=f"^images: .*{message}"):
        function(GRAPH, VARIABLES, quantized(), images)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "fields",
    [{"method": "relative"}, {"order": "random"}, {"prior_images": -1}, {"max_ratio": 0.5}, {"max_ratio": np.inf},
     {"prior_images": np.nan}, {"max_ratio": None}, {"blend": 1.5}, {"blend": -0.1}, {"blend": True}],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        BatchNormConfig(**fields)


# --- biases ---


def normalized_means(variables):
    """Mean of each BatchNorm's input less the mean it subtracts, and of the scores."""
    measured = batch_norm_moments(GRAPH, variables, IMAGES)
    means = [measured[bn.name][0] - np.asarray(GRAPH.leaf(variables, bn.mean)).reshape(-1) for bn in GRAPH.batch_norms]
    return [*means, apply_quantized(GRAPH, variables, IMAGES).mean(0)]


def test_bias_correction_restores_the_means():
    q = quantized()
    corrected = correct_bias(GRAPH, VARIABLES, q, IMAGES)
    wanted, before, after = map(normalized_means, (VARIABLES, q, corrected))
    assert max(np.abs(a - b).max() for a, b in zip(before, wanted, strict=True)) > 0.05
    for found, target in zip(after, wanted, strict=True):
        np.testing.assert_allclose(found, target, atol=1e-3)
    again = correct_bias(GRAPH, VARIABLES, corrected, IMAGES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), again, corrected)


def test_bias_correction_after_adaptation_does_not_correct_twice():
    adapted = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES)
    for normalized in (True, False):
        corrected = correct_bias(GRAPH, VARIABLES, adapted, IMAGES, normalized=normalized)
        tolerance = {"atol": 1e-3} if normalized else {"atol": 0, "rtol": 0}
        assert_statistics(corrected, statistics_of(adapted), **tolerance)
        scores = [apply_quantized(GRAPH, v, IMAGES).mean(0) for v in (VARIABLES, corrected, adapted)]
        np.testing.assert_allclose(scores[1], scores[0], atol=1e-3)
        assert np.abs(scores[2] - scores[0]).max() > 1e-2
    absolute = adapt_batch_norm(GRAPH, VARIABLES, quantized(), IMAGES, BatchNormConfig(method="absolute"))
    corrected = correct_bias(GRAPH, VARIABLES, absolute, IMAGES, normalized=False)
    assert_statistics(corrected, statistics_of(absolute), rtol=0)


def test_bias_correction_without_batch_norm():
    """Dense and convolutional layers with biases, and one without, which is left alone."""

    def plain(v, x):
        x = jax.nn.relu(convolve(x, v["conv"]["kernel"]) + v["conv"]["bias"])
        x = jax.nn.relu(x.mean((1, 2)) @ v["bare"]["kernel"])
        x = jax.nn.relu(x @ v["shared"]["kernel"] + v["shared"]["bias"])
        x = x @ v["shared"]["kernel"] + v["shared"]["bias"]
        return x @ v["head"]["kernel"] + v["head"]["bias"]

    shapes = {
        "conv": {"kernel": (3, 3, 3, 4), "bias": (4,)},
        "bare": {"kernel": (4, 4)},
        "shared": {"kernel": (4, 4), "bias": (4,)},
        "head": {"kernel": (4, 5), "bias": (5,)},
    }
    case = model_grid.function_case("plain", plain, shapes, SHAPE)
    graph = trace(plain, case.variables, SHAPE)
    convention = Convention.parse("w3a4", edge_bits=None)
    ranges = estimate_ranges(graph, case.variables, IMAGES, convention)
    q = quantize_params(graph, case.variables, ranges, convention)
    corrected = correct_bias(graph, case.variables, q, IMAGES)
    wanted = plain(case.variables, IMAGES).mean(0)
    assert np.abs(apply_quantized(graph, q, IMAGES).mean(0) - wanted).max() > 0.05
    np.testing.assert_allclose(apply_quantized(graph, corrected, IMAGES).mean(0), wanted, atol=1e-4)
    same(corrected["shared"], q["shared"])
    same(corrected["bare"], q["bare"])
    assert (corrected["conv"]["bias"] != q["conv"]["bias"]).any()
    assert jax.tree.structure(correct_bias(graph, case.variables, q, IMAGES, normalized=False)) == jax.tree.structure(q)


def test_a_batch_norm_is_a_factor_and_an_offset():
    (bn,), leaves = GRAPH.batch_norms[:1], GRAPH.leaves(VARIABLES)
    parameters = batch_norm_parameters(bn, leaves)
    factor, offset = affine(bn, parameters)
    assert factor.dtype == offset.dtype == jnp.float32
    for found, exact in zip((factor, offset), affine(bn, parameters, np), strict=True):
        assert exact.dtype == np.float64 and exact.shape == (bn.channels,)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
