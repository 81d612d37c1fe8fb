"""The CIFAR ResNets of He et al. (2015), section 4.2, as Linen modules.

A network of depth ``6 n + 2`` has a 3x3 stem and three stages of ``n`` basic blocks with 16, 32 and 64
channels. Where a block changes the number of channels, its shortcut is the paper's option A, without parameters
(every second row and column of the input, new channels zero), or option B, a 1x1 convolution.

Submodules are named so that checkpoints of other implementations map by reading: ``layer1.0.conv1`` there is
``layer1_0/conv1`` here.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import batch_norm, check_call, conv

__all__ = ["BasicBlock", "CifarResNet"]

_STAGE_CHANNELS = (16, 32, 64)
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_conv = functools.partial(conv, init=_KERNEL_INIT)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization and a shortcut.

    Attributes:
      features: output channels; where they differ from the input's, the new channels of an option-A shortcut are
        zero, half of them before and half after the input's channels.
      stride: 1 or 2, of the first convolution and of the shortcut.
      dtype: computation dtype; None takes that of the input and the parameters.
      shortcut: ``"pad"`` (option A) or ``"projection"`` (option B).
    """

    features: int
    stride: int = 1
    dtype: Any = None
    shortcut: str = "pad"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """Applies the block: `[N, H, W, C]` to `[N, ceil(H/stride), ceil(W/stride), features]`."""
        y = _conv(self.features, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(batch_norm(train, self.dtype, "bn1")(y))
        y = _conv(self.features, 3, 1, self.dtype, "conv2")(y)
        y = batch_norm(train, self.dtype, "bn2")(y)
        if self.stride != 1 or self.features != x.shape[-1]:
            x = self._project(x, train) if self.shortcut == "projection" else self._pad(x)
        return nn.relu(y + x)

    def _project(self, x: Array, train: bool) -> Array:
        x = _conv(self.features, 1, self.stride, self.dtype, "shortcut_conv")(x)
        return batch_norm(train, self.dtype, "shortcut_bn")(x)

    def _pad(self, x: Array) -> Array:
        x = x[:, :: self.stride, :: self.stride]
        new = self.features - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class CifarResNet(nn.Module):
    """A CIFAR ResNet.

    Attributes:
      depth: ``6 n + 2`` for an ``n >= 1``: 8, 14, 20, 32, 44, 56, 110...
      num_classes: number of logits.
      dtype: computation dtype; None takes that of the input and the parameters.
      shortcut: ``"pad"`` (option A, as in akamaster's checkpoints) or ``"projection"`` (option B, as in pytorchcv's).

    Raises:
      ValueError: at the first call, if `depth` is not of that form, `shortcut` is unknown, `num_classes` is below 1
        or the images are not `[N, H, W, C]`.
    """

    depth: int = 20
    num_classes: int = 10
    dtype: Any = None
    shortcut: str = "pad"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits.

        Args:
          x: preprocessed images `[N, H, W, C]`; the trained networks take `[N, 32, 32, 3]`.
          train: normalize by the batch's statistics and update the running ones (collection
            ``batch_stats``).

        Returns:
          Logits `[N, num_classes]`.
        """
        check_field("depth", self.depth, "6 n + 2 (8, 14, 20, ...)", lambda depth: depth >= 8 and depth % 6 == 2)
        check_field("shortcut", self.shortcut, "'pad' or 'projection'", ("pad", "projection").__contains__)
        check_call(self.num_classes, x)
        x = _conv(_STAGE_CHANNELS[0], 3, 1, self.dtype, "conv1")(x)
        x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        for stage, features in enumerate(_STAGE_CHANNELS, start=1):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}_{block}"
                x = BasicBlock(features, stride, self.dtype, self.shortcut, name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=_KERNEL_INIT, name="linear")(x)
