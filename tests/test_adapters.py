"""Linen modules, NNX modules and functions as one pure inference function."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import nnx

from dfq_jax.adapters import as_function, inference_arguments, is_module
from dfq_jax.graph import trace


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
    expected = case.model.apply(case.variables, x)
    np.testing.assert_allclose(apply_fn(variables, x), expected, rtol=1e-6)
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
