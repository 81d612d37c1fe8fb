"""One interpreter, three arithmetics: float as `apply_fn`, fake-quantized, and integer, on every layout of the grid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from model_grid import GRID, every_third, function_case, linen_case

from dfq_jax.graph import apply_quantized, normalize, record_tensors, run
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.program import sub_jaxprs
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import (
    OPERANDS,
    QUANTIZATION,
    TENSORS,
    ActivationQuantizers,
    quantization,
    with_quantization,
)
from dfq_jax.quantizers.qtensor import QTensor, QuantizerParams, fake_quant, params_from_range
from dfq_jax.quantizers.weights import quantize_kernel
from dfq_jax.stages.comparison import sqnr
from dfq_jax.stages.convention import Convention, quantize_params

# --- the grid: one compiled program tells everything about a network ---


class Results(NamedTuple):
    """Outputs of one network by several ways of running it, as NumPy arrays."""

    expected: Any  # apply_fn
    plain: Any  # run without rules
    normalized: Any  # run with BatchNorm computed by `normalize`
    simulated: Any
    integer: Any


@functools.cache
def traced(build: Callable[[], model_grid.Case]) -> tuple[Graph, Any, jax.Array]:
    case = build()
    return model_grid.traced(build), case.function()[1], case.images()


@functools.cache
def results(build: Callable[[], model_grid.Case], bits: str, shortcuts: str) -> Results:
    graph, variables, x = traced(build)
    convention = Convention.parse(bits, shortcuts=shortcuts, weight_range="min_max")

    @jax.jit
    def everything(variables, x):
        _, recorded = record_tensors(graph, variables, x)
        ranges = {name: (value.min(), value.max()) for name, value in recorded.items()}
        qvariables = quantize_params(graph, variables, ranges, convention)
        return Results(
            graph.apply_fn(variables, x),
            run(graph, variables, x),
            run(graph, variables, x, batch_norm=normalize),
            apply_quantized(graph, qvariables, x),
            apply_quantized(graph, qvariables, x, integer=True),
        )

    return jax.tree.map(np.asarray, everything(variables, x))


def is_narrow(build: Callable[[], model_grid.Case]) -> bool:
    """Whether the network computes in bfloat16."""
    return any(aval.dtype == jnp.bfloat16 for aval in traced(build)[0].program.avals.values())


def assert_same_outputs(found: Any, expected: Any, tolerance: float) -> None:
    """Same structure, shapes and types, and a largest difference of `tolerance` times the largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


FAST = ("w4a4", "float")  # 4-bit asymmetric and, at both edges, 8-bit symmetric weights
SLOW = (("w4a4", "quantized"), ("w8a8", "float"), ("w8a8", "quantized"))
FAST_GRID = every_third(1)


@pytest.mark.parametrize("build", FAST_GRID)
def test_run_equals_apply_fn(build):
    # In bfloat16 a sum in another order may round to the next number.
    found = results(build, *FAST)
    assert_same_outputs(found.plain, found.expected, 2e-2 if is_narrow(build) else 1e-6)


@pytest.mark.parametrize("build", FAST_GRID)
def test_batch_norm_rule_equals_the_networks_own(build):
    # In bfloat16 `normalize` rounds once at its end, the network after every operation.
    found = results(build, *FAST)
    assert_same_outputs(found.normalized, found.expected, 2e-2 if is_narrow(build) else 1e-4)


def check_quantized(found: Results, quiet: float) -> None:
    # Products of codes are exact in both modes, so within one program all bits agree; see the test on two programs.
    assert_same_outputs(found.integer, found.simulated, 0.0)
    outputs = zip(jax.tree.leaves(found.expected), jax.tree.leaves(found.simulated), strict=True)
    assert all(quiet < sqnr(a, b) < 80 for a, b in outputs)  # quantized for sure, and still the same network


@pytest.mark.parametrize("build", FAST_GRID)
def test_integer_equals_simulated(build):
    check_quantized(results(build, *FAST), 5)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "shortcuts"), SLOW)
@pytest.mark.parametrize("build", GRID)
def test_integer_equals_simulated_in_every_convention(build, bits, shortcuts):
    check_quantized(results(build, bits, shortcuts), 5 if bits == "w4a4" else 25)


# --- one layer against its definition, in float64 ---


def correlate(x, w, *, strides=1, padding=0, lhs_dilation=1, rhs_dilation=1, groups=1):
    """Correlation of `[N, *space, C]` with `[*window, C / groups, O]`, from its definition."""
    rank = x.ndim - 2
    strides, lhs_dilation, rhs_dilation = (np.broadcast_to(v, rank) for v in (strides, lhs_dilation, rhs_dilation))
    padding = np.broadcast_to(padding, (rank, 2))
    spread = np.zeros(
        (len(x), *((n - 1) * d + 1 for n, d in zip(x.shape[1:-1], lhs_dilation, strict=True)), x.shape[-1])
    )
    spread[(slice(None), *(slice(None, None, d) for d in lhs_dilation))] = x
    spread = np.pad(spread, [(0, 0), *np.maximum(padding, 0), (0, 0)])
    crop = [slice(max(-low, 0), min(high, 0) or None) for low, high in padding]
    spread = spread[(slice(None), *crop)]
    reach = [(k - 1) * d for k, d in zip(w.shape[:rank], rhs_dilation, strict=True)]
    size = [(n - r - 1) // s + 1 for n, r, s in zip(spread.shape[1:-1], reach, strides, strict=True)]
    result = np.zeros((len(x), *size, w.shape[-1]))
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    for offset in itertools.product(*map(range, w.shape[:rank])):
        start = np.multiply(offset, rhs_dilation)
        window = spread[
            (slice(None), *(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(start, size, strides, strict=True)))
        ]
        for g in range(groups):
            part = slice(g * outputs, (g + 1) * outputs)
            result[..., part] += window[..., g * inputs : (g + 1) * inputs] @ w[offset][:, part]
    return result


class OneLayer(NamedTuple):
    """A network of one layer, and the same computation in NumPy, `(x, kernel) -> y`."""

    model: Any
    input_shape: tuple[int, ...]
    reference: Callable[[np.ndarray, np.ndarray], np.ndarray]
    kernel_shape: tuple[int, ...] | None = None  # of a plain function

    @property
    def case(self) -> model_grid.Case:
        if self.kernel_shape is None:
            return linen_case("one_layer", self.model, self.input_shape)
        return function_case("one_layer", self.model, {"layer": {"kernel": self.kernel_shape}}, self.input_shape)


def conv(*arguments, **options):
    return nn.Conv(*arguments, use_bias=False, **options)


def definition(**options):
    return functools.partial(correlate, **options)


def padded_before(v, x):
    x = jnp.pad(x, [(0, 0), (2, 1), (0, 1), (0, 0)])
    return model_grid._conv2d(x, v["layer"]["kernel"], 2, "VALID")


def channels_first(v, x):
    return model_grid._conv2d(x, v["layer"]["kernel"], layout=("NCHW", "OIHW", "NCHW"))


def channels_first_reference(x, w):
    return np.moveaxis(correlate(np.moveaxis(x, 1, -1), w.transpose(2, 3, 1, 0), padding=1), -1, 1)


def einsum(equation, kernel_first=False):
    def apply_fn(v, x):
        operands = (v["layer"]["kernel"], x) if kernel_first else (x, v["layer"]["kernel"])
        return jnp.einsum(equation, *operands)

    def reference(x, w):
        return np.einsum(equation, *((w, x) if kernel_first else (x, w)))

    return apply_fn, reference


def flipped(w):
    return np.flip(w, (0, 1)).swapaxes(-1, -2)


def einsum_layer(equation, input_shape, kernel_shape, **options):
    apply_fn, reference = einsum(equation, **options)
    return OneLayer(apply_fn, input_shape, reference, kernel_shape)


LAYERS = {
    "same": OneLayer(conv(4, (3, 3)), (2, 7, 6, 3), definition(padding=1)),
    "stride_2": OneLayer(conv(4, (3, 3), 2), (2, 8, 7, 3), definition(strides=2, padding=((0, 1), (1, 1)))),
    "valid": OneLayer(conv(4, (3, 2), padding="VALID"), (2, 5, 6, 3), definition()),
    "uneven": OneLayer(conv(4, (3, 3), padding=((2, 1), (0, 3))), (2, 5, 5, 3), definition(padding=((2, 1), (0, 3)))),
    "cropped": OneLayer(
        conv(4, (2, 2), padding=((-1, 1), (2, -2))), (2, 6, 7, 3), definition(padding=((-1, 1), (2, -2)))
    ),
    "dilated": OneLayer(conv(4, (3, 3), kernel_dilation=2), (2, 7, 7, 3), definition(rhs_dilation=2, padding=2)),
    "grouped": OneLayer(
        conv(6, (3, 3), 2, feature_group_count=3), (2, 7, 7, 6), definition(strides=2, padding=1, groups=3)
    ),
    "depthwise": OneLayer(conv(4, (3, 3), feature_group_count=4), (2, 6, 6, 4), definition(padding=1, groups=4)),
    "multiplier": OneLayer(conv(8, (3, 3), feature_group_count=4), (2, 6, 6, 4), definition(padding=1, groups=4)),
    "input_dilation": OneLayer(
        conv(4, (3, 3), input_dilation=2, padding=((1, 2), (0, 1))),
        (2, 4, 5, 3),
        definition(lhs_dilation=2, padding=((1, 2), (0, 1))),
    ),
    "transposed": OneLayer(
        nn.ConvTranspose(4, (3, 3), (2, 2), use_bias=False),
        (2, 4, 5, 3),
        definition(lhs_dilation=2, padding=((2, 1),) * 2),
    ),
    "transposed_kernel": OneLayer(
        nn.ConvTranspose(4, (3, 2), (2, 2), use_bias=False, transpose_kernel=True),
        (2, 4, 5, 3),
        lambda x, w: correlate(x, flipped(w), lhs_dilation=2, padding=((2, 1), (1, 1))),
    ),
    "circular": OneLayer(
        conv(4, (3, 3), padding="CIRCULAR"),
        (2, 5, 5, 3),
        lambda x, w: correlate(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"), w),
    ),
    "padded_before": OneLayer(
        padded_before,
        (2, 6, 6, 3),
        definition(strides=2, padding=((2, 1), (0, 1))),
        (3, 3, 3, 4),
    ),
    "channels_first": OneLayer(channels_first, (2, 3, 6, 6), channels_first_reference, (4, 3, 3, 3)),
    "causal_1d": OneLayer(conv(4, (3,), padding="CAUSAL"), (2, 8, 3), definition(padding=((2, 0),))),
    "conv_3d": OneLayer(conv(3, (2, 3, 2)), (2, 4, 4, 3, 2), definition(padding=((0, 1), (1, 1), (0, 1)))),
    "dense": OneLayer(nn.Dense(4, use_bias=False), (5, 7), np.matmul),
    "dense_general": OneLayer(
        nn.DenseGeneral((2, 3), axis=(1, 3), use_bias=False),
        (2, 4, 3, 5),
        lambda x, w: np.einsum("ntac,tcij->naij", x, w),
    ),
    "kernel_transposed": einsum_layer("nhc,dc->nhd", (2, 3, 4), (5, 4)),
    "kernel_first": einsum_layer("dc,nc->dn", (3, 4), (5, 4), kernel_first=True),
    "heads": einsum_layer("nhc,hcd->nhd", (2, 3, 4), (3, 4, 5)),
    "heads_first": einsum_layer("hcd,nhc->hdn", (2, 3, 4), (3, 4, 5), kernel_first=True),
    "two_free_axes": einsum_layer("nc,icj->nij", (3, 4), (2, 4, 5)),
}


class Kind(NamedTuple):
    """Quantizers of one layer: bits of weights and activations, and which have a zero point."""

    weight_bits: int
    symmetric_weights: bool
    per_channel: bool
    activation_bits: int
    symmetric_activations: bool = False


KINDS = (
    Kind(4, False, True, 4),
    Kind(8, False, True, 8),  # weights that do not fit int8 once centered
    Kind(8, True, False, 3, symmetric_activations=True),
)
LOW, HIGH = -0.8, 2.1  # clips some of a standard Gaussian, and puts the zero point inside


def quantize_one_layer(graph: Graph, variables: Any, kind: Kind) -> Any:
    (layer,) = graph.layers
    kernel = quantize_kernel(
        graph.leaf(variables, layer.kernel),
        bits=kind.weight_bits,
        symmetric=kind.symmetric_weights,
        channel_axes=layer.channel_axes if kind.per_channel else (),
        method="min_max",
    )
    params = params_from_range(LOW, HIGH, bits=kind.activation_bits, symmetric=kind.symmetric_activations)
    quantizers = ActivationQuantizers(for_all={layer.tensor: params})
    return with_quantization(graph.replace(variables, {layer.kernel: kernel}), quantizers)


def reference_output(layer: OneLayer, graph: Graph, qvariables: Any, x: jax.Array) -> np.ndarray:
    """The layer on quantized operands in float64; only codes and scales come from the library."""
    kernel = graph.leaf(qvariables, graph.layers[0].kernel)
    (params,) = qvariables[QUANTIZATION][TENSORS].values()
    zero = 0 if params.zero_point is None else int(params.zero_point)
    low, high = (-(2 ** (params.bits - 1)), 2 ** (params.bits - 1) - 1) if params.signed else (0, 2**params.bits - 1)
    scale = float(params.scale)
    codes = np.clip(np.round(np.asarray(x, np.float64) / scale) + zero, low, high)
    kernel_zero = 0 if kernel.zero_point is None else np.asarray(kernel.zero_point, np.float64)
    weights = np.asarray(kernel.scale, np.float64) * (np.asarray(kernel.qvalue, np.float64) - kernel_zero)
    return layer.reference(scale * (codes - zero), weights)


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_equals_its_definition(name):
    layer = LAYERS[name]
    case = layer.case
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    x = case.images()

    @jax.jit
    def quantized(variables, x):
        outputs = []
        for kind in KINDS:
            q = quantize_one_layer(graph, variables, kind)
            outputs.append((q, apply_quantized(graph, q, x), apply_quantized(graph, q, x, integer=True)))
        return outputs

    if name in ("padded_before", "causal_1d"):  # zeros added before the layer are no part of the tensor
        assert graph.tensors[0].shape == x.shape
    for kind, (qvariables, simulated, integer) in zip(KINDS, quantized(variables, x), strict=True):
        expected = reference_output(layer, graph, qvariables, x)
        np.testing.assert_array_equal(simulated, integer, err_msg=str(kind))
        # Codes and their sums are exact, so what remains are the roundings of the scales and their product.
        np.testing.assert_allclose(integer, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=str(kind))


def test_unsigned_codes_without_zero_point():
    """Not what the library makes itself, but what others do: 8-bit codes up to 255 exceed int8."""
    layer = LAYERS["dense"]
    case = layer.case
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), jnp.abs(case.images())
    codes = jnp.asarray(np.random.default_rng(3).integers(0, 256, (7, 4)), jnp.uint8)
    kernel = QTensor(codes, jnp.full((1, 1), 0.01), None, bits=8, signed=False, dtype="float32")
    params = QuantizerParams(jnp.float32(0.01), None, bits=8, signed=False)
    quantizers = ActivationQuantizers(for_all={graph.layers[0].tensor: params})
    qvariables = with_quantization({"params": {"kernel": kernel}}, quantizers)
    expected = reference_output(layer, graph, qvariables, x)
    for integer in (False, True):
        found = apply_quantized(graph, qvariables, x, integer=integer)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_bias_and_bfloat16_of_one_layer():
    """Computing in bfloat16 rounds the layer's result and not its codes: 8-bit codes would lose a bit."""
    case = linen_case("bf16", nn.Conv(4, (3, 3), 2, dtype=jnp.bfloat16), (2, 8, 7, 3))
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    qvariables = quantize_one_layer(graph, variables, Kind(8, True, True, 8))
    product = reference_output(LAYERS["stride_2"], graph, qvariables, x)

    def rounded(value):
        return np.asarray(jnp.asarray(value, jnp.float32).astype(jnp.bfloat16), np.float64)

    expected = rounded(rounded(product) + rounded(variables["params"]["bias"]))
    for integer in (False, True):
        found = apply_quantized(graph, qvariables, x, integer=integer)
        assert found.dtype == jnp.bfloat16
        # The float64 product may lie on the other side of a tie.
        assert (np.asarray(found, np.float64) != expected).mean() < 0.01
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7)


# --- what is in the programs ---


def products(jaxpr: Any) -> list[tuple[str, ...]]:
    """Types of the operands and the result of every convolution and matrix product, once in a choice by platform."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            found.append(tuple(v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)))
        inner = [products(inner) for inner, _ in sub_jaxprs(eqn.params)]
        choice = eqn.primitive.name == "cond" and len({tuple(own) for own in inner}) == 1
        for own in inner[-1:] if choice else inner:
            found += own
    return found


@functools.cache
def quantized_by_noise(name: str, bits: str = "w4a4", **fields: Any) -> tuple[Graph, Any, Any, jax.Array]:
    """A network of the grid quantized with ranges from its noise images: graph, variables, qvariables, images."""
    graph, variables, x = traced(getattr(model_grid, name))
    convention = Convention.parse(bits, weight_range="min_max", **fields)

    @jax.jit
    def prepare(variables, x):
        _, recorded = record_tensors(graph, variables, x)
        ranges = {name: (value.min(), value.max()) for name, value in recorded.items()}
        return quantize_params(graph, variables, ranges, convention)

    return graph, variables, prepare(variables, x), x


@pytest.mark.parametrize("name", ["dilated_grouped", "general_dense", "bfloat16", "transposed_conv"])
def test_integer_products_are_integer(name):
    graph, _, qvariables, x = quantized_by_noise(name)

    def kinds(integer: bool) -> set[tuple[str, ...]]:
        jaxpr = jax.make_jaxpr(functools.partial(apply_quantized, graph, integer=integer))(qvariables, x)
        found = products(jaxpr.jaxpr)
        assert len(found) == len(graph.layers)  # no second product: 8-bit weights are symmetric
        return set(found)

    assert kinds(True) == {("int8", "int8", "int32")}
    assert kinds(False) == {("float32", "float32", "float32")}


@pytest.mark.parametrize(
    "name", ["private_batch_norm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mobilenet_v2", "transformer"))]
)
def test_separate_programs_agree(name):
    """Two programs may fuse what is between layers differently, and one rounding there can flip a code on a tie.

    On the CPU all bits agree here too; the tolerance is for other backends and versions.
    """
    graph, _, qvariables, x = quantized_by_noise(name)
    simulated = jax.jit(functools.partial(apply_quantized, graph))(qvariables, x)
    integer = jax.jit(functools.partial(apply_quantized, graph, integer=True))(qvariables, x)
    span = float(jnp.abs(simulated).max())
    assert float(jnp.median(jnp.abs(simulated - integer))) < 1e-6 * span
    assert float(jnp.abs(simulated - integer).max()) < 1e-2 * span  # a flipped code moves an output by a step


def test_record_tensors():
    graph, variables, x = traced(model_grid.dilated_grouped)
    outputs, recorded = jax.jit(record_tensors, static_argnums=0)(graph, variables, x)
    assert set(recorded) == {tensor.name for tensor in graph.tensors}
    assert all(recorded[tensor.name].shape == tensor.shape for tensor in graph.tensors)
    np.testing.assert_array_equal(recorded[graph.first_layer.tensor], x)
    np.testing.assert_allclose(outputs, graph.apply_fn(variables, x), rtol=1e-5, atol=1e-6)


# --- conventions ---


def test_weight_only_is_the_float_network_on_dequantized_weights():
    graph, _, qvariables, x = quantized_by_noise("shared_kernel", "w4a16")
    assert qvariables[QUANTIZATION] == {TENSORS: {}, OPERANDS: {}}
    plain = {k: v for k, v in qvariables.items() if k != QUANTIZATION}
    plain = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf,
        plain,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )

    @jax.jit
    def both(qvariables, plain, x):
        simulated = apply_quantized(graph, qvariables, x)
        return simulated, apply_quantized(graph, qvariables, x, integer=True), graph.apply_fn(plain, x)

    simulated, integer, expected = both(qvariables, plain, x)
    np.testing.assert_array_equal(simulated, integer)
    assert_same_outputs(simulated, expected, 1e-6)


def flat_residual(v, x):
    x = x.reshape(x.shape[0], -1)
    return x + x @ v["layer"]["kernel"]


@pytest.mark.parametrize("input_shape", [(4, 6), (4, 2, 3)])  # read by both as it is, or both in another layout
@pytest.mark.parametrize("shortcuts", ["float", "quantized"])
def test_shortcuts(shortcuts, input_shape):
    """The residual sum reads the tensor before ("float") or after ("quantized") its quantizer."""
    case = function_case("residual", flat_residual, {"layer": {"kernel": (6, 6)}}, input_shape)
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    convention = Convention(edge_bits=None, shortcuts=shortcuts)
    qvariables = quantize_params(graph, variables, {"layer": (jnp.float32(LOW), jnp.float32(HIGH))}, convention)
    kind, other = (OPERANDS, TENSORS) if shortcuts == "float" else (TENSORS, OPERANDS)
    assert list(qvariables[QUANTIZATION][kind]) == ["layer"] and not qvariables[QUANTIZATION][other]
    x = x.reshape(4, 6)
    x_hat = fake_quant(x, qvariables[QUANTIZATION][kind]["layer"])
    product = x_hat @ qvariables["layer"]["kernel"].dequantize()
    expected = product + (x if shortcuts == "float" else x_hat)
    for integer in (False, True):
        found = apply_quantized(graph, qvariables, x.reshape(input_shape), integer=integer)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_after_layer_and_batch_norm_rules():
    graph, _, qvariables, x = quantized_by_noise("mlp")
    seen = []

    def after_layer(call, result):
        seen.append(call.layer.name)
        return result + 0

    def batch_norm(bn, value, parameters):
        seen.append(bn.name)
        return normalize(bn, value, parameters)

    found = apply_quantized(graph, qvariables, x, after_layer=after_layer, batch_norm=batch_norm)
    assert seen == ["dense0", "bn0", "dense1", "bn1", "head"]
    np.testing.assert_allclose(found, apply_quantized(graph, qvariables, x), rtol=1e-5, atol=1e-5)


# --- other inputs ---


@pytest.mark.parametrize("integer", [False, True])
def test_other_batch_and_image_size(integer):
    graph, _, qvariables, x = quantized_by_noise("dilated_grouped")
    apply = jax.jit(functools.partial(apply_quantized, graph, integer=integer))
    whole = apply(qvariables, x)
    # An image's result does not depend on the others, up to a code on a rounding tie (another program).
    single = apply(qvariables, x[:1])
    assert single.shape == (1, *whole.shape[1:])
    np.testing.assert_allclose(single, whole[:1], rtol=0, atol=1e-2 * float(jnp.abs(whole).max()))
    larger = apply(qvariables, jnp.concatenate([x, x], axis=1))
    assert larger.shape == whole.shape and bool(jnp.isfinite(larger).all())
    assert not np.array_equal(larger, whole)


def test_other_size_of_one_layer_equals_its_definition():
    layer = LAYERS["same"]
    case = layer.case
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    qvariables = quantize_one_layer(graph, variables, KINDS[0])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 9, 3)), jnp.float32)
    expected = reference_output(layer, graph, qvariables, x)
    for integer in (False, True):
        found = apply_quantized(graph, qvariables, x, integer=integer)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_what_does_not_fit_is_refused():
    graph, variables, qvariables, x = quantized_by_noise("mlp")
    with pytest.raises(GraphError, match="shape"):
        run(graph, variables, x[:, :-1])
    with pytest.raises(GraphError, match="expected an array like"):
        apply_quantized(graph, qvariables, x[0])
    with pytest.raises(GraphError, match="missing"):
        apply_quantized(graph, {"params": {}}, x)


# --- gradients ---


def dense_layer(kind: Kind) -> tuple[Graph, Any, jax.Array, jax.Array]:
    case = LAYERS["dense"].case
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4)), jnp.float32)
    return graph, quantize_one_layer(graph, variables, kind), x, direction


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradients_of_one_layer_in_closed_form(kind):
    """Straight-through for x; learned step size (LSQ) for the activation scale; linear in the weight scale."""
    graph, qvariables, x, direction = dense_layer(kind)

    def loss(qvariables, x):
        return jnp.vdot(apply_quantized(graph, qvariables, x), direction)

    gradient, to_x = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(qvariables, x)
    kernel, (params,) = qvariables["params"]["kernel"], qvariables[QUANTIZATION][TENSORS].values()
    upstream = direction @ kernel.dequantize().T  # dL / dx_hat
    ratio = x / params.scale
    low, high = params.lo / params.scale, params.hi / params.scale
    inside = (ratio > low) & (ratio < high)
    assert bool(inside.any()) and not bool(inside.all())
    np.testing.assert_allclose(to_x, upstream * inside, rtol=1e-5, atol=1e-6)

    slope = jnp.where(inside, jnp.round(ratio) - ratio, jnp.clip(ratio, low, high))
    (found,) = gradient[QUANTIZATION][TENSORS].values()
    np.testing.assert_allclose(found.scale, jnp.vdot(upstream, slope), rtol=1e-4, atol=1e-5)
    outside = jnp.vdot(upstream, jnp.where(inside, 0.0, -params.scale))
    np.testing.assert_allclose(found.zero_point, outside, rtol=1e-4, atol=1e-5)

    unit = fake_quant(x, params) @ kernel.centered().astype(jnp.float32)  # the output for a weight scale of 1
    to_scale = gradient["params"]["kernel"].scale
    np.testing.assert_allclose(to_scale[0], (unit * direction).sum(0), rtol=1e-5, atol=1e-5)
    assert gradient["params"]["kernel"].qvalue.dtype == jax.dtypes.float0  # codes are integers


class DenseBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(4, name="dense")(x))


def test_gradients_of_batch_norm_leaves_by_finite_differences():
    case = linen_case("dense_bn", DenseBatchNorm(), (5, 7))
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    ranges = {"dense": (jnp.float32(LOW), jnp.float32(HIGH))}
    qvariables = quantize_params(graph, variables, ranges, Convention(edge_bits=None))
    bn = graph.batch_norms[0]
    paths = (bn.mean, bn.var, bn.scale, bn.bias, graph.layers[0].bias)

    @jax.jit
    def loss(leaves):
        return jnp.square(apply_quantized(graph, graph.replace(qvariables, leaves), x)).sum()

    leaves = {path: graph.leaf(qvariables, path) for path in paths}
    gradient = jax.grad(loss)(leaves)
    step = 1e-2
    for path, channel in itertools.product(paths, (0, 3)):
        up, down = ({**leaves, path: leaves[path].at[channel].add(sign * step)} for sign in (1, -1))
        expected = (loss(up) - loss(down)) / (2 * step)
        np.testing.assert_allclose(gradient[path][channel], expected, rtol=1e-2, atol=1e-2, err_msg=path)


@pytest.mark.parametrize(
    "name", ["private_batch_norm", "bfloat16", pytest.param("efficientnet", marks=pytest.mark.slow)]
)
def test_gradients_through_a_network_are_finite_and_reach_everything(name):
    graph, _, qvariables, x = quantized_by_noise(name, "w8a8")
    leaves = {path: graph.leaf(qvariables, path) for bn in graph.batch_norms for path in (bn.mean, bn.scale, bn.bias)}

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(leaves, quantizers, x):
        variables = with_quantization(graph.replace(qvariables, leaves), quantizers)
        return jnp.square(apply_quantized(graph, variables, x).astype(jnp.float32)).sum()

    by_leaf, by_quantizer, by_x = gradients(leaves, quantization(qvariables), x)
    scales = [q.scale for q in by_quantizer.by_tensor.values()]
    assert len(scales) == len(graph.tensors)
    for gradient in (*by_leaf.values(), *scales, by_x):
        assert bool(jnp.isfinite(gradient).all()) and bool(jnp.any(gradient != 0))
