"""CIFAR ResNets of https://github.com/akamaster/pytorch_resnet_cifar10."""

from dfq_jax.zoo.layouts.table import Layout, Rule

AKAMASTER = Layout(
    name="akamaster",
    description="CIFAR ResNets of pytorch_resnet_cifar10: layer1.0.conv1.weight, linear.weight",
    signature=(r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"linear\.weight"),
    rules=(
        Rule(pattern=r"conv1\.weight", target=r"params/conv1/kernel", transform="conv"),
        Rule(pattern=r"bn1\.weight", target=r"params/bn1/scale"),
        Rule(pattern=r"bn1\.bias", target=r"params/bn1/bias"),
        Rule(pattern=r"bn1\.running_mean", target=r"batch_stats/bn1/mean"),
        Rule(pattern=r"bn1\.running_var", target=r"batch_stats/bn1/var"),
        Rule(
            pattern=r"layer(\d)\.(\d+)\.(conv\d)\.weight",
            target=r"params/layer\1_\2/\3/kernel",
            transform="conv",
        ),
        Rule(pattern=r"layer(\d)\.(\d+)\.(bn\d)\.weight", target=r"params/layer\1_\2/\3/scale"),
        Rule(pattern=r"layer(\d)\.(\d+)\.(bn\d)\.bias", target=r"params/layer\1_\2/\3/bias"),
        Rule(pattern=r"layer(\d)\.(\d+)\.(bn\d)\.running_mean", target=r"batch_stats/layer\1_\2/\3/mean"),
        Rule(pattern=r"layer(\d)\.(\d+)\.(bn\d)\.running_var", target=r"batch_stats/layer\1_\2/\3/var"),
        Rule(pattern=r"linear\.weight", target=r"params/linear/kernel", transform="linear"),
        Rule(pattern=r"linear\.bias", target=r"params/linear/bias"),
        Rule(pattern=r".*\.num_batches_tracked", target=None),
    ),
)
