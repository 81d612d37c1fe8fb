"""Linen modules, NNX modules and functions as one pure inference function."""

from __future__ import annotations

import functools
import gc
import os
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import nnx

import dfq_jax
from dfq_jax.graph.adapters import INFERENCE_ARGUMENTS, as_function, inference_arguments, is_module, variable_shapes
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError

QUICK = dfq_jax.RECIPES["noise"].replace(synthesis_num_images=4)  # where any quantized network will do


class Net(nn.Module):
    """Takes whichever argument the tests give its subclasses."""

    def compute(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(nn.Dense(4, name="dense")(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class WithTrain(Net):
    @nn.compact
    def __call__(self, x, train: bool = True):
        return self.compute(x, train)


class WithRequiredTraining(Net):
    @nn.compact
    def __call__(self, x, training):
        return self.compute(x, training)


class WithKeywordOnly(Net):
    @nn.compact
    def __call__(self, x, *, is_training: bool = True):
        return self.compute(x, is_training)


class WithDeterministic(Net):
    @nn.compact
    def __call__(self, x, deterministic: bool = False, use_running_average: bool = False):
        assert deterministic == use_running_average
        return self.compute(x, not deterministic)


class WithNothing(Net):
    @nn.compact
    def __call__(self, x):
        return self.compute(x, False)


MODULES = {
    "train": (WithTrain(), {"train": False}),
    "training": (WithRequiredTraining(), {"training": False}),
    "is_training": (WithKeywordOnly(), {"is_training": False}),
    "deterministic": (WithDeterministic(), {"deterministic": True, "use_running_average": True}),
    "none": (WithNothing(), {}),
    "remat": (nn.remat(WithTrain, static_argnums=(2,))(), {"train": False}),
    "jit": (nn.jit(WithTrain, static_argnums=(2,))(), {"train": False}),
}


@pytest.mark.parametrize("name", MODULES)
def test_linen_inference_mode(name):
    module, arguments = MODULES[name]
    assert inference_arguments(type(module).__call__) == arguments
    case = model_grid.linen_case(name, WithNothing(), (3, 5))
    apply_fn, variables = as_function(module, case.variables)
    assert variables is case.variables
    x = case.images()
    expected, found = jax.jit(lambda v, x: (case.model.apply(v, x), apply_fn(v, x)))(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    graph = trace(apply_fn, variables, (3, 5))
    assert (len(graph.layers), len(graph.batch_norms)) == (1, 1)


def test_nnx_keeps_the_mode_of_the_module():
    case = model_grid.nnx_resnet()
    model, x = case.model, case.images()
    model.train()

    def weights():
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))

    before = weights()
    apply_fn, variables = as_function(model)
    apply_fn = jax.jit(apply_fn)
    first = apply_fn(variables, x)
    np.testing.assert_array_equal(apply_fn(variables, x), first)  # no dropout, no updates
    assert not model.bn.use_running_average
    assert not model.dropout.deterministic
    jax.tree.map(np.testing.assert_array_equal, weights(), before)
    model.eval()
    np.testing.assert_allclose(first, nnx.jit(lambda model, x: model(x))(model, x), rtol=1e-5, atol=1e-6)


def test_nnx_variables_are_a_pure_dict_of_float_arrays():
    _, variables = as_function(model_grid.nnx_resnet().model)
    assert type(variables) is dict
    assert "dropout" not in variables  # its random stream is no variable
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(variables))


def test_nnx_with_given_variables():
    model = model_grid.nnx_resnet().model
    _, own = as_function(model)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, own)
    apply_fn, variables = as_function(model, doubled)
    assert variables == doubled
    assert len(trace(apply_fn, variables, (2, 8, 8, 3)).layers) == 7
    state = nnx.state(model)  # random streams included
    for given in (state, nnx.to_pure_dict(state)):
        apply_fn, variables = as_function(model, given)
        assert jax.tree.structure(variables) == jax.tree.structure(own)
        jax.tree.map(np.testing.assert_array_equal, variables, own)
        assert len(trace(apply_fn, variables, (2, 8, 8, 3)).layers) == 7


def test_nnx_lists_and_call_arguments():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
            self.head = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x, train: bool = True):
            if train:
                raise AssertionError("inference was asked for")
            return self.head(nnx.relu(self.blocks(x)))

    apply_fn, variables = as_function(Inner(nnx.Rngs(0)))
    graph = trace(apply_fn, variables, (2, 3))
    assert [layer.name for layer in graph.layers] == ["blocks/layers/0", "head"]
    assert graph.layers[0].batch_norm == "blocks/layers/1"


def test_function_is_passed_through():
    variables = {"w": jnp.ones((3, 4))}

    def function(v, x):
        return x @ v["w"]

    assert as_function(function, variables) == (function, variables)
    partial = functools.partial(lambda scale, v, x: scale * (x @ v["w"]), 2.0)
    assert as_function(partial, variables)[0] is partial
    assert trace(partial, variables, (2, 3)).layers[0].name == "w"


def test_refusals():
    with pytest.raises(TypeError, match="a Linen module needs its variables"):
        as_function(WithTrain())
    with pytest.raises(TypeError, match="WithTrain is a class; pass an instance"):
        as_function(WithTrain, {})
    with pytest.raises(TypeError, match="NNXResNet is a class; pass an instance"):
        as_function(model_grid.NNXResNet)
    with pytest.raises(TypeError, match="found int"):
        as_function(3, {})
    with pytest.raises(TypeError, match=r"a function \(variables, x\) needs its variables"):
        as_function(lambda v, x: x)


def test_is_module():
    assert is_module(WithTrain())
    assert is_module(model_grid.nnx_resnet().model)
    assert not is_module(WithTrain)
    assert not is_module(lambda v, x: x)


# --- arguments of a module's own ---


@pytest.mark.parametrize("name", INFERENCE_ARGUMENTS)
def test_every_switch_of_the_table(name):
    """Inference is what the module sees, whether the switch has a default, the other one, or none."""
    seen = []

    def body(self, x, switch):
        seen.append(switch)
        return nn.Dense(2)(x)

    for default in ("", "=None", f"={not INFERENCE_ARGUMENTS[name]}"):
        scope = {"body": body}
        exec(f"def __call__(self, x, {name}{default}):\n    return body(self, x, {name})", scope)
        module = type("Made", (nn.Module,), {"__call__": nn.compact(scope["__call__"])})()
        apply_fn, variables = as_function(module, variable_shapes(module, (1, 3)))
        assert trace(apply_fn, variables, (1, 3)).layers[0].name == "Dense_0"
    assert len(seen) == 6 and set(seen) == {INFERENCE_ARGUMENTS[name]}


def test_what_is_no_switch():
    def call(self, x, train=0.5, mode="train", test="cifar", eval=None):
        return x

    assert inference_arguments(call) == {"eval": True}


class SecondInput(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, training, rngs):
        return nn.Dense(2)(x) * mask


class WithMode(nn.Module):
    @nn.compact
    def __call__(self, x, mode):
        return nn.BatchNorm(use_running_average=mode == "eval")(nn.Dense(2)(x))


class Keyed(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, *, rngs):
        return self.head(x)


class NoCall(nnx.Module):
    def encode(self, x):
        return x


REQUIRED = {
    "second input": (SecondInput(), r"SecondInput.__call__ needs the arguments 'mask', 'rngs' besides .*mask=\.\.\."),
    "mode": (
        WithMode(),
        r"needs the argument 'mode' .*lambda variables, x: model.apply\(variables, x, mode=.*train=False",
    ),
    "rngs": (
        Keyed(nnx.Rngs(0)),
        r"Keyed.__call__ needs the argument 'rngs' .*nnx.merge\(graphdef, variables\)\(x, rngs=",
    ),
    "no call": (NoCall(), "NoCall has no __call__; pass a function"),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_required_arguments_are_named(name):
    module, message = REQUIRED[name]
    for function in (as_function, lambda model, _: dfq_jax.quantize(model, {}, input_shape=(1, 3), recipe="instant")):
        with pytest.raises(TypeError, match=message):
            function(module, {})


def test_the_advice_works():
    module = WithMode()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)), "eval")
    graph = trace(lambda variables, x: module.apply(variables, x, mode="eval"), variables, (1, 3))
    assert graph.layers[0].batch_norm == "BatchNorm_0"
    graphdef, variables = nnx.split(Keyed(nnx.Rngs(0)))
    np.testing.assert_array_equal(nnx.merge(graphdef, variables)(jnp.zeros((1, 3)), rngs=None), np.zeros((1, 2)))


# --- modules of other libraries ---


class HuggingFaceLike:
    """The shape of `transformers.FlaxPreTrainedModel`: module, parameters, and a call that has its own form."""

    def __init__(self, module, params):
        self.module, self.params = module, params

    def __call__(self, pixel_values, params=None, train=False):
        raise AssertionError("the module is what is called")


def test_wrappers_of_a_linen_module_and_its_parameters():
    case = model_grid.linen_case("wrapped", WithNothing(), (2, 5))
    expected = case.model.apply(case.variables, case.images())
    wrapped = HuggingFaceLike(WithDeterministic(), case.variables)
    apply_fn, variables = as_function(wrapped)
    np.testing.assert_allclose(apply_fn(variables, case.images()), expected, rtol=1e-6)
    assert trace(apply_fn, variables, (2, 5)).layers[0].batch_norm == "bn"

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic: bool = True):
            return nn.Dense(3, name="head")(x)

    params = Head().init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    apply_fn, variables = as_function(HuggingFaceLike(Head(), params))  # parameters without their collection's name
    assert set(variables) == {"params"}
    assert trace(apply_fn, variables, (2, 5)).layers[0].name == "head"


def test_linen_modules_bound_to_variables():
    case = model_grid.linen_case("bound", WithNothing(), (2, 5))
    bound = WithTrain().bind(case.variables)
    apply_fn, variables = as_function(bound)
    jax.tree.map(np.testing.assert_array_equal, variables, case.variables)
    expected = case.model.apply(case.variables, case.images())
    np.testing.assert_allclose(apply_fn(variables, case.images()), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", minversion="3", reason="needs Keras 3")
    if keras.config.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    return keras


def keras_network(keras):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Dropout(0.5, seed=0),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, name="head"),
        ]
    )
    convolved = np.asarray(model.get_layer("conv")(np.random.default_rng(0).normal(size=(64, 8, 8, 3))))
    norm = model.get_layer("norm")
    norm.moving_mean.assign(convolved.mean((0, 1, 2)))
    norm.moving_variance.assign(convolved.var((0, 1, 2)))
    return model


def test_keras_models(keras, tmp_path):
    model = keras_network(keras)
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    apply_fn, variables = as_function(model)
    assert len(variables) == 7  # without the state of the random generator
    np.testing.assert_allclose(apply_fn(variables, x), model(x, training=False), rtol=1e-5)
    quantized = dfq_jax.quantize(model, input_shape=(2, 8, 8, 3), recipe="instant")
    assert [layer.name.rpartition("/")[2] for layer in quantized.graph.layers] == ["conv", "head"]
    assert quantized.graph.layers[0].batch_norm.endswith("norm")
    outputs = quantized(x)
    error = np.linalg.norm(outputs - model(x, training=False)) / np.linalg.norm(outputs)
    assert error < 0.05
    quantized.save(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(dfq_jax.load(tmp_path / "q.safetensors", model)(x), outputs)


def test_keras_refusals(keras):
    with pytest.raises(TypeError, match="Sequential has no variables yet"):
        as_function(keras.Sequential([keras.layers.Dense(3)]))
    inputs = [keras.Input((3,)), keras.Input((3,))]
    with pytest.raises(TypeError, match="has 2 inputs; build one"):
        as_function(keras.Model(inputs, keras.layers.add(inputs)))
    with pytest.raises(TypeError, match="expected None for the model's own, or a dict by path"):
        as_function(keras_network(keras), [1, 2])
    with pytest.raises(TypeError, match="apply_fn: expected a function"):
        trace(keras_network(keras), {}, (1, 8, 8, 3))


def test_haiku_functions(tmp_path):
    hk = pytest.importorskip("haiku", reason="needs Haiku")

    def network(x, is_training):
        x = hk.Conv2D(4, 3, with_bias=False)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
        return hk.Linear(5, with_bias=False)(x.mean((1, 2)))

    model = hk.transform_with_state(network)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params, state = model.init(jax.random.key(0), x, True)
    _, state = model.apply(params, state, None, x, True)
    expected = model.apply(params, state, None, x, False)[0]
    for own in (model, hk.without_apply_rng(model)):
        for given in ((params, state), {"params": params, "state": state}):
            apply_fn, variables = as_function(own, given)
            np.testing.assert_allclose(apply_fn(variables, x), expected, rtol=1e-6)
    quantized = dfq_jax.quantize(model, (params, state), input_shape=(1, 8, 8, 3), recipe=QUICK)
    assert len(quantized.graph.layers) == 2
    quantized.save(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(dfq_jax.load(tmp_path / "q.safetensors", model)(x), quantized(x))

    plain = hk.transform(lambda x: hk.Linear(5, with_bias=False)(x))
    params = plain.init(jax.random.key(0), jnp.zeros((1, 3)))
    for own in (plain, hk.without_apply_rng(plain)):
        apply_fn, variables = as_function(own, params)
        assert trace(apply_fn, variables, (1, 3)).layers[0].kernel == "linear/w"
    with pytest.raises(TypeError, match=r"a Haiku function needs its \(params, state\)"):
        as_function(model)
    with pytest.raises(TypeError, match=r"expected \(params, state\) of hk.transform_with_state"):
        as_function(model, params)
    masked = hk.transform(lambda x, mask: hk.Linear(5)(x) * mask)
    with pytest.raises(TypeError, match=r"needs the argument 'mask'.*model.apply\(params, None, x, mask="):
        as_function(masked, params)
    with pytest.raises(TypeError, match=r"needs the argument 'mask'.*model.apply\(params, x, mask="):
        as_function(hk.without_apply_rng(masked), params)


def test_equinox_modules():
    eqx = pytest.importorskip("equinox", reason="needs Equinox")

    class Stateless(eqx.Module):
        first: eqx.nn.Linear
        dropout: eqx.nn.Dropout
        second: eqx.nn.Linear

        def __call__(self, x, *, key=None):
            return self.second(self.dropout(jax.nn.relu(self.first(x)), key=key))

    keys = jax.random.split(jax.random.key(0), 2)
    model = Stateless(eqx.nn.Linear(3, 8, key=keys[0]), eqx.nn.Dropout(), eqx.nn.Linear(8, 5, key=keys[1]))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    expected = jax.vmap(eqx.nn.inference_mode(model))(x)
    for given in (None, model):
        apply_fn, variables = as_function(model, given)
        np.testing.assert_allclose(apply_fn(variables, x), expected, rtol=1e-6)
    assert not model.dropout.inference
    graph = trace(apply_fn, variables, (4, 3))
    assert [layer.kernel for layer in graph.layers] == ["model/first/weight", "model/second/weight"]

    class Stateful(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    build = eqx.nn.make_with_state(
        lambda: Stateful(eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.BatchNorm(4, "n", mode="ema"))
    )
    model, state = build()
    apply_fn, variables = as_function(model, state)
    served = eqx.nn.inference_mode(model)
    expected = jax.vmap(lambda x: served(x, state)[0])(x)
    np.testing.assert_allclose(apply_fn(variables, x), expected, rtol=1e-6)
    with pytest.raises(TypeError, match="Stateful has a state; pass it"):
        as_function(model)

    class Keyed(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x, key):
            return self.linear(x)

    with pytest.raises(
        TypeError, match=r"Keyed.__call__ needs the argument 'key'.*jax.vmap\(.*\(x, key=\.\.\.\)\)\(x\)"
    ):
        as_function(Keyed(eqx.nn.Linear(3, 4, key=keys[0])))


# --- what a function keeps alive ---


def freed(make):
    """Whether the arrays of a network are freed once the network is deleted and its graph lives on."""
    graph, references = make()
    gc.collect()
    assert len(graph.at((3, *graph.input.shape[1:])).layers) == len(graph.layers)  # it still traces
    gc.collect()
    return [reference() is None for reference in references]


def quantized_and_deleted(model, variables=None):
    quantized = dfq_jax.quantize(model, variables, input_shape=(1, 8, 8, 3), recipe="instant")
    quantized(jnp.ones((2, 8, 8, 3)))
    jax.jit(lambda graph, x: graph.logits(x), static_argnums=0)(quantized.graph, jnp.ones((1, 2)))
    arrays = [leaf for leaf in jax.tree.leaves((as_function(model, variables)[1], quantized.variables)) if leaf.ndim]
    return quantized.graph, [weakref.ref(array) for array in arrays if isinstance(array, jax.Array)]


class SmallNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.conv(x))).mean(axis=(1, 2)))


@pytest.mark.filterwarnings("ignore:the statistics of:dfq_jax.GraphWarning")
def test_graphs_of_nnx_modules_keep_no_weights():
    assert all(freed(lambda: quantized_and_deleted(SmallNNX(nnx.Rngs(0)))))


def test_graphs_of_linen_modules_keep_no_weights():
    def make():
        case = model_grid.cifar_resnet8()
        variables = jax.tree.map(jnp.array, case.variables)
        graph = trace(*as_function(case.model.bind(variables)), (1, 8, 8, 3))
        return graph, [weakref.ref(leaf) for leaf in jax.tree.leaves(variables)]

    assert all(freed(make))


def test_graphs_of_equinox_modules_keep_no_weights():
    eqx = pytest.importorskip("equinox", reason="needs Equinox")

    def make():
        model = eqx.nn.MLP(3, 4, 8, 1, key=jax.random.key(0))
        graph = trace(*as_function(model), (1, 3))
        return graph, [weakref.ref(leaf) for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]

    assert all(freed(make))


# --- failures of tracing ---


class Plain:
    def __init__(self, logits):
        self.logits = logits


def branch(v, x):
    return x @ v["w"] if x.sum() > 0 else x


def wrong_axis(v, x):
    return x @ v["w"].T


def looks_for_params(v, x):
    return x @ v["params"]["w"]


def needs_mask(v, x, mask):
    return x @ v["w"] * mask


def divides(v, x):
    return x @ v["w"] / (1 // 0)


FAILURES = {
    "output": (
        lambda v, x: Plain(x @ v["w"]),
        r"returns a Plain, which is neither an array nor.*register_dataclass\(Plain\)",
    ),
    "inner output": (lambda v, x: {"a": [x @ v["w"], "name"]}, r"returns a str at \['a'\]\[1\], which is neither"),
    "branch": (branch, r"at .*test_adapters.py:\d+, in branch: return x @ .*jnp.where"),
    "shapes": (wrong_axis, r"at .*test_adapters.py:\d+, in wrong_axis: return x @ .*do not fit: the input"),
    "variables": (looks_for_params, r"KeyError: 'params' \(at .*in looks_for_params: .*The variables lack"),
    "arguments": (needs_mask, r"needs_mask\(\) needs the argument 'mask' besides its input"),
    "anything": (divides, r"ZeroDivisionError: .*in divides: .*\. Does apply_fn\(variables, x\) run by itself"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_was_raised_where(name):
    function, message = FAILURES[name]
    with pytest.raises(GraphError, match=message) as caught:
        trace(function, {"w": jnp.ones((3, 4))}, (2, 3))
    assert "heck the input shape" not in str(caught.value)


def test_training_mode_is_told_with_the_table():
    class Training(nn.Module):
        @nn.compact
        def __call__(self, x, phase="fit"):
            return nn.BatchNorm(use_running_average=phase != "fit")(nn.Dense(2)(x))

    module = Training()
    with pytest.raises(GraphError, match=r"updates its state while it runs.*is_training=False.*deterministic=True"):
        trace(*as_function(module, module.init(jax.random.key(0), jnp.zeros((1, 3)))), (1, 3))


@pytest.mark.filterwarnings("ignore:the statistics of:dfq_jax.GraphWarning")
def test_load_fills_in_inference_arguments(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, is_train, *, deterministic):
            x = nn.BatchNorm(use_running_average=not is_train)(nn.Conv(4, (3, 3))(x))
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(5)(nn.relu(x).mean((1, 2))))

    module, x = Net(), jnp.ones((2, 8, 8, 3))
    variables = module.init(jax.random.key(0), x, False, deterministic=True)
    quantized = dfq_jax.quantize(module, variables, input_shape=(1, 8, 8, 3), recipe=QUICK)
    quantized.save(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(dfq_jax.load(tmp_path / "q.safetensors", module)(x), quantized(x))
