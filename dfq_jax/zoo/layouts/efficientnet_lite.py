"""EfficientNet-Lite of https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch, after lukemelas' EfficientNet."""

from dfq_jax.zoo.layouts.table import Layout, Rule

EFFICIENTNET_LITE = Layout(
    name="efficientnet_lite",
    description="EfficientNet-Lite of EfficientNet-Lite-PyTorch: _conv_stem.weight, _blocks.0._bn1.weight, _fc.weight",
    signature=(r"_conv_stem\.weight", r"_blocks\.0\._depthwise_conv\.weight", r"_fc\.weight"),
    rules=(
        Rule(pattern=r"_(conv_stem|conv_head)\.weight", target=r"params/\1/kernel", transform="conv"),
        Rule(pattern=r"_(bn\d)\.weight", target=r"params/\1/scale"),
        Rule(pattern=r"_(bn\d)\.bias", target=r"params/\1/bias"),
        Rule(pattern=r"_(bn\d)\.running_mean", target=r"batch_stats/\1/mean"),
        Rule(pattern=r"_(bn\d)\.running_var", target=r"batch_stats/\1/var"),
        Rule(pattern=r"_blocks\.(\d+)\._(\w+_conv)\.weight", target=r"params/blocks_\1/\2/kernel", transform="conv"),
        Rule(pattern=r"_blocks\.(\d+)\._(bn\d)\.weight", target=r"params/blocks_\1/\2/scale"),
        Rule(pattern=r"_blocks\.(\d+)\._(bn\d)\.bias", target=r"params/blocks_\1/\2/bias"),
        Rule(pattern=r"_blocks\.(\d+)\._(bn\d)\.running_mean", target=r"batch_stats/blocks_\1/\2/mean"),
        Rule(pattern=r"_blocks\.(\d+)\._(bn\d)\.running_var", target=r"batch_stats/blocks_\1/\2/var"),
        Rule(pattern=r"_fc\.weight", target=r"params/fc/kernel", transform="linear"),
        Rule(pattern=r"_fc\.bias", target=r"params/fc/bias"),
        Rule(pattern=r".*\.num_batches_tracked", target=None),
    ),
)
