"""SQuant and GPTQ against plain loops in float64, and on every layout."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import linen_case

from dfq_jax.graph import run
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.rounding import GPTQConfig, gptq, squant, squant_codes
from dfq_jax.stages.rounding.codes import KernelCodes, kernel_codes
from dfq_jax.stages.rounding.gptq import PatchMoments, nearest_plane, round_kernel

# --- references ---


def flip_loop(codes, values, members, total, low, high):
    """Move codes, largest error first, while that brings the total closest to zero; returns what to move next."""
    sign, count = np.sign(total), round(abs(total))
    errors = [(abs(codes[m] - values[m]), m) for m in members if np.sign(codes[m] - values[m]) == sign]
    room = [(e, m) for e, m in errors if (codes[m] > low[m] if sign > 0 else codes[m] < high[m])]
    room.sort(key=lambda pair: -pair[0])
    for _, m in room[:count]:
        codes[m] -= sign
    if count > abs(total):
        return room[count - 1][1] if count <= len(room) else None
    return room[count][1] if count < len(room) else None


def squant_loop(values, low, high):
    values, low, high = (np.asarray(a, np.float64) for a in (values, low, high))
    codes = np.clip(np.round(values), low, high)
    outputs, inputs, window = values.shape
    for o in range(outputs):
        if window == 1:
            members = [(o, i, 0) for i in range(inputs)]
            flip_loop(codes, values, members, (codes[o] - values[o]).sum(), low, high)
            continue
        candidates = []
        for i in range(inputs):
            members = [(o, i, k) for k in range(window)]
            total = (codes[o, i] - values[o, i]).sum()
            candidates.append(flip_loop(codes, values, members, total, low, high))
        total = (codes[o] - values[o]).sum()
        flip_loop(codes, values, [c for c in candidates if c is not None], total, low, high)
    return codes


def gptq_loop(values, second, low, high):
    """GPTQ as published: columns in order, each error spread over later ones by the inverse second moments."""
    values = np.array(values, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(np.asarray(second, np.float64))).T
    codes = np.zeros_like(values)
    for column in range(values.shape[1]):
        codes[:, column] = np.clip(np.round(values[:, column]), low[:, column], high[:, column])
        error = (values[:, column] - codes[:, column]) / upper[column, column]
        values[:, column:] -= np.outer(error, upper[column, column:])
    return codes


# --- SQuant ---


@pytest.mark.parametrize("shape", [(5, 7, 9), (6, 11, 1), (8, 1, 9)], ids=["conv", "1x1", "depthwise"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("array", [jnp.float32, np.float32], ids=["jax", "numpy"])
def test_squant_is_the_loop(shape, clipped, array):
    values = np.random.default_rng(sum(shape)).uniform(-8, 8, shape)
    limit = 5.0 if clipped else 8.0
    low, high = np.full(shape, -limit), np.full(shape, limit)
    nearest = np.clip(np.round(values), low, high)
    codes = np.asarray(squant_codes(*map(array, (values, nearest, low, high))))
    np.testing.assert_array_equal(codes, squant_loop(values, low, high))
    assert np.abs(codes - nearest).max() == 1 and codes.min() >= -limit and codes.max() <= limit
    if not clipped:
        error = codes - values
        assert np.abs(error.sum((1, 2))).max() <= 0.5 + 1e-4
        if shape[-1] > 1:
            assert np.abs(error.sum(2)).max() <= 1 + 1e-4
        assert np.abs((nearest - values).sum((1, 2))).max() > 0.5  # nearest does not have it


NAMES = ("dilated_grouped", "general_dense", "channels_first", "transposed_conv", "shared_kernel")


@functools.cache
def quantized(name, bits="w4a16", **fields):
    case = getattr(model_grid, name)()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    convention = Convention.parse(bits, edge_bits=None, weight_range="min_max", **fields)
    return graph, variables, quantize_params(graph, variables, {}, convention), case.images()


def kernels(graph, variables):
    return [leaf for leaf in graph.leaves(variables) if isinstance(leaf, QTensor)]


@pytest.mark.parametrize("name", NAMES)
def test_squant_sums_vanish_on_every_layout(name):
    graph, variables, qvariables, _ = quantized(name)
    better = squant(graph, variables, qvariables)
    assert jax.tree.structure(better) == jax.tree.structure(qvariables)
    for layer in graph.layers:
        leaf, kernel = graph.leaf(variables, layer.kernel), graph.leaf(better, layer.kernel)
        before = graph.leaf(qvariables, layer.kernel)
        assert kernel.qvalue.dtype == before.qvalue.dtype and kernel.bits == before.bits
        assert np.array_equal(kernel.scale, before.scale) and kernel.qvalue.max() <= 15
        axes = tuple(a for a in range(leaf.ndim) if a not in layer.channel_axes)
        sums = np.asarray(kernel.centered() - leaf / kernel.scale).sum(axes)
        assert np.abs(sums).max() <= 0.5 + 1e-3


def test_squant_traces():
    graph, variables, qvariables, _ = quantized("general_dense")
    eager, traced = (
        squant(graph, variables, qvariables),
        jax.jit(functools.partial(squant, graph))(variables, qvariables),
    )
    for a, b in zip(kernels(graph, eager), kernels(graph, traced), strict=True):
        np.testing.assert_array_equal(a.qvalue, b.qvalue)


# --- GPTQ ---


@pytest.mark.parametrize("block", [1, 4, 5, 64])
def test_nearest_plane_is_gptq(block):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 13)) @ rng.normal(size=(13, 13))
    second = inputs.T @ inputs / 50 + 0.05 * np.eye(13)
    values = rng.uniform(-4, 4, (6, 13))
    low, high = np.full((6, 13), -3.0), np.full((6, 13), 3.0)
    upper = np.linalg.cholesky(second).T
    codes = nearest_plane(*map(jnp.float32, (upper, values, low, high)), block=block)
    # The published order is the reverse one.
    expected = gptq_loop(values[:, ::-1], second[::-1, ::-1], low, high)[:, ::-1]
    np.testing.assert_array_equal(codes, expected)


def test_nearest_plane_comes_close_to_the_best_codes():
    rng = np.random.default_rng(1)
    upper = np.triu(rng.normal(size=(6, 6))) + 2 * np.eye(6)
    values, limit = rng.uniform(-1, 1, (1, 6)), np.full((1, 6), 1.0)

    def error(codes):
        return np.square((values - codes) @ upper.T).sum()

    best = min(error(np.array([c])) for c in itertools.product((-1, 0, 1), repeat=6))
    found = np.asarray(nearest_plane(*map(jnp.float32, (upper, values, -limit, limit)), block=3))
    assert error(found) <= min(error(np.round(values)), 2 * best)


def layer_results(graph, variables, images, layer):
    found = {}

    def keep(call):
        found[call.layer.name] = call.default()
        return found[call.layer.name]

    run(graph, variables, images, layer=keep)
    return np.asarray(found[layer])


@pytest.mark.parametrize(("name", "share"), [("dilated_grouped", 0.7), ("general_dense", 1.0)])
def test_gptq_lowers_the_error_of_layers(name, share):
    graph, variables, qvariables, _ = quantized(name, "w3a16")
    images = jax.random.normal(jax.random.key(0), (32, *graph.input.shape[1:]))
    images = images + 2 * images.mean(-1, keepdims=True)  # channels that have something in common
    better = gptq(graph, variables, qvariables, images, GPTQConfig(centered=False))
    assert jax.tree.structure(better) == jax.tree.structure(qvariables)
    first = graph.layers[0].name  # its inputs are the images in all networks
    wanted, nearest, found = (layer_results(graph, v, images, first) for v in (variables, qvariables, better))
    assert np.square(found - wanted).sum() <= share * np.square(nearest - wanted).sum()
    for a, b in zip(kernels(graph, better), kernels(graph, qvariables), strict=True):
        assert a.qvalue.dtype == b.qvalue.dtype and a.qvalue.max() <= 7 and np.array_equal(a.scale, b.scale)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3, 3), feature_group_count=5, use_bias=False, name="depthwise")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_gptq_of_a_depthwise_layer_is_gptq_of_each_channel():
    case = linen_case("depthwise", Depthwise(), (1, 6, 6, 5))
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    qvariables = quantize_params(
        graph, variables, {}, Convention.parse("w3a16", edge_bits=None, weight_range="min_max")
    )
    images = jax.random.normal(jax.random.key(0), (8, 6, 6, 5)).cumsum(1)  # neighbors alike
    better = gptq(graph, variables, qvariables, images, GPTQConfig(centered=False, order="natural"))
    layer = graph.layer("depthwise")
    leaf, kernel, found = (graph.leaf(v, layer.kernel) for v in (variables, qvariables, better))
    given, found = (kernel_codes(graph.form(layer).kernel, k, leaf) for k in (kernel, found))
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for channel in range(5):
        windows = np.lib.stride_tricks.sliding_window_view(padded[..., channel], (3, 3), axis=(1, 2)).reshape(-1, 9)
        second = windows.T @ windows / len(windows)
        second += 0.01 * np.diagonal(second).mean() * np.eye(9)
        values, low, high = (
            np.asarray(a[channel, 0].reshape(1, 9))[:, ::-1] for a in (given.values, given.low, given.high)
        )
        expected = gptq_loop(values, second[::-1, ::-1], low, high)[0, ::-1]
        np.testing.assert_array_equal(found.codes[channel, 0, 0], expected)
    assert not np.array_equal(found.codes, given.codes)


def test_centered_moments_do_not_see_the_mean():
    rng = np.random.default_rng(0)
    inputs, values = rng.normal(size=(200, 8)), rng.uniform(-3, 3, (1, 4, 8, 1))
    codes = KernelCodes(
        *map(jnp.float32, (values, np.round(values), np.full_like(values, -4), np.full_like(values, 4)))
    )

    def solve(shift, centered):
        x = jnp.float32(inputs + shift)
        moments = PatchMoments(jnp.float32(200), x.sum(0)[None], (x.T @ x)[None])
        return np.asarray(round_kernel(codes, moments, GPTQConfig(centered=centered)))

    np.testing.assert_array_equal(solve(5.0, True), solve(0.0, True))
    assert not np.array_equal(solve(5.0, False), solve(5.0, True))


def test_inputs_never_seen_round_to_nearest():
    values = jnp.float32(np.random.default_rng(0).uniform(-3, 3, (1, 2, 6, 1)))
    codes = KernelCodes(values, jnp.round(values), jnp.full_like(values, -4), jnp.full_like(values, 4))
    nothing = PatchMoments(jnp.float32(1), jnp.zeros((1, 6)), jnp.zeros((1, 6, 6)))
    np.testing.assert_array_equal(round_kernel(codes, nothing, GPTQConfig()), jnp.round(values))


@pytest.mark.untyped
def test_refuses_bad_arguments():
    graph, variables, qvariables, images = quantized("general_dense")
    for rounding in (squant, functools.partial(gptq, images=images)):
        with pytest.raises(ValueError, match="no quantized kernel"):
            rounding(graph, variables, qvariables=variables)
        with pytest.raises(ValueError, match="pass the float variables"):
            rounding(graph, qvariables, qvariables=qvariables)
    with pytest.raises(ValueError, match="images: found NaN"):
        gptq(graph, variables, qvariables, images * np.nan)
    for field, value in (("order", "random"), ("damping", 0.0), ("passes", 0), ("max_patches", 1.5)):
        with pytest.raises(ValueError, match=field):
            GPTQConfig(**{field: value})
