"""Equalization keeps the function and the tree, and brings ranges together."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax.core import FrozenDict
from model_grid import linen_case

from dfq_jax.graph.graph import trace
from dfq_jax.stages import absorb_high_bias, equalize, find_pairs, stretch_channels
from dfq_jax.stages.convention import Convention


def prepared(case):
    apply_fn, variables = case.function()
    return trace(apply_fn, variables, case.input_shape), apply_fn, variables


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("cifar_resnet8", 3), ("no_batch_norm", 1), ("mlp", 2), ("transposed_conv", 2), ("conv_bias_bn", 1),
        ("shared_kernel", 0),
        pytest.param("mobilenet_v2", 0, marks=pytest.mark.slow),
        pytest.param("vgg", 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("balance", ["weights", "activations"])
def test_keeps_function_and_tree(name, pairs, balance):
    case = getattr(model_grid, name)()
    graph, apply_fn, variables = prepared(case)
    found, skipped = find_pairs(graph)
    assert len(found) == pairs
    assert {p.first for p in found} | {s.name for s in skipped} == {layer.name for layer in graph.layers}
    assert all(s.reason for s in skipped)
    new, before, after = jax.jit(
        lambda v, x: (new := equalize(graph, v, balance=balance), apply_fn(v, x), apply_fn(new, x))
    )(variables, case.images())
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(variables), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    changed = any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (new, variables)), strict=True))
    with_norm = any(graph.layer(pair.first).batch_norm for pair in found)
    assert changed == (bool(found) if balance == "weights" else with_norm)


class Triple(nn.Module):
    """An inverted bottleneck: expansion, depthwise, projection."""

    activations: dict = FrozenDict(expand=nn.relu, depthwise=nn.relu, project=lambda x: x)

    @nn.compact
    def __call__(self, x):
        for name, features, groups in (("expand", 6, 1), ("depthwise", 6, 6), ("project", 3, 1)):
            window = (3, 3) if name == "depthwise" else (1, 1)
            x = nn.Conv(features, window, feature_group_count=groups, use_bias=False, name=name)(x)
            x = nn.BatchNorm(use_running_average=True, name=f"{name}_bn")(x)
            x = self.activations[name](x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def triple():
    return prepared(linen_case("triple", Triple(), (2, 6, 6, 3)))


def folded_kernel(variables, name):
    bn, stats = variables["params"][f"{name}_bn"], variables["batch_stats"][f"{name}_bn"]
    return np.asarray(variables["params"][name]["kernel"] * bn["scale"] / jnp.sqrt(stats["var"] + 1e-5), np.float64)


def ranges(variables):
    """Ranges of the six channels: expansion's outputs, depthwise, projection's inputs."""
    kernels = [np.abs(folded_kernel(variables, name)) for name in ("expand", "depthwise", "project")]
    return kernels[0].max((0, 1, 2)), kernels[1].max((0, 1, 2)), kernels[2].max((0, 1, 3))


def test_depthwise_triple_meets_at_the_geometric_mean(triple):
    graph, _, variables = triple
    assert [(p.first, p.readers) for p in find_pairs(graph)[0]] == [
        ("expand", ("depthwise",)),
        ("depthwise", ("project",)),
    ]
    before, after = ranges(variables), ranges(equalize(graph, variables))
    mean = np.prod(before, axis=0) ** (1 / 3)
    assert np.ptp(before, axis=0).max() > 0.1
    for found in after:  # up to a factor that all channels have in common
        np.testing.assert_allclose(found / found.max(), mean / mean.max(), rtol=1e-4)


def test_activations_are_balanced_with_the_weights_behind(triple):
    graph, _, variables = triple
    # Channels of like activations: none of them meets a bound.
    level = jnp.asarray([1.0, 1.1, 0.9, 1.0, 1.05, 0.95])
    variables = graph.replace(variables, {f"params/depthwise_bn/{leaf}": level for leaf in ("scale", "bias")})
    kernel = variables["params"]["project"]["kernel"]
    kernel = kernel * (level / jnp.abs(kernel).max((0, 1, 3)))[:, None]
    variables = graph.replace(variables, {"params/project/kernel": kernel * jnp.linspace(0.8, 1.2, 6)[:, None]})
    new = equalize(graph, variables, balance="activations")
    ratio = peaks(new, "depthwise") / ranges(new)[2]
    assert np.ptp(peaks(variables, "depthwise") / ranges(variables)[2]) > 0.1 * ratio.mean()
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def peaks(variables, name):
    """Three standard deviations out behind a BatchNorm and a ReLU, in float64."""
    bn, stats = variables["params"][f"{name}_bn"], variables["batch_stats"][f"{name}_bn"]
    scale, bias, var = (np.asarray(leaf, np.float64) for leaf in (bn["scale"], bn["bias"], stats["var"]))
    return np.maximum(bias + 3 * np.abs(scale) * np.sqrt(var / (var + 1e-5)), 0)


@pytest.mark.parametrize("balance", ["weights", "activations"])
def test_nearly_dead_channels_do_not_take_the_range(triple, balance):
    """Weights of two channels with a factor, and the statistics that training would leave for it."""
    graph, apply_fn, start = triple
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    outputs = jax.jit(apply_fn)
    balanced = jax.jit(lambda v: equalize(graph, v, balance=balance))
    for dead in ("expand", "depthwise", "project"):
        for factor in (0.0, 1e-30, 1e-10, 1e-6, 1e-4, 1e-2, 1.0, 1e6):
            factors = jnp.where(jnp.arange(6) < 2, factor, 1.0)
            along = factors[:, None] if dead == "project" else factors
            new = {f"params/{dead}/kernel": start["params"][dead]["kernel"] * along}
            if dead != "project":
                stats = start["batch_stats"][f"{dead}_bn"]
                new |= {f"batch_stats/{dead}_bn/mean": stats["mean"] * factors}
                new |= {f"batch_stats/{dead}_bn/var": stats["var"] * factors**2}
            variables = graph.replace(start, new)
            equal = balanced(variables)
            for name in ("expand", "depthwise"):
                assert peaks(equal, name).max() <= 1.0001 * peaks(variables, name).max(), (dead, factor)
            wanted = np.asarray(outputs(variables, x))
            tolerance = 1e-4 * np.abs(wanted).max()
            np.testing.assert_allclose(outputs(equal, x), wanted, rtol=0, atol=tolerance, err_msg=f"{dead} {factor}")


def limits(variables, bits, name="expand"):
    """Where each channel behind a BatchNorm is expected to end, in float64."""
    bn, stats = variables["params"][f"{name}_bn"], variables["batch_stats"][f"{name}_bn"]
    scale, bias, var = (np.asarray(leaf, np.float64) for leaf in (bn["scale"], bn["bias"], stats["var"]))
    # ACIQ for a Laplace distribution of one sign, b = sigma / sqrt(2): 12 4^bits e^-clip = clip, by bisection.
    lo, hi = 0.0, 40.0
    for _ in range(100):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if 12 * 4.0**bits * np.exp(-middle) > middle else (lo, middle)
    return bias + lo / np.sqrt(2) * np.abs(scale) * np.sqrt(var / (var + 1e-5))


@pytest.mark.parametrize("bits", [4, 8])
def test_channels_in_front_of_a_depthwise_layer_are_stretched(triple, bits):
    graph, apply_fn, variables = triple
    convention = Convention(weight_bits=4, activation_bits=bits, edge_bits=None)
    spread = jnp.asarray([1.0, 0.3, 0.1, 0.03, 2.0, 0.02])
    bn = variables["params"]["expand_bn"]
    leaves = {f"params/expand_bn/{leaf}": bn[leaf] * spread for leaf in ("scale", "bias")}
    variables = graph.replace(variables, leaves)
    stretched = jax.jit(lambda v: stretch_channels(graph, v, convention))(variables)
    before, after = limits(variables, bits), limits(stretched, bits)
    assert before.max() > 20 * before.min()
    np.testing.assert_allclose(after, before.max(), rtol=0.03)
    x = 3 * jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    np.testing.assert_allclose(apply_fn(stretched, x), apply_fn(variables, x), rtol=1e-4, atol=1e-5)
    # The projecting layer and all else stay as they are.
    for path, leaf in graph.leaves_by_path(stretched).items():
        same = np.array_equal(leaf, graph.leaves_by_path(variables)[path])
        assert same != (path in {*leaves, "params/depthwise/kernel"}), path


def test_stretched_channels_are_clipped_at_relu6_where_they_end(triple):
    variables = triple[2]
    scale = jnp.asarray([1.0, 0.3, 0.1, 0.03, 40.0, 0.5])
    params = variables["params"] | {"expand_bn": {"scale": scale, "bias": 0.1 * scale}}
    variables = {**variables, "params": params}
    convention, ends = Convention(weight_bits=8, activation_bits=4), np.minimum(limits(variables, 4), 6.0)

    def prepare(expand):
        module = Triple(activations=FrozenDict(expand=expand, depthwise=nn.relu6, project=lambda x: x))
        return prepared(linen_case("triple", module, (2, 6, 6, 3)))

    graph, apply_fn, _ = prepare(nn.relu6)
    stretched = stretch_channels(graph, variables, convention)
    np.testing.assert_allclose(limits(stretched, 4)[:4], 6.0, rtol=0.03)
    reference = prepare(lambda x: jnp.clip(x, 0.0, jnp.asarray(ends, jnp.float32)))[1]
    x = 5 * jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    found, wanted, unclipped = apply_fn(stretched, x), reference(variables, x), apply_fn(variables, x)
    np.testing.assert_allclose(found, wanted, rtol=0.03, atol=0.03 * np.abs(wanted).max())
    assert np.abs(wanted - unclipped).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cifar_resnet8", {}),
        ("mobilenet_v2", {"activation_bits": None}),
        ("mobilenet_v2", {"per_channel": False}),
        ("no_batch_norm", {}),
    ],
)
def test_nothing_to_stretch(name, fields):
    graph, _, variables = prepared(getattr(model_grid, name)())
    assert stretch_channels(graph, variables, Convention(**fields)) is variables


def test_high_bias_goes_to_the_next_layer(triple):
    graph, apply_fn, variables = triple
    # Every channel three standard deviations above zero or more: ReLU never cuts, so nothing changes but the split.
    bias = 5.0 + 3.0 * jnp.abs(variables["params"]["depthwise_bn"]["scale"])
    mean = variables["batch_stats"]["depthwise_bn"]["mean"]
    variables = graph.replace(variables, {"params/depthwise_bn/bias": bias, "params/expand_bn/bias": jnp.full(6, 50.0)})
    spread = {"batch_stats/depthwise_bn/var": jnp.full(6, 1e6), "batch_stats/depthwise_bn/mean": mean}
    variables = graph.replace(variables, spread)
    new = absorb_high_bias(graph, variables)
    np.testing.assert_allclose(new["params"]["depthwise_bn"]["bias"], bias - 5.0, rtol=1e-5)
    # The depthwise layer pads, so the constant in front of it stays.
    np.testing.assert_array_equal(new["params"]["expand_bn"]["bias"], 50.0)
    x = 0.1 * jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    np.testing.assert_allclose(apply_fn(new, x), apply_fn(variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.untyped
def test_refuses_bad_arguments(triple):
    graph, _, variables = triple
    with pytest.raises(ValueError, match="balance"):
        equalize(graph, variables, balance="both")
    with pytest.raises(ValueError, match="sigmas"):
        absorb_high_bias(graph, variables, sigmas=0)
    with pytest.raises(ValueError, match="do not match"):
        equalize(graph, variables["params"])
