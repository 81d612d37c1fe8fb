"""SqueezeNext in Linen (Gholami et al., SqueezeNext: Hardware-Aware Neural Network Design, arXiv 1803.10615).

Units are named `stage2_block1`, counted from 1. All convolutions have a bias of their own before the BatchNorm.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import ConvNorm, check_call, max_pool, staged

__all__ = ["VARIANTS", "SqueezeNext"]

STEM, HEAD = 64, 128
CHANNELS, STRIDES = (32, 64, 128, 256), (1, 2, 2, 2)  # of each stage
VARIANTS = {"23": (6, 6, 8, 1), "23v5": (2, 4, 14, 1)}  # units in each stage


class SqueezeNextUnit(nn.Module):
    """Two 1x1 reductions, a 3x3 convolution as 1x3 and 3x1, a 1x1 expansion, and a shortcut.

    Attributes:
      features: output channels.
      stride: of the first convolution and the shortcut.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        channels = x.shape[-1]
        projects = self.stride == 2 or channels > self.features
        reduction = 1 if self.stride == 2 else 4 if projects else 2
        wide, narrow = channels // reduction, channels // (2 * reduction)
        style = dict(use_bias=True, dtype=self.dtype)
        y = ConvNorm(wide, 1, self.stride, **style, name="conv1")(x, train)
        y = ConvNorm(narrow, 1, **style, name="conv2")(y, train)
        y = ConvNorm(wide, (1, 3), **style, name="conv3")(y, train)
        y = ConvNorm(wide, (3, 1), **style, name="conv4")(y, train)
        y = ConvNorm(self.features, 1, **style, name="conv5")(y, train)
        if projects:
            x = ConvNorm(self.features, 1, self.stride, **style, name="shortcut")(x, train)
        return nn.relu(y + x)


class SqueezeNext(nn.Module):
    """A SqueezeNext-23.

    Attributes:
      variant: "23", or "23v5" with more units in the third stage.
      num_classes: number of logits.
      width: factor on the channels of all layers: 1.0, 1.5 or 2.0.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `variant` is unknown, `num_classes` is below 1, `width` is not positive or
        the images are not `[N, H, W, C]`.
    """

    variant: str = "23"
    num_classes: int = 1000
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x, self.width)
        check_field("variant", self.variant, f"one of {', '.join(VARIANTS)}", VARIANTS.__contains__)
        style = dict(use_bias=True, dtype=self.dtype)
        x = ConvNorm(int(self.width * STEM), 7, 2, padding=1, **style, name="stem")(x, train)
        x = max_pool(x, 3, 2, (0, 1))
        for stage, name, stride in staged(VARIANTS[self.variant], STRIDES):
            x = SqueezeNextUnit(int(self.width * CHANNELS[stage]), stride, self.dtype, name=name)(x, train)
        x = ConvNorm(int(self.width * HEAD), 1, **style, name="head")(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))
