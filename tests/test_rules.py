"""Rules for single layers: what each gets, and that networks of mixed widths are the same in every way to run them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import linen as nn
from model_grid import GRID
from test_export_formats import litert
from test_partly_quantized import SHAPES, expected, residual
from test_runtime import EVERYTHING, assert_same_network, run_integer

import dfq_jax
from dfq_jax import RECIPES, Convention, LayerRule
from dfq_jax.export import artifact, get_exporter
from dfq_jax.graph import Graph, apply_quantized, record_tensors, trace
from dfq_jax.quantizers import QTensor, quantization
from dfq_jax.report import layer_reports, packed_size
from dfq_jax.runtime import compile_integer
from dfq_jax.runtime.policy import INT8, UNQUANTIZED, WEIGHT_ONLY
from dfq_jax.stages import TARGETS, convention_from, estimate_ranges, kind_of, quantize_params, sqnr

# In turn, from the first layer on.
IN_TURN = ("w4a4", "w8a8", "w4a8", "float", "w8a4", "w3a16")


def in_turn(graph: Graph, words: tuple[str, ...] = IN_TURN) -> tuple[LayerRule, ...]:
    """Rules that name every layer."""
    return tuple(
        LayerRule.parse(f"{re.escape(layer.name)}={words[i % len(words)]}") for i, layer in enumerate(graph.layers)
    )


def bits_of(graph: Graph, convention: Convention) -> dict[str, tuple[int | None, int | None]]:
    """Bits of each layer's kernel and of the tensor that it reads."""
    return {
        layer.name: (convention.layer_bits(graph, layer), convention.tensor_bits(graph, graph.tensor(layer.tensor)))
        for layer in graph.layers
    }


def mobilenet(bits: str = "w4a4", *words: str, **fields: Any) -> dict[str, tuple[int | None, int | None]]:
    graph = model_grid.traced(model_grid.mobilenet_v2)
    return bits_of(graph, Convention.parse(bits, rules=tuple(map(LayerRule.parse, words)), **fields))


@functools.cache
def quantized(
    build: Callable[[], model_grid.Case], words: tuple[str, ...], shortcuts: str = "float"
) -> tuple[Graph, Any, Any, jax.Array, np.ndarray]:
    """Graph, float variables, variables quantized by rules in turn, images and the simulation's outputs."""
    case = build()
    apply_fn, variables = case.function()
    graph, x = trace(apply_fn, variables, case.input_shape), case.images()
    convention = Convention.parse("w8a8", shortcuts=shortcuts, weight_range="min_max", rules=in_turn(graph, words))

    @jax.jit
    def everything(variables: Any, x: jax.Array) -> Any:
        _, recorded = record_tensors(graph, variables, x)
        ranges = {name: (value.min(), value.max()) for name, value in recorded.items()}
        qvariables = quantize_params(graph, variables, ranges, convention)
        return qvariables, apply_quantized(graph, qvariables, x)

    qvariables, outputs = everything(variables, x)
    return graph, variables, qvariables, x, jax.tree.map(np.asarray, outputs)


# --- words ---


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("blocks_0/.*=w8a8", LayerRule(pattern="blocks_0/.*", weight_bits=8, activation_bits=8)),
        ("head=float", LayerRule(pattern="head", weight_bits=None, activation_bits=None)),
        ("head=w4a16", LayerRule(pattern="head", weight_bits=4, activation_bits=None)),
        ("head=w2", LayerRule(pattern="head", weight_bits=2)),
        (".*=a6", LayerRule(activation_bits=6)),
        ("kind:depthwise=w8a8", LayerRule(kind="depthwise", weight_bits=8, activation_bits=8)),
        ("kind:conv:a|b=w3", LayerRule(kind="conv", pattern="a|b", weight_bits=3)),
        ("(?=a).*=w3", LayerRule(pattern="(?=a).*", weight_bits=3)),
    ],
)
def test_words(words, rule):
    assert LayerRule.parse(words) == rule
    assert rule.describe() == words


def test_words_for_what_has_none_in_parse():
    rule = LayerRule(pattern="head", weight_bits=4, per_channel=False, symmetric=True)
    assert rule.describe() == "head=w4 per-tensor symmetric"
    assert LayerRule(pattern="head", symmetric=False).describe() == "head=asymmetric"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (3, "expected words like .*, found 3"),
        ("head", "expected words like 'head=float'"),
        ("=w4a4", "expected words like"),
        ("head=", "expected words like"),
        ("head=4", "expected words like"),
        ("head=w4a4x", "expected words like"),
        ("head=w1", "weight_bits: expected an integer from 2 to 8, None for float or 'same', found 1"),
        ("head=a9", "activation_bits: expected an integer from 2 to 8"),
        ("head=w16a8", "activation_bits: expected None beside float weights, found 8"),
        ("head(=w4", r"pattern: expected a regular expression, found 'head\('"),
        ("kind:pool=w4", r"kind: expected one of \('conv', 'depthwise', 'dense'\) or None, found 'pool'"),
    ],
)
def test_words_that_are_no_rule(words, message):
    with pytest.raises(ValueError, match=message):
        LayerRule.parse(words)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected one that changes something"),
        ({"pattern": "head"}, "expected one that changes something"),
        ({"pattern": 3, "weight_bits": 4}, "pattern: expected a regular expression, found 3"),
        ({"weight_bits": True}, "weight_bits: expected"),
        ({"weight_bits": 4.0}, "weight_bits: expected"),
        ({"per_channel": 1}, "per_channel: expected True, False or 'same', found 1"),
        ({"symmetric": None}, "symmetric: expected True, False or 'same', found None"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerRule(**fields)


@pytest.mark.untyped
def test_rules_of_a_convention_are_checked():
    with pytest.raises(ValueError, match="rules: expected a tuple of LayerRule"):
        Convention(rules=("head=w4",))
    with pytest.raises(ValueError, match="rules: expected a tuple of LayerRule"):
        Convention(rules=LayerRule(weight_bits=4))
    assert Convention(rules=[LayerRule(weight_bits=3)]).rules == (LayerRule(weight_bits=3),)
    hash(Convention(rules=[LayerRule(weight_bits=3)]))


def test_descriptions_name_the_first_rules():
    rules = tuple(LayerRule(pattern=name, weight_bits=3) for name in "abcde")
    assert Convention(rules=rules[:1]).describe().endswith("float shortcuts, but a=w3")
    assert Convention(rules=rules).describe().endswith("but a=w3; b=w3; c=w3; 2 more")


# --- what each layer gets ---


def test_by_name_and_kind():
    plain, found = mobilenet(), mobilenet("w4a4", "block1/.*=w8a8", "kind:depthwise=w6a6", "kind:dense=float")
    changed = {name: bits for name, bits in found.items() if bits != plain[name]}
    assert changed == {
        "block0/depthwise": (6, 6),
        "block1/expand": (8, 8),
        "block1/depthwise": (8, 8),
        "block1/project": (8, 8),
        "block2/depthwise": (6, 6),
        "classifier": (None, None),
    }


def test_the_first_rule_that_says_it_counts():
    name = "block1/expand"
    assert mobilenet("w4a4", f"{name}=w8", "block1/.*=w2a6", ".*=w3a3")[name] == (8, 6)
    assert mobilenet("w4a4", ".*=w3a3", f"{name}=w8a8")[name] == (3, 3)
    assert mobilenet("w4a4", f"{name}=a8")[name] == (4, 8)


def test_rules_come_before_edges_and_the_second_input():
    fields = {"edge_input_bits": 6, "second_input_bits": 7}
    plain = mobilenet("w4a3", **fields)
    assert [*plain.values()][:3] == [(8, 6), (4, 7), (4, 3)] and plain["classifier"] == (8, 6)
    found = mobilenet("w4a3", "stem=w2", "block0/depthwise=a2", "classifier=a5", **fields)
    assert [*found.values()][:3] == [(2, 6), (4, 2), (4, 3)] and found["classifier"] == (8, 5)


@pytest.mark.parametrize("build", [model_grid.mobilenet_v2, model_grid.mlp, model_grid.cifar_resnet8])
@pytest.mark.parametrize(
    "fields", [{}, {"edge_bits": 2}, {"edge_bits": None, "edge_input_bits": 8}, {"second_input_bits": 8}]
)
def test_fields_about_edges_are_rules(build, fields):
    """Written out as rules they give the same network."""
    graph = model_grid.traced(build)
    convention = Convention(weight_bits=3, activation_bits=4, **fields)
    written = Convention(
        weight_bits=3, activation_bits=4, edge_bits=None, rules=convention.rules_for(graph), second_input_bits=None
    )
    assert bits_of(graph, written) == bits_of(graph, convention)


def test_rules_for_no_layer_name_the_closest():
    with pytest.raises(ValueError, match=r"rules: 'clasifier=w8a8' matches no layer; the closest are 'classifier'"):
        mobilenet("w4a4", "clasifier=w8a8")
    with pytest.raises(ValueError, match=r"'kind:dense:stem=w8a8' matches no layer; the closest are 'classifier'\."):
        mobilenet("w4a4", "kind:dense:stem=w8a8")
    graph = model_grid.traced(model_grid.scanned_resnet)
    name = next(layer.name for layer in graph.layers if "[0]" in layer.name)
    with pytest.raises(ValueError, match=f"'{re.escape(re.escape(name))}'"):  # a name, and the pattern that is meant
        Convention(rules=(LayerRule(pattern=name, weight_bits=8),)).check(graph)
    graph = model_grid.traced(model_grid.mlp)
    with pytest.raises(ValueError, match=r"'kind:depthwise=w8' matches no layer; the network has none but dense"):
        Convention(rules=(LayerRule(kind="depthwise", weight_bits=8),)).check(graph)


def test_tensors_have_the_most_bits_that_a_reader_asks_for():
    graph = model_grid.traced(model_grid.inception)
    tensor = max(graph.tensors, key=lambda tensor: len(tensor.layers))
    first, second = map(re.escape, tensor.layers)

    def found(*words: str) -> int | None:
        convention = Convention.parse("w4a4", edge_bits=None, rules=tuple(map(LayerRule.parse, words)))
        return convention.tensor_bits(graph, tensor)

    assert found(f"{first}=a6", f"{second}=a8") == 8
    assert found(f"{first}=a2") == 4  # the other asks for 4
    assert found(f"{first}|{second}=a2") == 2
    assert found(f"{first}=w4a16") is None  # float is more than any
    assert found(f"{first}=float", f"{second}=a3") == 3  # who has float weights asks for nothing
    assert found(f"{first}|{second}=float") is None


def test_kernels_that_are_one_have_the_most_bits():
    graph = model_grid.traced(model_grid.scanned_resnet)
    stacked = next(layer for layer in graph.layers if len(graph.together(layer.kernel)) > 1)
    together = [layer for layer in graph.layers if layer.kernel in graph.together(stacked.kernel)]
    for words, bits in (("w6", 6), ("w2", 4), ("float", None)):
        convention = Convention.parse(
            "w4a4", edge_bits=None, rules=(LayerRule.parse(f"{re.escape(stacked.name)}={words}"),)
        )
        assert {convention.layer_bits(graph, layer) for layer in together} == {bits}


def test_granularity_and_symmetry():
    case = model_grid.mlp()
    graph, variables = model_grid.traced(model_grid.mlp), case.function()[1]
    first, second, third = (layer.name for layer in graph.layers)
    rules = (
        LayerRule(pattern=first, per_channel=False),
        LayerRule(pattern=second, symmetric=True),
        LayerRule(pattern=third, weight_bits=3, per_channel=True),
    )
    convention = Convention.parse("w4a16", edge_bits=None, rules=rules)
    found = layers_of(graph, jax.jit(lambda v: quantize_params(graph, v, {}, convention))(variables))
    assert [found[name].scale.size > 1 for name in (first, second, third)] == [False, True, True]
    assert [found[name].signed for name in (first, second, third)] == [False, True, False]
    assert [found[name].bits for name in (first, second, third)] == [4, 4, 3]


def layers_of(graph: Graph, qvariables: Any) -> dict[str, Any]:
    leaves = graph.leaves_by_path(qvariables)
    return {layer.name: leaves[layer.kernel] for layer in graph.layers}


# --- one network ---


@pytest.mark.parametrize("shortcuts", ["float", "quantized"])
@pytest.mark.parametrize("words", [("d_side=float",), ("b_first=float", "c_depthwise=w8a8"), ("b_first|e_head=float",)])
def test_simulation_of_float_layers(words, shortcuts):
    """A float layer reads its input in float; layers beside it read the same tensor quantized."""
    case = model_grid.function_case("residual", residual, SHAPES, (4, 6, 6, 3))
    graph, x = trace(residual, case.variables, case.input_shape), case.images()
    rules = tuple(map(LayerRule.parse, words))
    convention = Convention.parse("w4a4", shortcuts=shortcuts, rules=rules)
    ranges = estimate_ranges(graph, case.variables, x, convention, estimator="max")
    qvariables = quantize_params(graph, case.variables, ranges, convention)
    in_float = {layer.name for layer in graph.layers if any(re.fullmatch(rule.pattern, layer.name) for rule in rules)}
    in_float -= {"c_depthwise"}
    assert {n for n, leaf in layers_of(graph, qvariables).items() if not isinstance(leaf, QTensor)} == in_float
    if shortcuts == "quantized" and "d_side" not in in_float:
        assert "b_first" not in quantization(qvariables).for_all  # a float layer reads it
    reports = {report.name: report for report in layer_reports(graph, case.variables, qvariables)}
    for name, report in reports.items():
        assert (report.weight_bits is None, report.activation_bits is None) == (name in in_float, name in in_float)
    found = jax.jit(lambda v, x: apply_quantized(graph, v, x))(qvariables, x)
    wanted = expected(qvariables, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_a_network_left_in_float_is_the_float_network():
    graph, variables, qvariables, x, outputs = quantized(model_grid.mobilenet_v2, ("float",))
    assert not quantization(qvariables).by_tensor
    float_outputs = jax.jit(model_grid.mobilenet_v2().function()[0])(variables, x)
    np.testing.assert_allclose(outputs, float_outputs, rtol=1e-5, atol=1e-5 * np.abs(outputs).max())
    size = packed_size(graph.leaves(qvariables))
    assert size["quantized"] == size["float"]


FAST = ("cifar_resnet8", "mobilenet_v2", "general_dense", "shared_kernel", "scanned_resnet")
CASES = [
    pytest.param(*param.values, words, shortcuts, id=f"{param.id}-{name}", marks=[] if fast else [pytest.mark.slow])
    for param in GRID
    for name, words, shortcuts in (("codes", ("w4a4", "w8a8"), "quantized"), ("float", IN_TURN, "float"))
    for fast in [param.id in FAST]
]


@pytest.mark.parametrize(("build", "words", "shortcuts"), CASES)
def test_integers_equal_the_simulation(build, words, shortcuts):
    graph, _, qvariables, x, outputs = quantized(build, words, shortcuts)
    integer = jax.jit(functools.partial(apply_quantized, graph, integer=True))(qvariables, x)
    assert_same_network(jax.tree.map(np.asarray, integer), outputs, 0.02)
    for storage in ("speed", "memory"):
        policy = dataclasses.replace(EVERYTHING, storage=storage)
        plan, ivariables = compile_integer(graph, qvariables, policy)
        assert_same_network(run_integer(plan, ivariables, x), outputs, 0.02)
    runs = {layer.decision.runs for layer in plan.layers}
    assert runs == ({INT8} if words != IN_TURN else {INT8, UNQUANTIZED, WEIGHT_ONLY} & runs)


@pytest.mark.parametrize("build", [model_grid.mobilenet_v2])
def test_reports_and_sizes(build):
    graph, variables, qvariables, _, _ = quantized(build, IN_TURN)
    convention = Convention.parse("w8a8", rules=in_turn(graph))
    reports = layer_reports(graph, variables, qvariables)
    assert [(report.weight_bits, report.activation_bits) for report in reports] == [
        *bits_of(graph, convention).values()
    ]
    assert [report.kind for report in reports] == [kind_of(layer) for layer in graph.layers]
    assert {"conv", "depthwise", "dense"} == {report.kind for report in reports}
    packed = sum(
        -(-int(np.prod(layer.kernel_shape)) * (4 if bits <= 4 else 8) // 8)
        for layer, (bits, _) in zip(graph.layers, bits_of(graph, convention).values(), strict=True)
        if bits is not None
    )
    kernels = [leaf for leaf in graph.leaves(qvariables) if isinstance(leaf, QTensor)]
    own = sum(leaf.qvalue.size * (4 if leaf.bits <= 4 else 8) // 8 for leaf in kernels)
    assert own == packed


# --- files ---


def written(build: Callable[[], model_grid.Case], words: tuple[str, ...], shortcuts: str = "float") -> Any:
    """A network of mixed widths as `quantize` would give it, without a report."""
    graph, _, qvariables, x, outputs = quantized(build, words, shortcuts)
    fields = {"report": None, "recipe": None, "convention": Convention(rules=in_turn(graph, words))}
    return dfq_jax.Quantized(variables=qvariables, graph=graph, images=x, **fields), np.asarray(graph.logits(outputs))


# Of each format, words and least SQNR in decibel.
FILES = {
    "stablehlo": (IN_TURN, 35),
    "onnx": (IN_TURN, 35),
    "onnx 8 bits": (("w4a8", "w8a8", "w8a8", "float"), 35),
    "tflite": (("w4a8", "w8a8", "float", "w8a8", "w8a16"), 15),
    "tflite weights": (("w4a16", "float", "w8a16"), 30),
    "qwix": (("w4a8", "w8a8"), 35),
    "qwix float": (("w8a8", "float", "w4a8"), 35),
}


@pytest.mark.parametrize("shortcuts", ["float", "quantized"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("tflite") else []) for name in FILES]
)
@pytest.mark.parametrize(
    "build", [model_grid.mobilenet_v2, pytest.param(model_grid.cifar_resnet8, marks=pytest.mark.slow)]
)
def test_files_of_mixed_widths(build, name, shortcuts, tmp_path):
    words, least = FILES[name]
    kind = name.split()[0]
    for package in {"stablehlo": ["flatbuffers"], "onnx": ["onnx", "onnxruntime"], "qwix": ["qwix"]}.get(kind, []):
        pytest.importorskip(package)
    if kind == "tflite" and litert() is None:
        pytest.skip("no LiteRT packages")
    net, outputs = written(build, words, "float" if kind == "qwix" else shortcuts)
    exporter, path = get_exporter(kind), tmp_path / "net"
    if kind == "qwix":
        exporter = dataclasses.replace(exporter, module=build().model)
    exporter.write(net, path)
    assert sqnr(outputs, exporter.open(path)(np.asarray(net.images))) > least


LEAST = {"onnx": 35, "tflite": 15}  # decibel


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "tflite")) for n in TARGETS])
@pytest.mark.parametrize("build", [model_grid.mobilenet_v2, model_grid.cifar_resnet8])
def test_what_budgets_give_a_target_it_runs(build, name, tmp_path):
    """All pairs of bits that a target has, in one network."""
    pairs = itertools.product(*reversed(TARGETS[name]))  # weights change from layer to layer
    words = tuple(f"w{weights}a{read}" for read, weights in pairs)
    net, outputs = written(build, words, "quantized" if name == "integer" else "float")
    given = {(net.graph.leaves_by_path(net.variables)[layer.kernel].bits) for layer in net.graph.layers}
    assert given == set(TARGETS[name][0])
    if name == "integer":
        plan, variables = compile_integer(net.graph, net.variables, EVERYTHING)
        assert {layer.decision.runs for layer in plan.layers} == {INT8}
        assert_same_network(run_integer(plan, variables, net.images), outputs, 0.02)
        return
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    elif litert() is None:
        pytest.skip("no LiteRT packages")
    exporter, path = get_exporter(name), tmp_path / "net"
    exporter.write(net, path)
    assert sqnr(outputs, exporter.open(path)(np.asarray(net.images))) > LEAST[name]


TYPES = """
import sys
from ai_edge_quantizer.utils import tfl_flatbuffer_utils as utils
model = utils.read_model(bytearray(open(sys.argv[1], "rb").read()))
for graph in model.subgraphs:
    for op in graph.operators:
        name = str(utils.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[op.opcodeIndex].builtinCode))
        if "CONV" in name or "FULLY" in name:
            print(*(utils.TENSOR_CODE_TO_TYPE[graph.tensors[i].type] for i in [*op.inputs[:2], *op.outputs]))
"""


@pytest.mark.slow
def test_tflite_files_leave_layers_in_float(tmp_path):
    if litert() is None:
        pytest.skip("no LiteRT packages")
    words = ("float", "w8a8", "w8a16")
    net, _ = written(model_grid.mobilenet_v2, words)
    get_exporter("tflite").write(net, tmp_path / "net")
    command = [litert(), "-c", TYPES, str(tmp_path / "net")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    types = {"float": "FLOAT32", "w8a8": "INT8", "w8a16": "FLOAT32"}
    assert found == [" ".join(3 * [types[words[i % 3]]]) for i in range(len(net.graph.layers))]


# --- recipes ---


SHAPE = (1, 8, 8, 3)
SMALL = {"synthesis_steps": 4, "synthesis_num_images": 16, "synthesis_batch_size": 16}


class Net(nn.Module):
    """A residual block with a depthwise convolution."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        def unit(x: Any, name: str, groups: int = 1) -> Any:
            x = nn.Conv(8, (3, 3), use_bias=False, feature_group_count=groups, name=name)(x)
            return nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x)

        x = nn.relu(unit(x, "conv1"))
        y = nn.relu(unit(x, "depthwise", 8))
        x = nn.relu(x + unit(y, "conv2"))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


CASE = model_grid.linen_case("net", Net(), SHAPE)
RULES = tuple(map(LayerRule.parse, ("head=float", "kind:depthwise=w8a8", "conv1=w4a16", "conv2=w3a6")))


@functools.cache
def by_recipe(name: str) -> Any:
    short = {
        "instant": {},
        "fast": SMALL,
        "best": SMALL | {"reconstruction_steps": 6, "reconstruction_batch_size": 8, "synthesis_source": "pixels"},
        "finetune": SMALL | {"finetune_steps": 4},
    }[name]
    return dfq_jax.quantize(
        CASE.model,
        CASE.variables,
        input_shape=SHAPE,
        recipe=RECIPES[name].replace(**short),
        convention=Convention.parse("w4a4", rules=RULES),
    )


SLOW_RECIPES = [pytest.param(name, marks=pytest.mark.slow) for name in ("fast", "best", "finetune")]


@pytest.mark.parametrize("name", ["instant", *SLOW_RECIPES])
@pytest.mark.filterwarnings("ignore::dfq_jax.GraphWarning")
def test_recipes(name):
    q = by_recipe(name)
    assert {layer.name: (layer.weight_bits, layer.activation_bits) for layer in q.report.layers} == {
        "conv1": (4, None), "depthwise": (8, 8), "conv2": (3, 6), "head": (None, None)
    }  # fmt: skip
    assert "but head=float; kind:depthwise=w8a8; conv1=w4a16; 1 more" in q.report.convention
    x = CASE.images()
    assert_same_network(np.asarray(jax.jit(q.apply_integer)(q.variables, x)), np.asarray(q(x)), 0.02)


@pytest.mark.filterwarnings("ignore::dfq_jax.GraphWarning")
def test_saved_and_loaded(tmp_path):
    q, path = by_recipe("instant"), tmp_path / "net.safetensors"
    q.save(path)
    back = dfq_jax.load(path, CASE.model)
    assert back.convention == q.convention and back.convention.rules == RULES and back.report == q.report
    np.testing.assert_array_equal(back(CASE.images()), q(CASE.images()))


@pytest.mark.filterwarnings("ignore::dfq_jax.GraphWarning")
def test_files_from_before_rules_load(tmp_path):
    q, path = by_recipe("instant"), tmp_path / "net.safetensors"
    q.save(path)
    header = {key: artifact.load(path)[1][key] for key in ("graph", "input_shape", "recipe", "convention", "report")}
    older = json.loads(json.dumps(header))
    del older["convention"]["rules"]
    artifact.save(path, q.variables, header=older)
    back = dfq_jax.load(path, CASE.model)
    assert back.convention == dataclasses.replace(q.convention, rules=())
    np.testing.assert_array_equal(back(CASE.images()), q(CASE.images()))
    older["convention"]["rules"] = [{"pattern": "head", "weight_bits": 4, "surprise": 1}]
    artifact.save(path, q.variables, header=older)
    with pytest.raises(artifact.ArtifactError, match=r"its convention cannot be read .*LayerRule: \['surprise'\]"):
        dfq_jax.load(path, CASE.model)


def test_convention_from_json():
    convention = Convention.parse("w4a4", rules=(*RULES, LayerRule(pattern="a", symmetric=True)))
    assert convention_from(json.loads(json.dumps(dataclasses.asdict(convention)))) == convention


def test_rules_for_no_layer_are_refused_before_work():
    stages = []
    convention = Convention.parse("w4a4", rules=(LayerRule.parse("haed=float"),))
    with pytest.raises(ValueError, match="'haed=float' matches no layer; the closest are 'head'"):
        dfq_jax.quantize(CASE.model, CASE.variables, input_shape=SHAPE, convention=convention, on_stage=stages.append)
    assert stages == ["trace"]
    convention = Convention.parse("w4a4", rules=(LayerRule(weight_bits=None),))
    with pytest.raises(ValueError, match="rules: they leave every layer in float"):
        dfq_jax.quantize(CASE.model, CASE.variables, input_shape=SHAPE, convention=convention)
