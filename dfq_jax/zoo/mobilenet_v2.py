"""MobileNetV2 in Linen (Sandler et al., Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381).

Blocks are named by the rows of the paper's table 2: `stage3_block2/expand`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.zoo.layers import ConvNorm, check_call, staged

__all__ = ["InvertedResidual", "MobileNetV2"]

STEM, HEAD = 32, 1280
# Of each stage; the stride is that of its first block.
EXPANSIONS, CHANNELS = (1, 6, 6, 6, 6, 6, 6), (16, 24, 32, 64, 96, 160, 320)
BLOCKS, STRIDES = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual where shapes match.

    Attributes:
      features: output channels.
      expansion: factor on the input's channels between the first two; 0 for no expansion convolution.
      stride: of the depthwise convolution.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    expansion: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        channels = x.shape[-1]
        hidden = channels * max(self.expansion, 1)
        style = dict(activation=nn.relu6, dtype=self.dtype)
        y = ConvNorm(hidden, **style, name="expand")(x, train) if self.expansion else x
        y = ConvNorm(hidden, 3, self.stride, groups=hidden, **style, name="depthwise")(y, train)
        y = ConvNorm(self.features, activation=None, dtype=self.dtype, name="project")(y, train)
        return x + y if self.stride == 1 and channels == self.features else y


class MobileNetV2(nn.Module):
    """A MobileNetV2.

    Attributes:
      num_classes: number of logits.
      width: factor on the channels of all layers but, where it is below 1, the last convolution. Channels are
        rounded down, as pytorchcv does; at 1.0, and only there, that is what torchvision and timm have, too.
      first_expansion: whether the first block has a (1x1, factor 1) expansion convolution, as in pytorchcv's
        `mobilenetv2_w1`; torchvision, timm and pytorchcv's `mobilenetv2b_w1` have none.
      classifier_bias: whether the classifier has a bias; pytorchcv's have none.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `num_classes` is below 1, `width` is not positive or the images are not
        `[N, H, W, C]`.
    """

    num_classes: int = 1000
    width: float = 1.0
    first_expansion: bool = False
    classifier_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x, self.width)
        style = dict(activation=nn.relu6, dtype=self.dtype)
        x = ConvNorm(int(self.width * STEM), 3, 2, **style, name="stem")(x, train)
        for stage, name, stride in staged(BLOCKS, STRIDES):
            expansion = EXPANSIONS[stage] if stage or self.first_expansion else 0
            features = int(self.width * CHANNELS[stage])
            x = InvertedResidual(features, expansion, stride, self.dtype, name=name)(x, train)
        x = ConvNorm(int(max(self.width, 1.0) * HEAD), **style, name="head")(x, train)
        classifier = nn.Dense(self.num_classes, use_bias=self.classifier_bias, dtype=self.dtype, name="classifier")
        return classifier(jnp.mean(x, axis=(1, 2)))
