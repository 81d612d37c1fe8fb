"""DenseNet in Linen (Huang et al., Densely Connected Convolutional Networks, arXiv 1608.06993).

Each layer reads all earlier outputs of its dense block, normalized before the convolution: most BatchNorms here follow
no convolution directly. Layers are named `block2_layer5`, what is between blocks `transition2`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import check_field
from dfq_jax.zoo.layers import ConvNorm, average_pool, batch_norm, check_call, conv, max_pool

__all__ = ["DEPTHS", "DenseNet"]

DEPTHS: dict[int, tuple[int, int, int, int]] = {
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
}  # layers in each dense block
STEM = 64
GROWTH = 32
BOTTLENECK = 4 * GROWTH


class DenseLayer(nn.Module):
    """Appends `GROWTH` channels, computed by a 1x1 and a 3x3 convolution with BatchNorm and ReLU before each."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w d"]:
        y = nn.relu(batch_norm(train, self.dtype, "norm1")(x))
        y = conv(BOTTLENECK, 1, 1, self.dtype, "conv1")(y)
        y = nn.relu(batch_norm(train, self.dtype, "norm2")(y))
        y = conv(GROWTH, 3, 1, self.dtype, "conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Halves channels by a 1x1 convolution, with BatchNorm and ReLU before it, and the image by an average pool."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo d"]:
        y = nn.relu(batch_norm(train, self.dtype, "norm")(x))
        y = conv(x.shape[-1] // 2, 1, 1, self.dtype, "conv")(y)
        return average_pool(y, 2, 2)


class DenseNet(nn.Module):
    """A DenseNet with growth rate 32.

    Attributes:
      depth: 121, 169 or 201.
      num_classes: number of logits.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `depth` is another, `num_classes` is below 1 or the images are not
        `[N, H, W, C]`.
    """

    depth: int = 121
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x)
        check_field("depth", self.depth, f"one of {', '.join(map(str, DEPTHS))}", DEPTHS.__contains__)
        x = ConvNorm(STEM, 7, 2, dtype=self.dtype, name="stem")(x, train)
        x = max_pool(x, 3, 2, (1, 1))
        for block, count in enumerate(DEPTHS[self.depth], start=1):
            if block > 1:
                x = Transition(self.dtype, name=f"transition{block - 1}")(x, train)
            for layer in range(1, count + 1):
                x = DenseLayer(self.dtype, name=f"block{block}_layer{layer}")(x, train)
        x = nn.relu(batch_norm(train, self.dtype, "norm")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(jnp.mean(x, axis=(1, 2)))
