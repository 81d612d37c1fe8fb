"""The zoo: its entries, preprocessing, random and loaded models, and the accuracy of public checkpoints."""

import dataclasses
import functools
import importlib.resources
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dfq_jax
from dfq_jax import zoo
from dfq_jax.zoo import cifar_resnet, fashion, layers, registry
from dfq_jax.zoo.arrays import read_npz
from dfq_jax.zoo.checkpoint import flatten_names
from dfq_jax.zoo.entry import abstract_model
from dfq_jax.zoo.layouts.table import Layout, conv_norm, linear

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("DFQ_JAX_DATA") or ROOT / ".." / "shared" / "data")
NAMES = tuple(entry.name for entry in zoo.list_models())
IMAGENET = tuple(name for name in NAMES if not name.startswith(("fashion", "cifar", "efficientnet")))


def shared(name):
    path = DATA / "cifar10" / name
    if not path.exists():
        pytest.skip(f"no {name}: set DFQ_JAX_DATA to the folder that holds cifar10/{name}")
    return path


def test_list():
    first = (
        "fashion_resnet20",
        "fashion_mobilenet",
        "cifar_resnet20",
        "cifar_resnet32",
        "cifar_resnet44",
        "cifar_resnet56",
        "cifar_resnet110",
        "cifar_resnet20_projection",
        "cifar_resnet56_projection",
        "cifar_resnet110_projection",
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "efficientnet_lite3",
        "efficientnet_lite4",
    )
    assert NAMES[: len(first)] == first
    assert len(set(NAMES)) == len(NAMES) and set(NAMES) > set(IMAGENET)
    start = time.perf_counter()
    zoo.list_models()
    assert time.perf_counter() - start < 0.1


# Published counts of parameters. The networks for ImageNet are in test_zoo_parity.py.
COUNTS = {"cifar_resnet20": 269_722, "cifar_resnet32": 464_154, "cifar_resnet44": 658_586, "cifar_resnet56": 853_018}
COUNTS |= {"cifar_resnet110": 1_727_962}
QUICK = ("fashion_resnet20", "fashion_mobilenet", "cifar_resnet20", "cifar_resnet20_projection")
OTHERS = [name for name in NAMES if name not in IMAGENET]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OTHERS])
def test_stated_sizes_are_those_of_the_networks(name):
    entry = zoo.list_models()[NAMES.index(name)]
    module, template, trained = abstract_model(entry)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert entry.num_parameters == parameters == COUNTS.get(name, parameters)
    graph = dfq_jax.trace(*dfq_jax.as_function(module, template), entry.input_shape)
    assert entry.macs == sum(layer.macs for layer in graph.layers)


def test_fashion_preprocessing_is_that_of_training():
    for entry in zoo.list_models():
        if entry.name.startswith("fashion"):
            assert entry.preprocessing.mean == (fashion.MEAN,) and entry.preprocessing.std == (fashion.STD,)


def logits(model, images):
    x = model.preprocessing(images)
    if isinstance(model.module, nnx.Module):
        return model.module(jnp.asarray(x))
    return jax.jit(model.module.apply)(model.variables, x)


def save(path, variables):
    np.savez(path, **{name: np.asarray(leaf) for name, leaf in flatten_names(variables).items()})
    return path


@pytest.mark.parametrize("name", ["fashion_resnet20", "fashion_mobilenet", "cifar_resnet20"])
def test_load_model_is_free_of_loss(name, tmp_path):
    entry = zoo.list_models()[NAMES.index(name)]
    rng = np.random.default_rng(0)
    wanted = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), entry.template())
    model = zoo.load_model(name, save(tmp_path / "w.npz", wanted))
    assert model.name == name and model.entry is entry and model.input_shape == entry.input_shape
    assert jax.tree.structure(model.variables) == jax.tree.structure(wanted)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.variables))
    found = flatten_names(model.variables)
    inside = found
    if name == "fashion_mobilenet":
        assert isinstance(model.module, nnx.Module) and model.module.stem_bn.use_running_average
        inside = flatten_names(nnx.to_pure_dict(nnx.state(model.module)))
    else:
        assert isinstance(model.module, nn.Module)
    for key, leaf in flatten_names(wanted).items():
        np.testing.assert_array_equal(found[key], leaf, key)
        np.testing.assert_array_equal(inside[key], leaf, key)


class TinyLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x).mean((1, 2))


class TinyNNX(nnx.Module):
    """With a list, whose indices are integers in the state."""

    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 10, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean((1, 2))


@pytest.fixture
def small_zoo(monkeypatch):
    """A zoo of two networks that are quick to initialize."""
    entry = zoo.list_models()[NAMES.index("cifar_resnet20")]
    entries = (
        dataclasses.replace(entry, name="linen", build=TinyLinen),
        dataclasses.replace(entry, name="nnx", build=lambda rngs=None: TinyNNX(rngs=rngs or nnx.Rngs(0))),
    )
    monkeypatch.setattr("dfq_jax.zoo.registry._ENTRIES", entries)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_random_models(name, tmp_path, small_zoo):
    model = zoo.load_model(name, random_key=jax.random.key(1))
    assert jax.tree.structure(model.entry.template()) == jax.tree.structure(model.variables)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    expected = logits(model, images)
    assert expected.shape == (2, model.num_classes)
    again = zoo.load_model(name, save(tmp_path / "w.npz", model.variables))
    np.testing.assert_array_equal(logits(again, images), expected)
    other = zoo.load_model(name, random_key=jax.random.key(2))
    assert np.abs(logits(other, images) - expected).max() > 0


@pytest.mark.parametrize("name", ["fashion_resnet20", "fashion_mobilenet"])
def test_bundled_weights(name):
    weights = importlib.resources.files("dfq_jax.zoo") / "weights"
    test = read_npz(weights / "fashion_test.npz")
    images, labels = test["images"][:500], test["labels"][:500]
    model = zoo.load_model(name)
    top1 = 100 * np.mean(np.argmax(logits(model, images), -1) == labels)
    assert top1 > 85
    if model.entry.float_top1 is not None:
        assert abs(top1 - model.entry.float_top1) < 4


def test_errors_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no model 'cifar_resnet65'.*did you mean 'cifar_resnet\d\d'\?"):
        zoo.load_model("cifar_resnet65")
    with pytest.raises(ValueError, match="name: no model 'xyz' in the zoo; Known are: fashion_resnet20"):
        zoo.load_model("xyz")
    with pytest.raises(ValueError, match=r"checkpoint: 'cifar_resnet20' comes without weights.*akamaster"):
        zoo.load_model("cifar_resnet20")
    with pytest.raises(ValueError, match="random_key: give either"):
        zoo.load_model("cifar_resnet20", tmp_path / "w.npz", jax.random.key(0))
    with pytest.raises(ValueError, match="layout: says how a checkpoint is arranged"):
        zoo.load_model("cifar_resnet20", layout="flax")
    with pytest.raises(ValueError, match="path: cannot read"):
        zoo.load_model("cifar_resnet20", tmp_path / "w.npz")


def test_bundled_file_missing(monkeypatch):
    entry = dataclasses.replace(zoo.list_models()[0], weights="none.npz")
    monkeypatch.setattr("dfq_jax.zoo.registry._ENTRIES", (entry,))
    with pytest.raises(ValueError, match=r"checkpoint: the weights 'none\.npz' of .* are missing"):
        zoo.load_model("fashion_resnet20")


# Public checkpoints


def cifar_top1(depth, file):
    test = read_npz(shared("test.npz"))
    model = zoo.load_model(f"cifar_resnet{depth}", shared(file))
    images, labels = test["images"], test["labels"]
    found = [np.argmax(logits(model, images[i : i + 141]), -1) for i in range(0, len(images), 141)]
    return 100 * np.mean(np.concatenate(found) == labels)


def test_top1_of_cifar_resnet20():
    assert round(cifar_top1(20, "resnet20-12fca82f.th"), 2) == 91.73


@pytest.mark.slow
def test_top1_of_cifar_resnet56():
    assert round(cifar_top1(56, "resnet56-4bfd9763.th"), 2) == 93.26


def test_checkpoint_of_another_depth():
    with pytest.raises(ValueError, match=r"(?s)does not fit.*unexpected: layer1\.3\.conv1\.weight"):
        zoo.load_model("cifar_resnet20", shared("resnet56-4bfd9763.th"))


# The architecture


def test_cifar_resnet_arguments():
    x = jnp.zeros((1, 8, 8, 3))
    for depth in (2, 9, 21):
        with pytest.raises(ValueError, match=f"depth: expected 6 n .*, found {depth}"):
            cifar_resnet.CifarResNet(depth=depth).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found 0"):
        cifar_resnet.CifarResNet(depth=8, num_classes=0).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"x: expected images \[N, H, W, C\], found shape \(8, 8, 3\)"):
        cifar_resnet.CifarResNet(depth=8).init(jax.random.key(0), x[0])


def test_training_mode_and_dtype():
    model = cifar_resnet.CifarResNet(depth=8, num_classes=3, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(1), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))

    def train(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    y, changed = jax.eval_shape(train, variables, x)
    assert y.shape == (4, 3) and y.dtype == jnp.bfloat16
    assert jax.tree.structure(changed["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


# Preprocessing


RGB = zoo.Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))


def test_preprocessing_values():
    images = np.array([[[[255, 0, 51]]]], np.uint8)
    found = RGB(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[[[1.0, -0.25, 0.1]]]], rtol=1e-6)
    assert RGB(np.zeros((0, 4, 4, 3), np.uint8)).shape == (0, 4, 4, 3)


def test_preprocessing_crop_and_resize():
    pytest.importorskip("PIL")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0)
    cropped = zoo.Preprocessing(crop=20, **plain)(images)
    np.testing.assert_array_equal(cropped, images[:, 10:30, 20:40])
    both = zoo.Preprocessing(resize=24, crop=20, **plain)
    assert both(images).shape == (2, 20, 20, 3)
    assert zoo.Preprocessing(resize=24, **plain)(images).shape == (2, 24, 36, 3)
    np.testing.assert_array_equal(both(images[:, :20, :20]), images[:, :20, :20])  # already of the right size
    with pytest.raises(ValueError, match="images: 40x60 pixels are too small to crop 50x50"):
        zoo.Preprocessing(crop=50, **plain)(images)


def test_preprocessing_resize_is_that_of_pillow():
    image_module = pytest.importorskip("PIL.Image")
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), np.uint8)
    found = zoo.Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0, resize=24)(images)
    expected = image_module.fromarray(images[0]).resize((36, 24), image_module.Resampling.BICUBIC)
    np.testing.assert_array_equal(found[0], np.asarray(expected))


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), TypeError, "images: expected pixels as uint8, found float32"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"images: expected shape \[N, H, W, C\]"),
        (np.zeros((1, 4, 4, 1), np.uint8), ValueError, r"images: expected 3 channels, found shape"),
        (np.zeros((1, 0, 4, 3), np.uint8), ValueError, r"images: expected shape"),
    ],
)
def test_preprocessing_refuses(images, error, match):
    with pytest.raises(error, match=match):
        RGB(images)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mean": [0.5]}, TypeError, "mean: expected a tuple"),
        ({"mean": ("a",)}, TypeError, "mean: expected a tuple of numbers"),
        ({"mean": (0.5,)}, ValueError, "std: has 3 channels and mean 1"),
        ({"mean": (), "std": ()}, ValueError, "mean: expected finite numbers"),
        ({"mean": (float("nan"), 0.0, 0.0)}, ValueError, "mean: expected finite"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std: expected positive numbers"),
        ({"scale": 0}, ValueError, "scale: expected a positive number"),
        ({"scale": float("inf")}, ValueError, "scale: expected"),
        ({"resize": 0}, ValueError, "resize: expected a positive number of pixels"),
        ({"crop": 2.5}, ValueError, "crop: expected a positive number of pixels"),
        ({"resize": 10, "crop": 20}, ValueError, "crop: 20 pixels do not fit"),
        ({"interpolation": "cubic"}, ValueError, "interpolation: expected one of nearest"),
    ],
)
def test_preprocessing_is_validated(changes, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(RGB, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"input_shape": (28, 28, 1)}, r"input_shape: expected \(1, H, W, C\)"),
        ({"input_shape": (2, 28, 28, 1)}, r"input_shape: expected \(1, H, W, C\)"),
        ({"input_shape": (1, 28, 28, 3)}, "input_shape: 3 channels, but preprocessing has 1"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"float_top1": 900.0}, "float_top1: expected percent"),
    ],
)
def test_entries_are_validated(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(zoo.list_models()[0], **changes)


# What docs/architecture.md says of families and layouts


class Toy(nn.Module):
    """A network of a family that the zoo does not have."""

    depth: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        for stage, name, stride in layers.staged((self.depth, 1), (1, 2)):
            x = layers.ConvNorm(4 * (stage + 1), 3, stride, name=name)(x, train)
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


TOY = Layout(
    name="toy",
    description="The toy of another program: stages.0.0.conv.weight",
    signature=(r"stages\.0\.0\.conv\.weight", r"head\.bias"),
    rules=(
        *conv_norm(r"stages\.(\d)\.(\d)\.conv", r"stages\.(\d)\.(\d)\.norm", r"stage{\1+1}_block{\2+1}"),
        *linear("head", "classifier"),
    ),
)


def test_a_family_is_its_module_and_a_row(tmp_path, monkeypatch):
    row = (registry._CIFAR, "toy", functools.partial(Toy, 2), "nowhere", 10.0, 662, 331_856)
    monkeypatch.setattr("dfq_jax.zoo.registry._ENTRIES", (*registry._ENTRIES, registry._entry(*row)))
    entry = zoo.list_models()[-1]
    module, template, trained = abstract_model(entry)
    graph = dfq_jax.trace(*dfq_jax.as_function(module, template), entry.input_shape)
    assert entry.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert entry.macs == sum(layer.macs for layer in graph.layers)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), template)

    # The names of another program, by a layout that is entered.
    monkeypatch.setattr("dfq_jax.zoo.checkpoint.LAYOUTS", (*zoo.LAYOUTS, TOY))
    state = {}
    for name, leaf in flatten_names(variables).items():
        _, layer, *_, kind = name.split("/")
        kind = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(kind, kind)
        part = "norm" if "/bn/" in name else "conv"
        where = "head" if layer == "classifier" else f"stages.{int(layer[5]) - 1}.{int(layer[12]) - 1}.{part}"
        state[f"{where}.{kind}"] = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    np.savez(tmp_path / "toy.npz", **state)
    loaded = zoo.load_model("toy", tmp_path / "toy.npz")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
