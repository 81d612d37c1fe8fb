"""Layers in loops: each is a layer of its own, and the user's stacked leaves stay what they are."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import nnx

import dfq_jax
from dfq_jax.graph import apply_quantized, run
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import dequantized, without_quantization
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.trees import flatten_with_paths
from dfq_jax.recipes.recipe import RECIPES
from dfq_jax.report.report import layer_reports
from dfq_jax.runtime import apply_plan, compile_integer
from dfq_jax.stages.comparison import sqnr
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.ranges import estimate_ranges

W8A8 = Convention.parse("w8a8", per_channel=False)
TINY = {"synthesis_steps": 4, "synthesis_num_images": 8, "synthesis_batch_size": 8}


class Twins:
    """A network of the grid with its blocks in a scan, and the same one written out, with the same numbers."""

    def __init__(self, build: Any):
        case = build()
        self.model, self.variables, self.shape = case.model, case.variables, case.input_shape
        self.plain_model = case.model.clone(scan=False)
        self.plain_variables = self.written_out(case.variables)
        self.graph = trace(*self.function(self.model, self.variables), self.shape)
        self.plain = trace(*self.function(self.plain_model, self.plain_variables), self.shape)
        self.images = jax.random.normal(jax.random.key(0), (8, *self.shape[1:]))

    def function(self, model: Any, variables: Any) -> tuple[Any, Any]:
        return dfq_jax.as_function(model, variables)

    def written_out(self, variables: Any) -> Any:
        """The variables of the network that is written out."""

        def collection(tree: Any) -> Any:
            if "block" not in tree:
                return tree
            rest = {name: value for name, value in tree.items() if name != "block"}
            blocks = {f"block{i}": jax.tree.map(lambda a, i=i: a[i], tree["block"]) for i in range(self.model.depth)}
            return {**rest, **blocks}

        return {name: collection(tree) for name, tree in variables.items()}

    def plain_name(self, name: str) -> str:
        """What a layer, a tensor or a leaf of the scan is called where it is written out."""
        for i in range(self.model.depth):
            if name.endswith(f"[{i}]"):
                return name.removesuffix(f"[{i}]").replace("block/", f"block{i}/")
        return name


@functools.cache
def twins(name: str) -> Twins:
    return Twins(getattr(model_grid, name))


BOTH = pytest.mark.parametrize("name", ["scanned_resnet", "scanned_vit"])


def assert_same_leaves(net: Twins, variables: Any, plain_variables: Any) -> None:
    """Leaf by leaf, codes and scales included."""
    plain = dict(zip(net.plain.leaf_paths, net.plain.leaves(plain_variables), strict=True))
    for path, leaf in zip(net.graph.leaf_paths, net.graph.leaves(variables), strict=True):
        other = plain.pop(net.plain_name(path))
        assert jax.tree.structure(leaf) == jax.tree.structure(other), path
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=path), leaf, other)
    assert not plain


@BOTH
def test_same_graph_as_written_out(name):
    net = twins(name)
    graph, plain = net.graph, net.plain
    assert [net.plain_name(layer.name) for layer in graph.layers] == [layer.name for layer in plain.layers]
    assert [net.plain_name(item.name) for item in graph.batch_norms] == [item.name for item in plain.batch_norms]
    assert [net.plain_name(item.name) for item in graph.tensors] == [item.name for item in plain.tensors]
    assert [len(block.layers) for block in graph.blocks] == [len(block.layers) for block in plain.blocks]
    for one, other in zip(graph.layers, plain.layers, strict=True):
        assert (one.kernel_shape, one.channel_axes, one.activation, one.macs) == (
            other.kernel_shape,
            other.channel_axes,
            other.activation,
            other.macs,
        )
        assert net.plain_name(one.kernel) == other.kernel
        assert (one.bias and net.plain_name(one.bias)) == other.bias
        assert (one.batch_norm and net.plain_name(one.batch_norm)) == other.batch_norm
    assert [item.reason for item in graph.skipped] == [item.reason for item in plain.skipped]
    assert len(graph.program.ops) == len(plain.program.ops)
    found = run(graph, net.variables, net.images)
    np.testing.assert_allclose(found, net.model.apply(net.variables, net.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("convention", "name"),
    [
        pytest.param(Convention(), "scanned_resnet", id="w4a4-scanned_resnet"),
        pytest.param(Convention(), "scanned_vit", id="w4a4-scanned_vit", marks=pytest.mark.slow),
        pytest.param(W8A8, "scanned_resnet", id="w8a8-scanned_resnet", marks=pytest.mark.slow),
        pytest.param(W8A8, "scanned_vit", id="w8a8-scanned_vit"),
    ],
)
def test_same_codes_and_outputs_as_written_out(name, convention):
    net = twins(name)
    quantized = []
    for graph, variables in ((net.graph, net.variables), (net.plain, net.plain_variables)):
        ranges = estimate_ranges(graph, variables, net.images, convention)
        qvariables = quantize_params(graph, variables, ranges, convention)
        quantized.append((ranges, qvariables, jax.jit(functools.partial(apply_quantized, graph))))
    (ranges, qvariables, apply), (plain_ranges, plain_qvariables, plain_apply) = quantized
    assert {net.plain_name(tensor): ends for tensor, ends in ranges.items()} == plain_ranges
    assert_same_leaves(net, qvariables, plain_qvariables)
    stacks = jax.tree.leaves(qvariables["params"]["block"], is_leaf=lambda node: isinstance(node, QTensor))
    assert {leaf.scale.shape[0] for leaf in stacks if isinstance(leaf, QTensor)} == {3}  # a scale for each layer
    np.testing.assert_allclose(apply(qvariables, net.images), plain_apply(plain_qvariables, net.images), atol=1e-6)
    plan, ivariables = compile_integer(net.graph, qvariables)
    plain_plan, plain_ivariables = compile_integer(net.plain, plain_qvariables)
    found = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, net.images)
    expected = jax.jit(apply_plan, static_argnums=0)(plain_plan, plain_ivariables, net.images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert sqnr(apply(qvariables, net.images), found) > 40


@pytest.mark.parametrize("name", ["scanned_resnet", pytest.param("scanned_vit", marks=pytest.mark.slow)])
def test_instant(name, tmp_path):
    net = twins(name)
    quantize = functools.partial(dfq_jax.quantize, input_shape=net.shape, recipe="instant", key=jax.random.key(0))
    q, plain = quantize(net.model, net.variables), quantize(net.plain_model, net.plain_variables)
    assert sqnr(plain(net.images), q(net.images)) > 20  # its noise depends on the names of BatchNorms
    assert sqnr(q(net.images), q.integer()(net.images)) > 40
    # The tree is the user's, with codes for kernels.
    own, given = flatten_with_paths(without_quantization(q.variables)), flatten_with_paths(net.variables)
    assert own[0] == given[0] and [leaf.shape for leaf in own[1]] == [leaf.shape for leaf in given[1]]
    q.save(tmp_path / "q.safetensors")
    loaded = dfq_jax.load(tmp_path / "q.safetensors", net.model, net.variables)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, q.variables)
    np.testing.assert_array_equal(loaded(net.images), q(net.images))


def test_images_and_statistics():
    """The whole way through synthesis and adapted statistics."""
    net = twins("scanned_resnet")
    recipe = RECIPES["fast"].replace(**TINY)
    quantize = functools.partial(dfq_jax.quantize, input_shape=net.shape, recipe=recipe, key=jax.random.key(0))
    q, plain = quantize(net.model, net.variables), quantize(net.plain_model, net.plain_variables)
    means = [bn.mean for bn in q.graph.batch_norms]
    assert all((q.graph.leaf(q.variables, m) != q.graph.leaf(net.variables, m)).any() for m in means)
    assert sqnr(plain(net.images), q(net.images)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["best", "finetune"])
def test_learned_recipes(recipe):
    """Reconstruction block by block, and distillation, write slices back into the user's leaves."""
    net = twins("scanned_resnet")
    steps = {"finetune_steps": 4} if recipe == "finetune" else {"reconstruction_steps": 4}
    small = RECIPES[recipe].replace(**TINY, **steps)
    quantize = functools.partial(dfq_jax.quantize, input_shape=net.shape, recipe=small, key=jax.random.key(0))
    q, plain = quantize(net.model, net.variables), quantize(net.plain_model, net.plain_variables)
    assert jax.tree.structure(dequantized(q.variables)) == jax.tree.structure(net.variables)
    assert sqnr(plain(net.images), q(net.images)) > 10


@BOTH
def test_onnx(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from dfq_jax.export.onnx import export_onnx

    net = twins(name)
    convention = Convention.parse("w4a4", edge_bits=4)
    ranges = estimate_ranges(net.graph, net.variables, net.images, convention)
    qvariables = quantize_params(net.graph, net.variables, ranges, convention)
    export_onnx((net.graph, qvariables), tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(net.images)})
    assert sqnr(apply_quantized(net.graph, qvariables, net.images), found) > 40


def test_orbax(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    net = twins("scanned_resnet")
    qvariables = quantize_params(net.graph, net.variables, {}, Convention.parse("w4a16"))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", qvariables)
    with checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", qvariables)
    jax.tree.map(np.testing.assert_array_equal, restored, qvariables)


# --- scans of other libraries ---


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class NNXScanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NNXBlock, in_axes=0, out_axes=0))(rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(scan(self.stem(x), self.blocks).mean((1, 2)))


def test_nnx_scan():
    model = NNXScanned(nnx.Rngs(0))
    function, variables = dfq_jax.as_function(model)
    variables = model_grid.randomize(variables)
    graph = trace(function, variables, (2, 8, 8, 3))
    assert [layer.name for layer in graph.layers] == ["stem", *(f"blocks/conv[{i}]" for i in range(3)), "head"]
    assert [layer.batch_norm for layer in graph.layers] == [None, *(f"blocks/bn[{i}]" for i in range(3)), None]
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_allclose(run(graph, variables, x), function(variables, x), rtol=1e-4, atol=1e-5)


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(nn.Dense, lengths=(2, 2))(4, name="stack")(x)


def test_remat_scan():
    case = model_grid.linen_case("remat_scan", RematScan(), (2, 4))
    graph = trace(*case.function(), case.input_shape)
    assert [layer.name for layer in graph.layers] == [f"stack[{i},{j}]" for i in (0, 1) for j in (0, 1)]
    expected = case.model.apply(case.variables, case.images())
    np.testing.assert_allclose(run(graph, case.variables, case.images()), expected, rtol=1e-5, atol=1e-5)


# --- other loops and other ways to read a stack ---


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 2, jnp.float32)


W, HEAD = random(3, 4, 4), random(4, 5)


def step(x, w):
    return jnp.tanh(x @ w), x.sum()


def alternating(v, x):
    def body(i, x):
        return jax.lax.cond(i % 2 == 0, lambda x: x @ v["w"][i], lambda x: jnp.tanh(x @ v["w"][i]), x)

    return jax.lax.fori_loop(0, 3, body, x)


LOOPS = {
    "scan": (lambda v, x: jax.lax.scan(step, x, v["w"]), {"w": W}, "w[0] w[1] w[2]"),
    "reverse": (lambda v, x: jax.lax.scan(step, x, v["w"], reverse=True), {"w": W}, "w[2] w[1] w[0]"),
    "remat": (lambda v, x: jax.lax.scan(jax.checkpoint(step), x, v["w"]), {"w": W}, "w[0] w[1] w[2]"),
    "map": (lambda v, x: jax.lax.map(lambda w: x @ w, v["w"]), {"w": W}, "w[0] w[1] w[2]"),
    "cast": (
        lambda v, x: jax.lax.scan(lambda x, w: (x @ w, None), x.astype(jnp.bfloat16), v["w"].astype(jnp.bfloat16)),
        {"w": W},
        "w[0] w[1] w[2]",
    ),
    "other axis": (
        lambda v, x: jax.lax.scan(step, x, jnp.moveaxis(v["w"], 1, 0)),
        {"w": random(4, 3, 4)},
        "w[:,0] w[:,1] w[:,2]",
    ),
    "nested": (
        lambda v, x: jax.lax.scan(lambda x, w: (jax.lax.scan(step, x, w)[0], None), x, v["w"]),
        {"w": random(2, 2, 4, 4)},
        "w[0,0] w[0,1] w[1,0] w[1,1]",
    ),
    "split": (
        lambda v, x: jax.lax.scan(lambda x, w: (jax.lax.scan(step, x, w)[0], None), x, v["w"].reshape(2, 2, 4, 4)),
        {"w": random(4, 4, 4)},
        "w[0] w[1] w[2] w[3]",
    ),
    "merged": (
        lambda v, x: jax.lax.scan(step, x, v["w"].reshape(4, 4, 4)),
        {"w": random(2, 2, 4, 4)},
        "w[0,0] w[0,1] w[1,0] w[1,1]",
    ),
    "part": (lambda v, x: jax.lax.scan(step, x, v["w"][1:]), {"w": W}, "w[1] w[2]"),
    "stacked": (lambda v, x: jax.lax.scan(step, x, jnp.stack([v["a"], v["b"]])), {"a": W[0], "b": W[1]}, "a b"),
    "fori_loop": (
        lambda v, x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ v["w"][i]), x),
        {"w": W},
        "w[0] w[1] w[2]",
    ),
    "while_loop": (
        lambda v, x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ v["w"][s[0]]), (0, x))[1],
        {"w": W},
        "w[0] w[1] w[2]",
    ),
    "choice": (alternating, {"w": W}, "w[0] w[1] w[2]"),
    "python loop": (lambda v, x: functools.reduce(lambda x, w: x @ w, v["w"], x), {"w": W}, "w[0] w[1] w[2]"),
    "index": (lambda v, x: x @ v["w"][0] @ v["w"][-1] @ v["head"], {"w": W, "head": HEAD}, "w[0] w[2] head"),
    "array index": (lambda v, x: x @ v["w"][jnp.int32(2)] @ jnp.take(v["w"], 1, axis=0), {"w": W}, "w[2] w[1]"),
    "fused": (lambda v, x: x @ v["w"][:, 1] @ v["w"][:, 0], {"w": random(4, 2, 4)}, "w[:,1] w[:,0]"),
    "recurrent": (
        lambda v, x: jax.lax.scan(lambda h, t: (jnp.tanh(h @ v["w"] + t), None), x, jnp.stack([x, x]))[0],
        {"w": W[0]},
        "w w#2",
    ),
    "ensemble": (
        lambda v, x: jax.vmap(lambda w: jax.lax.scan(step, x, w)[0])(v["w"]),
        {"w": random(2, 3, 4, 4)},
        "w[:,0] w[:,1] w[:,2]",
    ),
    "unread": (  # the last step's carry is dropped, so that its product is never computed
        lambda v, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]), x @ w[1]), x, (v["w"], v["u"]))[1],
        {"w": W, "u": W + 1},
        "u[0] w[0] u[1] w[1] u[2]",
    ),
    "same name": (
        lambda v, x: jax.lax.scan(step, x, v["w"])[0] @ v["w[0]"],
        {"w": W, "w[0]": HEAD},
        "w'[0] w'[1] w'[2] w[0]",
    ),
}


def traced(name: str) -> tuple[Any, Any, Graph, str]:
    function, variables, layers = LOOPS[name]
    return function, variables, trace(function, variables, (2, 4)), layers


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name):
    function, variables, graph, layers = traced(name)
    x = random(2, 4)
    assert {layer.name for layer in graph.layers} == set(layers.split())
    tolerance = {"rtol": 0.02, "atol": 0.02} if name == "cast" else {"rtol": 1e-5, "atol": 1e-5}
    wanted = jax.tree.leaves(function(variables, x))
    for found, expected in zip(jax.tree.leaves(run(graph, variables, x)), wanted, strict=True):
        np.testing.assert_allclose(np.float32(found), np.float32(expected), **tolerance)
    # Taken apart and put together, float or quantized: bit for bit the same.
    convention = Convention.parse("w4a8", edge_bits=None)
    ranges = estimate_ranges(graph, variables, x, convention)
    for tree in (variables, quantize_params(graph, variables, ranges, convention)):
        again = graph.replace(tree, dict(zip(graph.leaf_paths, graph.leaves(tree), strict=True)))
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
        for path, leaf in zip(graph.leaf_paths, graph.leaves(tree), strict=True):
            jax.tree.map(np.testing.assert_array_equal, graph.leaf(tree, path), leaf)


@pytest.mark.parametrize("name", ["other axis", "nested", "fused", "unread"])
def test_quantized_slices_are_those_of_single_kernels(name):
    function, variables, graph, _ = traced(name)
    convention = Convention.parse("w4a16", edge_bits=None)
    qvariables = quantize_params(graph, variables, {}, convention)
    for layer in graph.layers:
        kernel = graph.leaf(qvariables, layer.kernel)
        alone = trace(lambda v, x: x @ v["w"], {"w": graph.leaf(variables, layer.kernel)}, (2, 4))
        single = quantize_params(alone, {"w": graph.leaf(variables, layer.kernel)}, {}, convention)["w"]
        np.testing.assert_array_equal(kernel.qvalue, single.qvalue)
        np.testing.assert_array_equal(kernel.scale, single.scale)
    assert all(isinstance(leaf, QTensor) for leaf in graph.leaves(qvariables))
    x = random(2, 4)
    found = jax.tree.leaves(apply_quantized(graph, qvariables, x))
    for one, other in zip(found, jax.tree.leaves(function(dequantized(qvariables), x)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_edge_layer_gives_its_bits_to_the_stack():
    _, variables, graph, _ = traced("scan")
    convention = Convention.parse("w4a16")
    assert {convention.layer_bits(graph, layer) for layer in graph.layers} == {8}
    qvariables = quantize_params(graph, variables, {}, convention)
    assert qvariables["w"].bits == 8
    assert [layer.weight_bits for layer in layer_reports(graph, variables, qvariables)] == [8, 8, 8]


def test_layers_that_read_a_stack_along_different_axes_have_one_scale_each():
    def apply_fn(v, x):
        return x @ v["w"][0] @ v["w"][1].T

    graph = trace(apply_fn, {"w": W}, (2, 4))
    kernel = quantize_params(graph, {"w": W}, {}, Convention.parse("w8a16"))["w"]
    assert kernel.scale.shape == (3, 1, 1) or kernel.scale.shape == (2, 1, 1)
    np.testing.assert_allclose(kernel.dequantize(), W, atol=float(abs(W).max()) / 127)


def test_a_stack_of_which_a_part_is_no_kernel_stays_in_float():
    def apply_fn(v, x):
        return (x @ v["w"][0] + v["w"][1].sum(0)) @ v["head"]

    graph = trace(apply_fn, {"w": W, "head": HEAD}, (2, 4))
    assert [layer.name for layer in graph.layers] == ["head"]
    assert any("stored in one leaf with w[1]" in item.reason for item in graph.skipped)


def test_what_is_no_kernel_is_not_taken_apart():
    def apply_fn(v, x):
        return (x + v["positions"][1]) @ v["head"]

    graph = trace(apply_fn, {"head": HEAD, "positions": random(3, 4)}, (2, 4))
    assert graph.leaf_paths == graph.variable_paths == ("head", "positions")


def test_slices_quantized_differently_are_refused():
    _, variables, graph, _ = traced("scan")
    conventions = [Convention.parse(bits, edge_bits=None) for bits in ("w4a16", "w8a16")]
    four, eight = (quantize_params(graph, variables, {}, convention) for convention in conventions)
    with pytest.raises(GraphError, match=r"'w\[0\]' to 'w\[2\]'.*4-bit unsigned with zero point, 8-bit signed without"):
        graph.replace(four, {"w[1]": graph.leaf(eight, "w[1]")})


def test_long_loops_are_refused():
    def apply_fn(v, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ v["w"]), None), x, None, length=1000)[0]

    with pytest.raises(GraphError, match=r"`scan` of 1000 steps.*up to 256"):
        trace(apply_fn, {"w": W[0]}, (2, 4))
