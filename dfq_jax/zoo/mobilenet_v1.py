"""MobileNetV1 in Linen (Howard et al., MobileNets, arXiv 1704.04861).

A stem and thirteen pairs of a depthwise 3x3 and a pointwise 1x1 convolution. Blocks are named by stage, the first block
of every stage but the first having stride 2: `stage4_block6/pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.zoo.layers import ConvNorm, check_call, staged

__all__ = ["MobileNetV1"]

STEM = 32
CHANNELS, BLOCKS, STRIDES = (64, 128, 256, 512, 1024), (1, 2, 2, 6, 2), (1, 2, 2, 2, 2)  # of each stage


class MobileNetV1(nn.Module):
    """A MobileNetV1.

    Attributes:
      num_classes: number of logits.
      width: factor on the channels of all layers: 1.0, 0.75, 0.5 or 0.25 as published.
      activation: `nn.relu` (pytorchcv) or `nn.relu6` (timm, TensorFlow).
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `num_classes` is below 1, `width` is not positive or the images are not
        `[N, H, W, C]`.
    """

    num_classes: int = 1000
    width: float = 1.0
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x, self.width)
        style = dict(activation=self.activation, dtype=self.dtype)
        x = ConvNorm(int(self.width * STEM), 3, 2, **style, name="stem")(x, train)
        for stage, name, stride in staged(BLOCKS, STRIDES):
            x = SeparableBlock(int(self.width * CHANNELS[stage]), stride, **style, name=name)(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one.

    Attributes:
      features: output channels.
      stride: of the depthwise convolution.
      activation: after both.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    stride: int = 1
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        channels, style = x.shape[-1], dict(activation=self.activation, dtype=self.dtype)
        x = ConvNorm(channels, 3, self.stride, groups=channels, **style, name="depthwise")(x, train)
        return ConvNorm(self.features, **style, name="pointwise")(x, train)
