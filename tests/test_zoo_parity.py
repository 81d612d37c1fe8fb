"""The zoo's networks against PyTorch, the names of checkpoints, and what tracing finds in each network."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_execute import assert_same_outputs

import dfq_jax
from dfq_jax import zoo
from dfq_jax.graph import apply_quantized
from dfq_jax.graph.adapters import as_function
from dfq_jax.zoo.checkpoint import flatten_names, load_checkpoint
from dfq_jax.zoo.cifar_resnet import CifarResNet
from dfq_jax.zoo.densenet import DenseNet
from dfq_jax.zoo.entry import abstract_model
from dfq_jax.zoo.inception_v3 import InceptionV3
from dfq_jax.zoo.layers import adaptive_average_pool, channel_shuffle
from dfq_jax.zoo.mobilenet_v1 import MobileNetV1
from dfq_jax.zoo.mobilenet_v2 import MobileNetV2
from dfq_jax.zoo.regnet import VARIANTS, RegNetX
from dfq_jax.zoo.resnet import ResNet
from dfq_jax.zoo.resnet_nnx import ResNet as NNXResNet
from dfq_jax.zoo.shufflenet import ShuffleNetV1, ShuffleNetV2
from dfq_jax.zoo.squeezenext import SqueezeNext
from dfq_jax.zoo.vgg import VGG16

slow = pytest.mark.slow


def template(module, side):
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def settle(torch, network, side, seed=0):
    """Random BatchNorm parameters, and statistics near the network's own, so that every bias matters in the logits."""
    torch.manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 3, side, side))
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.7 + 0.6 * torch.rand_like(norm.running_var)
            norm.running_var += 1e-3
    return network.eval()


def check_parity(torch, path, network, modules, sides):
    """The logits of `network` are those of each module with its weights, at each image size."""
    torch.save(network.state_dict(), path)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(2, side, side, 3)).astype(np.float32) for side in sides]
    with torch.no_grad():
        expected = [network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy() for x in images]
    for module in modules:
        function, variables = as_function(module, load_checkpoint(path, variables_of(module, sides[0])))
        for x, logits in zip(images, expected, strict=True):
            found = np.asarray(jax.jit(function)(variables, x))
            np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


def variables_of(module, side):
    return nnx.to_pure_dict(nnx.state(module)) if isinstance(module, nnx.Module) else template(module, side)


def nnx_resnet(depth):
    return nnx.eval_shape(lambda: NNXResNet(depth, rngs=nnx.Rngs(0)))


# Module of pytorchcv.models and function in it, our network, image sizes.
PYTORCHCV = [
    pytest.param("resnet_cifar:resnet20_cifar10", lambda: CifarResNet(20, shortcut="projection"), (32, 48)),
    pytest.param("mobilenet:mobilenet_wd4", lambda: MobileNetV1(width=0.25), (64,)),
    pytest.param("mobilenet:mobilenet_w1", MobileNetV1, (64, 96), marks=slow),
    pytest.param("resnet:resnet18", lambda: ResNet(18), (64, 96), marks=slow),
    pytest.param("resnet:resnet50", lambda: ResNet(50, stride_on_1x1=True), (64, 96), marks=slow),
    pytest.param("resnet:resnet50b", lambda: ResNet(50), (64, 96), marks=slow),
    pytest.param(
        "mobilenetv2:mobilenetv2_w1",
        lambda: MobileNetV2(first_expansion=True, classifier_bias=False),
        (64, 96),
        marks=slow,
    ),
    pytest.param("mobilenetv2:mobilenetv2b_w1", lambda: MobileNetV2(classifier_bias=False), (64, 96), marks=slow),
    pytest.param("regnet:regnetx006", lambda: RegNetX("600MF"), (64, 96), marks=slow),
    pytest.param("regnet:regnetx032", lambda: RegNetX("3.2GF"), (64, 96), marks=slow),
    pytest.param("vgg:bn_vgg16", lambda: VGG16(conv_bias=False), (224,), marks=slow),
    pytest.param("densenet:densenet121", lambda: DenseNet(121), (64, 96), marks=slow),
    pytest.param("inceptionv3:inceptionv3", InceptionV3, (75, 107), marks=slow),
    pytest.param("shufflenet:shufflenet_g3_w1", ShuffleNetV1, (64, 96), marks=slow),
    pytest.param("shufflenet:shufflenet_g1_w1", lambda: ShuffleNetV1(groups=1), (64, 96), marks=slow),
    pytest.param("shufflenetv2:shufflenetv2_w1", lambda: ShuffleNetV2(pool_padding=(0, 1)), (64, 95), marks=slow),
    pytest.param("squeezenext:sqnxt23_w1", SqueezeNext, (64, 96), marks=slow),
]


@pytest.mark.parametrize(("reference", "build", "sides"), PYTORCHCV)
def test_parity_with_pytorchcv(reference, build, sides, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference networks are in torch")
    file, _, name = reference.partition(":")
    models = pytest.importorskip(f"pytorchcv.models.{file}", reason="pytorchcv has the reference networks")
    network = getattr(models, name)()
    if file != "vgg":  # pools of a fixed size allow one image size only
        network.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)
    check_parity(torch, tmp_path / "w.pth", settle(torch, network, sides[-1]), [build()], sides)


# A function of tests/torch_networks.py, our networks, image sizes.
TORCHVISION = [
    pytest.param("resnet", ((2, 2, 2, 2), False), lambda: [nnx_resnet(18)], (64,), id="resnet18_nnx"),
    pytest.param(
        "resnet", ((3, 4, 6, 3), True), lambda: [ResNet(50), nnx_resnet(50)], (64,), id="resnet50", marks=slow
    ),
    pytest.param("vgg16_bn", (), lambda: [VGG16()], (64, 224), marks=slow, id="vgg16_bn"),
    pytest.param("mobilenet_v2", (), lambda: [MobileNetV2()], (64,), id="mobilenet_v2"),
    pytest.param("densenet121", (), lambda: [DenseNet()], (64,), marks=slow, id="densenet121"),
    pytest.param("regnet_x", VARIANTS["400MF"], lambda: [RegNetX("400MF")], (64,), marks=slow, id="regnet_x"),
    pytest.param("shufflenet_v2", (), lambda: [ShuffleNetV2()], (64, 95), marks=slow, id="shufflenet_v2"),
]


@pytest.mark.parametrize(("name", "arguments", "build", "sides"), TORCHVISION)
def test_parity_with_torchvisions_names(name, arguments, build, sides, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference networks are in torch")
    network = getattr(importlib.import_module("torch_networks"), name)(*arguments)
    check_parity(torch, tmp_path / "w.pth", settle(torch, network, sides[-1]), build(), sides)


# --- names, without a network behind them ---


def state_dict(variables, modules):
    """A torch state dict of Flax variables.

    Args:
        variables: nested dictionaries of arrays.
        modules: module name in torch to path in Flax; a path with a trailing ':conv' is a dense layer that torch has as
            a convolution over 7x7 or 1x1 pixels.
    """
    leaves, state = flatten_names(variables), {}
    for name, path in modules.items():
        path, _, kind = path.partition(":")
        for leaf, word in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            array = leaves.pop(f"params/{path}/{leaf}", None)
            if array is None:
                continue
            if leaf == "kernel" and array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            elif leaf == "kernel":
                array = array.T
                if kind == "conv":
                    side = 7 if array.shape[1] == 512 * 7 * 7 else 1
                    array = array.reshape(len(array), -1, side, side)
            state[f"{name}.{word}"] = array
        for leaf, word in (("mean", "running_mean"), ("var", "running_var")):
            if f"batch_stats/{path}/{leaf}" in leaves:
                state[f"{name}.{word}"] = leaves.pop(f"batch_stats/{path}/{leaf}")
                state[f"{name}.num_batches_tracked"] = np.array(1)
    assert not leaves, f"left over: {list(leaves)[:3]}"
    return state


def pairs(conv, norm, path):
    return {conv: f"{path}/conv", norm: f"{path}/bn"}


def timm_mobilenet_v1():
    names = pairs("conv_stem", "bn1", "stem") | {"classifier": "classifier"}
    for stage, count in enumerate((1, 2, 2, 6, 2)):
        for block in range(count):
            name, path = f"blocks.{stage}.{block}", f"stage{stage + 1}_block{block + 1}"
            names |= pairs(f"{name}.conv_dw", f"{name}.bn1", f"{path}/depthwise")
            names |= pairs(f"{name}.conv_pw", f"{name}.bn2", f"{path}/pointwise")
    return names


def timm_mobilenet_v2():
    names = pairs("conv_stem", "bn1", "stem") | pairs("conv_head", "bn2", "head") | {"classifier": "classifier"}
    names |= pairs("blocks.0.0.conv_dw", "blocks.0.0.bn1", "stage1_block1/depthwise")
    names |= pairs("blocks.0.0.conv_pw", "blocks.0.0.bn2", "stage1_block1/project")
    for stage, count in enumerate((2, 3, 4, 3, 3, 1), start=1):
        for block in range(count):
            name, path = f"blocks.{stage}.{block}", f"stage{stage + 1}_block{block + 1}"
            names |= pairs(f"{name}.conv_pw", f"{name}.bn1", f"{path}/expand")
            names |= pairs(f"{name}.conv_dw", f"{name}.bn2", f"{path}/depthwise")
            names |= pairs(f"{name}.conv_pwl", f"{name}.bn3", f"{path}/project")
    return names


def timm_regnet():
    names = pairs("stem.conv", "stem.bn", "stem") | {"head.fc": "classifier"}
    for stage, count in enumerate(VARIANTS["600MF"].depths, start=1):
        for block in range(1, count + 1):
            name, path = f"s{stage}.b{block}", f"stage{stage}_block{block}"
            for layer in ("conv1", "conv2", "conv3"):
                names |= pairs(f"{name}.{layer}.conv", f"{name}.{layer}.bn", f"{path}/{layer}")
            if block == 1:
                names |= pairs(f"{name}.downsample.conv", f"{name}.downsample.bn", f"{path}/shortcut")
    return names


def timm_vgg16_bn():
    names = {"pre_logits.fc1": "fc1:conv", "pre_logits.fc2": "fc2:conv", "head.fc": "classifier"}
    number = 0
    for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
        for index in range(1, count + 1):
            names |= pairs(f"features.{number}", f"features.{number + 1}", f"stage{stage}_conv{index}")
            number += 3  # convolution, BatchNorm, ReLU
        number += 1  # pool
    return names


def torchvision_inception_v3():
    names = {"fc": "classifier"}
    for name, path in (
        ("Conv2d_1a_3x3", "stem1"),
        ("Conv2d_2a_3x3", "stem2"),
        ("Conv2d_2b_3x3", "stem3"),
        ("Conv2d_3b_1x1", "stem4"),
        ("Conv2d_4a_3x3", "stem5"),
    ):
        names |= pairs(f"{name}.conv", f"{name}.bn", path)
    a = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
    b = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
    c = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
    reduction_a = "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
    reduction_b = "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
    mixed = {"5b": (1, 1, a), "5c": (1, 2, a), "5d": (1, 3, a), "6a": (2, 1, reduction_a), "6b": (2, 2, b)}
    mixed |= {"6c": (2, 3, b), "6d": (2, 4, b), "6e": (2, 5, b), "7a": (3, 1, reduction_b)}
    mixed |= {"7b": (3, 2, c), "7c": (3, 3, c)}
    for name, (stage, block, branches) in mixed.items():
        for branch in branches.split():
            module = f"Mixed_{name}.branch{branch}"
            names |= pairs(f"{module}.conv", f"{module}.bn", f"stage{stage}_block{block}/branch{branch}")
    return names


NAMES = [
    pytest.param(timm_mobilenet_v1, MobileNetV1, id="timm_mobilenet_v1"),
    pytest.param(timm_mobilenet_v2, MobileNetV2, id="timm_mobilenet_v2"),
    pytest.param(timm_regnet, lambda: RegNetX("600MF"), id="timm_regnet"),
    pytest.param(timm_vgg16_bn, lambda: VGG16(num_classes=10), id="timm_vgg16_bn", marks=slow),  # 1 GB of dense layers
    pytest.param(torchvision_inception_v3, InceptionV3, id="torchvision_inception_v3"),
]


@pytest.mark.parametrize(("names", "build"), NAMES)
def test_names(names, build, tmp_path):
    """Every array goes where it belongs: no two of the random ones are alike."""
    rng = np.random.default_rng(0)
    shapes = template(build(), 96)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    state = state_dict(variables, names())
    if names is torchvision_inception_v3:  # an auxiliary classifier that inference does not need
        state |= {"AuxLogits.conv0.conv.weight": np.zeros((128, 768, 1, 1)), "AuxLogits.fc.bias": np.zeros(1000)}
    np.savez(tmp_path / "w.npz", **state)
    found = flatten_names(load_checkpoint(tmp_path / "w.npz", shapes))
    for name, leaf in flatten_names(variables).items():
        np.testing.assert_array_equal(found[name], leaf, name)
    del state[[name for name in state if name.endswith("running_var")][-1]]
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(ValueError, match=r"nothing was loaded\.\n  missing: batch_stats/"):
        load_checkpoint(tmp_path / "w.npz", shapes)


def test_old_names_of_densenet():
    layout = next(layout for layout in zoo.LAYOUTS if layout.name == "torchvision_densenet")
    for name in ("features.denseblock2.denselayer7.norm.1.weight", "features.denseblock2.denselayer7.norm1.weight"):
        assert layout.place(name)[1] == "params/block2_layer7/norm1/scale"


def test_signatures_tell_layouts_apart():
    """No layout's names look like another program's."""
    examples = {
        "akamaster": ("conv1.weight", "layer1.0.conv1.weight", "linear.weight"),
        "torchvision_resnet": ("conv1.weight", "layer1.0.conv1.weight", "fc.weight"),
        "timm_regnet": ("stem.conv.weight", "s1.b1.conv1.conv.weight", "head.fc.weight"),
        "flax": ("params/stem/conv/kernel",),
    }
    for name, names in examples.items():
        assert [layout.name for layout in zoo.LAYOUTS if layout.matches(dict.fromkeys(names))] == [name]


# --- tracing ---

# Layers, BatchNorms, those of them that follow no layer directly, blocks.
STRUCTURE = {
    "cifar_resnet20_projection": (22, 21, 0, 11),
    "resnet18": (21, 20, 0, 10),
    "resnet34": (37, 36, 0, 18),
    "resnet50": (54, 53, 0, 18),
    "resnet101": (105, 104, 0, 35),
    "resnet152": (156, 155, 0, 52),
    "resnet50_v1": (54, 53, 0, 18),
    "resnet18_nnx": (21, 20, 0, 10),
    "resnet50_nnx": (54, 53, 0, 18),
    "mobilenet_v1": (28, 27, 0, 28),
    "mobilenet_v2": (53, 52, 0, 33),
    "mobilenet_v2_pytorchcv": (54, 53, 0, 34),
    "regnetx_600mf": (54, 53, 0, 18),
    "regnetx_3200mf": (81, 80, 0, 27),
    "vgg16_bn": (16, 13, 0, 16),
    "densenet121": (121, 121, 62, 63),
    "inception_v3": (95, 94, 0, 17),
    "shufflenet_v1_g3": (50, 49, 0, 18),
    "shufflenet_v2": (57, 56, 0, 19),
    "squeezenext_23": (112, 111, 0, 24),
}
QUICK = ("cifar_resnet20_projection", "resnet18", "resnet18_nnx", "mobilenet_v2", "vgg16_bn", "shufflenet_v2")


def entry(name):
    return next(item for item in zoo.list_models() if item.name == name)


@functools.cache
def traced(name):
    module, variables, _ = abstract_model(entry(name))
    return dfq_jax.trace(*as_function(module, variables), entry(name).input_shape)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=slow) for n in STRUCTURE])
def test_tracing_finds_everything(name):
    graph = traced(name)
    apart = sum(bn.layer is None for bn in graph.batch_norms)
    assert (len(graph.layers), len(graph.batch_norms), apart, len(graph.blocks)) == STRUCTURE[name]
    assert graph.skipped == ()
    kernels = [path for path in graph.leaf_paths if path.endswith("kernel")]
    assert sorted(layer.kernel for layer in graph.layers) == sorted(kernels)
    means = [path for path in graph.leaf_paths if path.endswith("mean")]
    assert sorted(bn.mean for bn in graph.batch_norms) == sorted(means)
    # The sizes of large networks are stated: what is stated must be what there is.
    trained = [path.endswith(("kernel", "bias", "scale")) for path in graph.leaf_paths]
    parameters = sum(shape.size for shape, kept in zip(graph.leaf_shapes, trained, strict=True) if kept)
    assert entry(name).num_parameters == parameters
    assert entry(name).macs == sum(layer.macs for layer in graph.layers)


def test_structure_covers_the_zoo():
    ours = {entry.name for entry in zoo.list_models() if entry.trained_on == "ImageNet-1k"}
    assert {name for name in ours if not name.startswith("efficientnet")} < STRUCTURE.keys()


# --- quantizing ---

# Images as small as the network takes.
SIDES = {"cifar_resnet20_projection": 16, "inception_v3": 75}


@slow
@pytest.mark.parametrize("name", [n for n in STRUCTURE if n not in ("resnet34", "resnet101", "resnet152")])
def test_quantize(name):
    side = SIDES.get(name, 32)
    model = zoo.load_model(name, random_key=jax.random.key(0))
    # Four images whose last maps have one pixel tell BatchNorms little: their statistics are hardly trusted.
    recipe = dfq_jax.RECIPES["fast"].replace(
        synthesis_steps=2, synthesis_num_images=4, synthesis_batch_size=4, batch_norm_prior_images=64
    )
    quantized = dfq_jax.quantize(
        model.module, model.variables, input_shape=(4, side, side, 3), recipe=recipe, bits="w8a8"
    )
    assert all(layer.weight_bits == 8 and layer.activation_bits == 8 for layer in quantized.report.layers)
    assert quantized.report.sqnr > 10

    @jax.jit
    def both(variables, x):
        graph = quantized.graph
        return apply_quantized(graph, variables, x), apply_quantized(graph, variables, x, integer=True)

    simulated, integer = both(quantized.variables, quantized.images)
    assert_same_outputs(integer, simulated, 0.0)


# --- the pieces ---


def test_adaptive_average_pool_is_torchs():
    torch = pytest.importorskip("torch", reason="the reference is torch's")
    for height, width in ((7, 7), (1, 3), (9, 16), (14, 5)):
        x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
        expected = torch.nn.AdaptiveAvgPool2d(7)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        found = adaptive_average_pool(jnp.asarray(x), 7)
        np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_channel_shuffle():
    x = jnp.arange(6.0).reshape(1, 1, 1, 6)
    np.testing.assert_array_equal(channel_shuffle(x, 2)[0, 0, 0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(channel_shuffle(x, 3)[0, 0, 0], [0, 2, 4, 1, 3, 5])


@pytest.mark.parametrize(
    ("module", "shape", "match"),
    [
        (ResNet(51), (1, 32, 32, 3), "depth: expected one of 18, 34, 50, 101, 152, found 51"),
        (ResNet(18, num_classes=0), (1, 32, 32, 3), "num_classes: expected at least 1, found 0"),
        (MobileNetV1(width=0.0), (1, 32, 32, 3), "width: expected a positive factor, found 0.0"),
        (MobileNetV2(), (32, 32, 3), r"x: expected images \[N, H, W, C\], found shape \(32, 32, 3\)"),
        (RegNetX("500MF"), (1, 32, 32, 3), "variant: expected one of 200MF, .*, found '500MF'"),
        (DenseNet(120), (1, 32, 32, 3), "depth: expected one of 121, 169, 201, found 120"),
        (ShuffleNetV1(groups=5), (1, 32, 32, 3), "groups: expected one of 1, 2, 3, 4, 8, found 5"),
        (ShuffleNetV2(width=0.7), (1, 32, 32, 3), "width: expected one of 0.5, 1.0, 1.5, 2.0, found 0.7"),
        (SqueezeNext("24"), (1, 32, 32, 3), "variant: expected one of 23, 23v5, found '24'"),
        (InceptionV3(), (1, 74, 80, 3), r"x: Inception v3 takes images of at least 75x75 pixels"),
        (VGG16(num_classes=-1), (1, 32, 32, 3), "num_classes: expected at least 1, found -1"),
        (CifarResNet(8, shortcut="none"), (1, 32, 32, 3), "shortcut: expected 'pad' or 'projection', found 'none'"),
    ],
)
def test_bad_arguments(module, shape, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_bad_arguments_of_nnx():
    with pytest.raises(ValueError, match="depth: expected one of"):
        NNXResNet(51, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_classes: expected at least 1"):
        NNXResNet(18, 0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("build", [ResNet, MobileNetV2, VGG16], ids=lambda build: build.__name__)
def test_training_mode_and_dtype(build):
    module = build(num_classes=3, dtype=jnp.bfloat16)
    variables = template(module, 32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))

    def train(variables, x):
        rngs = {"dropout": jax.random.key(0)}
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

    y, changed = jax.eval_shape(train, variables, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32))
    assert y.shape == (4, 3) and y.dtype == jnp.bfloat16
    assert jax.tree.structure(changed["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
