"""The zoo's networks for ImageNet: how each is built, and the public weights that its accuracy was published for.

None of these weights come with the package: give `load_model` a file of them. Files of torchvision, timm and pytorchcv
are read for every network that the program has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
from flax import nnx

from dfq_jax.zoo.densenet import DenseNet
from dfq_jax.zoo.inception_v3 import InceptionV3
from dfq_jax.zoo.mobilenet_v1 import MobileNetV1
from dfq_jax.zoo.mobilenet_v2 import MobileNetV2
from dfq_jax.zoo.regnet import RegNetX
from dfq_jax.zoo.resnet import ResNet
from dfq_jax.zoo.resnet_nnx import resnet as nnx_resnet
from dfq_jax.zoo.shufflenet import ShuffleNetV1, ShuffleNetV2
from dfq_jax.zoo.squeezenext import SqueezeNext
from dfq_jax.zoo.vgg import VGG16

__all__ = ["IMAGENET_MODELS", "ImageNetModel"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetModel(NamedTuple):
    """One network.

    Attributes:
        name: in the zoo.
        build: makes the module.
        weights: the public weights that `top1` was published for.
        top1: accuracy in percent on the 50,000 validation images, as published with the weights.
        parameters: number of trained parameters.
        macs: multiply-accumulates of its layers for one image.
        side: of the image that it reads, in pixels.
        resize: length of an image's short side before that is cut from it.
        mean: of each channel, of pixels 0...1.
        std: of each channel.
    """

    name: str
    build: Callable[..., nn.Module | nnx.Module]
    weights: str
    top1: float
    parameters: int
    macs: int
    side: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


_partial = functools.partial

IMAGENET_MODELS = (
    ImageNetModel(
        "resnet18", _partial(ResNet, 18), "torchvision's ResNet18_Weights.IMAGENET1K_V1",
        69.758, 11_689_512, 1_814_073_344,
    ),
    ImageNetModel(
        "resnet34", _partial(ResNet, 34), "torchvision's ResNet34_Weights.IMAGENET1K_V1",
        73.314, 21_797_672, 3_663_761_408,
    ),
    ImageNetModel(
        "resnet50", _partial(ResNet, 50), "torchvision's ResNet50_Weights.IMAGENET1K_V1",
        76.130, 25_557_032, 4_089_184_256,
    ),
    ImageNetModel(
        "resnet101", _partial(ResNet, 101), "torchvision's ResNet101_Weights.IMAGENET1K_V1",
        77.374, 44_549_160, 7_801_405_440,
    ),
    ImageNetModel(
        "resnet152", _partial(ResNet, 152), "torchvision's ResNet152_Weights.IMAGENET1K_V1",
        78.312, 60_192_808, 11_513_626_624,
    ),
    ImageNetModel(
        "resnet50_v1", _partial(ResNet, 50, stride_on_1x1=True), "pytorchcv's resnet50-0658-828686d7.pth",
        77.04, 25_557_032, 3_857_973_248,
    ),
    ImageNetModel(
        "resnet18_nnx", _partial(nnx_resnet, 18), "torchvision's ResNet18_Weights.IMAGENET1K_V1",
        69.758, 11_689_512, 1_814_073_344,
    ),
    ImageNetModel(
        "resnet50_nnx", _partial(nnx_resnet, 50), "torchvision's ResNet50_Weights.IMAGENET1K_V1",
        76.130, 25_557_032, 4_089_184_256,
    ),
    ImageNetModel(
        "mobilenet_v1", MobileNetV1, "pytorchcv's mobilenet_w1-0895-7e1d739f.pth",
        73.39, 4_231_976, 568_740_352,
    ),
    ImageNetModel(
        "mobilenet_v2", MobileNetV2, "torchvision's MobileNet_V2_Weights.IMAGENET1K_V1",
        71.878, 3_504_872, 300_774_272,
    ),
    ImageNetModel(
        "mobilenet_v2_pytorchcv", _partial(MobileNetV2, first_expansion=True, classifier_bias=False),
        "pytorchcv's mobilenetv2_w1-1039-7532eb72.pth", 70.69, 3_504_960, 313_619_328,
    ),
    ImageNetModel(
        "regnetx_600mf", _partial(RegNetX, "600MF"), "pytorchcv's regnetx006-0791-30ca597a.pth",
        75.04, 6_196_040, 600_890_112,
    ),
    ImageNetModel(
        "regnetx_3200mf", _partial(RegNetX, "3.2GF"), "torchvision's RegNet_X_3_2GF_Weights.IMAGENET1K_V1",
        78.364, 15_296_552, 3_176_621_952,
    ),
    ImageNetModel(
        "vgg16_bn", VGG16, "torchvision's VGG16_BN_Weights.IMAGENET1K_V1",
        73.360, 138_365_992, 15_470_264_320,
    ),
    ImageNetModel(
        "densenet121", _partial(DenseNet, 121), "torchvision's DenseNet121_Weights.IMAGENET1K_V1",
        74.434, 7_978_856, 2_834_161_664,
    ),
    ImageNetModel(
        # torchvision's module turns its usual preprocessing into that of these weights, pixels in -1...1.
        "inception_v3", InceptionV3, "torchvision's Inception_V3_Weights.IMAGENET1K_V1",
        77.294, 23_834_568, 5_713_216_096, side=299, resize=342, mean=(0.5,) * 3, std=(0.5,) * 3,
    ),
    ImageNetModel(
        "shufflenet_v1_g3", ShuffleNetV1, "pytorchcv's shufflenet_g3_w1-1348.pth",
        65.61, 1_865_728, 137_460_672,
    ),
    ImageNetModel(
        "shufflenet_v2", ShuffleNetV2, "torchvision's ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1",
        69.362, 2_278_604, 144_907_992,
    ),
    ImageNetModel(
        "squeezenext_23", SqueezeNext, "pytorchcv's sqnxt23_w1-1906-97b74e0c.pth",
        57.49, 724_056, 275_920_640,
    ),
)  # fmt: skip
