"""Variables of any pytree: from quantize to every form that a quantized network has."""

import collections
import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dfq_jax
from dfq_jax.export.onnx import export_onnx
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers.collection import (
    ActivationQuantizers,
    QuantizedVariables,
    dequantized,
    is_quantized,
    quantization,
    with_quantization,
    without_quantization,
)
from dfq_jax.quantizers.qtensor import QTensor, params_from_range
from dfq_jax.quantizers.trees import flatten_with_paths

SHAPE = (2, 8, 8, 3)
EPSILON = 1e-3


def arrays():
    """Parameters of a convolution, its BatchNorm and a dense layer."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=0.3):
        return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)

    return {
        "kernel": normal(3, 3, 3, 8),
        "mean": normal(8),
        "var": jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32),
        "scale": 1 + normal(8),
        "bias": normal(8),
        "head": normal(8, 5),
        "offset": normal(5),
    }


def network(p, x):
    y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = (y - p["mean"]) * (jax.lax.rsqrt(p["var"] + EPSILON) * p["scale"]) + p["bias"]
    return jax.nn.relu(y).mean((1, 2)) @ p["head"] + p["offset"]


NAMES = ("kernel", "mean", "var", "scale", "bias", "head", "offset")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Norm:
    mean: Any
    var: Any
    scale: Any
    bias: Any


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A module that is a pytree, with static fields, as in Equinox."""

    def __init__(self, kernel, norm, dense, activation=jax.nn.relu):
        self.kernel, self.norm, self.dense, self.activation = kernel, norm, dense, activation

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key(name), getattr(self, name)) for name in ("kernel", "norm", "dense")], self.activation

    @classmethod
    def tree_unflatten(cls, activation, children):
        return cls(*children, activation)

    def __call__(self, x):
        return network({"kernel": self.kernel, **vars(self.norm), "head": self.dense[0], "offset": self.dense[1]}, x)


def as_tuple(p):
    statistics = {"mean": p["mean"], "var": p["var"]}
    params = {name: p[name] for name in NAMES if name not in statistics}
    return lambda v, x: network({**v[0], **v[1]}, x), (params, statistics)


def as_list(p):
    return lambda v, x: network(dict(zip(NAMES, v, strict=True)), x), [p[name] for name in NAMES]


def as_module(p):
    norm = Norm(p["mean"], p["var"], p["scale"], p["bias"])
    return lambda v, x: v(x), Module(p["kernel"], norm, (p["head"], p["offset"]))


def as_state(p):
    graphdef, state = nnx.split(nnx.Dict({name: nnx.Param(value) for name, value in p.items()}))

    def apply_fn(v, x):
        merged = nnx.merge(graphdef, v)
        return network({name: merged[name][...] for name in NAMES}, x)

    return apply_fn, state


def as_default_dict(p):
    return network, collections.defaultdict(jnp.zeros, p)


def as_own_quantization(p):
    """A mapping that has a collection of that name itself."""
    return lambda v, x: network(v["quantization"], x), {"quantization": p}


def as_numbered(p):
    """Names that do not sort with strings."""
    return lambda v, x: network({name: v[i] for i, name in enumerate(NAMES)}, x), dict(enumerate(p[n] for n in NAMES))


def as_mapping(p):
    return network, p


TREES = [as_tuple, as_list, as_module, as_state, as_default_dict, as_own_quantization, as_numbered, as_mapping]


def quantized(apply_fn, variables, **arguments):
    """By given images: noise for `instant` is drawn by the names of BatchNorms, which differ between trees."""
    images = jax.random.normal(jax.random.key(2), (16, *SHAPE[1:]))
    return dfq_jax.quantize(apply_fn, variables, input_shape=SHAPE, recipe="fast", images=images, **arguments)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), SHAPE)


@pytest.fixture(scope="module")
def expected():
    return quantized(*as_mapping(arrays()))


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("form", TREES)
def test_any_tree_from_quantize_to_file(form, x, expected, tmp_path):
    """The numbers are those of the same network with its parameters in a dict."""
    apply_fn, variables = form(arrays())
    q = quantized(apply_fn, variables)
    assert len(q.graph.layers) == 2 and len(q.graph.batch_norms) == 1
    np.testing.assert_array_equal(q(x), expected(x))
    np.testing.assert_array_equal(q.integer()(x), expected.integer()(x))
    np.testing.assert_array_equal(jax.jit(q.apply)(q.variables, x), q(x))
    tree = without_quantization(q.variables)
    assert type(tree) is type(variables)
    assert sum(isinstance(leaf, QTensor) for leaf in flatten_with_paths(tree)[1]) == 2
    assert jax.tree.structure(dequantized(q.variables)) == jax.tree.structure(variables)
    q.save(tmp_path / "q.safetensors")
    for template in (variables, jax.eval_shape(lambda: variables)):
        restored = dfq_jax.load(tmp_path / "q.safetensors", apply_fn, template)
        same(restored.variables, q.variables)
        np.testing.assert_array_equal(restored(x), q(x))


def test_a_bare_array(x, tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(192, 5)), jnp.float32)
    apply_fn = lambda v, x: x.reshape(-1, 192) @ v  # noqa: E731
    q = quantized(apply_fn, w)
    expected = quantized(lambda v, x: apply_fn(v["w"], x), {"w": w})
    np.testing.assert_array_equal(q(x), expected(x))
    np.testing.assert_array_equal(q.integer()(x), expected.integer()(x))
    q.save(tmp_path / "q.safetensors")
    same(dfq_jax.load(tmp_path / "q.safetensors", apply_fn, w).variables, q.variables)


def test_learned_steps_and_transformations(x):
    """Sub-networks, reconstruction, fine-tuning and JAX's transformations keep the form of the tree."""
    apply_fn, variables = as_module(arrays())
    recipe = dfq_jax.RECIPES["fast"].replace(
        reconstruction=dfq_jax.ReconstructionConfig(steps=3, batch_size=4),
        finetune=dfq_jax.FinetuneConfig(steps=3, batch_size=4),
        equalize=True,
    )
    images = jax.random.normal(jax.random.key(2), (16, *SHAPE[1:]))
    q = dfq_jax.quantize(apply_fn, variables, input_shape=SHAPE, recipe=recipe, bits="w4a4", images=images)
    assert isinstance(q.variables, QuantizedVariables) and isinstance(q.variables.variables, Module)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q.variables)
    for outputs in jax.vmap(q.apply, in_axes=(0, None))(stacked, x):
        np.testing.assert_allclose(outputs, q(x), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda v: q.apply(v, x).sum(), allow_int=True)(q.variables)
    assert jax.tree.structure(gradient) == jax.tree.structure(q.variables)
    assert trace(apply_fn, q.variables, SHAPE) == q.graph
    np.testing.assert_array_equal(
        trace(apply_fn, q.variables, SHAPE).leaves(q.variables)[0].qvalue, q.variables.variables.kernel.qvalue
    )


def test_onnx_of_a_tree(x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    q = quantized(*as_tuple(arrays()))
    export_onnx(q, tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    assert np.abs(outputs - q(x)).max() < 0.05 * np.abs(q(x)).max()


def test_orbax_restores_a_tree(x, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    q = quantized(*as_tuple(arrays()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", q.variables)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "checkpoint", q.variables), q.variables)


def test_equinox_modules(x, tmp_path):
    """One example and vmap, as all of Equinox; functions and numbers in the module stay in the function."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        head: eqx.nn.Linear
        activation: Any
        repeats: int = 2

        def __call__(self, x):
            return self.head(self.activation(self.conv(x)).mean((1, 2)))

    keys = jax.random.split(jax.random.key(0))
    model = Net(eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.Linear(8, 5, key=keys[1]), jax.nn.relu)

    def apply_fn(v, x):
        return jax.vmap(eqx.combine(v, static))(x.transpose(0, 3, 1, 2))

    params, static = eqx.partition(model, eqx.is_array)
    with pytest.raises(TypeError, match=r"'activation' is a .*expected an array.*eqx\.partition"):
        quantized(apply_fn, model)
    q = quantized(apply_fn, params)
    assert [layer.name for layer in q.graph.layers] == ["conv", "head"]
    assert jnp.abs(q(x) - apply_fn(params, x)).max() < 0.05 * jnp.abs(q(x)).max()
    q.save(tmp_path / "q.safetensors")
    same(dfq_jax.load(tmp_path / "q.safetensors", apply_fn, params).variables, q.variables)


def test_the_collection_of_quantizers():
    params = params_from_range(0.0, 1.0, bits=8)
    for variables in ((jnp.ones(2),), {"a": jnp.ones(2)}, {"quantization": {"a": jnp.ones(2)}}):
        assert not is_quantized(variables)
        assert quantization(variables) == ActivationQuantizers()
        first = with_quantization(variables, ActivationQuantizers(for_all={"a": params}))
        assert is_quantized(first)
        assert quantization(first) == ActivationQuantizers(for_all={"a": params})
        assert without_quantization(first) is variables or without_quantization(first) == variables
        again = with_quantization(first, ActivationQuantizers(for_layers={"a": params}))
        assert type(again) is type(first) and quantization(again) == ActivationQuantizers(for_layers={"a": params})
    tree = with_quantization({"a": jnp.ones(2)}, ActivationQuantizers({"a": params}))
    assert type(tree) is dict and tree["quantization"] == {"tensors": {"a": params}, "operands": {}}
    # As saved without their empty parts, and as other libraries restore mappings.
    for collection in ({"operands": {"a": params}}, flax.core.freeze({"operands": {"a": params}})):
        assert quantization({"quantization": collection}) == ActivationQuantizers(for_layers={"a": params})


def test_the_record_of_quantizers():
    low, high = (params_from_range(0.0, 1.0, bits=bits) for bits in (4, 8))
    record = ActivationQuantizers({"a": low}, {"b": high})
    assert record.by_tensor == {"a": low, "b": high}
    assert record.map(lambda name, params: high if name == "a" else params) == ActivationQuantizers(
        {"a": high}, {"b": high}
    )
    assert record.renamed([("x", "b"), ("y", "absent")]) == ActivationQuantizers({}, {"x": high})
    assert record.updated(ActivationQuantizers({"a": high}, {"c": low})) == ActivationQuantizers(
        {"a": high}, {"b": high, "c": low}
    )
    assert jax.tree.structure(record) == jax.tree.structure(jax.tree.map(lambda leaf: leaf, record))


def test_leaves_of_one_path_are_refused():
    with pytest.raises(TypeError, match="two leaves have the path 'a/b'"):
        trace(lambda v, x: x @ v["a/b"] @ v["a"]["b"], {"a/b": jnp.eye(3), "a": {"b": jnp.eye(3)}}, (2, 3))
