"""Networks of torchvision (https://github.com/pytorch/vision), by their state dicts.

timm keeps these names for its ResNet, DenseNet and Inception v3.
"""

from dfq_jax.zoo.layouts.table import Layout, Rule, conv, conv_norm, linear, norm

_UNIT = r"layer(\d)\.(\d+)"

RESNET = Layout(
    name="torchvision_resnet",
    description="ResNets of torchvision and timm: layer1.0.conv1.weight, fc.weight",
    signature=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"fc\.weight"),
    rules=(
        *conv_norm(r"conv1", r"bn1", r"stem"),
        *conv_norm(_UNIT + r"\.conv(\d)", _UNIT + r"\.bn(\d)", r"stage\1_block{\2+1}/conv\3"),
        *conv_norm(_UNIT + r"\.downsample\.0", _UNIT + r"\.downsample\.1", r"stage\1_block{\2+1}/shortcut"),
        *linear(r"fc", r"classifier"),
    ),
)

# Convolutions of VGG-16 by their number in `features`, ReLUs and pools counted; each BatchNorm has the next number.
_VGG16 = {1: (0, 3), 2: (7, 10), 3: (14, 17, 20), 4: (24, 27, 30), 5: (34, 37, 40)}

VGG16 = Layout(
    name="torchvision_vgg16_bn",
    description="VGG-16 with BatchNorm of torchvision: features.0.weight, classifier.6.weight",
    signature=(r"features\.40\.weight", r"features\.41\.running_mean", r"classifier\.6\.weight"),
    rules=(
        *(
            rule
            for stage, numbers in _VGG16.items()
            for index, number in enumerate(numbers, start=1)
            for rule in conv_norm(rf"features\.{number}", rf"features\.{number + 1}", f"stage{stage}_conv{index}")
        ),
        *linear(r"classifier\.0", r"fc1"),
        *linear(r"classifier\.3", r"fc2"),
        *linear(r"classifier\.6", r"classifier"),
    ),
)

# Inverted residuals by their number in `features`: the numbers of a stage's blocks, and the block's number from that.
_MOBILENET_V2 = (
    (r"([23])", r"stage2_block{\1-1}"),
    (r"([456])", r"stage3_block{\1-3}"),
    (r"([789]|10)", r"stage4_block{\1-6}"),
    (r"(1[123])", r"stage5_block{\1-10}"),
    (r"(1[456])", r"stage6_block{\1-13}"),
    (r"(17)", r"stage7_block{\1-16}"),
)

MOBILENET_V2 = Layout(
    name="torchvision_mobilenet_v2",
    description="MobileNetV2 of torchvision: features.1.conv.0.0.weight, classifier.1.weight",
    signature=(r"features\.0\.0\.weight", r"features\.17\.conv\.3\.weight", r"classifier\.1\.weight"),
    rules=(
        *conv_norm(r"features\.0\.0", r"features\.0\.1", r"stem"),
        # The first block has no expansion, so its layers have other numbers.
        *conv_norm(r"features\.1\.conv\.0\.0", r"features\.1\.conv\.0\.1", r"stage1_block1/depthwise"),
        *conv_norm(r"features\.1\.conv\.1", r"features\.1\.conv\.2", r"stage1_block1/project"),
        *(
            rule
            for numbers, block in _MOBILENET_V2
            for conv_number, norm_number, layer in (
                (r"0\.0", r"0\.1", "expand"),
                (r"1\.0", r"1\.1", "depthwise"),
                (r"2", r"3", "project"),
            )
            for rule in conv_norm(
                rf"features\.{numbers}\.conv\.{conv_number}",
                rf"features\.{numbers}\.conv\.{norm_number}",
                f"{block}/{layer}",
            )
        ),
        *conv_norm(r"features\.18\.0", r"features\.18\.1", r"head"),
        *linear(r"classifier\.1", r"classifier"),
    ),
)

_LAYER = r"features\.denseblock(\d)\.denselayer(\d+)"

DENSENET = Layout(
    name="torchvision_densenet",
    description="DenseNets of torchvision and timm: features.denseblock1.denselayer1.conv1.weight",
    signature=(r"features\.conv0\.weight", r"features\.denseblock1\.denselayer1\.conv\.?1\.weight"),
    rules=(
        *conv_norm(r"features\.conv0", r"features\.norm0", r"stem"),
        # The published files are of 2017 and have a dot before the number.
        *norm(_LAYER + r"\.norm\.?(\d)", r"block\1_layer\2/norm\3"),
        *conv(_LAYER + r"\.conv\.?(\d)", r"block\1_layer\2/conv\3"),
        *norm(r"features\.transition(\d)\.norm", r"transition\1/norm"),
        *conv(r"features\.transition(\d)\.conv", r"transition\1/conv"),
        *norm(r"features\.norm5", r"norm"),
        *linear(r"classifier", r"classifier"),
    ),
)

_BLOCK = r"trunk_output\.block\d\.block(\d)-(\d+)"

REGNET = Layout(
    name="torchvision_regnet",
    description="RegNets of torchvision: trunk_output.block1.block1-0.f.a.0.weight",
    signature=(r"stem\.0\.weight", r"trunk_output\.block1\.block1-0\.f\.a\.0\.weight", r"fc\.weight"),
    rules=(
        *conv_norm(r"stem\.0", r"stem\.1", r"stem"),
        *conv_norm(_BLOCK + r"\.f\.a\.0", _BLOCK + r"\.f\.a\.1", r"stage\1_block{\2+1}/conv1"),
        *conv_norm(_BLOCK + r"\.f\.b\.0", _BLOCK + r"\.f\.b\.1", r"stage\1_block{\2+1}/conv2"),
        *conv_norm(_BLOCK + r"\.f\.c\.0", _BLOCK + r"\.f\.c\.1", r"stage\1_block{\2+1}/conv3"),
        *conv_norm(_BLOCK + r"\.proj\.0", _BLOCK + r"\.proj\.1", r"stage\1_block{\2+1}/shortcut"),
        *linear(r"fc", r"classifier"),
    ),
)

_STAGE = r"stage([234])\.(\d+)"
_TO_UNIT = r"stage{\1-1}_block{\2+1}"

SHUFFLENET_V2 = Layout(
    name="torchvision_shufflenet_v2",
    description="ShuffleNet V2 of torchvision: stage2.0.branch1.0.weight, fc.weight",
    signature=(r"conv1\.0\.weight", r"stage2\.0\.branch1\.0\.weight", r"fc\.weight"),
    rules=(
        *conv_norm(r"conv1\.0", r"conv1\.1", r"stem"),
        *conv_norm(_STAGE + r"\.branch1\.0", _STAGE + r"\.branch1\.1", _TO_UNIT + "/shortcut_depthwise"),
        *conv_norm(_STAGE + r"\.branch1\.2", _STAGE + r"\.branch1\.3", _TO_UNIT + "/shortcut_expand"),
        *conv_norm(_STAGE + r"\.branch2\.0", _STAGE + r"\.branch2\.1", _TO_UNIT + "/compress"),
        *conv_norm(_STAGE + r"\.branch2\.3", _STAGE + r"\.branch2\.4", _TO_UNIT + "/depthwise"),
        *conv_norm(_STAGE + r"\.branch2\.5", _STAGE + r"\.branch2\.6", _TO_UNIT + "/expand"),
        *conv_norm(r"conv5\.0", r"conv5\.1", r"head"),
        *linear(r"fc", r"classifier"),
    ),
)

_STEM = {"1a_3x3": 1, "2a_3x3": 2, "2b_3x3": 3, "3b_1x1": 4, "4a_3x3": 5}
_MIXED = {5: (1, "bcd"), 6: (2, "abcde"), 7: (3, "abc")}  # the stage, and the letters of its blocks

INCEPTION_V3 = Layout(
    name="torchvision_inception_v3",
    description="Inception v3 of torchvision and timm: Mixed_5b.branch1x1.conv.weight",
    signature=(r"Conv2d_1a_3x3\.conv\.weight", r"Mixed_5b\.branch1x1\.conv\.weight", r"fc\.weight"),
    rules=(
        *(
            rule
            for name, number in _STEM.items()
            for rule in conv_norm(rf"Conv2d_{name}\.conv", rf"Conv2d_{name}\.bn", f"stem{number}")
        ),
        *(
            rule
            for number, (stage, letters) in _MIXED.items()
            for block, letter in enumerate(letters, start=1)
            for rule in conv_norm(
                rf"Mixed_{number}{letter}\.(\w+)\.conv",
                rf"Mixed_{number}{letter}\.(\w+)\.bn",
                rf"stage{stage}_block{block}/\1",
            )
        ),
        *linear(r"fc", r"classifier"),
        Rule(pattern=r"AuxLogits\..+", target=None),
    ),
)

TORCHVISION = (RESNET, VGG16, MOBILENET_V2, DENSENET, REGNET, SHUFFLENET_V2, INCEPTION_V3)
