"""Two small Fashion-MNIST classifiers, one written in Linen and one in NNX.

Both take images `[N, 28, 28, 1]`, preprocessed as `(pixels / 255 - MEAN) / STD`, and return logits
`[N, 10]`. They are fully convolutional up to the global average pool, so other image sizes run as well.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from dfq_jax.zoo.layers import batch_norm

MEAN = 0.2860
STD = 0.3530
CLASSES = 10

STAGE_WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 3

STEM_WIDTH = 32
HEAD_WIDTH = 256
# (expansion, output channels, repeats, stride of the first repeat)
INVERTED_RESIDUALS = ((1, 24, 1, 1), (3, 32, 3, 1), (4, 64, 4, 2))


class ResNetBlock(nn.Module):
    """Basic residual block of two 3x3 convolutions: `[N, H, W, C] -> [N, H / stride, W / stride, width]`."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output."""
        shortcut = x
        y = _linen_conv(self.width, 3, self.stride, "conv1")(x)
        y = nn.relu(batch_norm(train, None, "bn1")(y))
        y = _linen_conv(self.width, 3, 1, "conv2")(y)
        y = batch_norm(train, None, "bn2")(y)
        if shortcut.shape != y.shape:
            shortcut = _linen_conv(self.width, 1, self.stride, "conv_proj")(x)
            shortcut = batch_norm(train, None, "bn_proj")(shortcut)
        return nn.relu(y + shortcut)


class FashionResNet20(nn.Module):
    """CIFAR-style ResNet-20 (He et al., 2016) in Linen: `[N, 28, 28, 1] -> [N, 10]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output."""
        x = _linen_conv(STAGE_WIDTHS[0], 3, 1, "conv_init")(x)
        x = nn.relu(batch_norm(train, None, "bn_init")(x))
        for stage, width in enumerate(STAGE_WIDTHS):
            for block in range(BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResNetBlock(width, stride, name=f"stage{stage}_block{block}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(CLASSES, name="head")(x)


class InvertedResidual(nnx.Module):
    """MobileNetV2 block: 1x1 expansion, 3x3 depthwise, linear 1x1 projection, residual where shapes match.

    `[N, H, W, C] -> [N, H / stride, W / stride, width]`; an expansion of 1 has no expansion convolution.
    """

    def __init__(self, in_width: int, width: int, expansion: int, stride: int, *, rngs: nnx.Rngs):
        hidden = in_width * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and in_width == width
        if self.expands:
            self.expand = _nnx_conv(in_width, hidden, 1, rngs=rngs)
            self.expand_bn = _nnx_norm(hidden, rngs=rngs)
        self.depthwise = _nnx_conv(hidden, hidden, 3, stride, groups=hidden, rngs=rngs)
        self.depthwise_bn = _nnx_norm(hidden, rngs=rngs)
        self.project = _nnx_conv(hidden, width, 1, rngs=rngs)
        self.project_bn = _nnx_norm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output."""
        y = nnx.relu6(self.expand_bn(self.expand(x))) if self.expands else x
        y = nnx.relu6(self.depthwise_bn(self.depthwise(y)))
        y = self.project_bn(self.project(y))
        return x + y if self.residual else y


class FashionMobileNet(nnx.Module):
    """Small MobileNetV2-style network in NNX: `[N, 28, 28, 1] -> [N, 10]`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = _nnx_conv(1, STEM_WIDTH, 3, 2, rngs=rngs)
        self.stem_bn = _nnx_norm(STEM_WIDTH, rngs=rngs)
        channels, count = STEM_WIDTH, 0
        for expansion, width, repeats, first_stride in INVERTED_RESIDUALS:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                block = InvertedResidual(channels, width, expansion, stride, rngs=rngs)
                setattr(self, f"block{count}", block)
                channels, count = width, count + 1
        self.block_count = count
        self.last = _nnx_conv(channels, HEAD_WIDTH, 1, rngs=rngs)
        self.last_bn = _nnx_norm(HEAD_WIDTH, rngs=rngs)
        self.head = nnx.Linear(HEAD_WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits."""
        x = nnx.relu6(self.stem_bn(self.stem(x)))
        for index in range(self.block_count):
            x = getattr(self, f"block{index}")(x)
        x = nnx.relu6(self.last_bn(self.last(x)))
        x = jnp.mean(x, axis=(1, 2))
        return self.head(x)


def mobilenet(rngs: nnx.Rngs | None = None) -> nnx.Module:
    """The NNX MobileNet with freshly initialized weights, in eval mode."""
    model = FashionMobileNet(rngs=nnx.Rngs(0) if rngs is None else rngs)
    model.eval()
    return model


def _linen_conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
    init = nn.initializers.he_normal()
    return nn.Conv(
        width, (kernel, kernel), (stride, stride), padding="SAME", use_bias=False, kernel_init=init, name=name
    )


def _nnx_conv(in_width: int, width: int, kernel: int, stride: int = 1, *, groups: int = 1, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        in_width,
        width,
        (kernel, kernel),
        (stride, stride),
        padding="SAME",
        use_bias=False,
        feature_group_count=groups,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def _nnx_norm(width: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)
