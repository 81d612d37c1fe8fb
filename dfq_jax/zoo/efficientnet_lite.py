"""EfficientNet-Lite as Linen modules: the EfficientNets made for integer arithmetic.

Mobile inverted bottlenecks (Sandler et al. 2018, arXiv 1801.04381) in the arrangement of EfficientNet (Tan & Le 2019,
arXiv 1905.11946), without squeeze-and-excitation and with ReLU6 in place of swish. Width and depth grow from Lite0 to
Lite4 for all stages but the stem, the first and last stage's depth and the head.

Padding is TensorFlow's "SAME": at stride 2 and even sizes one pixel more at the end, as the published networks were
trained. Submodules are named as in the torch ports: ``_blocks.0._bn1`` there is ``blocks_0/bn1`` here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import KERNEL_INIT, check_call

__all__ = ["EfficientNetLite", "InvertedBottleneck"]


class _Stage(NamedTuple):
    blocks: int
    kernel: int
    stride: int
    expansion: int
    features: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
_STEM_FEATURES = 32
_HEAD_FEATURES = 1280
_DIVISOR = 8


def _conv(features: int, kernel: int, stride: int, groups: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding="SAME", feature_group_count=groups, use_bias=False,
        dtype=dtype, kernel_init=KERNEL_INIT, name=name,
    )  # fmt: skip


def _norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3, dtype=dtype, name=name)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut where input and output have one shape.

    Attributes:
      features: output channels.
      kernel: side of the depthwise kernel.
      stride: 1 or 2, of the depthwise convolution.
      expansion: channels of the depthwise convolution over those of the input; 1 leaves the expansion out.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    expansion: int = 6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """Applies the block: `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), features]`."""
        wide = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = _conv(wide, 1, 1, 1, self.dtype, "expand_conv")(y)
            y = nn.relu6(_norm(train, self.dtype, "bn0")(y))
        y = _conv(wide, self.kernel, self.stride, wide, self.dtype, "depthwise_conv")(y)
        y = nn.relu6(_norm(train, self.dtype, "bn1")(y))
        y = _conv(self.features, 1, 1, 1, self.dtype, "project_conv")(y)
        y = _norm(train, self.dtype, "bn2")(y)
        return y + x if x.shape == y.shape else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite for any width and depth.

    Attributes:
      width: factor for the channels of all stages, rounded to multiples of 8: 1.0, 1.0, 1.1, 1.2 and 1.4 from Lite0
        to Lite4.
      depth: factor for the blocks of all stages but the first and the last, rounded up: 1.0, 1.1, 1.2, 1.4 and 1.8.
      dropout: share of the pooled features that training drops.
      num_classes: number of logits.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `width` or `depth` is not positive, `num_classes` is below 1 or the images
        are not `[N, H, W, C]`.
    """

    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits.

        Args:
          x: preprocessed images `[N, H, W, C]`, values from -1 to 1; any size, best that of training.
          train: normalize by the batch's statistics, update the running ones (collection ``batch_stats``), and
            drop features (random stream ``dropout``).

        Returns:
          Logits `[N, num_classes]`.
        """
        check_call(self.num_classes, x, self.width)
        check_field("depth", self.depth, "a positive factor", lambda depth: depth > 0)
        x = _conv(_STEM_FEATURES, 3, 2, 1, self.dtype, "conv_stem")(x)
        x = nn.relu6(_norm(train, self.dtype, "bn0")(x))
        index = 0
        for number, stage in enumerate(_STAGES):
            fixed = number in (0, len(_STAGES) - 1)
            for block in range(stage.blocks if fixed else math.ceil(stage.blocks * self.depth)):
                x = InvertedBottleneck(
                    features=_scaled(stage.features, self.width),
                    kernel=stage.kernel,
                    stride=stage.stride if block == 0 else 1,
                    expansion=stage.expansion,
                    dtype=self.dtype,
                    name=f"blocks_{index}",
                )(x, train)
                index += 1
        x = _conv(_HEAD_FEATURES, 1, 1, 1, self.dtype, "conv_head")(x)
        x = nn.relu6(_norm(train, self.dtype, "bn1")(x))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


def _scaled(features: int, width: float) -> int:
    """Channels times `width`, to the nearest multiple of 8 that is not more than a tenth too small."""
    wanted = features * width
    rounded = max(_DIVISOR, int(wanted + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded if rounded >= 0.9 * wanted else rounded + _DIVISOR
