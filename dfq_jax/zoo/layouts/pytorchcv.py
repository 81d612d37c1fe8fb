"""Networks of pytorchcv (https://github.com/osmr/imgclsmob), by their state dicts.

There, nearly everything is a block of a convolution `conv` and a BatchNorm `bn` inside stages of units.
"""

from dfq_jax.zoo.layouts.table import Layout, Rule, conv, conv_norm, linear, norm

_UNIT = r"features\.stage(\d)\.unit(\d+)"
_TO_BLOCK = r"stage\1_block\2"


def _block(name: str, path: str) -> tuple[Rule, ...]:
    """The block `name` as a `ConvNorm`."""
    return conv_norm(name + r"\.conv", name + r"\.bn", path)


def _numbered(layer: str, number: int, path: str) -> tuple[Rule, ...]:
    """The pair of `compress_conv1` and `compress_bn1` in a unit, as a `ConvNorm`."""
    return conv_norm(rf"{_UNIT}\.{layer}_conv{number}", rf"{_UNIT}\.{layer}_bn{number}", f"{_TO_BLOCK}/{path}")


RESNET = Layout(
    name="pytorchcv_resnet",
    description="ResNets of pytorchcv: features.stage1.unit1.body.conv1.conv.weight",
    signature=(r"features\.init_block\.conv\.conv\.weight", r"features\.stage1\.unit1\.body\.conv1\.conv\.weight"),
    rules=(
        *_block(r"features\.init_block\.conv", r"stem"),
        *_block(_UNIT + r"\.body\.(conv\d)", _TO_BLOCK + r"/\3"),
        *_block(_UNIT + r"\.identity_conv", _TO_BLOCK + r"/shortcut"),
        *linear(r"output", r"classifier"),
    ),
)

CIFAR_RESNET = Layout(
    name="pytorchcv_cifar_resnet",
    description="CIFAR ResNets of pytorchcv: features.init_block.conv.weight, features.stage1.unit1.body...",
    signature=(r"features\.init_block\.conv\.weight", r"features\.stage1\.unit1\.body\.conv2\.conv\.weight"),
    rules=(
        *conv(r"features\.init_block\.conv", r"conv1"),
        *norm(r"features\.init_block\.bn", r"bn1"),
        *conv(_UNIT + r"\.body\.conv(\d)\.conv", r"layer\1_{\2-1}/conv\3"),
        *norm(_UNIT + r"\.body\.conv(\d)\.bn", r"layer\1_{\2-1}/bn\3"),
        *conv(_UNIT + r"\.identity_conv\.conv", r"layer\1_{\2-1}/shortcut_conv"),
        *norm(_UNIT + r"\.identity_conv\.bn", r"layer\1_{\2-1}/shortcut_bn"),
        *linear(r"output", r"linear"),
    ),
)

REGNET = Layout(
    name="pytorchcv_regnet",
    description="RegNets of pytorchcv: features.init_block.conv.weight, features.stage1.unit1.body.conv3...",
    signature=(r"features\.init_block\.conv\.weight", r"features\.stage1\.unit1\.body\.conv3\.conv\.weight"),
    rules=(
        *_block(r"features\.init_block", r"stem"),
        *_block(_UNIT + r"\.body\.(conv\d)", _TO_BLOCK + r"/\3"),
        *_block(_UNIT + r"\.identity_conv", _TO_BLOCK + r"/shortcut"),
        *linear(r"output", r"classifier"),
    ),
)

MOBILENET_V1 = Layout(
    name="pytorchcv_mobilenet_v1",
    description="MobileNetV1 of pytorchcv: features.stage1.unit1.dw_conv.conv.weight",
    signature=(r"features\.init_block\.conv\.weight", r"features\.stage1\.unit1\.dw_conv\.conv\.weight"),
    rules=(
        *_block(r"features\.init_block", r"stem"),
        *_block(_UNIT + r"\.dw_conv", _TO_BLOCK + r"/depthwise"),
        *_block(_UNIT + r"\.pw_conv", _TO_BLOCK + r"/pointwise"),
        *linear(r"output", r"classifier"),
    ),
)

# pytorchcv joins the paper's stages of one image size.
_MOBILENET_V2 = (
    (r"stage([123])\.unit(\d)", r"stage\1_block\2"),
    (r"stage4\.unit([1234])", r"stage4_block\1"),
    (r"stage4\.unit([567])", r"stage5_block{\1-4}"),
    (r"stage5\.unit([123])", r"stage6_block\1"),
    (r"stage5\.unit(4)", r"stage7_block{\1-3}"),
)

MOBILENET_V2 = Layout(
    name="pytorchcv_mobilenet_v2",
    description="MobileNetV2 of pytorchcv: features.stage5.unit4.conv3.conv.weight",
    signature=(r"features\.init_block\.conv\.weight", r"features\.stage5\.unit4\.conv3\.conv\.weight"),
    rules=(
        *_block(r"features\.init_block", r"stem"),
        *(
            rule
            for unit, block in _MOBILENET_V2
            for number, layer in ((1, "expand"), (2, "depthwise"), (3, "project"))
            for rule in _block(rf"features\.{unit}\.conv{number}", f"{block}/{layer}")
        ),
        *_block(r"features\.final_block", r"head"),
        *linear(r"output", r"classifier", "conv_linear"),
    ),
)

VGG = Layout(
    name="pytorchcv_vgg",
    description="VGGs with BatchNorm of pytorchcv: features.stage1.unit1.conv.weight, output.fc1.fc.weight",
    signature=(r"features\.stage1\.unit1\.conv\.weight", r"output\.fc1\.fc\.weight"),
    rules=(
        *_block(_UNIT, r"stage\1_conv\2"),
        *linear(r"output\.(fc[12])\.fc", r"\1"),
        *linear(r"output\.fc3", r"classifier"),
    ),
)

DENSENET = Layout(
    name="pytorchcv_densenet",
    description="DenseNets of pytorchcv: features.stage1.unit1.conv1.bn.weight, features.post_activ.bn.weight",
    signature=(r"features\.stage1\.unit1\.conv1\.bn\.weight", r"features\.post_activ\.bn\.weight"),
    rules=(
        *_block(r"features\.init_block", r"stem"),
        *norm(_UNIT + r"\.conv(\d)\.bn", r"block\1_layer\2/norm\3"),
        *conv(_UNIT + r"\.conv(\d)\.conv", r"block\1_layer\2/conv\3"),
        *norm(r"features\.stage\d\.trans(\d)\.conv\.bn", r"transition{\1-1}/norm"),
        *conv(r"features\.stage\d\.trans(\d)\.conv\.conv", r"transition{\1-1}/conv"),
        *norm(r"features\.post_activ\.bn", r"norm"),
        *linear(r"output", r"classifier"),
    ),
)

SHUFFLENET_V1 = Layout(
    name="pytorchcv_shufflenet_v1",
    description="ShuffleNet V1 of pytorchcv: features.init_block.conv.weight, ...unit1.compress_conv1.weight",
    signature=(r"features\.init_block\.conv\.weight", r"features\.stage1\.unit1\.compress_conv1\.weight"),
    rules=(
        *_block(r"features\.init_block", r"stem"),
        *_numbered("compress", 1, "compress"),
        *_numbered("dw", 2, "depthwise"),
        *_numbered("expand", 3, "expand"),
        *linear(r"output", r"classifier"),
    ),
)

SHUFFLENET_V2 = Layout(
    name="pytorchcv_shufflenet_v2",
    description="ShuffleNet V2 of pytorchcv: features.init_block.conv.conv.weight, ...unit1.compress_conv1.weight",
    signature=(r"features\.init_block\.conv\.conv\.weight", r"features\.stage1\.unit1\.compress_conv1\.weight"),
    rules=(
        *_block(r"features\.init_block\.conv", r"stem"),
        *_numbered("compress", 1, "compress"),
        *_numbered("dw", 2, "depthwise"),
        *_numbered("expand", 3, "expand"),
        *_numbered("dw", 4, "shortcut_depthwise"),
        *_numbered("expand", 5, "shortcut_expand"),
        *_block(r"features\.final_block", r"head"),
        *linear(r"output", r"classifier"),
    ),
)

SQUEEZENEXT = Layout(
    name="pytorchcv_squeezenext",
    description="SqueezeNexts of pytorchcv: features.stage1.unit1.conv5.conv.weight",
    signature=(r"features\.init_block\.conv\.conv\.weight", r"features\.stage1\.unit1\.conv5\.conv\.weight"),
    rules=(
        *_block(r"features\.init_block\.conv", r"stem"),
        *_block(_UNIT + r"\.(conv\d)", _TO_BLOCK + r"/\3"),
        *_block(_UNIT + r"\.identity_conv", _TO_BLOCK + r"/shortcut"),
        *_block(r"features\.final_block", r"head"),
        *linear(r"output", r"classifier"),
    ),
)

# Units, the branch and convolution there, and the convolution's name here (after the block's).
_INCEPTION_V3 = (
    (r"stage(1)\.unit(\d)", r"branch1\.conv", r"branch1x1"),
    (r"stage(1)\.unit(\d)", r"branch2\.conv_list\.conv(\d)", r"branch5x5_\3"),
    (r"stage(1)\.unit(\d)", r"branch3\.conv_list\.conv(\d)", r"branch3x3dbl_\3"),
    (r"stage(2)\.unit(1)", r"branch1\.conv_list\.conv1", r"branch3x3"),
    (r"stage(2)\.unit(1)", r"branch2\.conv_list\.conv(\d)", r"branch3x3dbl_\3"),
    (r"stage(2)\.unit([2-5])", r"branch1\.conv", r"branch1x1"),
    (r"stage(2)\.unit([2-5])", r"branch2\.conv_list\.conv(\d)", r"branch7x7_\3"),
    (r"stage(2)\.unit([2-5])", r"branch3\.conv_list\.conv(\d)", r"branch7x7dbl_\3"),
    (r"stage(3)\.unit(1)", r"branch1\.conv_list\.conv(\d)", r"branch3x3_\3"),
    (r"stage(3)\.unit(1)", r"branch2\.conv_list\.conv(\d)", r"branch7x7x3_\3"),
    (r"stage(3)\.unit([23])", r"branch1\.conv", r"branch1x1"),
    (r"stage(3)\.unit([23])", r"branch2\.conv_list\.conv1", r"branch3x3_1"),
    (r"stage(3)\.unit([23])", r"branch2\.conv1x3", r"branch3x3_2a"),
    (r"stage(3)\.unit([23])", r"branch2\.conv3x1", r"branch3x3_2b"),
    (r"stage(3)\.unit([23])", r"branch3\.conv_list\.conv(\d)", r"branch3x3dbl_\3"),
    (r"stage(3)\.unit([23])", r"branch3\.conv1x3", r"branch3x3dbl_3a"),
    (r"stage(3)\.unit([23])", r"branch3\.conv3x1", r"branch3x3dbl_3b"),
    (r"stage(\d)\.unit(\d)", r"branch4\.conv", r"branch_pool"),
)

INCEPTION_V3 = Layout(
    name="pytorchcv_inception_v3",
    description="Inception v3 of pytorchcv: features.stage1.unit1.branches.branch1.conv.conv.weight",
    signature=(r"features\.init_block\.conv5\.conv\.weight", r"features\.stage1\.unit1\.branches\.branch1\..+"),
    rules=(
        *_block(r"features\.init_block\.conv(\d)", r"stem\1"),
        *(
            rule
            for unit, branch, path in _INCEPTION_V3
            for rule in _block(rf"features\.{unit}\.branches\.{branch}", rf"{_TO_BLOCK}/{path}")
        ),
        *linear(r"output\.fc", r"classifier"),
    ),
)

PYTORCHCV = (
    RESNET,
    CIFAR_RESNET,
    REGNET,
    MOBILENET_V1,
    MOBILENET_V2,
    VGG,
    DENSENET,
    SHUFFLENET_V1,
    SHUFFLENET_V2,
    SQUEEZENEXT,
    INCEPTION_V3,
)
