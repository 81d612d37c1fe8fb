"""`trace` on every layout of the grid: what is found, that it computes the same, and what is refused."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import nnx
from model_grid import GRID, every_third, traced

from dfq_jax.graph.adapters import as_function
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.program import Constant, Program
from dfq_jax.graph.tracing.structure import GraphError, Skipped
from dfq_jax.quantizers.collection import QUANTIZATION, ActivationQuantizers, with_quantization, without_quantization
from dfq_jax.quantizers.qtensor import QTensor, params_from_range


class Counts(NamedTuple):
    """Counted by hand from the definitions of the networks."""

    layers: int
    batch_norms: int
    blocks: int
    residual_sums: int = 0  # layers whose result goes into one


COUNTS = {
    "resnet18": Counts(21, 20, 10, 12),
    "resnet50": Counts(54, 53, 18, 20),
    "nnx_resnet": Counts(7, 6, 4, 4),
    "cifar_resnet8": Counts(8, 7, 5, 4),
    "mobilenet_v2": Counts(11, 10, 8, 4),
    "mobilenet_v3": Counts(13, 8, 5, 3),
    "efficientnet": Counts(13, 8, 5, 3),
    "pre_activation_resnet": Counts(9, 7, 5, 5),
    "densenet": Counts(11, 10, 7),
    "vgg": Counts(4, 3, 4),
    "inception": Counts(6, 5, 3),
    "conv_bias_bn": Counts(4, 3, 4),
    "no_batch_norm": Counts(4, 0, 4),
    "transposed_conv": Counts(3, 2, 3),
    "dilated_grouped": Counts(4, 3, 4, 2),
    "conv_1d": Counts(4, 3, 4, 2),
    "conv_3d": Counts(4, 3, 4, 2),
    "mlp": Counts(3, 2, 3),
    "general_dense": Counts(3, 1, 3),
    "shared_kernel": Counts(4, 3, 4),
    "dict_outputs": Counts(3, 2, 3),
    "tuple_outputs": Counts(3, 2, 3),
    "private_batch_norm": Counts(3, 2, 3, 2),
    "remat": Counts(6, 5, 4, 3),
    "custom_vjp": Counts(3, 2, 3),
    "bfloat16": Counts(7, 6, 4, 4),
    "odd_sizes": Counts(10, 9, 4, 4),
    "frozen_dict": Counts(4, 3, 3, 2),
    "plain_function": Counts(3, 1, 3),
    "channels_first": Counts(3, 2, 3, 2),
    "weight_standardized": Counts(2, 0, 2, 1),
    "transformer": Counts(8, 0, 4, 3),
    "convnext": Counts(9, 0, 5, 4),
    "vit": Counts(14, 0, 6, 5),
    "unet": Counts(13, 10, 6),
    "audio": Counts(9, 7, 6, 4),
    "video": Counts(6, 5, 4, 4),
    "scanned_resnet": Counts(5, 3, 5),
    "scanned_vit": Counts(20, 0, 8, 7),
}
EPSILONS = {
    "efficientnet": {1e-3},
    "mobilenet_v3": {1e-3},
    "inception": {1e-3},
    "private_batch_norm": {1e-3, 2e-5},
}


def build_of(name: str):
    return next(p.values[0] for p in GRID if p.id == name)


def graph_of(name: str) -> Graph:
    return traced(build_of(name))


def evaluate(program: Program, leaves, x, given=None):
    """The flat program, operation by operation; returns every value."""
    env = dict(enumerate([*leaves, x])) | (given or {})

    def read(operand):
        return operand.value if isinstance(operand, Constant) else env[operand]

    for op in program.ops:
        env.update(zip(op.outputs, op(*map(read, op.inputs)), strict=True))
    return env


# --- what is found ---


@pytest.mark.parametrize("build", GRID)
def test_counts(build):
    graph = traced(build)
    sums = sum("add" in layer.consumers for layer in graph.layers)
    found = Counts(len(graph.layers), len(graph.batch_norms), len(graph.blocks), sums)
    assert found == COUNTS[build().name], graph.table()


@pytest.mark.parametrize("build", GRID)
def test_records_are_consistent(build):
    graph = traced(build)
    assert graph.first_layer == graph.layers[0]
    assert graph.last_layer == graph.layers[-1]
    assert [layer.op for layer in graph.layers] == sorted(layer.op for layer in graph.layers)
    assert len({layer.name for layer in graph.layers}) == len(graph.layers)
    assert len({bn.name for bn in graph.batch_norms}) == len(graph.batch_norms)
    assert "output" in graph.last_layer.consumers
    for layer in graph.layers:
        assert graph.layer(layer.name) is layer
        assert layer.name in graph.tensor(layer.tensor).layers
        assert graph.leaf_paths[layer.kernel_index] == layer.kernel
        assert graph.leaf_shapes[layer.kernel_index].shape == layer.kernel_shape
        assert layer.macs > 0
        channels = np.prod([layer.kernel_shape[a] for a in layer.channel_axes])
        if layer.bias is not None:
            assert graph.leaf_paths[layer.bias_index] == layer.bias
            assert np.prod(graph.leaf_shapes[layer.bias_index].shape) == channels
        if layer.batch_norm is not None:
            assert graph.batch_norm(layer.batch_norm).layer == layer.name
            assert graph.batch_norm(layer.batch_norm).channels == channels
            assert graph.batch_norm(layer.batch_norm).activation == layer.activation
    for bn in graph.batch_norms:
        assert graph.batch_norm(bn.name) is bn
        assert bn.layer is None or graph.layer(bn.layer).batch_norm == bn.name
        assert graph.program.avals[bn.input].shape[bn.channel_axis] == bn.channels
        for value in (graph.program.ops[i].outputs[0] for i in bn.chain[:-1]):
            assert graph.program.readers(value) == 1
    for tensor in graph.tensors:
        assert graph.tensor(tensor.name) is tensor
        assert tensor.name == tensor.layers[0]
        assert graph.program.avals[tensor.value].shape == tensor.shape
        assert (tensor.activation == "input") == (tensor.value == graph.program.input)


@pytest.mark.parametrize("build", GRID)
def test_batch_norm_roles_and_epsilon(build):
    case, graph = build(), traced(build)
    for bn in graph.batch_norms:
        words = {role: last_word(getattr(bn, role) or "") for role in ("mean", "var", "scale", "bias")}
        assert words["mean"] in ("mean", "running_mean")
        assert words["var"] in ("var", "running_var")
        assert words["scale"] in ("scale", "gamma", "")
        assert words["bias"] in ("bias", "beta", "")
        modules = {module_of(path) for path in (bn.mean, bn.var, bn.scale, bn.bias) if path}
        assert modules == {bn.name.split("#")[0].split("[")[0]}
    assert {bn.epsilon for bn in graph.batch_norms} <= EPSILONS.get(case.name, {1e-5})
    statistics = [p for p in graph.leaf_paths if last_word(p) in ("mean", "running_mean")]
    assert sorted(statistics) == sorted(bn.mean for bn in graph.batch_norms)


def last_word(path):
    """Without the index of a slice."""
    return path.split("/")[-1].split("[")[0]


def module_of(path):
    first, *rest = path.split("/")[:-1]
    return "/".join(rest if first in ("params", "batch_stats", "moving") else [first, *rest])


def test_missing_scale_and_bias():
    by_name = {bn.name: bn for bn in graph_of("conv_bias_bn").batch_norms}
    assert (by_name["bn1"].scale, by_name["bn1"].bias) == ("params/bn1/scale", "params/bn1/bias")
    assert (by_name["bn2"].scale, by_name["bn2"].bias) == ("params/bn2/scale", None)
    assert (by_name["bn3"].scale, by_name["bn3"].bias) == (None, None)
    assert all(bn.scale is None and bn.bias for bn in graph_of("inception").batch_norms)


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        (
            "resnet18",
            "ResNetBlock_2/conv_proj",
            ("params/ResNetBlock_2/conv_proj/kernel", None, "ResNetBlock_2/norm_proj", "none", ("add",)),
        ),
        (
            "resnet50",
            "BottleneckResNetBlock_15/Conv_1",
            (
                "params/BottleneckResNetBlock_15/Conv_1/kernel",
                None,
                "BottleneckResNetBlock_15/BatchNorm_1",
                "relu",
                ("BottleneckResNetBlock_15/Conv_2",),
            ),
        ),
        ("nnx_resnet", "block2/proj", ("block2/proj/kernel", None, "block2/bn_proj", "none", ("add",))),
        ("nnx_resnet", "head", ("head/kernel", "head/bias", None, "none", ("output",))),
        ("mobilenet_v2", "stem", ("params/stem/kernel", None, "bn_stem", "relu6", ("block0/depthwise", "add"))),
        ("conv_bias_bn", "conv1", ("params/conv1/kernel", "params/conv1/bias", "bn1", "leaky_relu", ("conv2",))),
        ("custom_vjp", "unit2", ("unit2/kernel", None, "unit2", "relu", ("head",))),
        ("plain_function", "w2", ("w2/kernel", None, None, "none", ("w3",))),
        ("shared_kernel", "shared#2", ("params/shared/kernel", None, "bn2", "relu", ("head",))),
        ("channels_first", "conv2", ("conv2/weight", None, "bn2", "none", ("add",))),
        ("dict_outputs", "conv2", ("params/conv2/kernel", None, "bn2", "relu", ("output", "head"))),
        ("general_dense", "merge", ("params/merge/kernel", "params/merge/bias", "bn", "relu", ("einsum",))),
        ("densenet", "stem", ("params/stem/kernel", None, None, "none", None)),
        ("pre_activation_resnet", "stem", ("params/stem/kernel", None, None, "none", ("add", "conv1_0"))),
        ("transformer", "fc1", ("params/fc1/kernel", "params/fc1/bias", None, "gelu_tanh", ("fc2",))),
    ],
)
def test_layer_by_name(name, layer, expected):
    found = graph_of(name).layer(layer)
    kernel, bias, batch_norm, activation, consumers = expected
    assert (found.kernel, found.bias, found.batch_norm) == (kernel, bias, batch_norm)
    assert found.activation == activation
    assert consumers is None or set(found.consumers) == set(consumers)


def test_activations_of_layers():
    def activations(name):
        return [layer.activation for layer in graph_of(name).layers]

    assert activations("cifar_resnet8") == ["relu", "relu", "none", "relu", "none", "relu", "none", "none"]
    se = ["swish", "swish", "swish", "sigmoid", "none"]
    assert activations("efficientnet") == ["swish", *se, *se, "swish", "none"]
    hard = ["hard_swish", "hard_swish", "relu", "hard_sigmoid", "none"]
    assert activations("mobilenet_v3") == ["hard_swish", *hard, *hard, "hard_swish", "none"]
    assert activations("conv_bias_bn") == ["leaky_relu", "elu", "gelu_tanh", "none"]
    assert activations("convnext") == ["none", *["none", "gelu", "none", "none"] * 2]
    assert activations("bfloat16") == ["relu", "relu", "none", "relu", "none", "none", "none"]


def test_tensors_know_what_made_them():
    graph = graph_of("cifar_resnet8")
    made = {t.name: (t.activation, t.batch_norm, t.shared) for t in graph.tensors}
    assert made["conv1"] == ("input", None, False)
    assert made["layer1_0/conv1"] == ("relu", "bn1", True)
    assert made["layer1_0/conv2"] == ("relu", "layer1_0/bn1", False)
    assert made["layer2_0/conv1"] == ("relu", None, True)  # the sum's ReLU
    assert made["linear"] == ("none", None, False)
    # One tensor for all its readers, through padding, flattening and casts.
    assert graph_of("inception").tensor("branch1").layers == ("branch1", "branch3_reduce")
    assert graph_of("pre_activation_resnet").tensor("proj_1").layers == ("proj_1", "conv1_1")
    attention = tuple(f"attention/{name}" for name in ("query", "key", "value"))
    assert graph_of("transformer").tensor("attention/query").layers == attention
    assert graph_of("vgg").tensor("fc").shape == (2, 2, 2, 6)
    made = {t.name: (t.activation, t.batch_norm) for t in graph_of("bfloat16").tensors}
    assert made["ResNetBlock_1/Conv_1"] == ("relu", "ResNetBlock_1/BatchNorm_0")


def test_convolution_details():
    graph = graph_of("dilated_grouped")
    assert (graph.layer("grouped").groups, graph.layer("grouped").strides) == (2, (2, 2))
    assert not graph.layer("grouped").depthwise
    assert graph_of("mobilenet_v2").layer("block1/depthwise").depthwise
    assert graph_of("transposed_conv").layer("up").transposed
    assert graph_of("transposed_conv").layer("out").channel_axes == (2,)  # its kernel is stored transposed
    assert graph_of("channels_first").layer("conv1").channel_axes == (0,)
    assert graph_of("general_dense").layer("split").channel_axes == (1, 2)
    assert graph_of("general_dense").layer("merge").channel_axes == (2,)
    assert graph_of("plain_function").layer("w2").channel_axes == (0,)
    # 4 channels at 4 x 4, from 3x3x3; 8 x 8 x 4 positions and channels, from 3x3x4.
    assert graph_of("resnet18").layer("conv_init").macs == 16 * 16 * 4 * 7 * 7 * 3
    assert graph_of("mobilenet_v2").layer("block1/depthwise").macs == 4 * 4 * 12 * 3 * 3
    assert graph_of("vgg").layer("fc").macs == 24 * 8
    assert graph_of("general_dense").layer("split").macs == 4 * 3 * 6
    assert graph_of("general_dense").layer("einsum").macs == 4 * 6 * 5
    assert graph_of("plain_function").layer("w2").macs == 8 * 8 * 4 * 6


def test_channel_axis_where_rows_are_as_many_as_channels():
    assert {bn.channel_axis for bn in graph_of("channels_first").batch_norms} == {1}

    def apply_fn(v, x):  # full-size operands, as older versions of JAX make them
        def full(name):
            return jax.lax.broadcast_in_dim(v["bn"][name], x.shape, (2,))

        x = (x - full("mean")) * (jax.lax.rsqrt(full("var") + 1e-5) * full("scale")) + full("bias")
        return x.sum((1, 2)) @ v["fc"]["kernel"]

    shapes = {"bn": {k: (6,) for k in ("mean", "var", "scale", "bias")}, "fc": {"kernel": (6, 5)}}
    case = model_grid.function_case("full", apply_fn, shapes, (6, 6, 6, 6))
    (bn,) = trace(case.model, case.variables, case.input_shape).batch_norms
    assert (bn.channel_axis, bn.layer) == (2, None)


def test_blocks_follow_the_residual_structure():
    def blocks(name):
        return [block.layers for block in graph_of(name).blocks]

    assert blocks("cifar_resnet8") == [
        ("conv1",),
        ("layer1_0/conv1", "layer1_0/conv2"),
        ("layer2_0/conv1", "layer2_0/conv2"),
        ("layer3_0/conv1", "layer3_0/conv2"),
        ("linear",),
    ]
    assert blocks("pre_activation_resnet")[2:4] == [("proj_1", "conv1_1", "conv2_1"), ("conv1_2", "conv2_2")]
    assert blocks("transformer") == [
        ("patches",),
        ("attention/query", "attention/key", "attention/value", "attention/out"),
        ("fc1", "fc2"),
        ("head",),
    ]
    assert blocks("inception")[1] == ("branch1", "branch3_reduce", "branch3", "branch_pool")


@pytest.mark.parametrize("build", GRID)
def test_blocks_are_cut_points(build):
    graph = traced(build)
    program = graph.program
    assert [name for block in graph.blocks for name in block.layers] == [x.name for x in graph.layers]
    assert graph.blocks[0].input == program.input
    assert graph.blocks[-1].output == -1
    for block, following in itertools.pairwise(graph.blocks):
        assert block.output == following.input
    for block in graph.blocks:
        assert block.name == block.layers[0]
        # From the block's input alone everything later can be computed, its output first.
        known = set(program.parameter_only) | {block.input}
        for op in program.ops:
            if known.issuperset(op.value_inputs):
                known.update(op.outputs)
        assert known >= program.output_values if block.output == -1 else block.output in known
        # Without the block's input nothing reaches the outputs.
        reached = {program.input} - {block.input}
        for op in program.ops:
            if not reached.isdisjoint(op.value_inputs):
                reached.update(set(op.outputs) - {block.input})
        assert reached.isdisjoint(program.output_values)


# --- what stays in float ---


def test_skipped_operations_are_listed_with_reasons():
    (skipped,) = graph_of("weight_standardized").skipped
    assert "params/standardized/kernel" in skipped.reason
    assert "weight standardization" in skipped.reason
    skipped = graph_of("transformer").skipped
    assert [s.reason for s in skipped] == ["both operands depend on the input (attention-like product)"] * 2
    assert len(graph_of("vit").skipped) == 5  # two products in each block, and the table of positions
    listed = {p.id for p in GRID if p.id not in ("weight_standardized", "transformer", "vit", "scanned_vit")}
    assert all(graph_of(name).skipped == () for name in listed)


def test_constant_kernels_and_tables_are_listed():
    fixed = jnp.ones((3, 4))

    def apply_fn(v, x):
        tokens = v["table"][jnp.zeros(x.shape[0], jnp.int32)] + v["positions"]
        return (x @ fixed + tokens) @ v["w"]

    variables = {"table": jnp.ones((7, 4)), "positions": jnp.ones((2, 4)), "w": jnp.ones((4, 5))}
    graph = trace(apply_fn, variables, (2, 3))
    reasons = {s.name: s.reason for s in graph.skipped}
    assert {"table", "positions"} < reasons.keys()
    assert any("constant of the program" in reason for reason in reasons.values())
    assert [layer.name for layer in graph.layers] == ["w"]


def test_what_only_resembles_batch_norm_is_listed():
    def apply_fn(v, x):
        x = (x @ v["w"] - v["mean"]) / jnp.sqrt(jnp.maximum(v["var"], 1.0) + 1e-5)
        return x @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "mean": jnp.ones(4), "var": jnp.ones(4), "head": jnp.ones((4, 5))}
    graph = trace(apply_fn, variables, (2, 3))
    assert graph.batch_norms == ()
    reason = "scales by the root of a parameter but computes no BatchNorm; it stays as it is"
    assert graph.skipped == (Skipped("var", reason, kind="norm"),)
    assert graph.unrecognized_batch_norms == graph.skipped
    with pytest.raises(GraphError, match=r"no BatchNorm was recognized in the network \(var: scales by"):
        graph.require_batch_norms("so there are no statistics.")


def test_no_batch_norm_is_said_of_networks_that_have_none():
    def apply_fn(v, x):  # a normalized classifier, a temperature, and LayerNorm scale by roots, too
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * v["scale"]
        return x @ v["w"] / jnp.sqrt(jnp.square(v["w"]).sum(0)) / jnp.sqrt(v["temperature"])

    variables = {"w": jnp.ones((3, 4)), "scale": jnp.ones(3), "temperature": jnp.ones(())}
    graph = trace(apply_fn, variables, (2, 3))
    assert graph.unrecognized_batch_norms == ()
    with pytest.raises(GraphError, match="the network has no BatchNorm, so there are no statistics"):
        graph.require_batch_norms("so there are no statistics.")


def test_position_table_is_no_bias():
    def apply_fn(v, x):
        return (x @ v["w"] + v["positions"]).mean(1) @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "positions": jnp.ones((6, 4)), "head": jnp.ones((4, 5))}
    graph = trace(apply_fn, variables, (2, 6, 3))
    assert graph.layer("w").bias is None
    assert [s.name for s in graph.skipped] == ["positions"]


def test_leaves_of_one_dict_get_their_own_names():
    def apply_fn(v, x):
        return jax.nn.relu(x @ v["block"]["w1"]) @ v["block"]["w2"]

    variables = {"block": {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 5))}}
    assert [layer.name for layer in trace(apply_fn, variables, (2, 3)).layers] == ["block/w1", "block/w2"]


def test_shared_batch_norm_gets_two_names():
    def norm(p, x):
        return (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5)

    def apply_fn(v, x):
        return norm(v["bn"], norm(v["bn"], x @ v["w"]) @ v["w"])

    shapes = {"bn": {"mean": (4,), "var": (4,)}, "w": (4, 4)}
    case = model_grid.function_case("shared", apply_fn, shapes, (2, 4))
    graph = trace(case.model, case.variables, case.input_shape)
    assert [bn.name for bn in graph.batch_norms] == ["bn", "bn#2"]
    assert [layer.batch_norm for layer in graph.layers] == ["bn", "bn#2"]
    assert [layer.name for layer in graph.layers] == ["w", "w#2"]


# --- the program computes what the network computes ---


@pytest.mark.parametrize("build", every_third(0))
def test_program_and_gradients_equal_apply_fn(build):
    case, graph = build(), traced(build)
    apply_fn, variables = case.function()
    leaves, x = graph.leaves(variables), case.images()

    def by_program(x):
        env = evaluate(graph.program, leaves, x)
        outputs = [o.value if isinstance(o, Constant) else env[o] for o in graph.program.outputs]
        return jax.tree.unflatten(graph.output_treedef, outputs), env

    def weighted(outputs):
        return sum(jnp.sum(jnp.sin(o.astype(jnp.float32))) for o in jax.tree.leaves(outputs))

    def both(x):
        expected, pull = jax.vjp(lambda x: apply_fn(variables, x), x)
        found, pull_found, env = jax.vjp(by_program, x, has_aux=True)
        cotangent = jax.grad(weighted)(expected)
        norms = [(env[bn.input], env[bn.output]) for bn in graph.batch_norms]
        return expected, found, pull(cotangent), pull_found(cotangent), norms

    expected, found, gradient, found_gradient, norms = jax.jit(both)(x)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    np.testing.assert_allclose(found_gradient[0], gradient[0], rtol=1e-5, atol=1e-6)
    assert np.abs(gradient[0]).max() > 0
    # A compiler may keep more digits than bfloat16 has between a convolution and its BatchNorm.
    tolerance = 0.03 if case.name == "bfloat16" else 1e-5
    for bn, (before, after) in zip(graph.batch_norms, norms, strict=True):
        truth = normalized(graph, variables, bn, before)
        np.testing.assert_allclose(after, truth, rtol=tolerance, atol=tolerance)
    assert graph.logits(expected).shape[-1] == {"transposed_conv": 3, "unet": 3, "cifar_resnet8": 10}.get(case.name, 5)


def normalized(graph, variables, bn, x):
    """y = (x - mean) scale / sqrt(var + epsilon) + bias in float64, by the records of the graph."""

    def channels(path, default):
        values = default if path is None else np.asarray(graph.leaf(variables, path), np.float64).reshape(-1)
        return values if path is None else np.expand_dims(values, [a for a in range(x.ndim) if a != bn.channel_axis])

    mean, var = channels(bn.mean, 0.0), channels(bn.var, 1.0)
    scaled = (np.asarray(x, np.float64) - mean) * channels(bn.scale, 1.0) / np.sqrt(var + bn.epsilon)
    return scaled + channels(bn.bias, 0.0)


def test_gradient_at_exact_ties_is_that_of_the_custom_derivative():
    case, graph = model_grid.cifar_resnet8(), graph_of("cifar_resnet8")
    apply_fn, variables = case.function()
    # Zero means and biases, except of the classifier: every ReLU sees exactly 0.
    quiet = {p: jnp.zeros(s.shape) for p, s in zip(graph.leaf_paths, graph.leaf_shapes, strict=True) if s.ndim == 1}
    scales = {bn.scale: jnp.ones(bn.channels) for bn in graph.batch_norms}
    variances = {bn.var: jnp.ones(bn.channels) for bn in graph.batch_norms}
    variables = graph.replace(variables, quiet | scales | variances)
    leaves, x = graph.leaves(variables), jnp.zeros(case.input_shape)

    def by_program(x):
        return evaluate(graph.program, leaves, x)[graph.program.outputs[0]].sum()

    expected, found = jax.jit(lambda x: (jax.grad(lambda x: apply_fn(variables, x).sum())(x), jax.grad(by_program)(x)))(
        x
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, 0)  # the derivative of jax.nn.relu at 0; that of maximum is 1/2


def test_custom_derivatives_of_plain_functions_stay():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (3.0 * g,))

    def apply_fn(v, x):
        return straight_through(x) @ v["w"]

    graph = trace(apply_fn, {"w": jnp.ones((3, 4))}, (2, 3))
    gradient = jax.grad(lambda x: evaluate(graph.program, [jnp.ones((3, 4))], x)[graph.program.outputs[0]].sum())
    np.testing.assert_array_equal(gradient(jnp.ones((2, 3))), 12.0)


# --- identity and other shapes ---


@pytest.mark.parametrize("build", GRID)
def test_tracing_is_deterministic_and_shapes_are_enough(build):
    case, graph = build(), traced(build)
    apply_fn, variables = case.function()
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    again = trace(apply_fn, specs, jax.ShapeDtypeStruct(case.input_shape, jnp.float32))
    assert again == graph
    assert hash(again) == hash(graph)
    assert again.digest == graph.digest
    assert (again.layers, again.batch_norms, again.tensors) == (graph.layers, graph.batch_norms, graph.tensors)


@pytest.mark.parametrize("build", GRID)
def test_other_batch_size(build):
    case, graph = build(), traced(build)
    other = graph.at((5, *case.input_shape[1:]))
    assert other.digest == graph.digest
    assert other != graph
    assert other.input.shape[0] == 5
    assert other.layers == graph.layers and other.batch_norms == graph.batch_norms
    assert graph.at((5, *case.input_shape[1:])) is other
    assert other.at(case.input_shape) is graph
    assert graph.at(case.input_shape) is graph
    assert graph.at((1, *case.input_shape[1:])).digest == graph.digest


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenet_v2", "odd_sizes", "dilated_grouped", "densenet"])
def test_other_image_size(name):
    graph = graph_of(name)
    other = graph.at((3, 24, 20, 3))
    assert other.digest == graph.digest
    assert other.tensors[0].shape == (3, 24, 20, 3)
    assert [bn.channel_axis for bn in other.batch_norms] == [3] * len(graph.batch_norms)


def test_channels_first_image_size():
    assert graph_of("channels_first").at((4, 3, 12, 10)).digest == graph_of("channels_first").digest


def test_at_refuses_what_does_not_fit():
    graph = graph_of("vgg")
    with pytest.raises(GraphError, match=r"cannot be traced on an input of shape \(2, 16, 16, 3\)"):
        graph.at((2, 16, 16, 3))  # the flattened features have another size
    with pytest.raises(GraphError, match=r"expected an array like \[N, 8, 8, 3\], found shape \(8, 8, 3\)"):
        graph.at((8, 8, 3))
    with pytest.raises(GraphError, match="shape"):
        graph.at((2, 8, 8, 4))
    with pytest.raises(GraphError, match="at least 1"):
        graph.at((0, 8, 8, 3))


def test_at_refuses_a_network_that_changes_with_its_input():
    def apply_fn(v, x):
        x = x @ v["a"]
        return x @ v["b"] if x.shape[0] > 2 else x

    graph = trace(apply_fn, {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}, (4, 3))
    with pytest.raises(GraphError, match="other layers"):
        graph.at((1, 3))


def test_graphs_that_differ_between_layers_are_not_equal():
    def network(pool):
        return lambda v, x: pool(jax.nn.relu(x @ v["w"]), axis=1) @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5))}
    mean, maximum = (trace(network(pool), variables, (2, 6, 3)) for pool in (jnp.mean, jnp.max))
    assert mean.digest == maximum.digest
    assert mean != maximum

    # A graph is a static argument: equal ones share a compiled function, others must not.
    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, x):
        return evaluate(graph.program, graph.leaves(variables), x)[graph.program.outputs[0]]

    x = jnp.arange(36.0).reshape(2, 6, 3)
    np.testing.assert_allclose(run(mean, x), network(jnp.mean)(variables, x))
    np.testing.assert_allclose(run(maximum, x), network(jnp.max)(variables, x))


DIGESTS = {
    "cifar_resnet8": "7f0def663ebb847b",
    "nnx_resnet": "a75352fe09292b6b",
    "efficientnet": "eed8da0a6b257770",
    "private_batch_norm": "3097f4a58d0906c7",
    "transformer": "21f75ea66a2c61da",
    "densenet": "eb19fef218fe5034",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_digest_is_that_of_other_versions(name):
    """Artifacts hold the digest: it may change only with what is found. Made with JAX 0.6, 0.8 and 0.10."""
    assert graph_of(name).digest.startswith(DIGESTS[name])


def test_digest_does_not_depend_on_the_process():
    code = (
        "import model_grid; from dfq_jax.graph.graph import trace; case = model_grid.shared_kernel();"
        "graph = trace(*case.function(), case.input_shape); print(graph.digest)"
    )
    path = os.pathsep.join([os.path.dirname(model_grid.__file__), *sys.path])
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == graph_of("shared_kernel").digest


# --- the tree of variables ---


def test_leaves_and_replace():
    case, graph = model_grid.cifar_resnet8(), graph_of("cifar_resnet8")
    _, variables = case.function()
    assert graph.leaf(variables, "params/conv1/kernel").shape == (3, 3, 3, 16)
    assert graph.leaf(variables, None) is None
    by_path = graph.leaves_by_path(variables)
    assert tuple(by_path) == graph.leaf_paths
    assert all(found is leaf for found, leaf in zip(by_path.values(), graph.leaves(variables), strict=True))
    new = graph.replace(variables, {"params/linear/bias": jnp.full(10, 7.0)})
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert new["params"]["linear"]["bias"][0] == 7
    assert new["params"]["conv1"]["kernel"] is variables["params"]["conv1"]["kernel"]
    with pytest.raises(GraphError, match="no leaf at"):
        graph.replace(variables, {"params/nothing": jnp.ones(3)})
    with pytest.raises(GraphError, match=r"missing \['params/conv1/kernel'\]"):
        graph.leaves({**variables, "params": {k: v for k, v in variables["params"].items() if k != "conv1"}})
    with pytest.raises(GraphError, match=r"'params/linear/bias' has shape \(3,\)"):
        graph.leaves(graph.replace(variables, {"params/linear/bias": jnp.ones(3)}))


@pytest.mark.parametrize("name", ["cifar_resnet8", "frozen_dict"])
def test_quantized_variables(name):
    graph = graph_of(name)
    _, variables = build_of(name)().function()
    quantizers = ActivationQuantizers(for_all={"conv1": params_from_range(0.0, 1.0, bits=8)})
    quantized = with_quantization(variables, quantizers)
    assert type(quantized) is type(variables)
    assert graph.leaves(quantized) == graph.leaves(variables)
    replaced = graph.replace(quantized, {graph.layers[0].kernel: "anything"})
    assert replaced[QUANTIZATION] == quantized[QUANTIZATION]
    assert jax.tree.structure(without_quantization(quantized)) == jax.tree.structure(variables)
    assert trace(graph.apply_fn, quantized, graph.input) == graph


def test_qtensor_leaves_stay_whole():
    graph = graph_of("mlp")
    _, variables = build_of("mlp")().function()
    kernel = graph.leaf(variables, "params/head/kernel")
    codes = QTensor(jnp.zeros(kernel.shape, jnp.int8), jnp.ones((1, 5)), None, 8, signed=True, dtype="float32")
    quantized = graph.replace(variables, {"params/head/kernel": codes})
    assert graph.leaf(quantized, "params/head/kernel") is codes
    assert len(graph.leaves(quantized)) == len(graph.leaves(variables))
    assert trace(graph.apply_fn, quantized, graph.input) == graph


def test_table_tells_everything():
    graph = graph_of("densenet")
    lines = graph.table().splitlines()
    assert lines[0].split() == ["layer", "kind", "kernel", "then", "feeds"]
    for layer in graph.layers:
        (line,) = (line for line in lines if f"{line} ".startswith(f"{layer.name} "))
        assert "x".join(map(str, layer.kernel_shape)) in line
        assert (" BN" in line) == (layer.batch_norm is not None) and (" relu" in line) == (layer.activation == "relu")
    assert repr(graph) in " ".join(graph.table().split())
    assert max(map(len, lines)) <= 80
    assert "BatchNorm apart from layers: bn_transition_0 (10 channels, then relu)" in lines
    assert "conv/2 " in graph_of("dilated_grouped").table()
    assert "conv^T" in graph_of("transposed_conv").table()
    assert "not quantized: " in graph_of("transformer").table()
    assert str(graph) == graph.table()


def test_logits():
    assert graph_of("dict_outputs").logits({"embedding": 1, "features": 2, "logits": 3}) == 3
    assert graph_of("tuple_outputs").logits((1, 2)) == 2

    def auxiliary(v, x):
        return {"aux_logits": x @ v["w"], "logits": x @ v["w2"]}

    graph = trace(auxiliary, {"w": jnp.ones((3, 4)), "w2": jnp.ones((3, 4))}, (2, 3))
    assert graph.logits({"aux_logits": 1, "logits": 2}) == 2


# --- refusals ---


def test_linen_training_mode_without_mutable():
    case = model_grid.resnet18()
    with pytest.raises(GraphError, match=r"training mode.*train=False"):
        trace(case.model.apply, case.variables, case.input_shape)  # train=True is the default


def test_linen_training_mode_with_batch_statistics():
    case = model_grid.cifar_resnet8()

    def apply_fn(variables, x):
        return case.model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    with pytest.raises(GraphError, match=r"BatchNorm in training mode at CifarResNet/bn1.*train=False"):
        trace(apply_fn, case.variables, case.input_shape)
    with pytest.raises(GraphError, match="BatchNorm in training mode"):
        trace(apply_fn, case.variables, (1, 16, 16, 3))


def test_nnx_training_mode():
    model = nnx.merge(*nnx.split(model_grid.nnx_resnet().model))
    model.train()
    graphdef, state = nnx.split(model)

    def apply_fn(variables, x):
        return nnx.merge(graphdef, variables)(x)

    with pytest.raises(GraphError, match=r"BatchNorm in training mode.*module\.eval\(\)"):
        trace(apply_fn, nnx.to_pure_dict(state), (2, 16, 16, 3))


@pytest.mark.parametrize(
    "normalize",
    [
        lambda x: (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5),
        lambda x: (x - x.mean((0, 1, 2))) / (x.std((0, 1, 2), keepdims=True) + 1e-5),
        lambda x: x * (jnp.square(x).mean(0) + 1e-5) ** -0.5,
        lambda x: jnp.moveaxis(_batch_norm_first_axis(jnp.moveaxis(x, -1, 0)), 0, -1),
        lambda x: _flat_batch_norm(x.reshape(-1, x.shape[-1])).reshape(x.shape),
    ],
)
def test_statistics_of_the_batch(normalize):
    def apply_fn(v, x):
        return normalize(model_grid._conv2d(x, v["w"])).mean((1, 2)) @ v["head"]

    with pytest.raises(GraphError, match="training mode"):
        trace(apply_fn, {"w": jnp.ones((3, 3, 3, 4)), "head": jnp.ones((4, 5))}, (2, 8, 8, 3))


def _batch_norm_first_axis(x):
    mean = x.mean((1, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean((1, 2, 3), keepdims=True) + 1e-5)


def _flat_batch_norm(x):
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize(
    "normalize",
    [
        lambda x: x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-5),  # per position
        lambda x: (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1e-5),  # per example
        lambda x: jnp.moveaxis(_layer_norm_first_axis(jnp.moveaxis(x, -1, 0)), 0, -1),  # channels on axis 0
        lambda x: x / jnp.sqrt(1e-5 + jnp.square(x).sum()),  # one number
        lambda x: x - x.mean((0, 1, 2)),  # no root
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_other_normalizations_are_no_training_mode(normalize, batch):
    def apply_fn(v, x):
        return normalize(model_grid._conv2d(x, v["w"])).mean((1, 2)) @ v["head"]

    graph = trace(apply_fn, {"w": jnp.ones((3, 3, 3, 4)), "head": jnp.ones((4, 5))}, (batch, 8, 8, 3))
    assert (len(graph.layers), len(graph.batch_norms)) == (2, 0)


def _layer_norm_first_axis(x):
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)


def test_layers_in_loops_and_branches():
    """Those that run as x decides; others are unrolled (see test_scan)."""
    variables = {"w": jnp.ones((3, 4, 4))}

    def while_loop(v, x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ v["w"][0], x)

    def cond(v, x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ v["w"][0], lambda x: x, x)

    for function, name in ((while_loop, "while"), (cond, "cond")):
        with pytest.raises(GraphError, match=f"layers inside a `{name}`"):
            trace(function, variables, (2, 4))


def test_loops_without_layers_are_kept():
    def apply_fn(v, x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x @ v["w"])
        return x @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5))}
    graph = trace(apply_fn, variables, (2, 3))
    assert len(graph.layers) == 2
    x = jnp.ones((2, 3))
    found = evaluate(graph.program, graph.leaves(variables), x)[graph.program.outputs[0]]
    np.testing.assert_allclose(found, apply_fn(variables, x), rtol=1e-6)


def test_closed_over_weights():
    large, small = jnp.ones((600, 600)), jnp.ones((3, 4))
    with pytest.raises(GraphError, match=r"closes over an array of 1\.4 MiB.*in `variables`"):
        trace(lambda v, x: x @ large + v["b"], {"b": jnp.ones(600)}, (2, 600))
    with pytest.raises(GraphError, match=r"no convolution or dense layer.*constant of the program"):
        trace(lambda v, x: x @ small + v["b"], {"b": jnp.ones(4)}, (2, 3))
    with pytest.raises(GraphError, match=r"closes over an array of 1\.4 MiB"):
        trace(lambda v, x: jax.jit(lambda x: x @ np.ones((600, 600), np.float32))(x), {"b": 0 * large}, (2, 600))


def test_wrong_input_shapes():
    apply_fn, variables = model_grid.cifar_resnet8().function()
    with pytest.raises(GraphError, match=r"input of shape \(2, 16, 16, 4\).*ScopeParamShape.*do not fit: the input"):
        trace(apply_fn, variables, (2, 16, 16, 4))
    with pytest.raises(GraphError, match=r"input of shape \(16, 16, 3\)"):
        trace(apply_fn, variables, (16, 16, 3))
    for shape in ((0, 16, 16, 3), (2, 0, 16, 3), ()):
        with pytest.raises(GraphError, match="every dimension must be at least 1"):
            trace(apply_fn, variables, shape)
    for spec in (16, "images", None, (2, None)):
        with pytest.raises(TypeError, match=r"spec: expected a shape such as \(1, 32, 32, 3\)"):
            trace(apply_fn, variables, spec)


def test_what_is_no_function():
    case = model_grid.cifar_resnet8()
    nnx_model = model_grid.nnx_resnet().model
    named = {3: "int", case.model: "CifarResNet", nnx_model: "NNXResNet", type(case.model): "the class CifarResNet"}
    for wrong, name in named.items():
        with pytest.raises(TypeError, match=rf"apply_fn: .* found {name}\..*as_function"):
            trace(wrong, case.variables, case.input_shape)


def test_leaves_that_are_no_arrays():
    with pytest.raises(TypeError, match=r"variables: 'b/c' is a float, expected an array"):
        trace(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 4)), "b": {"c": 1.0}}, (2, 3))
    with pytest.raises(TypeError, match=r"variables: 'name' is a str"):
        trace(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 4)), "name": "net"}, (2, 3))


def test_no_layers_at_all():
    with pytest.raises(GraphError, match="no convolution or dense layer with a kernel in `variables` was found"):
        trace(lambda v, x: x * v["scale"], {"scale": jnp.ones(3)}, (2, 3))


def test_errors_of_the_network_are_passed_on():
    def apply_fn(v, x):
        raise KeyError("nonsense")

    with pytest.raises(GraphError, match="KeyError: 'nonsense'") as info:
        trace(apply_fn, {"w": jnp.ones(3)}, (2, 3))
    assert isinstance(info.value.__cause__, KeyError)


def test_dropout_that_is_on():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic: bool = False):
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x))

    case = model_grid.linen_case("dropout", Net(), (2, 3), deterministic=True)
    with pytest.raises(GraphError, match=r"random numbers.*deterministic=True"):
        trace(case.model.apply, case.variables, case.input_shape)


def test_integer_kernels_are_not_quantized_again():
    variables = {"w": jnp.ones((3, 4), jnp.int8), "head": jnp.ones((4, 5))}
    graph = trace(lambda v, x: (x @ v["w"].astype(x.dtype)) @ v["head"], variables, (2, 3))
    assert [layer.name for layer in graph.layers] == ["head"]
    assert "type int8" in graph.skipped[0].reason


def test_random_keys_as_constants_and_as_leaves():
    key = jax.random.key(0)

    def apply_fn(v, x):
        noise = jax.random.normal(key, x.shape) + jax.random.normal(v["key"], x.shape)
        return (x + noise + jnp.asarray([1.0, 2.0, 3.0])) @ v["w"]

    variables = {"key": jax.random.key(1), "w": jnp.ones((3, 4))}
    graph, again = (trace(apply_fn, variables, (2, 3)) for _ in range(2))
    assert graph == again
    assert graph.layers[0].name == "w"

    @jax.jit
    def both(v, x):
        return evaluate(graph.program, graph.leaves(v), x)[graph.program.outputs[0]], apply_fn(v, x)

    np.testing.assert_allclose(*both(variables, jnp.ones((2, 3))), rtol=1e-6)


def test_constants_tell_graphs_apart():
    def network(constant):
        return trace(lambda v, x: (x * constant) @ v["w"], {"w": jnp.ones((3, 4))}, (2, 3))

    assert network(2.0) == network(2.0) != network(3.0)
    first, second = np.ones(3, np.float32), np.asarray([1, 1, 2], np.float32)
    assert network(first) == network(first) != network(second)


# --- speed ---


def test_tracing_a_resnet50_at_full_size_is_fast():
    model = model_grid.ResNet((3, 4, 6, 3), model_grid.BottleneckResNetBlock, features=64, classes=1000)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    apply_fn, variables = as_function(model, variables)
    start = time.perf_counter()
    graph = trace(apply_fn, variables, x)
    assert time.perf_counter() - start < 10  # 1 s on two idle cores
    assert (len(graph.layers), len(graph.batch_norms), len(graph.blocks)) == (54, 53, 18)
    assert 4.08e9 < sum(layer.macs for layer in graph.layers) < 4.1e9  # the published 4.1 GMACs
