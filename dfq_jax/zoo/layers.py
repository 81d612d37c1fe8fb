"""What the networks of the zoo are made of, as Linen modules with the padding of torch.

torch pads the same number of zeros on both sides; "SAME" would, with stride 2, pad only at the end and shift the grid
by one pixel against networks trained that way. So every padding here is explicit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field

__all__ = [
    "ConvNorm",
    "adaptive_average_pool",
    "average_pool",
    "batch_norm",
    "channel_shuffle",
    "check_call",
    "conv",
    "max_pool",
    "staged",
]

KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Pair = int | tuple[int, int]


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _both_sides(padding: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = _pair(padding)
    return (height, height), (width, width)


def batch_norm(train: bool, dtype: Any, name: str, epsilon: float = 1e-5) -> nn.BatchNorm:
    """BatchNorm with torch's momentum 0.1, which Flax calls 0.9."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=epsilon, dtype=dtype, name=name)


def conv(features: int, kernel: int, stride: int, dtype: Any, name: str, init: Any = KERNEL_INIT) -> nn.Conv:
    """A convolution without bias, padded by half its window."""
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=_both_sides(kernel // 2), use_bias=False,
        kernel_init=init, dtype=dtype, name=name,
    )  # fmt: skip


class ConvNorm(nn.Module):
    """A convolution, a BatchNorm and an activation; submodules `conv` and `bn`.

    Attributes:
      features: output channels.
      kernel: side of the window, or its height and width.
      stride: of the window.
      padding: zeros on both sides, one number or one for each axis; None for half the window, which with stride 1
        keeps the image's size.
      groups: of the convolution; as many as channels for a depthwise one.
      use_bias: whether the convolution has a bias of its own.
      activation: elementwise function, or None.
      epsilon: of the BatchNorm.
      dtype: computation dtype; None takes that of the input and the parameters.
    """

    features: int
    kernel: Pair = 1
    stride: int = 1
    padding: Pair | None = None
    groups: int = 1
    use_bias: bool = False
    activation: Callable[[Array], Array] | None = nn.relu
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo f"]:
        """Applies the three: `[N, H, W, C]` to `[N, H', W', features]`."""
        height, width = _pair(self.kernel)
        padding = ((height - 1) // 2, (width - 1) // 2) if self.padding is None else self.padding
        x = nn.Conv(
            self.features, (height, width), _pair(self.stride), padding=_both_sides(padding),
            feature_group_count=self.groups, use_bias=self.use_bias, kernel_init=KERNEL_INIT, dtype=self.dtype,
            name="conv",
        )(x)  # fmt: skip
        x = batch_norm(train, self.dtype, "bn", self.epsilon)(x)
        return x if self.activation is None else self.activation(x)


def max_pool(x: Float[Array, "n h w c"], window: int, stride: int, padding: tuple[int, int]) -> Float[Array, "n p q c"]:
    """The largest value in each window; `padding` before and after both axes never wins."""
    return nn.max_pool(x, (window, window), (stride, stride), (padding, padding))


def average_pool(x: Float[Array, "n h w c"], window: int, stride: int, padding: int = 0) -> Float[Array, "n p q c"]:
    """The mean of each window, padding zeros counted, as torch does unless told otherwise."""
    return nn.avg_pool(x, (window, window), (stride, stride), _both_sides(padding))


def adaptive_average_pool(x: Float[Array, "n h w c"], side: int) -> Float[Array, "n s s c"]:
    """Means over `side` x `side` windows that together cover the image, as torch's AdaptiveAvgPool2d.

    Window i of an axis of length n spans from floor(i n / side) to ceil((i + 1) n / side).
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length != side:
            spans = [(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]
            means = [jnp.take(x, jnp.arange(*span), axis).mean(axis, keepdims=True) for span in spans]
            x = jnp.concatenate(means, axis)
    return x


def channel_shuffle(x: Float[Array, "n h w c"], groups: int) -> Float[Array, "n h w c"]:
    """Channels of `groups` groups interleaved, so that the next grouped convolution sees some of each.

    Source: Zhang et al., ShuffleNet, arXiv 1707.01083.
    """
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, groups, channels // groups)
    return x.swapaxes(3, 4).reshape(n, height, width, channels)


def staged(counts: Sequence[int], strides: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """The blocks of some stages: index of the stage, name, and stride, which the first block of a stage has.

    >>> list(staged((1, 2), (1, 2)))
    [(0, 'stage1_block1', 1), (1, 'stage2_block1', 2), (1, 'stage2_block2', 1)]
    """
    for stage, (count, stride) in enumerate(zip(counts, strides, strict=True)):
        for block in range(count):
            yield stage, f"stage{stage + 1}_block{block + 1}", 1 if block else stride


def check_call(num_classes: int, x: Array, width: float = 1.0) -> None:
    """The checks that every network makes at its first call.

    Raises:
      ValueError: if `num_classes` is below 1, `width` is not positive or the images are not `[N, H, W, C]`.
    """
    check_field("num_classes", num_classes, "at least 1", lambda number: number >= 1)
    check_field("width", width, "a positive factor", lambda factor: factor > 0)
    if x.ndim != 4:
        raise ValueError(f"x: expected images [N, H, W, C], found shape {x.shape}; add the missing axes")
