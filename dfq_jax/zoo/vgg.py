"""VGG-16 with BatchNorm in Linen (Simonyan and Zisserman, arXiv 1409.1556).

Convolutions are named by stage, with a 2x2 max pool after each: `stage3_conv1`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from dfq_jax.zoo.layers import ConvNorm, adaptive_average_pool, check_call, max_pool

__all__ = ["VGG16"]

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of each
HIDDEN = 4096
POOLED_SIDE = 7  # of the image that the dense layers read


class VGG16(nn.Module):
    """A VGG-16 with BatchNorm.

    Attributes:
      num_classes: number of logits.
      conv_bias: whether convolutions have a bias before their BatchNorm, as in torchvision, timm and pytorchcv's
        `bn_vgg16b`; pytorchcv's `bn_vgg16` has none.
      dropout: rate after each hidden dense layer in training, for which `apply` then needs the stream `dropout`.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `num_classes` is below 1 or the images are not `[N, H, W, C]`.
    """

    num_classes: int = 1000
    conv_bias: bool = True
    dropout: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits.

        Args:
          x: preprocessed images `[N, H, W, C]`. Of other sizes than 224 the last feature maps are averaged to 7x7,
            as in torchvision; the least is 32.
          train: normalize by the batch's statistics, update the running ones, and drop activations.

        Returns:
          Logits `[N, num_classes]`.
        """
        check_call(self.num_classes, x)
        for stage, (features, count) in enumerate(STAGES, start=1):
            for index in range(1, count + 1):
                name = f"stage{stage}_conv{index}"
                x = ConvNorm(features, 3, use_bias=self.conv_bias, dtype=self.dtype, name=name)(x, train)
            x = max_pool(x, 2, 2, (0, 0))
        x = adaptive_average_pool(x, POOLED_SIDE)
        # Channels first, then flat: the order that the trained dense layers have their inputs in.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(HIDDEN, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
