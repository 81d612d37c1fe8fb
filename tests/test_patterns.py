"""The recognizers that `trace` is made of, each on many ways to write the same thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.computed import compute_kernels
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.activations import ACTIVATIONS, GRID, classify
from dfq_jax.graph.tracing.batch_norm_pattern import computed_statistics
from dfq_jax.graph.tracing.elementwise import NotElementwise, evaluate
from dfq_jax.graph.tracing.flattening import flatten
from dfq_jax.graph.tracing.layout import follow_axis, move_labels
from dfq_jax.graph.tracing.naming import inner_paths, unique_names
from dfq_jax.graph.tracing.program import Op

NORM = {k: jnp.ones(4) for k in ("mean", "var", "scale", "bias")}


def graph_of(normalize, x_shape=(2, 3), **leaves):
    def apply_fn(v, x):
        return normalize(v, x @ v["w"]) @ v["head"]

    variables = {"w": jnp.ones((x_shape[-1], 4)), "head": jnp.ones((4, 5)), **NORM, **leaves}
    return trace(apply_fn, variables, x_shape)


# --- BatchNorm ---

FORMULAS = {
    "textbook": lambda v, x: (x - v["mean"]) / jnp.sqrt(v["var"] + 1e-3) * v["scale"] + v["bias"],
    "rsqrt": lambda v, x: (x - v["mean"]) * jax.lax.rsqrt(v["var"] + 1e-3) * v["scale"] + v["bias"],
    "power": lambda v, x: v["scale"] * (x - v["mean"]) * (v["var"] + 1e-3) ** -0.5 + v["bias"],
    "reciprocal": lambda v, x: (x - v["mean"]) * (v["scale"] / (v["var"] + 1e-3) ** 0.5) + v["bias"],
    "folded": lambda v, x: (lambda a: x * a + (v["bias"] - v["mean"] * a))(v["scale"] / jnp.sqrt(v["var"] + 1e-3)),
    "folded_minus": lambda v, x: (lambda a: x * a - (v["mean"] * a - v["bias"]))(
        v["scale"] * jax.lax.rsqrt(v["var"] + 1e-3)
    ),
    "negated": lambda v, x: v["bias"] - (v["mean"] - x) * (v["scale"] / jnp.sqrt(v["var"] + 1e-3)),
    "minus_x": lambda v, x: v["bias"] - (-x + v["mean"]) * v["scale"] * jax.lax.rsqrt(v["var"] + 1e-3),
    "divided_bias": lambda v, x: (
        (x - v["mean"] + v["bias"] * jnp.sqrt(v["var"] + 1e-3) / v["scale"]) * (v["scale"] / jnp.sqrt(v["var"] + 1e-3))
    ),
    "doubled": lambda v, x: (2 * x - 2 * v["mean"]) / (4 * (v["var"] + 1e-3)) ** 0.5 * v["scale"] + v["bias"],
    "jit": lambda v, x: jax.jit(FORMULAS["textbook"])(v, x),
    "casts": lambda v, x: FORMULAS["textbook"](v, x.astype(jnp.float32)).astype(jnp.float16).astype(jnp.float32),
    "column": lambda v, x: FORMULAS["textbook"](jax.tree.map(lambda leaf: leaf.reshape(1, -1), v), x),
    "full_size": lambda v, x: FORMULAS["textbook"](
        {k: jnp.broadcast_to(v[k], x.shape) for k in ("mean", "var", "scale", "bias")}, x
    ),
    "clipped_variance": lambda v, x: FORMULAS["textbook"]({**v, "var": jnp.maximum(v["var"], 0)}, x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_batch_norm(name):
    graph = graph_of(FORMULAS[name])
    (bn,) = graph.batch_norms
    assert (bn.mean, bn.var, bn.scale, bn.bias) == ("mean", "var", "scale", "bias")
    assert (bn.epsilon, bn.layer, bn.channel_axis) == (1e-3, "w", 1)
    assert graph.skipped == ()


def test_absent_parts():
    (bn,) = graph_of(lambda v, x: (x - v["mean"]) / jnp.sqrt(v["var"])).batch_norms
    assert (bn.scale, bn.bias, bn.epsilon) == (None, None, 0.0)
    (bn,) = graph_of(lambda v, x: (x - v["mean"]) / jnp.sqrt(v["var"] + 1e-12) + v["bias"]).batch_norms
    assert (bn.scale, bn.bias, bn.epsilon) == (None, "bias", 1e-12)
    (bn,) = graph_of(lambda v, x: (x - v["mean"]) * v["scale"] / jnp.sqrt(v["var"] + 0.5)).batch_norms
    assert (bn.scale, bn.bias, bn.epsilon) == ("scale", None, 0.5)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1.1e-5, 2e-5, 3e-4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_epsilon_is_as_it_was_written_in_any_type(dtype, epsilon):
    """A network cast to half precision rounds epsilon; it is the same network still."""

    def apply_fn(v, x):
        x = (x @ v["w"] - v["mean"]) * jax.lax.rsqrt(v["var"] + epsilon) * v["scale"] + v["bias"]
        return x @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5)), **NORM}
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    graph = trace(apply_fn, cast, (2, 3))
    assert graph.batch_norms[0].epsilon == epsilon
    assert graph.digest == trace(apply_fn, variables, (2, 3)).digest


def test_statistics_computed_from_leaves_and_numbers():
    """Moving averages that start at zero, divided by 1 - decay ** steps, as Equinox stores them."""

    def apply_fn(v, x):
        debias = jnp.where(v["steps"] == 0, 1, 1 - 0.99 ** v["steps"])
        stored = {**v, "mean": v["mean"] / debias, "var": v["var"] / debias}
        return FORMULAS["textbook"](stored, x @ v["w"]) / v["temperature"] @ v["head"]

    variables = {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5)), **NORM, "steps": jnp.ones((), jnp.int32)}
    graph = trace(apply_fn, {**variables, "temperature": jnp.ones(())}, (2, 3))
    assert graph.unrecognized_batch_norms == graph.skipped != ()
    mean, var = computed_statistics(graph.program)
    behind = [graph.program.leaves_behind[value] for value in (mean, var)]
    names = [{graph.leaf_paths[leaf] for leaf in leaves} for leaves in behind]
    assert names == [{"mean", "steps"}, {"var", "steps"}]
    assert {graph.program.producer(value).name for value in (mean, var)} == {"div"}
    assert computed_statistics(graph_of(FORMULAS["textbook"]).program) == []
    rng = np.random.default_rng(0)
    values = {k: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype) for k, v in variables.items()}
    values = {**values, "steps": jnp.asarray(7), "temperature": jnp.asarray(2.0)}
    again, stored = compute_kernels(graph, values)
    assert [(bn.mean, bn.var, bn.epsilon, bn.layer) for bn in again.batch_norms] == [("mean", "var", 1e-3, "w")]
    assert again.skipped == ()
    np.testing.assert_allclose(stored["var"], values["var"] / (1 - 0.99**7), rtol=1e-5)
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    np.testing.assert_allclose(again.apply_fn(stored, x), apply_fn(values, x), rtol=1e-4)


OTHERS = {
    "affine": lambda v, x: x * v["scale"] + v["bias"],
    "no_root": lambda v, x: (x - v["mean"]) / (v["var"] + 1e-3) * v["scale"] + v["bias"],
    "cube_root": lambda v, x: (x - v["mean"]) * (v["var"] + 1e-3) ** (-1 / 3) * v["scale"] + v["bias"],
    "epsilon_outside": lambda v, x: (x - v["mean"]) / (jnp.sqrt(v["var"]) + 1e-3) * v["scale"] + v["bias"],
    "mean_added": lambda v, x: (x + v["mean"]) / jnp.sqrt(v["var"] + 1e-3) * v["scale"] + v["bias"],
    "bias_scaled": lambda v, x: ((x - v["mean"]) / jnp.sqrt(v["var"] + 1e-3) + v["bias"]) * v["scale"],
    "mixed_channels": lambda v, x: (x - v["mean"]) / jnp.sqrt(v["var"][::-1] + 1e-3) * v["scale"] + v["bias"],
    "statistic_of_x": lambda v, x: (x - x.mean(-1, keepdims=True)) * v["scale"] / jnp.sqrt(v["var"] + 1e-3),
    "one_variance": lambda v, x: (x - v["mean"]) / jnp.sqrt(v["var"].mean() + 1e-3) * v["scale"] + v["bias"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formulas_are_no_batch_norm(name):
    whole = [bn for bn in graph_of(OTHERS[name]).batch_norms if bn.scale and bn.bias]
    assert whole == []


def test_only_the_part_that_is_a_batch_norm_is_taken():
    graph = graph_of(OTHERS["bias_scaled"])  # normalization with a bias, then a scale
    (bn,) = graph.batch_norms
    assert (bn.scale, bn.bias, bn.layer) == (None, "bias", "w")


def test_statistics_along_two_axes_are_no_batch_norm():
    def apply_fn(v, x):  # 4 channels, 4 positions
        x = (x - v["mean"]) / jnp.sqrt(v["var"][:, None] + 1e-3) * v["scale"] + v["bias"]
        return x.sum(1) @ v["head"]

    graph = trace(apply_fn, {**NORM, "head": jnp.ones((4, 5))}, (2, 4, 4))
    assert graph.batch_norms == ()


def test_two_in_a_row():
    second = {f"{k}2": jnp.ones(4) for k in NORM}

    def normalize(v, x):
        x = FORMULAS["textbook"](v, x)
        return FORMULAS["folded"]({k: v[f"{k}2"] for k in NORM}, x)

    graph = graph_of(normalize, **second)
    first, then = graph.batch_norms
    assert (first.mean, then.mean) == ("mean", "mean2")
    assert then.input == first.output
    assert (first.layer, then.layer) == ("w", None)


def test_layer_scale_after_batch_norm():
    graph = graph_of(lambda v, x: FORMULAS["textbook"](v, x) * v["gain"] * 2.0, gain=jnp.ones(4))
    (bn,) = graph.batch_norms
    assert (bn.scale, bn.bias) == ("scale", "bias")
    assert graph.layer("w").activation == "none"


def test_normalization_that_branches_keeps_its_common_part():
    def normalize(v, x):
        x = (x - v["mean"]) / jnp.sqrt(v["var"] + 1e-3)
        return jax.nn.relu(x * v["scale"] + v["bias"]) + jnp.tanh(x)

    (bn,) = graph_of(normalize).batch_norms
    assert (bn.scale, bn.bias, bn.activation) == (None, None, "none")


def test_result_of_a_layer_that_is_read_twice_is_not_its_batch_norms_alone():
    graph = graph_of(lambda v, x: FORMULAS["textbook"](v, x) + x)
    (bn,) = graph.batch_norms
    assert (bn.layer, graph.layer("w").batch_norm) == (None, None)


def test_bias_before_batch_norm():
    graph = graph_of(lambda v, x: FORMULAS["folded"](v, x + v["b"]), b=jnp.ones(4))
    assert (graph.layer("w").bias, graph.layer("w").batch_norm) == ("b", "mean")
    assert graph.batch_norms[0].input == graph.layer("w").output


def test_one_channel():
    def apply_fn(v, x):
        return FORMULAS["textbook"](v, x @ v["w"]) @ v["head"]

    norm = {k: jnp.ones(1) for k in NORM}
    graph = trace(apply_fn, {"w": jnp.ones((3, 1)), "head": jnp.ones((1, 5)), **norm}, (1, 2, 3))
    (bn,) = graph.batch_norms
    assert (bn.channels, bn.channel_axis, bn.layer) == (1, 2, "w")


# --- activations ---

JAX_ACTIVATIONS = {
    "relu": [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.where(x > 0, x, 0), lambda x: (x + abs(x)) / 2],
    "relu6": [jax.nn.relu6, lambda x: jnp.clip(x, 0, 6), lambda x: jnp.minimum(jax.nn.relu(x), 6)],
    "swish": [jax.nn.silu, lambda x: x * jax.nn.sigmoid(x), lambda x: x / (1 + jnp.exp(-x))],
    "gelu": [lambda x: jax.nn.gelu(x, approximate=False)],
    "gelu_tanh": [jax.nn.gelu],
    "quick_gelu": [lambda x: x * jax.nn.sigmoid(1.702 * x)],
    "hard_swish": [jax.nn.hard_swish, lambda x: x * jax.nn.hard_sigmoid(x)],
    "hard_sigmoid": [jax.nn.hard_sigmoid],
    "sigmoid": [jax.nn.sigmoid, lambda x: 0.5 * (jnp.tanh(x / 2) + 1)],
    "tanh": [jnp.tanh],
    "softplus": [jax.nn.softplus],
    "elu": [jax.nn.elu],
    "selu": [jax.nn.selu],
    "leaky_relu": [jax.nn.leaky_relu],
    "leaky_relu_0.1": [lambda x: jax.nn.leaky_relu(x, 0.1)],
    "leaky_relu_0.2": [lambda x: jax.nn.leaky_relu(x, 0.2), lambda x: jnp.maximum(x, 0.2 * x)],
    "mish": [jax.nn.mish, lambda x: x * jnp.tanh(jax.nn.softplus(x))],
    "none": [jnp.sin, lambda x: x * x, lambda x: jnp.maximum(x + 0.1, 0), lambda x: x, lambda x: jnp.minimum(x, 0)],
}


def test_every_activation_is_tried():
    assert JAX_ACTIVATIONS.keys() == {*ACTIVATIONS, "none"}


@pytest.mark.parametrize(
    ("name", "function"), [(name, f) for name, functions in JAX_ACTIVATIONS.items() for f in functions]
)
def test_activations(name, function):
    def apply_fn(v, x):
        return function(x @ v["w"]) @ v["head"]

    graph = trace(apply_fn, {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5))}, (2, 3))
    assert graph.layer("w").activation == name
    assert graph.tensor("head").activation == name
    assert graph.layer("w").consumers == ("head",)
    if name != "none":
        np.testing.assert_allclose(function(jnp.asarray(GRID)), ACTIVATIONS[name](GRID), rtol=1e-4, atol=1e-5)


def test_names_tell_all_activations_apart():
    assert [classify(function(GRID)) for function in ACTIVATIONS.values()] == list(ACTIVATIONS)


def layer_activation(function, **leaves):
    variables = {"w": jnp.ones((3, 4)), "head": jnp.ones((4, 5)), **leaves}
    graph = trace(lambda v, x: function(v, x @ v["w"]) @ v["head"], variables, (2, 3))
    return graph.layer("w").activation, graph.tensor("head").activation


def test_activation_counts_only_if_everything_goes_through_it():
    assert layer_activation(lambda v, y: jax.nn.relu(y) + jnp.sin(y)) == ("none", "none")
    assert layer_activation(lambda v, y: jax.nn.relu(y) + y.sum()) == ("none", "none")
    assert layer_activation(lambda v, y: jax.nn.relu(y) * jax.nn.relu(y).sum()) == ("none", "none")

    def twice(v, y):
        y = jax.nn.relu(y)
        return y + jnp.cumsum(y, axis=0)

    assert layer_activation(twice) == ("relu", "none")


def test_activation_with_parameters_is_no_named_one():
    assert layer_activation(lambda v, y: jnp.where(y > 0, y, v["slope"] * y), slope=jnp.ones(4)) == ("none", "none")


def test_activation_is_the_last_named_one():
    assert layer_activation(lambda v, y: jnp.clip(jax.nn.relu(y), 0, 6)) == ("relu6", "relu6")
    assert layer_activation(lambda v, y: jax.nn.relu(y).astype(jnp.bfloat16).astype(jnp.float32)) == ("relu", "relu")
    assert layer_activation(lambda v, y: 2 * jax.nn.relu(y)) == ("relu", "none")


def test_layout_changes_are_not_elementwise():
    variables = {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 5))}

    def apply_fn(v, x):
        y = x @ v["w"]
        return jax.nn.relu(y + y.T - y.T) @ v["head"]

    graph = trace(apply_fn, variables, (4, 4))
    assert graph.layer("w").activation == "none"


# --- elementwise evaluation ---


def test_evaluate_refuses_what_moves_or_mixes():
    x = np.ones(3)
    for name in ("reduce_sum", "cumsum", "sort", "dot_general", "reshape", "transpose", "nonsense"):
        with pytest.raises(NotElementwise):
            evaluate(name, {}, [x])
    with pytest.raises(NotElementwise):
        evaluate("select_n", {}, [x, x, x, x])
    assert evaluate("reshape", {}, [x], channelwise=True) is x
    assert evaluate("broadcast_in_dim", {}, [np.float64(2.0)]) == 2.0


# --- layout ---


def moved(function, shape):
    program, _ = flatten(lambda leaves, x: function(leaves[0]) + x, [jax.ShapeDtypeStruct(shape, jnp.float32)],
                         jax.ShapeDtypeStruct((), jnp.float32))  # fmt: skip
    labels = tuple((axis,) for axis in range(len(shape)))
    for op in program.ops:
        if op.inputs and program.parameter_only.issuperset(op.outputs):
            labels = move_labels(op, labels, program.shape(op.inputs[0]))
    return list(labels)


def test_labels_follow_their_axes():
    assert moved(lambda x: x.transpose(2, 0, 1), (2, 3, 4)) == [(2,), (0,), (1,)]
    assert moved(lambda x: x.reshape(6, 4), (2, 3, 4)) == [(0, 1), (2,)]
    assert moved(lambda x: x.T.reshape(6), (2, 3)) == [(1, 0)]
    assert moved(lambda x: x.reshape(2, 3, 2, 2), (2, 3, 4)) == [(0,), (1,), (2,), (2,)]
    assert moved(lambda x: x.reshape(2, 12), (2, 3, 4)) == [(0,), (1, 2)]
    assert moved(lambda x: x.reshape(3, 2), (2, 3)) == [(0, 1), (0, 1)]
    assert moved(lambda x: x.reshape(1, 2, 1, 3), (2, 3)) == [(), (0,), (), (1,)]
    assert moved(lambda x: x[:, None, :], (2, 3)) == [(0,), (), (1,)]
    assert moved(lambda x: jnp.broadcast_to(x[:, None], (2, 5)), (2,)) == [(0,), ()]
    assert moved(lambda x: x[:, 0], (2, 1)) == [(0,)]
    assert moved(lambda x: x[::-1], (2, 3)) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("old", "axis", "new", "expected"),
    [
        ((1, 8, 8, 4), 0, (64, 4), 0),  # merged with the axis behind it
        ((4, 1, 8, 8), 1, (4, 1, 64), 1),
        ((4, 1, 8, 8), 1, (4, 64), 1),
        ((1, 1, 3), 0, (1, 3), 0),
        ((1, 1, 3), 1, (1, 3), 0),
        ((1, 3), 0, (1, 1, 3), 0),
        ((1, 1, 3), 1, (1, 1, 3, 1), 1),
        ((4, 1), 1, (4,), 0),  # at the end, with the one before
        ((2, 8, 8, 4), 0, (128, 4), 0),
        ((4, 2, 8, 8), 1, (4, 128), 1),
    ],
)
def test_axes_of_size_one_are_followed_by_their_place(old, axis, new, expected):
    leaf, x = jax.ShapeDtypeStruct(old, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    program, _ = flatten(lambda leaves, x: leaves[0].reshape(new) + x, [leaf], x)
    (op,) = (op for op in program.ops if op.name == "reshape")
    assert follow_axis(op, axis, old) == expected


def test_kernels_through_reshapes():
    def channel_axes(function, shape, x_shape=(2, 6)):
        graph = trace(lambda v, x: x @ function(v["w"]), {"w": jnp.ones(shape)}, x_shape)
        return graph.layers[0].channel_axes

    assert channel_axes(lambda w: w.T, (4, 6)) == (0,)
    assert channel_axes(lambda w: w.reshape(6, 4), (2, 3, 4)) == (2,)
    assert channel_axes(lambda w: w.reshape(6, 6), (6, 2, 3)) == (1, 2)
    assert channel_axes(lambda w: w.squeeze((0, 1)), (1, 1, 6, 4)) == (3,)
    assert channel_axes(lambda w: w[::-1], (6, 4)) == (1,)  # inputs may come in another order
    assert channel_axes(lambda w: w.reshape(6, 4), (6, 2, 2)) == (1, 2)


@pytest.mark.parametrize(
    ("rearrange", "shape", "reason"),
    [
        (lambda w: w.reshape(6, 4), (4, 6), "split into input and output channels"),
        (lambda w: w[:, ::-1], (6, 4), "channels come in another order"),
        (lambda w: w.transpose(0, 2, 1).reshape(6, 4), (6, 2, 2), "channels come in another order"),
        (lambda w: w.reshape(6, 2, 2).transpose(0, 2, 1).reshape(6, 4), (6, 4), "channels come in another order"),
        (lambda w: w - w.mean(), (6, 4), "computed from a"),
        (lambda w: jnp.concatenate([w, w], 1), (6, 2), "computed from a"),
        (lambda w: w[:, :4], (6, 8), "computed from a"),
        (lambda w: jnp.broadcast_to(w, (6, 4)), (1, 4), "computed from a"),
    ],
)
def test_kernels_that_are_more_than_a_leaf(rearrange, shape, reason):
    variables = {"a": jnp.ones(shape), "b": jnp.ones((4, 4))}
    graph = trace(lambda v, x: x @ rearrange(v["a"]) @ v["b"], variables, (2, 6))
    assert [layer.name for layer in graph.layers] == ["b"]
    (skipped,) = graph.skipped
    assert reason in skipped.reason


def test_bias_in_another_order_is_no_bias():
    graph = graph_of(lambda v, x: x + v["b"][::-1], b=jnp.ones(4))
    assert graph.layer("w").bias is None


# --- names ---


def test_names():
    linen = ["params/a/kernel", "params/a/b/kernel", "batch_stats/a/mean", "params/top"]
    assert inner_paths(linen) == ["a/kernel", "a/b/kernel", "a/mean", "top"]
    assert inner_paths(["conv/kernel/value", "kernel"]) == ["conv/kernel", "kernel"]
    assert unique_names(["a/kernel", "a/b/kernel", "top"]) == ["a", "a/b", "top"]
    assert unique_names(["a/w1", "a/w2", "a/w1"]) == ["a/w1", "a/w2", "a/w1#2"]
    assert unique_names(["a/w", "b/w", "a/w"]) == ["a", "b", "a#2"]


# --- the flat program ---


def test_dead_operations_are_dropped():
    def function(leaves, x):
        _unused = jnp.sin(x) @ leaves[0]
        return x @ leaves[0]

    spec = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    program, _ = flatten(function, [jax.ShapeDtypeStruct((3, 3), jnp.float32)], spec)
    assert [op.name for op in program.ops] == ["dot_general"]


def test_nested_calls_are_inlined():
    @jax.jit
    def inner(w, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)

    spec = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    program, _ = flatten(lambda leaves, x: jax.jit(inner)(leaves[0], inner(leaves[0], x)), [spec], spec)
    assert [op.name for op in program.ops] == ["dot_general", "tanh"] * 2
    assert all(isinstance(op, Op) and op.index == i for i, op in enumerate(program.ops))


def test_outputs_may_be_inputs_leaves_and_constants():
    def apply_fn(v, x):
        return {"x": x, "w": v["w"], "one": 1.0, "y": x @ v["w"]}

    graph = trace(apply_fn, {"w": jnp.ones((3, 4))}, (2, 3))
    assert len(graph.program.outputs) == 4
    assert graph.layers[0].consumers == ("output",)
    assert graph.tensor("w").shared
