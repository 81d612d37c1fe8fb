"""Networks written for one example and vmapped, and sizes that coincide: the same graph as written for batches."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from jax import lax
from model_grid import GRID, every_third

import dfq_jax
from dfq_jax.graph import normalize, run
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers.qtensor import QTensor

BATCHES = (1, 2, 3, 8)
rng = np.random.default_rng(0)


# --- no recognition depends on the batch ---


@pytest.mark.parametrize("build", every_third(1))  # and of the whole grid two batches in test_graph
def test_one_digest_at_every_batch(build):
    case = build()
    function, variables = case.function()
    digests = {trace(function, variables, (n, *case.input_shape[1:])).digest for n in BATCHES}
    assert len(digests) == 1


def _quantized_at_one_and_served_at_others(case, traced):
    function, variables = case.function()
    shape = case.input_shape[1:]
    recipe = dfq_jax.RECIPES["noise"].replace(synthesis_num_images=4)
    quantized = dfq_jax.quantize(function, variables, input_shape=(traced, *shape), recipe=recipe)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, *shape)), jnp.float32)
    expected = jax.tree.map(np.asarray, quantized(x))
    for n in BATCHES[:-1]:
        for found, wanted in zip(jax.tree.leaves(quantized(x[:n])), jax.tree.leaves(expected), strict=True):
            # Float rounding may move single activations by a step.
            np.testing.assert_allclose(found, wanted[:n], atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("traced", [1, 3])
def test_quantized_at_one_batch_and_served_at_others(traced):
    _quantized_at_one_and_served_at_others(model_grid.conv_bias_bn(), traced)


@pytest.mark.slow
@pytest.mark.parametrize("build", GRID)
@pytest.mark.parametrize("traced", [1, 2])
def test_every_network_quantized_at_one_batch_and_served_at_others(build, traced):
    _quantized_at_one_and_served_at_others(build(), traced)


# --- one example, vmapped ---


def _norm(y, mean, var, scale, bias):
    return (y - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def _norm_leaves(leaves, form=lambda leaf: leaf):
    return [form(leaves[name]) for name in ("mean", "var", "scale", "bias")]


def _conv(x, kernel, layout=("NCHW", "OIHW", "NCHW")):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _classify(v, x, axes):
    return x.mean(axes) @ v["head"] + v["head_bias"]


def channels_first(v, x):
    """As Equinox writes it: a norm vmapped over channels inside a network vmapped over examples."""

    def one(t):
        t = _conv(t[None], v["conv"])[0] + v["conv_bias"]
        t = jax.nn.relu(jax.vmap(_norm)(t, *_norm_leaves(v["norm"])))
        t = _conv(t[None], v["conv2"])[0] + v["conv2_bias"]
        t = jax.nn.relu(jax.vmap(_norm)(t, *_norm_leaves(v["norm2"])))
        return v["head"].T @ t.mean((1, 2)) + v["head_bias"]

    return jax.vmap(one)(x)


def channels_last(v, x):
    def one(t):
        t = _conv(t[None], v["conv"].transpose(2, 3, 1, 0), ("NHWC", "HWIO", "NHWC"))[0] + v["conv_bias"][:, 0, 0]
        t = jax.vmap(_norm, (-1, 0, 0, 0, 0), -1)(t, *_norm_leaves(v["norm"]))
        return _classify(v, jax.nn.relu(t), (0, 1))

    return jax.vmap(one)(x.transpose(0, 2, 3, 1))


def channel_axis_moved(v, x):
    """The norm's result has its channels first, in front of the batch."""
    x = _conv(x, v["conv"]) + jnp.broadcast_to(v["conv_bias"], (x.shape[0], *v["conv"].shape[:1], *x.shape[2:]))
    x = jnp.tanh(jax.vmap(_norm, (1, 0, 0, 0, 0), 0)(x, *_norm_leaves(v["norm"])))
    return jnp.einsum("cnhw,co->no", x, v["head"]) + jnp.broadcast_to(v["head_bias"], (x.shape[1], 5))


def positions_merged(v, x):
    x = (_conv(x, v["conv"]) + v["conv_bias"]).reshape(x.shape[0], v["conv"].shape[0], -1)
    return _classify(v, jax.nn.relu(_norm(x, *_norm_leaves(v["norm"], lambda leaf: leaf[:, None]))), -1)


def matrix_vector(v, x):
    def one(t):
        t = v["dense"] @ t + v["conv_bias"][:, 0, 0]
        t = _norm(v["dense2"] @ t + v["conv2_bias"][:, 0, 0], *_norm_leaves(v["norm"]))
        return v["head"].T @ jax.nn.relu(t) + v["head_bias"]

    return jax.vmap(one)(x.mean((2, 3)))


def two_axes_of_examples(v, x):
    def one(t):
        t = _conv(t[None], v["conv"])[0] + v["conv_bias"]
        t = jax.vmap(_norm)(t, *_norm_leaves(v["norm"]))
        return _classify(v, jax.nn.relu(t), (1, 2))

    return jax.vmap(jax.vmap(one))(jnp.stack([x, 2 * x, -x], 1)).sum(1)


# Of each: layers (all with a bias), BatchNorms (all joined to theirs), activations.
FORMS = {
    channels_first: (3, 2, ("relu", "relu", "none")),
    channels_last: (2, 1, ("relu", "none")),
    channel_axis_moved: (2, 1, ("tanh", "none")),
    positions_merged: (2, 1, ("none", "none")),
    matrix_vector: (3, 1, ("none", "relu", "none")),
    two_axes_of_examples: (2, 1, ("none", "none")),
}


def _variables(channels, inputs):
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def norm():
        positive = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        return {"mean": array(channels), "var": positive[0], "scale": positive[1], "bias": array(channels)}

    return {
        "conv": array(channels, inputs, 3, 3),
        "conv_bias": array(channels, 1, 1),
        "norm": norm(),
        "conv2": array(channels, channels, 3, 3),
        "conv2_bias": array(channels, 1, 1),
        "norm2": norm(),
        "dense": array(channels, inputs),
        "dense2": array(channels, channels),
        "head": array(channels, 5),
        "head_bias": array(5),
    }


# Channels, input channels and image size; with batches 1, 2, 3 and 8 every size meets every other.
SIZES = [(4, 3, 6), (8, 8, 8), (3, 3, 3), (2, 1, 2), (5, 3, 1), (1, 1, 4), (1, 1, 1)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_forms_of_one_network(form, sizes):
    channels, inputs, side = sizes
    variables = _variables(channels, inputs)
    digests = set()
    for n in BATCHES:
        graph = trace(form, variables, (n, inputs, side, side))
        layers, batch_norms, activations = FORMS[form]
        assert [layer.bias is not None for layer in graph.layers] == [True] * layers
        assert len(graph.batch_norms) == batch_norms
        for bn in graph.batch_norms:
            layer = graph.layer(bn.layer)
            assert (layer.batch_norm, layer.output) == (bn.name, bn.input)
            product = graph.program.avals[graph.program.ops[layer.op].outputs[0]].shape
            assert product[bn.channel_axis] == channels == bn.channels
        assert tuple(layer.activation for layer in graph.layers) == activations
        assert graph.skipped == ()
        digests.add(graph.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms_compute_what_they_did(form):
    variables = jax.tree.map(jnp.asarray, _variables(4, 3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 4)), jnp.float32)
    graph = trace(form, variables, x.shape)
    found = jax.jit(lambda v, x: run(graph, v, x, batch_norm=dfq_jax.graph.normalize))(variables, x)
    np.testing.assert_allclose(found, jax.jit(form)(variables, x), rtol=1e-4, atol=1e-5)


def test_one_example_vmapped_gives_the_graph_of_the_batch():
    def batch(v, x):
        column = lambda leaf: leaf[:, None, None]  # noqa: E731
        x = jax.nn.relu(_norm(_conv(x, v["conv"]) + v["conv_bias"], *_norm_leaves(v["norm"], column)))
        x = jax.nn.relu(_norm(_conv(x, v["conv2"]) + v["conv2_bias"], *_norm_leaves(v["norm2"], column)))
        return _classify(v, x, (2, 3))

    variables = _variables(4, 3)
    ours, theirs = (trace(function, variables, (2, 3, 6, 6)) for function in (channels_first, batch))
    assert ours.digest == theirs.digest
    assert ours.layers == theirs.layers
    assert [(t.activation, t.batch_norm, t.shared) for t in ours.tensors] == [
        (t.activation, t.batch_norm, t.shared) for t in theirs.tensors
    ]
    assert [block.layers for block in ours.blocks] == [block.layers for block in theirs.blocks]
    names = [op.name for op in ours.program.ops if ours.program.data_inputs(op)]
    assert names == [op.name for op in theirs.program.ops if theirs.program.data_inputs(op)]


def test_integer_execution_of_a_vmapped_network():
    variables = jax.tree.map(jnp.asarray, _variables(4, 3))
    recipe = dfq_jax.RECIPES["noise"].replace(synthesis_num_images=4)
    quantized = dfq_jax.quantize(channels_first, variables, input_shape=(1, 3, 6, 6), recipe=recipe)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 6, 6)), jnp.float32)
    np.testing.assert_allclose(quantized.integer()(x), quantized(x), rtol=1e-3, atol=1e-3)
    assert sum(isinstance(v, QTensor) for v in quantized.graph.leaves(quantized.variables)) == 3


# --- biases in other forms, and what is none ---


@pytest.mark.parametrize("n", BATCHES)
def test_biases_repeated_to_full_size(n):
    def apply_fn(v, x):  # as many channels as examples, groups as a bias, a scalar
        x = x @ v["w"]
        x = jax.nn.relu(x + jnp.broadcast_to(v["b"], x.shape))
        x = x @ v["w2"]
        x = jax.nn.relu(x + jnp.broadcast_to(v["groups"][:, None], (4, 2)).reshape(8))
        x = x @ v["w3"]
        return x + jnp.broadcast_to(v["row"], x.shape)

    variables = {
        "w": jnp.ones((3, n)), "b": jnp.ones(n), "w2": jnp.ones((n, 8)), "groups": jnp.ones(4), "w3": jnp.ones((8, 5)),
        "row": jnp.ones((1, 5)),
    }  # fmt: skip
    graph = trace(apply_fn, variables, (n, 3))
    assert [layer.bias for layer in graph.layers] == ["b", None, "row"]


@pytest.mark.parametrize("n", BATCHES)
def test_layouts_between_what_is_not_per_channel_stay(n):
    def apply_fn(v, x):  # a table of positions between the layer and its norm, and a result read in two layouts
        x = (x @ v["w"]).reshape(-1, 6, 4)
        flat = x.reshape(-1, 24)
        x = x + v["positions"]
        return _norm(x, *_norm_leaves(v)).mean(1) @ v["head"] + flat @ v["wide"]

    norm = {k: jnp.ones(4) + i for i, k in enumerate(("mean", "var", "scale", "bias"))}
    arrays = {"w": (3, 4), "positions": (6, 4), "head": (4, 5), "wide": (24, 5)}
    rng = np.random.default_rng(0)
    variables = {**norm, **{k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in arrays.items()}}
    graph = trace(apply_fn, variables, (6 * n, 3))
    assert (graph.layer("w").bias, graph.layer("w").batch_norm, len(graph.batch_norms)) == (None, None, 1)
    if n == 2:
        x = jnp.asarray(rng.normal(size=(6 * n, 3)), jnp.float32)
        np.testing.assert_allclose(run(graph, variables, x), jax.jit(apply_fn)(variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_norms_of_one_example_are_no_training_mode(batch):
    """Normalizations over positions or channels, vmapped and reshaped; statistics of the batch are still refused."""

    def per_example(v, x):
        def one(t):  # C H W
            t = _conv(t[None], v["conv"])[0]
            t = (t - t.mean((1, 2), keepdims=True)) * lax.rsqrt(t.var((1, 2), keepdims=True) + 1e-5)
            t = t.reshape(2, -1)
            t = (t - t.mean(1, keepdims=True)) * lax.rsqrt(t.var(1, keepdims=True) + 1e-5)
            return t.reshape(v["conv"].shape[0], -1).mean(1) @ v["head"]

        return jax.vmap(one)(x)

    def channels_in_front(v, x):
        x = _conv(x, v["conv"]).transpose(1, 0, 2, 3)
        x = x.reshape(*x.shape[:2], -1)
        x = (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5)
        return x.mean(2).T @ v["head"]

    variables = _variables(4, 3)
    for function in (per_example, channels_in_front):
        assert len(trace(function, variables, (batch, 3, 4, 4)).layers) == 2


# --- other libraries ---


class _Unbatched(nn.Module):
    """Linen layers on one image, as research code vmaps them."""

    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(5)(x.mean((0, 1)))


def test_linen_on_one_image():
    model = _Unbatched()
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((8, 8, 3), jnp.float32))
    batched = functools.partial(jax.vmap, in_axes=(None, 0))(model.apply)
    graphs = [trace(batched, variables, (n, 8, 8, 3)) for n in BATCHES]
    assert len({graph.digest for graph in graphs}) == 1
    assert [layer.batch_norm for layer in graphs[0].layers] == ["BatchNorm_0", "BatchNorm_1", None]
    assert [layer.activation for layer in graphs[0].layers] == ["relu", "relu", "none"]
    assert all(layer.bias is not None for layer in graphs[0].layers)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def network(x, is_training):
        for i in range(2):
            x = hk.Conv2D(4, 3, name=f"conv{i}")(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name=f"norm{i}")(x, is_training))
        return hk.Linear(5, name="head")(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform_with_state(network))
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params, state = jax.eval_shape(lambda key, x: model.init(key, x, True), jax.random.key(0), x)
    variables = model_grid.randomize({"params": params, "state": state})

    def apply_fn(v, x):
        return model.apply(v["params"], v["state"], x, False)[0]

    graphs = [trace(apply_fn, variables, (n, 8, 8, 3)) for n in BATCHES]
    assert len({graph.digest for graph in graphs}) == 1
    assert [layer.bias is not None for layer in graphs[0].layers] == [True] * 3
    assert [bn.layer for bn in graphs[0].batch_norms] == ["conv0", "conv1"]
    assert [bn.scale for bn in graphs[0].batch_norms] == ["params/norm0/scale", "params/norm1/scale"]


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        depthwise: eqx.nn.Conv2d
        norm2: eqx.nn.BatchNorm
        hidden: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0])
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
            self.depthwise = eqx.nn.Conv2d(4, 4, 3, padding=1, groups=4, use_bias=False, key=keys[1])
            self.norm2 = eqx.nn.BatchNorm(4, "batch", mode="ema")
            self.hidden = eqx.nn.Linear(4, 6, key=keys[2])
            self.head = eqx.nn.Linear(6, 5, key=keys[3])

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            x, state = self.norm2(self.depthwise(jax.nn.relu(x)), state)
            x = jax.nn.relu(self.hidden(jax.nn.relu(x).mean((1, 2))))
            return self.head(x), state

    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    model = eqx.nn.inference_mode(model)
    variables, static = eqx.partition({"model": model, "state": state}, eqx.is_inexact_array)

    def apply_fn(v, x):
        network = eqx.combine(v, static)
        outputs, _ = jax.vmap(network["model"], axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, network["state"]
        )
        return outputs

    graphs = [trace(apply_fn, variables, (n, 3, 8, 8)) for n in BATCHES]
    assert len({graph.digest for graph in graphs}) == 1
    graph = graphs[1]
    assert [layer.bias is not None for layer in graph.layers] == [True, False, True, True]
    assert [layer.activation for layer in graph.layers] == ["relu", "relu", "relu", "none"]
    assert [bn.layer for bn in graph.batch_norms] == [layer.name for layer in graph.layers[:2]]
    assert graph.layers[1].depthwise
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 8)), jnp.float32)
    found = jax.jit(lambda v, x: run(graph, v, x))(variables, x)
    np.testing.assert_allclose(found, jax.jit(apply_fn)(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", BATCHES)
def test_layers_that_read_a_tensor_with_another_axis(n):
    """A 1-D convolution written as a 2-D one shares the tensor, and its activation, with a layer that reads it flat."""

    def apply_fn(v, x):
        x = jax.nn.relu(x @ v["w"])
        y = _conv(x[:, None], v["conv"], ("NHWC", "HWIO", "NHWC"))[:, 0]
        return y.mean(1) @ v["head"] + x.mean(1) @ v["head"] + (x @ v["w2"]).mean(1)

    shapes = {"w": (3, 4), "conv": (1, 3, 4, 4), "head": (4, 5), "w2": (4, 5)}
    variables = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    graph = trace(apply_fn, variables, (n, 6, 3))
    tensor = graph.tensor("conv")
    assert (tensor.layers, tensor.activation) == (("conv", "w2"), "relu")


# --- choices by platform ---


def test_layers_in_a_choice_by_platform():
    """What the interpreter makes of a depthwise convolution is one on any platform."""
    dimensions = ("NHWC", "HWIO", "NHWC")

    def convolution(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=4)

    def shifted(x, kernel):
        return dfq_jax.graph.convolutions.depthwise_product(x, kernel, (1, 1), ((1, 1), (1, 1)))

    @jax.jit
    def apply_fn(v, x):
        x = lax.platform_dependent(x, v["depthwise"], cpu=shifted, default=convolution)
        return jnp.maximum(x, 0).mean((1, 2)) @ v["head"]

    rng = np.random.default_rng(0)
    shapes = {"depthwise": (3, 3, 1, 4), "head": (4, 5)}
    variables = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 4)), jnp.float32)
    graph = trace(apply_fn, variables, x.shape)
    assert [(layer.name, layer.depthwise, layer.activation) for layer in graph.layers] == [
        ("depthwise", True, "relu"),
        ("head", False, "none"),
    ]
    np.testing.assert_allclose(run(graph, variables, x), apply_fn(variables, x), rtol=1e-5, atol=1e-5)


def test_a_network_that_the_interpreter_ran_is_found_again():
    """All layers, the depthwise ones that it computes otherwise on CPU included."""
    case = model_grid.mobilenet_v2()
    function, variables = case.function()
    graph = trace(function, variables, case.input_shape)
    again = trace(lambda v, x: run(graph, v, x), variables, case.input_shape)
    assert again.layers == graph.layers
    assert (again.digest, again.skipped) == (graph.digest, ())


def offset_norm(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-3) * p["scale"] + p["bias"]


def kernels_by_position(v, x):
    """A kernel for each row, and one bias for all of them: it is not the layer's, which has rows times features."""
    y = jnp.einsum("nabi,aio->nabo", x, v["k"]) + v["b"]
    return jax.nn.relu(offset_norm(v, y)).mean((1, 2)) @ v["d"]


def positions(v, x):
    return jax.nn.relu(offset_norm(v, x @ v["k"] + v["b"])).mean((1, 2)) @ v["d"]


def test_a_batch_norm_behind_an_average():
    def network(v, x):
        y = nn.avg_pool(x @ v["k"], (2, 3), (1, 1))  # a sum, divided by a number
        return jax.nn.relu(offset_norm(v, y)).mean((1, 2)) @ v["d"]

    shapes = dict.fromkeys(("mean", "var", "scale", "bias"), (6,)) | {"k": (4, 6), "d": (6, 2)}
    variables = {name: jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32) for name, shape in shapes.items()}
    graph = trace(network, variables, (2, 3, 5, 4))
    (bn,) = graph.batch_norms
    assert (bn.mean, bn.var, bn.scale, bn.bias, bn.activation) == ("mean", "var", "scale", "bias", "relu")
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
    moments = dfq_jax.batch_norm_moments(graph, variables, x)[bn.name]
    pooled = np.asarray(nn.avg_pool(x @ variables["k"], (2, 3), (1, 1)), np.float64).reshape(-1, 6)
    np.testing.assert_allclose(moments[0], pooled.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments[1], pooled.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "kernel", "offset"),
    [(kernels_by_position, (3, 4, 6), (6,)), (positions, (4, 6), (3, 5, 6))],
    ids=["one bias for all rows", "a table of positions"],
)
def test_a_batch_norm_behind_a_sum_with_a_leaf(network, kernel, offset):
    shapes = dict.fromkeys(("mean", "var", "scale", "bias"), (6,)) | {"k": kernel, "b": offset, "d": (6, 2)}
    variables = {name: jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32) for name, shape in shapes.items()}
    graph = trace(network, variables, (2, 3, 5, 4))
    (bn,) = graph.batch_norms
    assert (bn.mean, bn.var, bn.scale, bn.bias, bn.layer) == ("mean", "var", "scale", "bias", None)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
    seen = {}

    def keep(bn, x, parameters):
        seen[bn.name] = x
        return normalize(bn, x, parameters)

    np.testing.assert_allclose(run(graph, variables, x, batch_norm=keep), network(variables, x), rtol=1e-5, atol=1e-5)
    product = jnp.einsum("nabi,aio->nabo" if len(kernel) == 3 else "nabi,io->nabo", x, variables["k"])
    expected = np.asarray(product + variables["b"], np.float64).reshape(-1, 6)
    moments = seen[bn.name].mean([a for a in range(4) if a != bn.channel_axis])
    np.testing.assert_allclose(moments, expected.mean(0), rtol=1e-5)
