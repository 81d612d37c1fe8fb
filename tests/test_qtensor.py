"""Quantizers, quantized tensors, packing and weight ranges against float64 NumPy references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.quantizers.packing import pack, unpack
from dfq_jax.quantizers.qtensor import (
    SCALE_FLOOR,
    QTensor,
    QuantizerParams,
    bounds,
    code_limits,
    dequantize,
    fake_quant,
    int8_codes,
    params_from_range,
    quantize,
    quantize_tensor,
    ste_round,
    storage_bits,
)
from dfq_jax.quantizers.weights import WEIGHT_RANGES, lp, min_max, mse, quantize_kernel

ALL_BITS = range(2, 9)
rng = np.random.default_rng(0)


def kernel(shape=(3, 3, 4, 6)):
    """A kernel with channels (last axis) of unlike scale and offset."""
    w = rng.normal(size=shape) * np.geomspace(0.01, 1.0, shape[-1])
    return jnp.asarray(w + 0.2 * w.std() * rng.normal(size=shape[-1:]), jnp.float32)


# --- float64 references ---------------------------------------------------------------------------------


def ref_limits(bits, symmetric):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def ref_params(lo, hi, bits, symmetric):
    lo, hi = np.minimum(np.float64(lo), 0), np.maximum(np.float64(hi), 0)
    qmin, qmax = ref_limits(bits, symmetric)
    if symmetric:
        return np.maximum(np.maximum(lo / qmin, hi / qmax), SCALE_FLOOR), np.zeros_like(lo)
    scale = np.maximum((hi - lo) / qmax, SCALE_FLOOR)
    return scale, np.clip(np.round(-lo / scale), qmin, qmax)


def ref_fake_quant(x, lo, hi, bits, symmetric):
    scale, zero_point = ref_params(lo, hi, bits, symmetric)
    qmin, qmax = ref_limits(bits, symmetric)
    q = np.clip(np.round(np.float64(x) / scale) + zero_point, qmin, qmax)
    return (q - zero_point) * scale


# --- quantizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bounds(bits):
    assert bounds(bits, signed=False) == (0, 2**bits - 1)
    assert bounds(bits, signed=True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_params_and_codes_match_float64(bits, symmetric):
    lo, hi = -rng.uniform(0.0, 2.0, 50), rng.uniform(0.0, 3.0, 50)
    params = params_from_range(lo, hi, bits=bits, symmetric=symmetric)
    scale, zero_point = ref_params(np.float32(lo), np.float32(hi), bits, symmetric)
    np.testing.assert_allclose(params.scale, scale, rtol=3e-7)
    if symmetric:
        assert params.zero_point is None and params.signed
    else:
        tie = np.abs(-lo / scale % 1 - 0.5) < 1e-4
        np.testing.assert_array_equal(np.asarray(params.zero_point)[~tie], zero_point[~tie])
        assert not params.signed and params.zero_point.dtype == jnp.float32

    # Codes, from the parameters as they are in float32.
    x = rng.uniform(-3.0, 4.0, size=(200, 50)).astype(np.float32)
    scale = np.float64(params.scale)
    zero_point = 0.0 if symmetric else np.float64(params.zero_point)
    expected = np.clip(np.round(x / scale) + zero_point, *ref_limits(bits, symmetric))
    tie = np.abs(x / scale % 1 - 0.5) < 1e-4
    codes = quantize(x, params)
    assert codes.dtype == (jnp.int8 if symmetric else jnp.uint8)
    np.testing.assert_array_equal(np.asarray(codes)[~tie], expected[~tie])
    np.testing.assert_allclose(dequantize(codes, params), (codes - zero_point) * scale, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_zero_is_exact_and_range_is_covered(bits, symmetric):
    lo, hi = -rng.uniform(0.0, 2.0, 100), rng.uniform(0.0, 2.0, 100)
    lo[:10], hi[10:20] = 0.0, 0.0
    params = params_from_range(lo, hi, bits=bits, symmetric=symmetric)
    assert np.all(dequantize(quantize(jnp.zeros(100), params), params) == 0.0)
    slack = 1e-6 if symmetric else 0.5 * params.scale + 1e-6
    assert np.all(params.lo <= lo + slack) and np.all(params.hi >= hi - slack)
    assert np.all(params.lo <= 0) and np.all(params.hi >= 0)


def test_activation_range_from_zero_has_zero_point_zero():
    params = params_from_range(0.0, 6.0, bits=8)
    assert params.zero_point == 0 and params.lo == 0
    np.testing.assert_allclose(params.hi, 6.0, rtol=1e-6)


def test_range_is_widened_to_zero():
    params = params_from_range(jnp.array([1.0, -3.0]), jnp.array([2.0, -1.0]), bits=8)
    np.testing.assert_allclose(params.lo, [0.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(params.hi, [2.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_width_range_is_finite(symmetric):
    def loss(x, params):
        return fake_quant(x, params).sum()

    params = params_from_range(jnp.zeros(3), jnp.zeros(3), bits=8, symmetric=symmetric)
    assert np.all(params.scale > 0)
    x = jnp.array([0.0, 5.0, -5.0])
    grads = jax.grad(loss, argnums=(0, 1))(x, params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((grads, fake_quant(x, params))))


def test_rounds_half_to_even():
    params = QuantizerParams(jnp.float32(1.0), None, bits=8, signed=True)
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(quantize(x, params), [-2, -2, 0, 0, 2, 2])
    np.testing.assert_array_equal(ste_round(x), np.round(x))


def test_unsigned_without_zero_point():
    params = QuantizerParams(jnp.float32(0.5), None, bits=2, signed=False)
    np.testing.assert_array_equal(quantize(jnp.array([-1.0, 0.6, 9.0]), params), [0, 1, 3])
    assert params.lo == 0.0 and params.hi == 1.5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quant_value_and_dtype(bits, symmetric):
    x = kernel()
    params = params_from_range(x.min((0, 1, 2)) * 0.8, x.max((0, 1, 2)) * 0.8, bits=bits, symmetric=symmetric)
    out = fake_quant(x, params)
    np.testing.assert_array_equal(out, dequantize(quantize(x, params), params))
    np.testing.assert_array_equal(out, jax.jit(fake_quant)(x, params))
    half = x.astype(jnp.bfloat16)
    assert fake_quant(half, params).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        fake_quant(half, params), fake_quant(half.astype(jnp.float32), params).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quant_gradients_match_closed_form(bits, symmetric):
    x = jnp.asarray(rng.uniform(-3.0, 3.0, size=(400, 5)), jnp.float32)
    params = params_from_range(-rng.uniform(1, 2, 5), rng.uniform(1, 2, 5), bits=bits, symmetric=symmetric)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    to_x, to_params = jax.jit(jax.grad(lambda x, p: (cotangent * fake_quant(x, p)).sum(), argnums=(0, 1)))(x, params)
    scale = np.float64(params.scale)
    zero_point = 0.0 if symmetric else np.float64(params.zero_point)
    v = np.float64(x) / scale
    low, high = (limit - zero_point for limit in ref_limits(bits, symmetric))
    inside = (v > low) & (v < high)
    clipped = np.clip(v, low, high)
    g = np.float64(cotangent)
    np.testing.assert_allclose(to_x, g * inside, rtol=1e-6, atol=1e-7)
    expected = (g * np.where(inside, np.round(v) - v, clipped)).sum(0)
    np.testing.assert_allclose(to_params.scale, expected, rtol=1e-3, atol=2e-2)
    if not symmetric:
        np.testing.assert_allclose(to_params.zero_point, (g * np.where(inside, 0, -scale)).sum(0), rtol=1e-4)


def test_gradient_at_the_ends_is_that_of_the_clipped_branch():
    params = QuantizerParams(jnp.float32(1.0), jnp.float32(0.0), bits=2, signed=False)
    grads = jax.vmap(jax.grad(fake_quant), (0, None))(jnp.array([0.0, 0.5, 3.0]), params)
    np.testing.assert_array_equal(grads, [0.0, 1.0, 0.0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_params_from_range_jit_equals_eager(symmetric):
    lo, hi = (
        -jnp.asarray(rng.uniform(0, 2, 999), jnp.float32),
        jnp.asarray(rng.uniform(0, 2, 999), jnp.float32),
    )
    for bits in ALL_BITS:
        eager = params_from_range(lo, hi, bits=bits, symmetric=symmetric)
        traced = jax.jit(lambda lo, hi, b=bits: params_from_range(lo, hi, bits=b, symmetric=symmetric))(lo, hi)
        jax.tree.map(np.testing.assert_array_equal, eager, traced)


# --- quantized tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_qtensor(bits, symmetric):
    w = kernel()
    q = quantize_kernel(w, bits=bits, symmetric=symmetric, channel_axes=(3,), method="min_max")
    assert q.shape == w.shape and q.ndim == 4 and q.size == w.size and q.dtype == "float32"
    assert q.scale.shape == (1, 1, 1, 6) and q.signed == symmetric
    assert np.max(np.abs(q.dequantize() - w) / q.scale) <= 0.5 + (0 if symmetric else 0.5) + 1e-4
    np.testing.assert_array_equal(q.dequantize(), fake_quant(w, q.params))
    centered = q.centered()
    assert centered.dtype == (jnp.int16 if bits == 8 and not symmetric else jnp.int8)
    np.testing.assert_array_equal(centered.astype(jnp.float32) * q.scale, q.dequantize())
    np.testing.assert_array_equal(q.with_centered(centered.astype(jnp.float32)).qvalue, q.qvalue)
    packed = pack(q.qvalue, bits)
    assert q.nbytes_packed == packed.nbytes + 4 * 6 * (1 if symmetric else 2)
    np.testing.assert_array_equal(unpack(packed, bits, q.shape, q.signed), q.qvalue)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero_point", [None, 5.0])
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_codes_for_int8_products(bits, zero_point, signed, array):
    low, high = bounds(bits, signed)
    zero_point = None if zero_point is None else array(np.float32(zero_point))
    params = QuantizerParams(array(np.float32(0.5)), zero_point, bits=bits, signed=signed)
    codes = array(np.arange(low, high + 1).astype(np.int8 if signed else np.uint8))
    found, zero = int8_codes(codes, params)
    assert found.dtype == np.int8 and isinstance(found, type(codes))
    assert (zero is None) == (bits < 8 or (signed and zero_point is None))
    real = 0.5 * (np.asarray(found, np.float32) - (0 if zero is None else float(zero)))
    np.testing.assert_array_equal(real, dequantize(codes, params))
    tensor = QTensor(codes, params.scale, zero_point, bits=bits, signed=signed, dtype="float32")
    np.testing.assert_array_equal(0.5 * tensor.centered().astype(np.float32), real)
    limits = [0.5 * float(limit) for limit in code_limits(params)]
    assert limits == [real.min(), real.max()]


def test_qtensor_keeps_dtype():
    w = kernel().astype(jnp.bfloat16)
    q = quantize_kernel(w, bits=8, symmetric=True, channel_axes=(3,), method="mse")
    assert q.dtype == "bfloat16" and q.dequantize().dtype == jnp.bfloat16 and q.scale.dtype == jnp.float32


def test_qtensor_scalar_params_are_per_tensor():
    q = quantize_tensor(kernel(), params_from_range(-1.0, 1.0, bits=4))
    assert q.scale.shape == q.zero_point.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_qtensor_under_tree_operations(symmetric):
    q = quantize_kernel(kernel(), bits=4, symmetric=symmetric, channel_axes=(3,), method="min_max")
    assert len(jax.tree.leaves(q)) == (2 if symmetric else 3)
    for same in (
        jax.tree.map(lambda a: a, q),
        jax.jit(lambda a: a)(q),
        jax.device_put(q),
        jax.tree.unflatten(*reversed(jax.tree.flatten(q))),
    ):
        assert isinstance(same, QTensor) and jax.tree.structure(same) == jax.tree.structure(q)
        jax.tree.map(np.testing.assert_array_equal, same, q)
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), q.dequantize())
    abstract = jax.eval_shape(lambda a: a, q)
    assert abstract.shape == q.shape and abstract.nbytes_packed == q.nbytes_packed
    assert jax.eval_shape(QTensor.dequantize, abstract).shape == q.shape
    with_path, _ = jax.tree_util.tree_flatten_with_path({"kernel": q})
    assert jax.tree_util.keystr(with_path[0][0], simple=True, separator="/") == "kernel/qvalue"
    # Leaves of any kind.
    for leaf in (None, object(), "sharding", 0, np.zeros(3)):
        assert "QTensor" in repr(jax.tree.map(lambda _, leaf=leaf: leaf, q))


def test_qtensor_repr():
    q = quantize_kernel(kernel(), bits=4, symmetric=True, channel_axes=(3,), method="min_max")
    expected = "QTensor(shape=(3, 3, 4, 6), bits=4, symmetric, signed, scale=(1, 1, 1, 6), dtype=float32)"
    assert repr(q) == expected == repr(jax.eval_shape(lambda a: a, q))
    seen = []
    jax.jit(lambda a: seen.append(repr(a)) or a.scale)(q)
    assert seen == [expected]


def test_qtensor_under_vmap_and_scan():
    w = jnp.stack([kernel(), kernel()])
    make = lambda w: quantize_kernel(w, bits=4, symmetric=False, channel_axes=(3,), method="min_max")  # noqa: E731
    stacked = jax.vmap(make)(w)
    assert stacked.shape == w.shape
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], stacked), make(w[i]))
    _, out = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(out, stacked.dequantize())


def test_nodes_are_frozen():
    params = params_from_range(-1.0, 1.0, bits=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.bits = 4


# --- packing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (3,), (4,), (5, 7), (3, 3, 1, 5)])
def test_pack_round_trip(bits, signed, shape):
    qmin, qmax = bounds(bits, signed)
    codes = rng.integers(qmin, qmax + 1, size=shape).astype(np.int8 if signed else np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (-(-codes.size * storage_bits(bits) // 8),)
    out = unpack(packed, bits, shape, signed)
    assert out.dtype == codes.dtype
    np.testing.assert_array_equal(out, codes)


def test_pack_layout():
    assert pack(np.array([1, 2, 3, 0, 1]), 2).tolist() == [0b00_11_10_01, 0b01]
    assert pack(np.array([-1, 7, -8]), 4).tolist() == [0x7F, 0x08]
    assert pack(np.array([-128, 127]), 8).tolist() == [0x80, 0x7F]


# --- weight ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axes", [(), (3,), (0, 3), (-1,), (0, 1, 2, 3)])
def test_min_max(channel_axes):
    w = kernel()
    lo, hi = min_max(w, bits=8, symmetric=True, channel_axes=channel_axes)
    axes = tuple(a for a in range(4) if a not in [c % 4 for c in channel_axes])
    np.testing.assert_array_equal(lo, np.minimum(np.min(w, axes, keepdims=True), 0))
    np.testing.assert_array_equal(hi, np.maximum(np.max(w, axes, keepdims=True), 0))


def ref_error(w, lo, hi, bits, symmetric, axes, p):
    w = np.float64(w)
    return (np.abs(w - ref_fake_quant(w, lo, hi, bits, symmetric)) ** p).mean(axes, keepdims=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "bits,channel_axes,method",
    [(2, (), "lp"), (3, (2, 3), "lp"), (4, (3,), "mse"), (8, (3,), "mse")],
)
def test_search_is_no_worse_than_brute_force(bits, channel_axes, method, symmetric):
    w, p = kernel(), {"mse": 2.0, "lp": 2.4}[method]
    axes = tuple(a for a in range(4) if a not in channel_axes)
    full = [np.float64(a) for a in min_max(w, bits=bits, symmetric=symmetric, channel_axes=channel_axes)]
    grid = [ref_error(w, full[0] * c, full[1] * c, bits, symmetric, axes, p) for c in np.arange(100, 0, -1) / 100]
    lo, hi = WEIGHT_RANGES[method](w, bits=bits, symmetric=symmetric, channel_axes=channel_axes)
    found = ref_error(w, lo, hi, bits, symmetric, axes, p)
    assert found.shape == lo.shape == hi.shape
    # Up to the ties that float32 and float64 round apart, which weigh more the finer the grid.
    assert np.all(found <= np.min(grid, axis=0) * (1 + 1e-4))
    assert found.sum() < np.min(grid, axis=0).sum()  # the finer steps found something
    assert np.all(lo >= full[0]) and np.all(hi <= full[1])
    np.testing.assert_allclose(lo * full[1], hi * full[0], rtol=1e-5, atol=1e-12)  # shrunk together


def test_search_improves_on_min_max_and_p_orders_the_ranges():
    w = jnp.asarray(rng.standard_t(4, size=(64, 32)), jnp.float32)
    settings = {"bits": 4, "symmetric": True, "channel_axes": (1,)}
    errors = {
        m: float(((quantize_kernel(w, **settings, method=m).dequantize() - w) ** 2).mean()) for m in WEIGHT_RANGES
    }
    assert errors["mse"] < errors["lp"] < errors["min_max"]
    mean_hi = [float(lp(w, **settings, p=p)[1].mean()) for p in (1.0, 2.4, 4.0)]
    assert mean_hi == sorted(mean_hi)


def test_search_scales_with_the_weights():
    # By a power of two, hence exactly; the p-th powers of the errors themselves would underflow.
    w, tiny = kernel(), 2.0**-50
    settings = {"bits": 2, "symmetric": False, "channel_axes": (3,)}
    for small, large in zip(lp(w * tiny, **settings), lp(w, **settings), strict=True):
        np.testing.assert_array_equal(small, large * tiny)


@pytest.mark.parametrize("method", WEIGHT_RANGES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_degenerate_channels(method, symmetric):
    w = np.array(kernel((5, 7)))
    w[:, 0] = 0.0  # dead
    w[:, 1] = np.abs(w[:, 1])  # all positive
    w[:, 2] = -np.abs(w[:, 2])  # all negative
    w[:, 3] = 0.25  # constant
    w[:, 4] *= 1e-12  # the p-th power would underflow
    q = quantize_kernel(jnp.asarray(w), bits=8, symmetric=symmetric, channel_axes=(1,), method=method)
    out = np.asarray(q.dequantize())
    assert np.all(np.isfinite(out)) and np.all(np.asarray(q.scale) > 0)
    np.testing.assert_array_equal(out[:, 0], 0.0)
    np.testing.assert_allclose(out[:, 3], 0.25, rtol=1e-2)
    error = np.abs(out - w).max(0)
    assert np.all(error <= 0.03 * np.abs(w).max(0))
    if not symmetric:
        assert q.zero_point[0, 1] == 0 and q.zero_point[0, 2] == 255


@pytest.mark.parametrize("method", WEIGHT_RANGES)
def test_ranges_can_be_traced_and_take_bfloat16(method):
    settings = {"bits": 4, "symmetric": False, "channel_axes": (3,), "method": method}
    w = kernel().astype(jnp.bfloat16)
    eager = quantize_kernel(w, **settings)
    traced = jax.jit(lambda w: quantize_kernel(w, **settings))(w)
    np.testing.assert_allclose(eager.scale, traced.scale, rtol=1e-6)
    np.testing.assert_array_equal(eager.qvalue, traced.qvalue)
    assert eager.dtype == traced.dtype == "bfloat16"


# --- messages -------------------------------------------------------------------------------------------

W = jnp.ones((2, 3))
OK = {"bits": 4, "symmetric": True, "channel_axes": (1,)}


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: bounds(1, True), ValueError, "bits.*2 to 8.*found 1"),
        (lambda: bounds(9, True), ValueError, "bits.*found 9"),
        (lambda: bounds(8.0, True), TypeError, "bits.*int.*8.0"),
        (lambda: bounds(True, True), TypeError, "bits"),
        (lambda: params_from_range(jnp.zeros(2), jnp.zeros(3), bits=8), ValueError, r"lo and hi.*\(2,\)"),
        (lambda: params_from_range(0.0, 1.0, bits=16), ValueError, "bits"),
        (
            lambda: quantize_tensor(jnp.ones(3, jnp.int32), params_from_range(0.0, 1.0, bits=8)),
            TypeError,
            "w: ",
        ),
        (
            lambda: quantize_tensor(W, params_from_range(0.0, np.ones(3), bits=8)),
            ValueError,
            "params.scale.*keep",
        ),
        (
            lambda: quantize_tensor(W, params_from_range(0.0, np.ones((1, 2)), bits=8)),
            ValueError,
            "params.scale",
        ),
        (lambda: pack(np.array([4]), 2), ValueError, r"codes.*\[0, 3\].*bits=2"),
        (lambda: pack(np.array([-3, 1]), 2), ValueError, r"codes.*\[-2, 1\]"),
        (lambda: pack(np.array([0.5]), 2), TypeError, "codes.*float64"),
        (lambda: unpack(np.zeros(2, np.uint8), 2, (9,), True), ValueError, "packed.*3 bytes"),
        (lambda: min_max(W, **{**OK, "channel_axes": 1}), TypeError, "channel_axes.*tuple"),
        (lambda: min_max(W, **{**OK, "channel_axes": (1.0,)}), TypeError, "channel_axes"),
        (lambda: min_max(W, **{**OK, "channel_axes": (2,)}), ValueError, r"channel_axes.*rank 2.*\(2,\)"),
        (lambda: min_max(W, **{**OK, "channel_axes": (1, -1)}), ValueError, "channel_axes.*distinct"),
        (lambda: min_max(W, **{**OK, "bits": 0}), ValueError, "bits"),
        (lambda: mse(W[:0], **OK), ValueError, "w: expected at least one"),
        (lambda: lp(W.astype(jnp.int8), **OK), TypeError, "w: expected a floating"),
        (lambda: lp(W, **OK, p=0.0), ValueError, "p: expected a positive"),
        (lambda: quantize_kernel(W, **OK, method="kl"), ValueError, "method.*min_max, mse, lp.*'kl'"),
    ],
)
def test_messages(call, error, words):
    with pytest.raises(error, match=words):
        call()
