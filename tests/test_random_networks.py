"""What must hold on any network, on networks drawn at random.

A failure names the seed: `print(random_network(seed))` in `tests/` says what the network is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from random_networks import ACTIVATIONS, CONVOLUTIONS, NORMS, UNITS, RandomNetwork, random_network
from test_rules import in_turn

import dfq_jax
from dfq_jax.graph import apply_quantized, record_tensors, run
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import dequantized
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.report.report import Report, packed_size
from dfq_jax.runtime import apply_plan, compile_integer
from dfq_jax.runtime.policy import Policy
from dfq_jax.stages.comparison import sqnr
from dfq_jax.stages.convention import Convention, quantize_params

FAST = (49, 87, 125, 190, 210, 303, 304)  # few that hold every part and convention between them
SEEDS = [seed if seed in FAST else pytest.param(seed, marks=pytest.mark.slow) for seed in range(330)]

BATCH = 8
BITS, SHORTCUTS = ("w8a8", "w4a8", "w4a4", "w8a8"), ("float", "quantized")
EVERYTHING = Policy(self_test=False)  # all that can run as int8 does


@dataclasses.dataclass(frozen=True)
class Results:
    """One network and what it computes in every way, for one batch of images."""

    network: RandomNetwork
    graph: Graph  # traced at batch size 1
    x: jax.Array
    convention: Convention
    ranges: Any
    qvariables: Any
    weights_only: Any
    mixed: Any
    outputs: dict[str, Any]


@functools.cache
def results(seed: int) -> Results:
    """Everything of one seed, compiled as one program."""
    network = random_network(seed)
    graph = trace(network.apply_fn, network.variables, (1, *network.input_shape[1:]))
    x = network.images(BATCH)
    convention = Convention.parse(BITS[seed % 4], shortcuts=SHORTCUTS[seed // 2 % 2], weight_range="min_max")
    rules = in_turn(graph)
    of_each = Convention.parse("w8a8", shortcuts=SHORTCUTS[seed % 2], weight_range="min_max", rules=rules)
    only = Convention.parse(("w4a16", "w8a16")[seed % 2], weight_range="min_max")

    @jax.jit
    def everything(variables, x):
        expected, recorded = record_tensors(graph, variables, x)
        ranges = {name: (value.min(), value.max()) for name, value in recorded.items()}
        qvariables = quantize_params(graph, variables, ranges, convention)
        weights_only = quantize_params(graph, variables, {}, only)
        mixed = quantize_params(graph, variables, ranges, of_each)
        return ranges, qvariables, weights_only, mixed, expected

    @jax.jit
    def computed(variables, qvariables, weights_only, mixed, x):
        return {
            "float": network.apply_fn(variables, x),
            "interpreted": run(graph, variables, x),
            "float on dequantized": network.apply_fn(dequantized(weights_only), x),
            "weights only": apply_quantized(graph, weights_only, x),
            "simulated": apply_quantized(graph, qvariables, x),
            "integer": apply_quantized(graph, qvariables, x, integer=True),
            "mixed": apply_quantized(graph, mixed, x),
            "mixed integer": apply_quantized(graph, mixed, x, integer=True),
        }

    ranges, qvariables, weights_only, mixed, _ = everything(network.variables, x)
    outputs = jax.tree.map(np.asarray, computed(network.variables, qvariables, weights_only, mixed, x))
    return Results(network, graph, x, convention, ranges, qvariables, weights_only, mixed, outputs)


# --- checks ---


def precision(network: RandomNetwork) -> float:
    """Relative error that the rounding of the network's own type explains."""
    return {"float32": 2e-5, "bfloat16": 0.1, "float16": 2e-2}[
        next(f.removeprefix("dtype: ") for f in network.features if f.startswith("dtype: "))
    ]


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf equal up to a share of its largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, span = np.abs(a - b).max(), np.abs(b).max()
        assert error <= tolerance * span, f"error {error:.3g} of {span:.3g}"


def assert_same_codes(found: Any, expected: Any, network: RandomNetwork, step: float = 0.05) -> None:
    """Equal to rounding for most images; in the others a value between two codes may have fallen to the other side."""
    tolerance = precision(network)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        span = np.abs(b).max()
        errors = np.abs(a - b).reshape(len(a), -1).max(1) / span
        # Small kernels of few bits have few sums, so that one between two codes may be in every image: by little then.
        rare = tolerance >= 1e-3 or np.mean(errors > tolerance) <= 0.25
        assert errors.max() <= (max(step, 3 * tolerance) if rare else 0.01), f"errors by image: {errors}"


def check_traced(seed: int) -> None:
    """Kernels, biases and BatchNorms are those that were written."""
    network = random_network(seed)
    graph = trace(network.apply_fn, network.variables, (1, *network.input_shape[1:]))
    norm_of = {bn.name: bn.mean for bn in graph.batch_norms}
    found = {}
    for layer in graph.layers:
        found.setdefault(layer.kernel, []).append((layer.bias, norm_of.get(layer.batch_norm)))
    norms = {bn.mean for bn in graph.batch_norms}
    assert norms == set(network.norms), f"BatchNorms {norms}, written {network.norms}"
    for item in network.expected:
        places = found.get(item.kernel, [])
        # A BatchNorm that was written before the next layer may directly follow this one.
        assert any(bias == item.bias and item.norm in (None, norm) for bias, norm in places), f"{item}, found {places}"


def check_batches(seed: int) -> None:
    """One digest at every batch size."""
    network = random_network(seed)
    graphs = [trace(network.apply_fn, network.variables, (n, *network.input_shape[1:])) for n in (1, 2, 3, 8)]
    assert len({graph.digest for graph in graphs}) == 1, "digests differ"


def check_interpreted(seed: int) -> None:
    """The interpreter without rules is the function."""
    own = results(seed)
    assert_close(own.outputs["interpreted"], own.outputs["float"], precision(own.network))


def check_weights_only(seed: int) -> None:
    """Float on dequantized weights is the simulation with float activations."""
    own = results(seed)
    assert_close(own.outputs["weights only"], own.outputs["float on dequantized"], precision(own.network))


def check_quantized(seed: int) -> None:
    """The quantized network is near the float one, finite, and its variables are the tree that was given."""
    own = results(seed)
    variables = own.network.variables
    back = dequantized(own.qvariables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert jax.tree.structure(own.outputs["simulated"]) == jax.tree.structure(own.outputs["float"])
    for name, outputs in own.outputs.items():
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(outputs)), name
    if own.convention.name == "w8a8":
        found = sqnr(*(own.graph.logits(own.outputs[name]) for name in ("float", "simulated")))
        assert found > 20, f"{found:.1f} dB"


def check_integer(seed: int) -> None:
    """Integer execution is the simulation."""
    own = results(seed)
    assert_same_codes(own.outputs["integer"], own.outputs["simulated"], own.network)


def check_mixed(seed: int) -> None:
    """Layers of several widths, and in float, beside each other: integer execution is the simulation."""
    own = results(seed)
    step = 0.1  # some read 4 bits, of which one code is 1 / 15 of all
    assert_same_codes(own.outputs["mixed integer"], own.outputs["mixed"], own.network, step)
    plan, ivariables = compile_integer(own.graph, own.mixed, EVERYTHING)
    found = jax.tree.map(np.asarray, jax.jit(apply_plan, static_argnums=0)(plan, ivariables, own.x))
    assert_same_codes(found, own.outputs["mixed"], own.network, step)


def check_compiled(seed: int) -> None:
    """Compiled integer execution is the simulation."""
    own = results(seed)
    plan, ivariables = compile_integer(own.graph, own.qvariables, EVERYTHING)
    found = jax.tree.map(np.asarray, jax.jit(apply_plan, static_argnums=0)(plan, ivariables, own.x))
    assert_same_codes(found, own.outputs["simulated"], own.network)


def check_served(seed: int) -> None:
    """Another batch size gives the same outputs."""
    own = results(seed)
    found = jax.jit(functools.partial(apply_quantized, own.graph))(own.qvariables, own.x[:3])
    assert_same_codes(found, jax.tree.map(lambda leaf: leaf[:3], own.outputs["simulated"]), own.network)


def check_saved(seed: int, tmp_path: Any) -> None:
    """Saved and loaded bit for bit."""
    own = results(seed)
    recipe = dfq_jax.RECIPES["noise"]
    report = Report(
        recipe=recipe.name,
        settings={},
        convention=own.convention.describe(),
        key=[0],
        images="given",
        seconds={},
        agreement=None,
        sqnr=0.0,
        layers=(),
        skipped=(),
        steps=(),
        size=packed_size(own.graph.leaves(own.qvariables)),
    )
    q = Quantized(
        variables=own.qvariables,
        graph=own.graph,
        report=report,
        recipe=recipe,
        convention=own.convention,
        images=None,
    )
    q.save(tmp_path / "q.safetensors")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), own.network.variables)
    loaded = dfq_jax.load(tmp_path / "q.safetensors", own.network.apply_fn, shapes)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(q.variables)
    assert loaded.graph == q.graph and loaded.report == q.report
    for a, b in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(q.variables), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_onnx(seed: int) -> None:
    """An ONNX file in a plain session is the simulation, or the file is refused with the operation's name."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from dfq_jax.export.onnx import to_onnx

    own = results(seed)
    try:
        model = to_onnx(own.graph, own.qvariables)
    except GraphError as error:
        assert "`" in str(error), error
        pytest.skip(str(error)[:200])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input": np.asarray(own.x)})
    expected = own.graph.logits(own.outputs["simulated"])
    # A value between two codes of few bits moves one image by much, and no other.
    by_image = sorted(sqnr(a, b) for a, b in zip(expected, found, strict=True))
    difference = sqnr(expected, found) if own.convention.name == "w8a8" else by_image[BATCH // 4]
    assert difference > (40 if precision(own.network) < 1e-3 else 15), f"{difference:.1f} dB, images {by_image}"


def test_the_fast_networks_hold_every_part():
    assert {seed % 4 for seed in FAST} == {0, 1, 2, 3}  # every convention, with bits of weights alone
    found = frozenset().union(*(random_network(seed).features for seed in FAST))
    parts = {
        "activation": (*ACTIVATIONS, "prelu"),
        "BatchNorm": (*NORMS, "vmapped"),
        "BatchNorm place": ("after", "missing"),
        "bias": ("plain", "broadcast", "none"),
        "convolution": CONVOLUTIONS,
        "unit": UNITS,
        "dims": (1, 2, 3),
        "layout": ("channels first", "channels last"),
        "batch": ("batch", "vmap"),
        "dtype": ("float32", "bfloat16", "float16"),
        "dense over channels": ("plain", "stored transposed", "batched"),
        "stacked": ("first axis", "last axis", "scan"),
        "wrapped in": ("jit", "remat"),
        "head": ("mean", "flatten", "einsum"),
        "tree": ("dict", "list", "tuple"),
    }
    assert not {f"{part}: {option}" for part, options in parts.items() for option in options} - found


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_network(seed, check, request):
    network = random_network(seed)
    arguments = {"tmp_path": request.getfixturevalue("tmp_path")} if check == "saved" else {}
    try:
        CHECKS[check](seed, **arguments)
    except Exception as error:
        raise AssertionError(f"{check}: {type(error).__name__}: {error}\n{network}") from error
