"""ResNets for ImageNet in Linen (He et al., Deep Residual Learning, arXiv 1512.03385).

The stride of a bottleneck is on its 3x3 convolution ("v1.5"; torchvision, timm, pytorchcv's `resnet50b`) or, as
published, on its first 1x1 (`stride_on_1x1`; pytorchcv's `resnet50`). Blocks are named `stage2_block1`, counted from 1.

    module = ResNet(depth=50)
    variables = load_checkpoint("resnet50-0676ba61.pth", jax.eval_shape(module.init, key, x))
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import ConvNorm, check_call, max_pool, staged

__all__ = ["DEPTHS", "BasicBlock", "Bottleneck", "ResNet"]

# Blocks in each of the four stages; from depth 50 on they are bottlenecks.
DEPTHS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BOTTLENECK_DEPTH = 50
STAGE_CHANNELS = (64, 128, 256, 512)  # of basic blocks; bottlenecks have EXPANSION times as many
STAGE_STRIDES = (1, 2, 2, 2)
EXPANSION = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        y = ConvNorm(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x, train)
        y = ConvNorm(self.features, 3, activation=None, dtype=self.dtype, name="conv2")(y, train)
        return nn.relu(y + _shortcut(self, x, train))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, and a shortcut.

    Attributes:
      features: output channels; a quarter of them inside.
      stride: of the block.
      stride_on_1x1: the first convolution has the stride, in place of the 3x3 one.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    stride: int = 1
    stride_on_1x1: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        inner = self.features // EXPANSION
        first, second = (self.stride, 1) if self.stride_on_1x1 else (1, self.stride)
        y = ConvNorm(inner, 1, first, dtype=self.dtype, name="conv1")(x, train)
        y = ConvNorm(inner, 3, second, dtype=self.dtype, name="conv2")(y, train)
        y = ConvNorm(self.features, 1, activation=None, dtype=self.dtype, name="conv3")(y, train)
        return nn.relu(y + _shortcut(self, x, train))


def _shortcut(block: BasicBlock | Bottleneck, x: Array, train: bool) -> Array:
    """The input, or a projection of it where the block changes its shape."""
    if block.stride == 1 and x.shape[-1] == block.features:
        return x
    return ConvNorm(block.features, 1, block.stride, activation=None, dtype=block.dtype, name="shortcut")(x, train)


class ResNet(nn.Module):
    """A ResNet for ImageNet.

    Attributes:
      depth: 18, 34, 50, 101 or 152.
      num_classes: number of logits.
      stride_on_1x1: where bottlenecks have their stride; see the module's docstring.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `depth` is another, `num_classes` is below 1 or the images are not
        `[N, H, W, C]`.
    """

    depth: int = 50
    num_classes: int = 1000
    stride_on_1x1: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x)
        check_field("depth", self.depth, f"one of {', '.join(map(str, DEPTHS))}", DEPTHS.__contains__)
        x = ConvNorm(64, 7, 2, dtype=self.dtype, name="stem")(x, train)
        x = max_pool(x, 3, 2, (1, 1))
        for stage, name, stride in staged(DEPTHS[self.depth], STAGE_STRIDES):
            x = self._block(STAGE_CHANNELS[stage], stride, name)(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))

    def _block(self, features: int, stride: int, name: str) -> BasicBlock | Bottleneck:
        if self.depth < BOTTLENECK_DEPTH:
            return BasicBlock(features, stride, self.dtype, name=name)
        return Bottleneck(EXPANSION * features, stride, self.stride_on_1x1, self.dtype, name=name)
