"""ShuffleNet V1 and V2 in Linen (Zhang et al., arXiv 1707.01083; Ma et al., arXiv 1807.11164).

Units are named `stage1_block1`, counted from 1; the first unit of every stage halves the image.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import ConvNorm, average_pool, channel_shuffle, check_call, max_pool, staged

__all__ = ["ShuffleNetV1", "ShuffleNetV2"]

STEM = 24
BLOCKS, STRIDES = (4, 8, 4), (2, 2, 2)
CHANNELS_V1 = {  # of the three stages, by groups
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
CHANNELS_V2 = {  # of the three stages and the last convolution, by width
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or with stride 2 appended to its mean.

    Attributes:
      features: output channels; a quarter of them inside.
      groups: of the 1x1 convolutions.
      first_groups: of the first one.
      stride: 1 or 2.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    groups: int
    first_groups: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        inner = self.features // 4
        added = self.features - (x.shape[-1] if self.stride == 2 else 0)
        linear = dict(activation=None, dtype=self.dtype)
        y = ConvNorm(inner, groups=self.first_groups, dtype=self.dtype, name="compress")(x, train)
        y = channel_shuffle(y, self.groups)
        y = ConvNorm(inner, 3, self.stride, groups=inner, **linear, name="depthwise")(y, train)
        y = ConvNorm(added, groups=self.groups, **linear, name="expand")(y, train)
        if self.stride == 2:
            return nn.relu(jnp.concatenate([y, average_pool(x, 3, 2, 1)], axis=-1))
        return nn.relu(y + x)


class ShuffleNetV1(nn.Module):
    """A ShuffleNet V1.

    Attributes:
      groups: of its 1x1 convolutions: 1, 2, 3, 4 or 8; with more groups it has more channels.
      num_classes: number of logits.
      width: factor on the channels of all layers: 1.0, 0.75, 0.5 or 0.25.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `groups` is another, `num_classes` is below 1, `width` is not positive or
        the images are not `[N, H, W, C]`.
    """

    groups: int = 3
    num_classes: int = 1000
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x, self.width)
        check_field("groups", self.groups, f"one of {', '.join(map(str, CHANNELS_V1))}", CHANNELS_V1.__contains__)
        x = ConvNorm(int(self.width * STEM), 3, 2, dtype=self.dtype, name="stem")(x, train)
        x = max_pool(x, 3, 2, (1, 1))
        for stage, name, stride in staged(BLOCKS, STRIDES):
            # The very first 1x1 convolution reads few channels and is not grouped.
            first_groups = 1 if name == "stage1_block1" else self.groups
            features = int(self.width * CHANNELS_V1[self.groups][stage])
            x = UnitV1(features, self.groups, first_groups, stride, self.dtype, name=name)(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))


class UnitV2(nn.Module):
    """1x1, depthwise 3x3, 1x1 on half the channels, then a shuffle with the other half.

    With stride 2 both branches read all channels, and the other one is a depthwise 3x3 and a 1x1 convolution.

    Attributes:
      features: output channels.
      stride: 1 or 2.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        half = self.features // 2

        def branch(y: Array, prefix: str) -> Array:
            channels = y.shape[-1]
            conv = ConvNorm(
                channels, 3, self.stride, groups=channels, activation=None, dtype=self.dtype, name=f"{prefix}depthwise"
            )
            return ConvNorm(half, dtype=self.dtype, name=f"{prefix}expand")(conv(y, train), train)

        if self.stride == 2:
            kept, y = branch(x, "shortcut_"), x
        else:
            kept, y = jnp.split(x, 2, axis=-1)
        y = ConvNorm(half, dtype=self.dtype, name="compress")(y, train)
        return channel_shuffle(jnp.concatenate([kept, branch(y, "")], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """A ShuffleNet V2.

    Attributes:
      width: 0.5, 1.0, 1.5 or 2.0.
      num_classes: number of logits.
      pool_padding: of the max pool after the stem, before and after both axes: (1, 1) in torchvision, (0, 1) for
        pytorchcv's `shufflenetv2_w1`, which pads at the end only.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `width` is another, `num_classes` is below 1 or the images are not
        `[N, H, W, C]`.
    """

    width: float = 1.0
    num_classes: int = 1000
    pool_padding: tuple[int, int] = (1, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x)
        check_field("width", self.width, f"one of {', '.join(map(str, CHANNELS_V2))}", CHANNELS_V2.__contains__)
        channels = CHANNELS_V2[self.width]
        x = ConvNorm(STEM, 3, 2, dtype=self.dtype, name="stem")(x, train)
        x = max_pool(x, 3, 2, self.pool_padding)
        for stage, name, stride in staged(BLOCKS, STRIDES):
            x = UnitV2(channels[stage], stride, self.dtype, name=name)(x, train)
        x = ConvNorm(channels[-1], dtype=self.dtype, name="head")(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))
