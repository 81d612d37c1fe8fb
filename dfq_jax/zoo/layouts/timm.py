"""Networks of timm (https://github.com/huggingface/pytorch-image-models) whose names are not those of torchvision."""

from dfq_jax.zoo.layouts.table import Layout, conv_norm, linear
from dfq_jax.zoo.layouts.torchvision import VGG16 as TORCHVISION_VGG16

_BLOCK = r"blocks\.(\d)\.(\d)"
_TO_BLOCK = r"stage{\1+1}_block{\2+1}"

MOBILENET_V1 = Layout(
    name="timm_mobilenet_v1",
    description="MobileNetV1 of timm: blocks.0.0.conv_dw.weight, classifier.weight",
    signature=(r"conv_stem\.weight", r"blocks\.4\.1\.conv_dw\.weight", r"classifier\.weight"),
    rules=(
        *conv_norm(r"conv_stem", r"bn1", r"stem"),
        *conv_norm(_BLOCK + r"\.conv_dw", _BLOCK + r"\.bn1", _TO_BLOCK + "/depthwise"),
        *conv_norm(_BLOCK + r"\.conv_pw", _BLOCK + r"\.bn2", _TO_BLOCK + "/pointwise"),
        *linear(r"classifier", r"classifier"),
    ),
)

_INVERTED = r"blocks\.([1-6])\.(\d)"

MOBILENET_V2 = Layout(
    name="timm_mobilenet_v2",
    description="MobileNetV2 of timm: blocks.1.0.conv_pwl.weight, conv_head.weight",
    signature=(r"conv_stem\.weight", r"blocks\.6\.0\.conv_pwl\.weight", r"conv_head\.weight", r"classifier\.weight"),
    rules=(
        *conv_norm(r"conv_stem", r"bn1", r"stem"),
        # The first block has no expansion, so its layers have other numbers.
        *conv_norm(r"blocks\.0\.0\.conv_dw", r"blocks\.0\.0\.bn1", r"stage1_block1/depthwise"),
        *conv_norm(r"blocks\.0\.0\.conv_pw", r"blocks\.0\.0\.bn2", r"stage1_block1/project"),
        *conv_norm(_INVERTED + r"\.conv_pw", _INVERTED + r"\.bn1", _TO_BLOCK + "/expand"),
        *conv_norm(_INVERTED + r"\.conv_dw", _INVERTED + r"\.bn2", _TO_BLOCK + "/depthwise"),
        *conv_norm(_INVERTED + r"\.conv_pwl", _INVERTED + r"\.bn3", _TO_BLOCK + "/project"),
        *conv_norm(r"conv_head", r"bn2", r"head"),
        *linear(r"classifier", r"classifier"),
    ),
)

_UNIT = r"s(\d)\.b(\d+)"

REGNET = Layout(
    name="timm_regnet",
    description="RegNets of timm: s1.b1.conv1.conv.weight, head.fc.weight",
    signature=(r"stem\.conv\.weight", r"s1\.b1\.conv1\.conv\.weight", r"head\.fc\.weight"),
    rules=(
        *conv_norm(r"stem\.conv", r"stem\.bn", r"stem"),
        *conv_norm(_UNIT + r"\.(conv\d)\.conv", _UNIT + r"\.(conv\d)\.bn", r"stage\1_block\2/\3"),
        *conv_norm(_UNIT + r"\.downsample\.conv", _UNIT + r"\.downsample\.bn", r"stage\1_block\2/shortcut"),
        *linear(r"head\.fc", r"classifier"),
    ),
)

VGG16 = Layout(
    name="timm_vgg16_bn",
    description="VGG-16 with BatchNorm of timm: features.0.weight, pre_logits.fc1.weight",
    signature=(r"features\.40\.weight", r"features\.41\.running_mean", r"pre_logits\.fc1\.weight"),
    rules=(
        # timm has the hidden dense layers as convolutions.
        *linear(r"pre_logits\.fc1", r"fc1", "conv_linear"),
        *linear(r"pre_logits\.fc2", r"fc2", "conv_linear"),
        *linear(r"head\.fc", r"classifier"),
        *(rule for rule in TORCHVISION_VGG16.rules if rule.pattern.startswith("features")),
    ),
)

TIMM = (MOBILENET_V1, MOBILENET_V2, REGNET, VGG16)
