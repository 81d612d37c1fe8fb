"""Kernels that a network computes from its parameters become leaves, and are quantized like others."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dfq_jax
from dfq_jax.graph.adapters import as_function
from dfq_jax.graph.computed import computed_kernels
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError
from dfq_jax.quantizers.collection import dequantized
from dfq_jax.quantizers.qtensor import QTensor

SHAPE = (2, 8, 8, 3)


class StandardizedConv(nn.Conv):
    """As in Flax's ViT-hybrid and Big Transfer: the parameter is replaced on its way into the convolution."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - jnp.mean(value, axis=(0, 1, 2))
            value = value / (jnp.std(value, axis=(0, 1, 2)) + 1e-5)
        return value


class StandardizedResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(StandardizedConv(8, (3, 3), name="stem")(x)))
        for i, stride in enumerate((1, 2)):
            y = nn.relu(nn.GroupNorm(2)(StandardizedConv(8, (3, 3), (stride, stride), name=f"conv{i}_1")(x)))
            y = nn.GroupNorm(2)(StandardizedConv(8, (3, 3), name=f"conv{i}_2")(y))
            if stride > 1:
                x = StandardizedConv(8, (1, 1), (stride, stride), name="projection")(x)
            x = nn.relu(x + y)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class SpectralNormalized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = nn.SpectralNorm(nn.Conv(6, (3, 3), name=f"conv{i}"))(x, update_stats=train)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.SpectralNorm(nn.Dense(5, name="head"))(x.mean((1, 2)), update_stats=train)


class WeightNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Conv(6, (3, 3), name="conv"))(x))
        return nn.WeightNorm(nn.Dense(5, name="head"))(x.mean((1, 2)))


class Adapted(nn.Module):
    """Low-rank adapters, computed in bfloat16 in the first layer."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for name, features, dtype in (("first", 8, jnp.bfloat16), ("second", 5, jnp.float32)):
            init = nn.initializers.normal(0.2)
            kernel = self.param(f"{name}/kernel", init, (x.shape[-1], features))
            a, b = (self.param(f"{name}/{k}", init, s) for k, s in (("a", (x.shape[-1], 2)), ("b", (2, features))))
            x = nn.relu(x.astype(dtype) @ (kernel + a @ b).astype(dtype)).astype(jnp.float32)
        return x


def spread(variables):
    """With parameters and statistics that are all different, variances positive."""
    rng = np.random.default_rng(0)

    def noisy(path, leaf):
        noise = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        return leaf * (1 + abs(noise)) if path[-1].key == "var" else leaf + noise

    return jax.tree_util.tree_map_with_path(noisy, variables)


NETWORKS = {
    "standardized": (StandardizedResNet, 7),
    "spectral": (SpectralNormalized, 3),
    "weight_norm": (WeightNormalized, 2),
    "adapters": (Adapted, 2),
}


@functools.cache
def build(name):
    module = NETWORKS[name][0]()
    return module, spread(jax.jit(module.init)(jax.random.key(0), jnp.zeros(SHAPE)))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), SHAPE)


@functools.cache
def computed(name):
    apply_fn, variables = as_function(*build(name))
    return apply_fn, variables, *dfq_jax.compute_kernels(trace(apply_fn, variables, SHAPE), variables)


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def sqnr(reference, found):
    reference, found = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    with np.errstate(divide="ignore"):  # infinite where both are equal
        return 10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_function_in_a_tree_of_the_same_structure(name, x):
    apply_fn, variables, graph, new = computed(name)
    assert len(graph.layers) == NETWORKS[name][1]
    assert not graph.skipped
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert {s.shape for s in jax.tree.leaves(new)} == {s.shape for s in jax.tree.leaves(variables)}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name != "adapters" else {"rtol": 1e-2, "atol": 1e-2}
    own, run = jax.jit(apply_fn), jax.jit(lambda v, x: dfq_jax.run(graph, v, x))
    np.testing.assert_allclose(jax.jit(graph.apply_fn)(new, x), own(variables, x), **tolerance)
    x = jnp.concatenate([x, x + 1, x])  # another batch size
    np.testing.assert_allclose(run(new, x), own(variables, x), **tolerance)
    assert dfq_jax.compute_kernels(graph, new) == (graph, new)
    abstract, shapes = dfq_jax.compute_kernels(trace(apply_fn, variables, SHAPE), jax.eval_shape(lambda: variables))
    assert abstract == graph and shapes == jax.eval_shape(lambda: new)


def test_the_kernels_are_those_of_the_papers():
    """Against float64 NumPy."""

    def kernels(name):
        _, variables, graph, new = computed(name)
        for layer in graph.layers:
            yield (
                layer.kernel,
                variables,
                np.asarray(graph.leaf(variables, layer.kernel), np.float64),
                graph.leaf(new, layer.kernel),
            )

    for path, _, w, found in kernels("standardized"):
        if not path.startswith("params/head"):
            w = w - w.mean((0, 1, 2))
            w = w / (w.std((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)
    for path, variables, w, found in kernels("weight_norm"):
        name = path.split("/")[1]
        (scale,) = (
            v for k, v in variables["params"].items() if k.startswith("WeightNorm") and f"{name}/kernel/scale" in v
        )
        axes = tuple(range(w.ndim - 1))
        expected = w / np.sqrt((w**2).sum(axes)) * np.asarray(scale[f"{name}/kernel/scale"])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for path, variables, w, found in kernels("spectral"):
        name = path.split("/")[1]
        (stats,) = (v for v in variables["batch_stats"].values() if f"{name}/kernel/u" in v)
        u, matrix = np.asarray(stats[f"{name}/kernel/u"], np.float64), w.reshape(-1, w.shape[-1])
        v = u @ matrix.T
        v /= np.linalg.norm(v)
        u = v @ matrix
        np.testing.assert_allclose(found, w / np.linalg.norm(u), rtol=1e-4, atol=1e-5)
    for path, variables, w, found in kernels("adapters"):
        a, b = (np.asarray(variables["params"][path.split("/", 1)[1].replace("kernel", k)], np.float64) for k in "ab")
        np.testing.assert_allclose(found.astype(jnp.float32), w + a @ b, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_from_quantize_to_file(name, x, tmp_path):
    module, variables = build(name)
    images = jax.random.normal(jax.random.key(2), (16, *SHAPE[1:]))
    q = dfq_jax.quantize(module, variables, input_shape=SHAPE, recipe="fast", images=images)
    kernels = [q.graph.leaf(q.variables, layer.kernel) for layer in q.graph.layers]
    assert len(kernels) == NETWORKS[name][1] and all(isinstance(kernel, QTensor) for kernel in kernels)
    assert not q.report.skipped
    assert q.report.steps[0].startswith("kernels computed from parameters: ")
    assert sqnr(as_function(module, variables)[0](variables, x), q(x)) > 20
    assert sqnr(q(x), q.integer()(x)) > 60
    q.save(tmp_path / "q.safetensors")
    for template in (variables, jax.eval_shape(lambda: variables)):
        again = dfq_jax.load(tmp_path / "q.safetensors", module, template)
        same(again.variables, q.variables)
        np.testing.assert_array_equal(again(x), q(x))


@pytest.mark.parametrize("name", ["standardized", "spectral"])
def test_float_on_dequantized_weights_is_the_simulation(name, x):
    q = dfq_jax.quantize(*build(name), input_shape=SHAPE, recipe="fast", images=jnp.concatenate([x] * 4), bits="w4a16")
    found = jax.jit(q.graph.apply_fn)(dequantized(q.variables), x)
    np.testing.assert_allclose(found, q(x), rtol=1e-4, atol=1e-5)


def test_onnx(x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export = pytest.importorskip("dfq_jax.export.onnx")
    q = dfq_jax.quantize(*build("spectral"), input_shape=SHAPE, recipe="fast", images=jnp.concatenate([x] * 4))
    export.export_onnx(q, tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    assert sqnr(q(x), outputs) > 20


def test_a_leaf_that_is_read_elsewhere_keeps_its_value():
    """Neither of two kernels can take the place of a leaf that the other, or the input, needs."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)), jnp.float32)

    def found(apply_fn, **variables):
        graph, new = dfq_jax.compute_kernels(trace(apply_fn, variables, (2, 6)), variables)
        x = jax.random.normal(jax.random.key(0), (2, 6))
        np.testing.assert_allclose(graph.apply_fn(new, x), apply_fn(variables, x), rtol=1e-5, atol=1e-5)
        return computed_kernels(graph)

    assert found(lambda v, x: x @ (2 * v["w"]) @ v["head"], w=w, head=w) == ("w",)
    assert found(lambda v, x: x @ (2 * v["w"]) @ v["w"], w=w) == ()
    assert found(lambda v, x: (x + v["w"][0]) @ (2 * v["w"]) @ v["head"], w=w, head=w) == ()
    assert found(lambda v, x: x @ (2 * v["w"]) @ (3 * v["w"]) @ v["head"], w=w, head=w) == ()
    assert found(lambda v, x: x @ (2 * v["w"]) @ (v["w"] * v["m"]) @ v["head"], w=w, m=w + 1, head=w) == ("w", "m")
    assert found(lambda v, x: (lambda k: x @ k @ v["head"] @ k)(2 * v["w"]), w=w, head=w) == ("w",)
    assert found(lambda v, x: x @ (v["a"] @ v["b"]) @ v["head"], a=w[:, :2], b=w[:2], head=w) == ()
    with pytest.raises(GraphError, match=r"no layer has a kernel that can be a leaf.*computed from a, b"):
        found(lambda v, x: x @ (v["a"] @ v["b"]), a=w[:, :2], b=w[:2])
