"""Weights whose values are known are quantized without a program for each shape of kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from jax import lax

from dfq_jax import Convention, quantize, quantize_params, squant, trace
from dfq_jax.quantizers import quantize_kernel

KERNELS = {
    "conv": ((3, 3, 20, 6), (3,)),
    "depthwise": ((3, 3, 1, 40), (3,)),
    "dense": ((70, 9), (1,)),
    "torch": ((5, 4, 3, 3), (0,)),
    "per_tensor": ((3, 3, 8, 300), ()),
    "two_axes": ((4, 50, 3), (0, 2)),
}
POWERS = {"lp": 2.4, "mse": 2.0}


def kernel(name):
    shape, _ = KERNELS[name]
    return (np.random.default_rng(len(name)).standard_t(4, shape) * np.linspace(0.1, 3, shape[-1])).astype(np.float32)


# --- an independent reference, in float64 ---


def quantizer(lo, hi, bits, symmetric):
    """Scale, and the least and the greatest multiple of it."""
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return max(lo / low, hi / high), low, high
    scale = (hi - lo) / (2**bits - 1)
    zero = np.round(-lo / scale)
    return scale, -zero, 2**bits - 1 - zero


def errors(channel, bits, symmetric, power):
    """Mean errors of a channel over 1000 fractions of its range, by thousandths."""
    lo, hi = min(channel.min(), 0.0), max(channel.max(), 0.0)

    def error(thousandths):
        scale, low, high = quantizer(lo * thousandths / 1000, hi * thousandths / 1000, bits, symmetric)
        return np.mean(np.abs(channel - scale * np.clip(np.round(channel / scale), low, high)) ** power)

    return functools.cache(error), lo, hi


def search(error):
    """Hundredths first, then thousandths around the best of them, which must be better to be taken."""
    coarse = min(range(1000, 0, -10), key=error)
    fine = min((f for f in range(coarse - 10, coarse + 11) if 1 <= f <= 1000), key=error)
    return fine if error(fine) < error(coarse) else coarse


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("method", POWERS)
def test_kernels_are_those_of_float64(method, name, bits, symmetric):
    w, axes = kernel(name), KERNELS[name][1]
    found = quantize_kernel(jnp.asarray(w), bits=bits, symmetric=symmetric, channel_axes=axes, method=method)
    assert found.qvalue.shape == w.shape and found.qvalue.dtype == (jnp.int8 if symmetric else jnp.uint8)
    front = range(len(axes))
    channels, codes = (np.moveaxis(a, axes, front).reshape(found.scale.size, -1) for a in (w, found.centered()))
    scales = np.moveaxis(np.asarray(found.scale), axes, front).reshape(-1)
    others = 0
    for channel, own, scale in zip(np.float64(channels), codes, scales, strict=True):
        error, lo, hi = errors(channel, bits, symmetric, POWERS[method])
        best = search(error)
        expected, low, high = quantizer(lo * best / 1000, hi * best / 1000, bits, symmetric)
        if abs(scale / expected - 1) > 1e-5:  # of two fractions that are as good in float32, the other one
            full, _, _ = quantizer(lo, hi, bits, symmetric)
            assert error(round(1000 * scale / full)) <= error(best) * (1 + 1e-5)
            others += 1
            continue
        difference = own - np.clip(np.round(channel / expected), low, high)
        ties = np.abs(np.abs(channel / expected - np.floor(channel / expected)) - 0.5) < 1e-4
        assert not difference[~ties].any()
    assert others <= len(scales) // 10


@pytest.mark.parametrize("method", ["min_max", *POWERS])
@pytest.mark.parametrize("name", KERNELS)
def test_traced_kernels_are_the_same(name, method):
    settings = {"bits": 4, "symmetric": False, "channel_axes": KERNELS[name][1], "method": method}
    known = quantize_kernel(kernel(name), **settings)
    traced = jax.jit(functools.partial(quantize_kernel, **settings))(kernel(name))
    same = np.isclose(known.scale, traced.scale, rtol=1e-6, atol=0)
    assert same.mean() > 0.9
    assert (np.asarray(known.qvalue != traced.qvalue) & same).mean() < 1e-3


def test_known_kernels_within_a_trace():
    settings = {"bits": 4, "symmetric": False, "channel_axes": (3,)}
    inside = jax.jit(lambda x: quantize_kernel(kernel("conv"), **settings).dequantize() + x)(0.0)
    np.testing.assert_array_equal(inside, quantize_kernel(kernel("conv"), **settings).dequantize())


# --- whole networks ---


def network(*widths):
    """Convolutions, depthwise ones between them, and a matrix product; BatchNorms behind all but the last."""
    rng = np.random.default_rng(len(widths))
    variables = {}

    def add(name, *shape):
        variables[name] = {"kernel": rng.normal(0, 0.3, shape).astype(np.float32)}
        for leaf in ("scale", "bias", "mean", "var"):
            variables[name][leaf] = rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32)

    for number, (inputs, outputs) in enumerate(zip((3, *widths), widths, strict=False)):
        add(f"pointwise{number}", 1, 1, inputs, outputs)
        add(f"depthwise{number}", 3, 3, 1, outputs)
    variables["dense"] = {"kernel": rng.normal(0, 0.3, (widths[-1], 10)).astype(np.float32)}

    order = list(variables)

    def apply_fn(v, x):
        for name in order:
            if name != "dense":
                own = v[name]
                groups = x.shape[-1] if "depthwise" in name else 1
                x = lax.conv_general_dilated(
                    x, own["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    feature_group_count=groups,
                )  # fmt: skip
                x = (x - own["mean"]) * (own["scale"] * lax.rsqrt(own["var"] + 1e-5)) + own["bias"]
                x = jax.nn.relu(x)
        return x.mean((1, 2)) @ v["dense"]["kernel"]

    return apply_fn, variables


def test_programs_do_not_grow_with_the_shapes_of_kernels():
    counts = []
    for widths in ((8, 12), (5, 7, 9, 11, 13)):
        jax.clear_caches()
        with Compilations() as compiled:
            quantize(*network(*widths), input_shape=(1, 8, 8, 3), recipe="instant", bits="w4a8")
        counts.append(compiled)
    assert counts[1] <= counts[0]  # of every function
    assert counts[0].total() <= 60


def test_squant_of_a_network_is_the_same_under_jit():
    apply_fn, variables = network(8, 12)
    graph = trace(apply_fn, variables, (1, 8, 8, 3))
    nearest = quantize_params(graph, variables, {}, Convention.parse("w3a16", weight_range="min_max"))
    known, traced = squant(graph, variables, nearest), jax.jit(functools.partial(squant, graph))(variables, nearest)
    for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
        np.testing.assert_array_equal(a, b)
