"""EfficientNet-Lite of https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch, after lukemelas' EfficientNet."""

from dfq_jax.zoo.layouts.table import Layout, conv, linear, norm

EFFICIENTNET_LITE = Layout(
    name="efficientnet_lite",
    description="EfficientNet-Lite of EfficientNet-Lite-PyTorch: _conv_stem.weight, _blocks.0._bn1.weight, _fc.weight",
    signature=(r"_conv_stem\.weight", r"_blocks\.0\._depthwise_conv\.weight", r"_fc\.weight"),
    rules=(
        *conv(r"_(conv_stem|conv_head)", r"\1"),
        *norm(r"_(bn\d)", r"\1"),
        *conv(r"_blocks\.(\d+)\._(\w+_conv)", r"blocks_\1/\2"),
        *norm(r"_blocks\.(\d+)\._(bn\d)", r"blocks_\1/\2"),
        *linear(r"_fc", r"fc"),
    ),
)
