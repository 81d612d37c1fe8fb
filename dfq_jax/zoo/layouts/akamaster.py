"""CIFAR ResNets of https://github.com/akamaster/pytorch_resnet_cifar10."""

from dfq_jax.zoo.layouts.table import Layout, conv, linear, norm

AKAMASTER = Layout(
    name="akamaster",
    description="CIFAR ResNets of pytorch_resnet_cifar10: layer1.0.conv1.weight, linear.weight",
    signature=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"linear\.weight"),
    rules=(
        *conv(r"conv1", r"conv1"),
        *norm(r"bn1", r"bn1"),
        *conv(r"layer(\d)\.(\d+)\.(conv\d)", r"layer\1_\2/\3"),
        *norm(r"layer(\d)\.(\d+)\.(bn\d)", r"layer\1_\2/\3"),
        *linear(r"linear", r"linear"),
    ),
)
