"""Small networks of many layouts, for tests that must hold on any architecture.

`GRID` lists the builders; each returns a `Case` with random positive BatchNorm statistics, because a fresh
network (zero means, unit variances, zero scales at the end of residual blocks) hides most mistakes.

    from model_grid import GRID, Case

    @pytest.mark.parametrize("build", GRID)
    def test_something(build):
        case = build()
        graph = dfq_jax.trace(*case.function(), case.input_shape)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from dfq_jax.graph.adapters import as_function
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.quantizers.trees import path_string
from dfq_jax.zoo.cifar_resnet import CifarResNet


class Case(NamedTuple):
    """A network, its variables, and the shape of its input."""

    name: str
    model: Any
    variables: Any
    input_shape: tuple[int, ...]

    def function(self) -> tuple[Callable[[Any, jax.Array], Any], Any]:
        """`apply_fn` and variables."""
        return as_function(self.model, self.variables)

    def images(self, seed: int = 0) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).normal(size=self.input_shape), jnp.float32)


def network_of(case: Any, count: int = 8) -> tuple[Graph, Any, jax.Array]:
    """The graph of one example, the variables, and so many images, of a network here or a random one."""
    model = case.apply_fn if hasattr(case, "apply_fn") else case.model
    apply_fn, variables = as_function(model, case.variables)
    shape = case.input_shape[1:]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, *shape)), jnp.float32)
    return trace(apply_fn, variables, (1, *shape)), variables, images


# --- random variables ---


def random_leaf(path: str, shape: Sequence[int], dtype: Any, rng: np.random.Generator) -> jax.Array:
    """A plausible value for a leaf, by the last word of its path: statistics and scales positive and spread."""
    word = path.removesuffix("/value").split("/")[-1]
    if word in ("var", "running_var", "variance"):
        value = rng.uniform(0.5, 2.0, shape)
    elif word in ("scale", "gamma"):
        value = rng.uniform(0.5, 1.5, shape)
    elif word in ("mean", "running_mean", "bias", "beta"):
        value = rng.normal(0.0, 0.3, shape)
    else:  # kernels: keep the size of activations
        value = rng.normal(0.0, math.sqrt(2.0 / max(math.prod(shape[:-1]), 1)), shape)
    return jnp.asarray(value, dtype)


def randomize(tree: Any, seed: int = 0) -> Any:
    """A tree of arrays or of shapes with `random_leaf` values."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_leaf(path_string(path), leaf.shape, leaf.dtype, rng), tree
    )


def linen_case(name: str, module: nn.Module, input_shape: tuple[int, ...], **arguments: Any) -> Case:
    """A case from a Linen module; initialization is evaluated for shapes only, which takes milliseconds."""
    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    init = functools.partial(module.init, **arguments)
    return Case(name, module, randomize(jax.eval_shape(init, jax.random.key(0), x)), input_shape)


def function_case(name: str, function: Callable[..., Any], shapes: Any, input_shape: tuple[int, ...]) -> Case:
    """A case from a function and a tree of leaf shapes (tuples)."""

    def spec(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    specs = jax.tree.map(spec, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return Case(name, function, randomize(specs), input_shape)


# --- ImageNet ResNets in Linen, named as Flax's example names them ---


class ResNetBlock(nn.Module):
    features: int
    strides: tuple[int, int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.features, (3, 3))(y)
        y = self.norm()(y)
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class BottleneckResNetBlock(nn.Module):
    features: int
    strides: tuple[int, int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        y = self.norm()(self.conv(self.features * 4, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(self.features * 4, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    stages: Sequence[int]
    block: Any
    features: int = 4
    classes: int = 5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):  # training by default, as in Flax's example
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-5, dtype=self.dtype)
        x = conv(self.features, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, size in enumerate(self.stages):
            for j in range(size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = self.block(self.features * 2**i, strides, conv, norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        return jnp.asarray(nn.Dense(self.classes, dtype=self.dtype)(x), self.dtype)


def resnet18():
    return linen_case("resnet18", ResNet((2, 2, 2, 2), ResNetBlock), (2, 32, 32, 3))


def resnet50():
    return linen_case("resnet50", ResNet((3, 4, 6, 3), BottleneckResNetBlock, features=2), (2, 32, 32, 3))


def bfloat16():
    return linen_case("bfloat16", ResNet((1, 1), ResNetBlock, dtype=jnp.bfloat16), (2, 16, 16, 3))


def odd_sizes():
    return linen_case("odd_sizes", ResNet((1, 1), BottleneckResNetBlock), (3, 13, 9, 3))


def frozen_dict():
    case = linen_case("frozen_dict", ResNet((1,), ResNetBlock), (2, 16, 16, 3))
    return case._replace(variables=freeze(case.variables))


def cifar_resnet8():
    return linen_case("cifar_resnet8", CifarResNet(depth=8), (2, 16, 16, 3))


# --- NNX ---


class NNXBlock(nnx.Module):
    def __init__(self, cin: int, cout: int, strides: int, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(cin, cout, (3, 3), strides=strides)
        self.bn1 = nnx.BatchNorm(cout, rngs=rngs)
        self.conv2 = conv(cout, cout, (3, 3))
        self.bn2 = nnx.BatchNorm(cout, rngs=rngs)
        self.project = strides > 1
        if self.project:
            self.proj = conv(cin, cout, (1, 1), strides=strides)
            self.bn_proj = nnx.BatchNorm(cout, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = self.bn_proj(self.proj(x)) if self.project else x
        return nnx.relu(y + shortcut)


class NNXResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.block1 = NNXBlock(4, 4, 1, rngs)
        self.block2 = NNXBlock(4, 8, 2, rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        x = self.block2(self.block1(x))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


def nnx_resnet():
    model = nnx.eval_shape(lambda: NNXResNet(nnx.Rngs(0)))
    graphdef, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    # The dropout's random state is no parameter: it stays what a fresh module has.
    fresh = jax.tree.map(lambda leaf: jax.random.key(0) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                         else jnp.zeros(leaf.shape, leaf.dtype), rest)  # fmt: skip
    model = nnx.merge(graphdef, randomize(params), randomize(statistics, 1), fresh)
    return Case("nnx_resnet", model, None, (2, 16, 16, 3))


# --- other convolutional layouts in Linen ---


def bn(train: bool, **arguments: Any) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, **arguments)


class InvertedResidual(nn.Module):
    features: int
    strides: int
    expand: int

    @nn.compact
    def __call__(self, x, train):
        width = x.shape[-1] * self.expand
        conv = functools.partial(nn.Conv, use_bias=False)
        y = x
        if self.expand > 1:
            y = nn.relu6(bn(train, name="bn_expand")(conv(width, (1, 1), name="expand")(y)))
        y = conv(width, (3, 3), self.strides, feature_group_count=width, name="depthwise")(y)
        y = nn.relu6(bn(train, name="bn_depthwise")(y))
        y = bn(train, name="bn_project")(conv(self.features, (1, 1), name="project")(y))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu6(bn(train, name="bn_stem")(nn.Conv(4, (3, 3), 2, use_bias=False, name="stem")(x)))
        x = InvertedResidual(4, 1, 1, name="block0")(x, train)
        x = InvertedResidual(6, 2, 3, name="block1")(x, train)
        x = InvertedResidual(6, 1, 3, name="block2")(x, train)
        x = nn.relu6(bn(train, name="bn_head")(nn.Conv(12, (1, 1), use_bias=False, name="head")(x)))
        return nn.Dense(5, name="classifier")(jnp.mean(x, axis=(1, 2)))


def mobilenet_v2():
    return linen_case("mobilenet_v2", MobileNetV2(), (2, 16, 16, 3))


class SqueezeExcite(nn.Module):
    activation: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = self.activation(nn.Conv(2, (1, 1), name="reduce")(s))
        return x * self.gate(nn.Conv(x.shape[-1], (1, 1), name="expand")(s))


class EfficientNet(nn.Module):
    """MBConv blocks with squeeze-and-excitation: swish of B0, or hard swish of MobileNetV3."""

    activation: Callable[[jax.Array], jax.Array] = nn.swish
    inner: Callable[[jax.Array], jax.Array] = nn.swish
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid

    @nn.compact
    def __call__(self, x, training: bool = False):
        norm = functools.partial(bn, training, epsilon=1e-3)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = self.activation(norm(name="bn_stem")(conv(4, (3, 3), 2, name="stem")(x)))
        for i in range(2):
            y = self.activation(norm(name=f"bn_expand{i}")(conv(8, (1, 1), name=f"expand{i}")(x)))
            y = conv(8, (3, 3), feature_group_count=8, name=f"depthwise{i}")(y)
            y = self.activation(norm(name=f"bn_depthwise{i}")(y))
            y = SqueezeExcite(self.inner, self.gate, name=f"se{i}")(y)
            x = x + norm(name=f"bn_project{i}")(conv(4, (1, 1), name=f"project{i}")(y))
        x = self.activation(norm(name="bn_head")(conv(12, (1, 1), name="head")(x)))
        return nn.Dense(5, name="classifier")(jnp.mean(x, axis=(1, 2)))


def efficientnet():
    return linen_case("efficientnet", EfficientNet(), (2, 16, 16, 3))


def mobilenet_v3():
    model = EfficientNet(nn.hard_swish, nn.relu, nn.hard_sigmoid)
    return linen_case("mobilenet_v3", model, (2, 16, 16, 3))


class PreActivationResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        for i, (features, strides) in enumerate([(4, 1), (8, 2), (8, 1)]):
            y = nn.relu(bn(train, name=f"bn1_{i}")(x))
            if strides > 1:
                x = nn.Conv(features, (1, 1), strides, use_bias=False, name=f"proj_{i}")(y)
            y = nn.Conv(features, (3, 3), strides, use_bias=False, name=f"conv1_{i}")(y)
            y = nn.relu(bn(train, name=f"bn2_{i}")(y))
            x = x + nn.Conv(features, (3, 3), use_bias=False, name=f"conv2_{i}")(y)
        x = nn.relu(bn(train, name="bn_last")(x))
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def pre_activation_resnet():
    return linen_case("pre_activation_resnet", PreActivationResNet(), (2, 16, 16, 3))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        for block in range(2):
            for i in range(2):
                y = nn.relu(bn(train, name=f"bn1_{block}_{i}")(x))
                y = nn.Conv(6, (1, 1), use_bias=False, name=f"bottleneck_{block}_{i}")(y)
                y = nn.relu(bn(train, name=f"bn2_{block}_{i}")(y))
                y = nn.Conv(3, (3, 3), use_bias=False, name=f"grow_{block}_{i}")(y)
                x = jnp.concatenate([x, y], axis=-1)
            x = nn.relu(bn(train, name=f"bn_transition_{block}")(x))
            if block == 0:
                x = nn.avg_pool(nn.Conv(5, (1, 1), use_bias=False, name="transition")(x), (2, 2), (2, 2))
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def densenet():
    return linen_case("densenet", DenseNet(), (2, 8, 8, 3))


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        for i, features in enumerate((4, 6)):
            x = nn.relu(bn(train, name=f"bn{i}")(nn.Conv(features, (3, 3), name=f"conv{i}")(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(bn(train, name="bn_fc")(nn.Dense(8, name="fc")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5, name="head")(x)


def vgg():
    return linen_case("vgg", VGG(), (2, 8, 8, 3))


class Inception(nn.Module):
    """Parallel branches that are concatenated: layers share one input tensor, and nothing is cut inside."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        def unit(x, features, size, name):
            x = nn.Conv(features, (size, size), use_bias=False, name=name)(x)
            return nn.relu(bn(train, use_scale=False, epsilon=1e-3, name=f"bn_{name}")(x))

        x = unit(x, 4, 3, "stem")
        pooled = nn.avg_pool(x, (3, 3), (1, 1), padding="SAME")
        branches = [
            unit(x, 3, 1, "branch1"),
            unit(unit(x, 2, 1, "branch3_reduce"), 4, 3, "branch3"),
            unit(pooled, 3, 1, "branch_pool"),
        ]
        return nn.Dense(5, name="head")(jnp.concatenate(branches, axis=-1).mean(axis=(1, 2)))


def inception():
    return linen_case("inception", Inception(), (2, 8, 8, 3))


class ConvBiasBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.leaky_relu(bn(train, name="bn1")(nn.Conv(4, (3, 3), name="conv1")(x)))
        x = nn.elu(bn(train, use_bias=False, name="bn2")(nn.Conv(4, (3, 3), 2, name="conv2")(x)))
        x = bn(train, use_scale=False, use_bias=False, name="bn3")(nn.Conv(4, (3, 3), name="conv3")(x))
        x = nn.gelu(x)
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def conv_bias_bn():
    return linen_case("conv_bias_bn", ConvBiasBatchNorm(), (2, 8, 8, 3))


class NoBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (5, 5), name="conv1")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(6, (5, 5), name="conv2")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, name="fc2")(x)


def no_batch_norm():
    return linen_case("no_batch_norm", NoBatchNorm(), (2, 8, 8, 1))


class AutoEncoder(nn.Module):
    """Transposed convolutions; the output is an image."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(bn(train, name="bn_down")(nn.Conv(4, (3, 3), 2, use_bias=False, name="down")(x)))
        x = nn.ConvTranspose(5, (3, 3), (2, 2), use_bias=False, name="up")(x)
        x = nn.relu(bn(train, name="bn_up")(x))
        return nn.ConvTranspose(3, (3, 3), transpose_kernel=True, name="out")(x)


def transposed_conv():
    return linen_case("transposed_conv", AutoEncoder(), (2, 8, 8, 3))


class DilatedGrouped(nn.Module):
    dimensions: int = 2

    @nn.compact
    def __call__(self, x, train: bool = False):
        size = (3,) * self.dimensions
        x = nn.relu(bn(train, name="bn1")(nn.Conv(4, size, use_bias=False, name="plain")(x)))
        y = nn.Conv(4, size, kernel_dilation=2, use_bias=False, name="dilated")(x)
        x = x + nn.relu(bn(train, name="bn2")(y))
        x = nn.Conv(6, size, feature_group_count=2, strides=2, use_bias=False, name="grouped")(x)
        x = nn.relu(bn(train, name="bn3")(x))
        return nn.Dense(5, name="head")(x.mean(axis=tuple(range(1, x.ndim - 1))))


def dilated_grouped():
    return linen_case("dilated_grouped", DilatedGrouped(), (2, 8, 8, 3))


def conv_1d():
    return linen_case("conv_1d", DilatedGrouped(dimensions=1), (2, 12, 3))


def conv_3d():
    return linen_case("conv_3d", DilatedGrouped(dimensions=3), (2, 6, 6, 6, 2))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(2):
            x = nn.relu(bn(train, name=f"bn{i}")(nn.Dense(6, name=f"dense{i}")(x)))
        return nn.Dense(5, name="head")(x)


def mlp():
    return linen_case("mlp", MLP(), (4, 7))


class GeneralDense(nn.Module):
    """Matrix products with several contracted or several output axes."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.DenseGeneral((2, 3), name="split")(x)  # [N, T, 2, 3]
        x = nn.relu(x)
        x = nn.DenseGeneral(6, axis=(-2, -1), name="merge")(x)
        x = nn.relu(bn(train, name="bn")(x))
        return nn.Einsum((4, 6, 5), "ntc,tco->no", use_bias=False, name="einsum")(x)


def general_dense():
    return linen_case("general_dense", GeneralDense(), (2, 4, 3))


class SharedKernel(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(bn(train, name="bn0")(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)))
        conv = nn.Conv(4, (3, 3), use_bias=False, name="shared")
        x = nn.relu(bn(train, name="bn1")(conv(x)))
        x = nn.relu(bn(train, name="bn2")(conv(x)))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def shared_kernel():
    return linen_case("shared_kernel", SharedKernel(), (2, 8, 8, 3))


# --- outputs that are not one array ---


class WithFeatures(nn.Module):
    as_dict: bool

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(bn(train, name="bn1")(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)))
        features = nn.relu(bn(train, name="bn2")(nn.Conv(6, (3, 3), use_bias=False, name="conv2")(x)))
        pooled = features.mean(axis=(1, 2))
        logits = nn.Dense(5, name="head")(pooled)
        if self.as_dict:
            return {"embedding": pooled, "features": features, "logits": logits}
        return features, logits


def dict_outputs():
    return linen_case("dict_outputs", WithFeatures(as_dict=True), (2, 8, 8, 3))


def tuple_outputs():
    return linen_case("tuple_outputs", WithFeatures(as_dict=False), (2, 8, 8, 3))


# --- BatchNorms written by others ---


class FoldedBatchNorm(nn.Module):
    """One multiplication and one addition: x * inv + (bias - mean * inv)."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        gamma = self.param("gamma", nn.initializers.ones, shape)
        beta = self.param("beta", nn.initializers.zeros, shape)
        mean = self.variable("moving", "running_mean", jnp.zeros, shape).value
        var = self.variable("moving", "running_var", jnp.ones, shape).value
        inv = gamma * (var + 1e-3) ** -0.5
        return x * inv + (beta - mean * inv)


class DividingBatchNorm(nn.Module):
    """Division by the standard deviation, the scale applied after it."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        gamma = self.param("gamma", nn.initializers.ones, shape)
        beta = self.param("beta", nn.initializers.zeros, shape)
        mean = self.variable("moving", "running_mean", jnp.zeros, shape).value
        var = self.variable("moving", "running_var", jnp.ones, shape).value
        normalized = (x - mean) / jnp.sqrt(var + 2e-5)
        return beta + gamma * normalized


class PrivateBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(FoldedBatchNorm(name="norm1")(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)))
        y = DividingBatchNorm(name="norm2")(nn.Conv(4, (3, 3), name="conv2")(x))
        x = nn.relu(x + y)
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def private_batch_norm():
    return linen_case("private_batch_norm", PrivateBatchNorm(), (2, 8, 8, 3))


# --- transformations around a block ---


class PlainBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(bn(train, name="bn1")(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)))
        return nn.relu(x + bn(train, name="bn2")(nn.Conv(4, (3, 3), use_bias=False, name="conv2")(y)))


class RematNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        block = nn.remat(PlainBlock, static_argnums=(2,))
        x = nn.relu(bn(train, name="bn")(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)))
        for i in range(2):
            x = block(name=f"block{i}")(x, train)
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def remat():
    return linen_case("remat", RematNet(), (2, 8, 8, 3))


def _conv2d(x, kernel, strides=1, padding="SAME", layout=("NHWC", "HWIO", "NHWC")):
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=layout)


@jax.custom_vjp
def _scaled_gradient_unit(kernel, scale, bias, mean, var, x):
    y = _conv2d(x, kernel)
    return jax.nn.relu((y - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias)


def _forward(*args):
    return jax.vjp(_scaled_gradient_unit.__wrapped__, *args)


def _backward(residuals, gradient):
    return residuals(gradient)


_scaled_gradient_unit.defvjp(_forward, _backward)


def custom_vjp():
    def unit(p, x):
        return _scaled_gradient_unit(p["kernel"], p["scale"], p["bias"], p["mean"], p["var"], x)

    def apply_fn(variables, x):
        x = unit(variables["unit2"], unit(variables["unit1"], x))
        return x.mean(axis=(1, 2)) @ variables["head"]["kernel"] + variables["head"]["bias"]

    def norm(kernel):
        return {"kernel": kernel, **{k: kernel[-1:] for k in ("scale", "bias", "mean", "var")}}

    shapes = {
        "unit1": norm((3, 3, 3, 4)),
        "unit2": norm((3, 3, 4, 4)),
        "head": {"kernel": (4, 5), "bias": (5,)},
    }
    return function_case("custom_vjp", apply_fn, shapes, (2, 8, 8, 3))


# --- plain functions ---


def plain_function():
    def apply_fn(v, x):
        x = _conv2d(x, v["w1"]["kernel"])
        x = (x - v["n1"]["mean"]) / jnp.sqrt(v["n1"]["var"] + 1e-5) * v["n1"]["scale"] + v["n1"]["bias"]
        x = jnp.maximum(x, 0)
        x = jnp.einsum("nhwc,dc->nhwd", x, v["w2"]["kernel"])  # kernel stored transposed
        return x.mean((1, 2)) @ v["w3"]["kernel"].T

    norm = {k: (4,) for k in ("scale", "bias", "mean", "var")}
    shapes = {"w1": {"kernel": (3, 3, 3, 4)}, "n1": norm, "w2": {"kernel": (6, 4)}, "w3": {"kernel": (5, 6)}}
    return function_case("plain_function", apply_fn, shapes, (2, 8, 8, 3))


def channels_first():
    """NCHW activations and OIHW kernels, as in networks converted from PyTorch; as many channels as rows."""

    names = ("running_mean", "running_var", "scale", "bias")

    def norm(p, x):
        mean, var, scale, bias = (p[k][:, None, None] for k in names)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias

    layout = ("NCHW", "OIHW", "NCHW")

    def apply_fn(v, x):
        x = jax.nn.relu(norm(v["bn1"], _conv2d(x, v["conv1"]["weight"], layout=layout)))
        x = jax.nn.relu(x + norm(v["bn2"], _conv2d(x, v["conv2"]["weight"], layout=layout)))
        return x.mean((2, 3)) @ v["fc"]["weight"].T + v["fc"]["bias"]

    statistics = {k: (8,) for k in names}
    shapes = {
        "conv1": {"weight": (8, 3, 3, 3)},
        "bn1": statistics,
        "conv2": {"weight": (8, 8, 3, 3)},
        "bn2": statistics,
        "fc": {"weight": (5, 8), "bias": (5,)},
    }
    return function_case("channels_first", apply_fn, shapes, (2, 3, 8, 8))


# --- what is not quantized, and must not be mistaken for something else ---


class StandardizedConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        return _conv2d(x, (kernel - mean) * jax.lax.rsqrt(var + 1e-5))


class WeightStandardized(nn.Module):
    """Big Transfer's layout: standardized kernels and GroupNorm."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2, name="gn1")(nn.Conv(4, (3, 3), name="stem")(x)))
        x = x + nn.relu(nn.GroupNorm(2, name="gn2")(StandardizedConv(4, name="standardized")(x)))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def weight_standardized():
    return linen_case("weight_standardized", WeightStandardized(), (2, 8, 8, 3))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="patches")(x).reshape(x.shape[0], -1, 8)
        y = nn.LayerNorm(name="ln1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=deterministic, name="attention")(y)
        y = nn.LayerNorm(name="ln2")(x)
        x = x + nn.Dense(8, name="fc2")(nn.gelu(nn.Dense(12, name="fc1")(y)))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="ln")(x).mean(axis=1))


def transformer():
    return linen_case("transformer", Transformer(), (2, 8, 8, 3), deterministic=True)


class ConvNeXt(nn.Module):
    """Depthwise 7x7, LayerNorm, exact GELU, and a learned scale of the residual branch, in two stages."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm_stem")(nn.Conv(6, (4, 4), (4, 4), name="stem")(x))
        for i, width in enumerate((6, 8)):
            if i:
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID", name="down")(nn.LayerNorm(name="norm_down")(x))
            y = nn.Conv(width, (7, 7), feature_group_count=width, name=f"depthwise{i}")(x)
            y = nn.Dense(2 * width, name=f"expand{i}")(nn.LayerNorm(name=f"norm{i}")(y))
            y = nn.Dense(width, name=f"project{i}")(nn.gelu(y, approximate=False))
            x = x + y * self.param(f"gamma{i}", nn.initializers.ones, (width,))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x.mean(axis=(1, 2))))


def convnext():
    return linen_case("convnext", ConvNeXt(), (2, 16, 16, 3))


class ViT(nn.Module):
    """ViT-Ti's form: patches, a class token, positions, pre-norm blocks of attention and GELU, the token's class."""

    width: int = 8
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        x = nn.Conv(self.width, (4, 4), (4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.normal(), (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], self.width))
        x = nn.Dropout(0.1, deterministic=deterministic)(x)
        for i in range(self.depth):
            y = nn.LayerNorm(name=f"norm{i}a")(x)
            y = nn.MultiHeadDotProductAttention(self.heads, deterministic=deterministic, name=f"attention{i}")(y)
            x = x + y
            y = nn.Dense(2 * self.width, name=f"expand{i}")(nn.LayerNorm(name=f"norm{i}b")(x))
            x = x + nn.Dense(self.width, name=f"project{i}")(nn.gelu(y, approximate=i > 0))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def vit():
    return linen_case("vit", ViT(), (2, 8, 8, 3), deterministic=True)


class UNet(nn.Module):
    """Down by max pooling, up by transposed convolutions, each level joined to what went down; scores of pixels."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        def unit(x, features, name):
            for i in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False, name=f"{name}{i}")(x)
                x = nn.relu(bn(train, name=f"bn_{name}{i}")(x))
            return x

        skips = []
        for i, features in enumerate((4, 6)):
            x = unit(x, features, f"down{i}_")
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = unit(x, 8, "bottom")
        for i, features in ((1, 6), (0, 4)):
            x = nn.ConvTranspose(features, (2, 2), (2, 2), name=f"up{i}")(x)
            x = unit(jnp.concatenate([skips[i], x], axis=-1), features, f"merge{i}_")
        return nn.Conv(3, (1, 1), name="head")(x)


def unet():
    return linen_case("unet", UNet(), (2, 8, 8, 3))


class AudioNet(nn.Module):
    """A wide strided stem on the waveform, residual units of growing dilation (causal or not), pooling over time."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (9,), (4,), use_bias=False, name="stem")(x)
        x = nn.max_pool(nn.relu(bn(train, name="bn_stem")(x)), (2,), (2,), padding="SAME")
        for i, padding in enumerate(("SAME", "CAUSAL", "CAUSAL")):
            y = nn.Conv(4, (3,), kernel_dilation=2**i, padding=padding, use_bias=False, name=f"dilated{i}")(x)
            y = nn.relu(bn(train, name=f"bn{i}a")(y))
            x = nn.relu(x + bn(train, name=f"bn{i}b")(nn.Conv(4, (1,), use_bias=False, name=f"mix{i}")(y)))
        x = nn.avg_pool(nn.Conv(6, (3,), feature_group_count=2, name="grouped")(x), (3,), (2,), padding="SAME")
        x = jnp.concatenate([x.mean(axis=1), x.max(axis=1)], axis=-1)
        return nn.Dense(5, name="head")(x)


def audio():
    return linen_case("audio", AudioNet(), (2, 96, 1))


class VideoNet(nn.Module):
    """Residual units of full, and of spatial then temporal, 3-D convolutions with pooling over space and time."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        def unit(x, features, size, name, strides=1):
            x = nn.Conv(features, size, strides, use_bias=False, name=name)(x)
            return bn(train, name=f"bn_{name}")(x)

        x = nn.relu(unit(x, 4, (3, 5, 5), "stem", (1, 2, 2)))
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding="SAME")
        x = nn.relu(x + unit(nn.relu(unit(x, 4, (1, 3, 3), "spatial")), 4, (3, 1, 1), "temporal"))
        x = nn.relu(unit(x, 6, (3, 3, 3), "down", 2) + unit(x, 6, (1, 1, 1), "project", 2))
        x = nn.avg_pool(x, (2, 1, 1), (2, 1, 1))
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2, 3)))


def video():
    return linen_case("video", VideoNet(), (2, 4, 12, 12, 3))


# --- layers in a scan: one leaf holds the kernels of all of them ---


class ScannedNetwork(nn.Module):
    """A stem, equal blocks and a head; the blocks in a scan, or written out under the names block0, block1, ..."""

    block: type[nn.Module]
    stem: nn.Module
    depth: int = 3
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        x = self.stem(x)
        if self.scan:
            axes = {"params": 0, "batch_stats": 0}
            blocks = nn.scan(self.block, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
            x, _ = blocks(name="block")(x, None)
        else:
            for i in range(self.depth):
                x, _ = self.block(name=f"block{i}")(x, None)
        return nn.Dense(5, name="head")(x.mean(axis=tuple(range(1, x.ndim - 1))))


class ConvBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(bn(False, name="bn")(nn.Conv(8, (3, 3), use_bias=False, name="conv")(x))), None


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="ln1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")(y)
        y = nn.Dense(12, name="fc1")(nn.LayerNorm(name="ln2")(x))
        return x + nn.Dense(8, name="fc2")(nn.gelu(y)), None


class PatchEmbedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x + self.param("positions", nn.initializers.normal(0.1), (1, *x.shape[1:]))


def scanned_resnet():
    model = ScannedNetwork(ConvBlock, nn.Conv(8, (3, 3), name="stem"))
    return linen_case("scanned_resnet", model, (2, 8, 8, 3))


def scanned_vit():
    return linen_case("scanned_vit", ScannedNetwork(TransformerBlock, PatchEmbedding(name="stem")), (2, 8, 8, 3))


BUILDERS = (
    resnet18, resnet50, nnx_resnet, cifar_resnet8, mobilenet_v2, mobilenet_v3, efficientnet,
    pre_activation_resnet, densenet, vgg, inception, conv_bias_bn, no_batch_norm, transposed_conv,
    dilated_grouped, conv_1d, conv_3d, mlp, general_dense, shared_kernel, dict_outputs, tuple_outputs,
    private_batch_norm, remat, custom_vjp, bfloat16, odd_sizes, frozen_dict, plain_function, channels_first,
    weight_standardized, transformer, convnext, vit, unet, audio, video, scanned_resnet, scanned_vit,
)  # fmt: skip
GRID = [pytest.param(functools.cache(build), id=build.__name__) for build in BUILDERS]
LARGE = ("resnet18", "resnet50", "odd_sizes", "efficientnet")  # much like others, and slow to compile


def every_third(turn: int) -> list[Any]:
    """The grid for a test that compiles each network: a third of it, and the rest under `slow`.

    Tests take turns (0, 1, 2), so that each network but the large ones is compiled by a fast one. Neighbors in
    `BUILDERS` are alike, so that each third holds about all kinds.
    """
    fast = [param.id for param in GRID if param.id not in LARGE][turn::3]
    return [pytest.param(*p.values, id=p.id, marks=[] if p.id in fast else [pytest.mark.slow]) for p in GRID]


@functools.cache
def traced(build: Callable[[], Case]) -> Graph:
    """The graph of a network of `GRID`, traced once for all tests of a process."""
    case = build()
    return trace(*case.function(), case.input_shape)
