"""RegNetX in Linen (Radosavovic et al., Designing Network Design Spaces, arXiv 2003.13678).

Residual blocks of a grouped 3x3 convolution between two of 1x1; every stage begins with stride 2. Blocks are named
`stage3_block5`, counted from 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import ConvNorm, check_call, staged

__all__ = ["VARIANTS", "RegNetX", "Variant"]

STEM = 32


class Variant(NamedTuple):
    """Blocks and channels of the four stages, and channels of a group."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    group_width: int


# The paper's table of RegNetX models, by megaflops.
VARIANTS: dict[str, Variant] = {
    "200MF": Variant((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "400MF": Variant((1, 2, 7, 12), (32, 64, 160, 400), 16),
    "600MF": Variant((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "800MF": Variant((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "1.6GF": Variant((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "3.2GF": Variant((2, 6, 15, 2), (96, 192, 432, 1008), 48),
}


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1, all of the same width, and a shortcut.

    Attributes:
      features: channels, inside and out.
      group_width: channels of a group of the 3x3 convolution.
      stride: of the 3x3 convolution and the shortcut.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    group_width: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        groups = self.features // self.group_width
        y = ConvNorm(self.features, dtype=self.dtype, name="conv1")(x, train)
        y = ConvNorm(self.features, 3, self.stride, groups=groups, dtype=self.dtype, name="conv2")(y, train)
        y = ConvNorm(self.features, activation=None, dtype=self.dtype, name="conv3")(y, train)
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = ConvNorm(self.features, 1, self.stride, activation=None, dtype=self.dtype, name="shortcut")
            x = shortcut(x, train)
        return nn.relu(y + x)


class RegNetX(nn.Module):
    """A RegNetX.

    Attributes:
      variant: a name in `VARIANTS`.
      num_classes: number of logits.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `variant` is unknown, `num_classes` is below 1 or the images are not
        `[N, H, W, C]`.
    """

    variant: str = "600MF"
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x)
        check_field("variant", self.variant, f"one of {', '.join(VARIANTS)}", VARIANTS.__contains__)
        depths, widths, group_width = VARIANTS[self.variant]
        x = ConvNorm(STEM, 3, 2, dtype=self.dtype, name="stem")(x, train)
        for stage, name, stride in staged(depths, (2, 2, 2, 2)):
            x = GroupedBottleneck(widths[stage], group_width, stride, self.dtype, name=name)(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))
