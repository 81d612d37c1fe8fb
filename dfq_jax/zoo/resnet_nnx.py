"""The ResNets of `resnet` written in NNX: the same networks, names and checkpoints.

Where Linen has collections, an NNX state has all leaves of a layer together: `params/stem/bn/scale` and
`batch_stats/stem/bn/mean` are `stem/bn/scale` and `stem/bn/mean` here. `load_checkpoint` knows both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import KERNEL_INIT, max_pool, staged
from dfq_jax.zoo.resnet import BOTTLENECK_DEPTH, DEPTHS, EXPANSION, STAGE_CHANNELS, STAGE_STRIDES

__all__ = ["BasicBlock", "Bottleneck", "ConvNorm", "ResNet", "resnet"]


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half its window, a BatchNorm, and a ReLU unless `activate` is False."""

    def __init__(
        self, channels: int, features: int, kernel: int, stride: int = 1, *, activate: bool = True,
        dtype: Any = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        padding = (kernel - 1) // 2
        self.conv = nnx.Conv(
            channels, features, (kernel, kernel), (stride, stride), padding=((padding, padding), (padding, padding)),
            use_bias=False, kernel_init=KERNEL_INIT, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.bn = nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.activate = activate

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        x = self.bn(self.conv(x))
        return nnx.relu(x) if self.activate else x


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut: `[N, H, W, channels]` to `[N, H / stride, W / stride, features]`."""

    def __init__(self, channels: int, features: int, stride: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.conv1 = ConvNorm(channels, features, 3, stride, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(features, features, 3, activate=False, dtype=dtype, rngs=rngs)
        self.shortcut = _shortcut(channels, features, stride, dtype, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        y = self.conv2(self.conv1(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """A 3x3 convolution between two of 1x1, and a shortcut; the stride is on the 3x3 unless `stride_on_1x1`."""

    def __init__(
        self, channels: int, features: int, stride: int, *, stride_on_1x1: bool = False, dtype: Any = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        inner = features // EXPANSION
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        self.conv1 = ConvNorm(channels, inner, 1, first, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(inner, inner, 3, second, dtype=dtype, rngs=rngs)
        self.conv3 = ConvNorm(inner, features, 1, activate=False, dtype=dtype, rngs=rngs)
        self.shortcut = _shortcut(channels, features, stride, dtype, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """The block's output."""
        y = self.conv3(self.conv2(self.conv1(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _shortcut(channels: int, features: int, stride: int, dtype: Any, rngs: nnx.Rngs) -> ConvNorm | None:
    if stride == 1 and channels == features:
        return None
    return ConvNorm(channels, features, 1, stride, activate=False, dtype=dtype, rngs=rngs)


class ResNet(nnx.Module):
    """A ResNet for ImageNet: images `[N, H, W, 3]` to logits `[N, num_classes]`.

    Args:
      depth: 18, 34, 50, 101 or 152.
      num_classes: number of logits.
      stride_on_1x1: bottlenecks have their stride on the first convolution, in place of the 3x3 one.
      dtype: computation dtype; None takes that of the input and the parameters.
      rngs: where initial weights come from.

    Raises:
      ValueError: if `depth` is another or `num_classes` is below 1.
    """

    def __init__(
        self, depth: int = 50, num_classes: int = 1000, *, stride_on_1x1: bool = False, dtype: Any = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        check_field("depth", depth, f"one of {', '.join(map(str, DEPTHS))}", DEPTHS.__contains__)
        check_field("num_classes", num_classes, "at least 1", lambda number: number >= 1)
        self.stem = ConvNorm(3, 64, 7, 2, dtype=dtype, rngs=rngs)
        self.block_names: tuple[str, ...] = ()
        channels = 64
        for stage, name, stride in staged(DEPTHS[depth], STAGE_STRIDES):
            features = STAGE_CHANNELS[stage]
            module: BasicBlock | Bottleneck
            if depth < BOTTLENECK_DEPTH:
                module = BasicBlock(channels, features, stride, dtype=dtype, rngs=rngs)
            else:
                features *= EXPANSION
                module = Bottleneck(channels, features, stride, stride_on_1x1=stride_on_1x1, dtype=dtype, rngs=rngs)
            setattr(self, name, module)
            self.block_names = (*self.block_names, name)
            channels = features
        self.classifier = nnx.Linear(channels, num_classes, kernel_init=KERNEL_INIT, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n k"]:
        """The logits."""
        x = max_pool(self.stem(x), 3, 2, (1, 1))
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))


def resnet(depth: int, rngs: nnx.Rngs | None = None) -> ResNet:
    """A ResNet with freshly initialized weights, in eval mode."""
    module = ResNet(depth, rngs=nnx.Rngs(jax.random.key(0)) if rngs is None else rngs)
    module.eval()
    return module
