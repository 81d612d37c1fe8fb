"""Inception v3 in Linen (Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567).

Eleven blocks of parallel branches, concatenated. Blocks are named by image size, `stage2_block3` (Mixed_6c elsewhere),
their convolutions as in the first public implementation: `branch7x7dbl_2`. The auxiliary classifier, which serves
training alone, is left out.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.zoo.layers import ConvNorm, average_pool, check_call, max_pool

__all__ = ["InceptionV3"]

_ConvNorm = functools.partial(ConvNorm, epsilon=1e-3)


class InceptionA(nn.Module):
    """1x1, 5x5, double 3x3 and pooled branches: 224 + `pool_features` channels."""

    pool_features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w d"]:
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        a = conv(64, name="branch1x1")(x, train)
        b = conv(48, name="branch5x5_1")(x, train)
        b = conv(64, 5, name="branch5x5_2")(b, train)
        c = conv(64, name="branch3x3dbl_1")(x, train)
        c = conv(96, 3, name="branch3x3dbl_2")(c, train)
        c = conv(96, 3, name="branch3x3dbl_3")(c, train)
        d = conv(self.pool_features, name="branch_pool")(average_pool(x, 3, 1, 1), train)
        return jnp.concatenate([a, b, c, d], axis=-1)


class ReductionA(nn.Module):
    """Halves the image by a 3x3, a double 3x3 and a max-pool branch."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo d"]:
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        a = conv(384, 3, 2, 0, name="branch3x3")(x, train)
        b = conv(64, name="branch3x3dbl_1")(x, train)
        b = conv(96, 3, name="branch3x3dbl_2")(b, train)
        b = conv(96, 3, 2, 0, name="branch3x3dbl_3")(b, train)
        return jnp.concatenate([a, b, max_pool(x, 3, 2, (0, 0))], axis=-1)


class InceptionB(nn.Module):
    """1x1, 7x7, double 7x7 (as 1x7 and 7x1) and pooled branches of 192 channels each, `inner` inside."""

    inner: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w 768"]:
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        a = conv(192, name="branch1x1")(x, train)
        b = conv(self.inner, name="branch7x7_1")(x, train)
        b = conv(self.inner, (1, 7), name="branch7x7_2")(b, train)
        b = conv(192, (7, 1), name="branch7x7_3")(b, train)
        c = conv(self.inner, name="branch7x7dbl_1")(x, train)
        c = conv(self.inner, (7, 1), name="branch7x7dbl_2")(c, train)
        c = conv(self.inner, (1, 7), name="branch7x7dbl_3")(c, train)
        c = conv(self.inner, (7, 1), name="branch7x7dbl_4")(c, train)
        c = conv(192, (1, 7), name="branch7x7dbl_5")(c, train)
        d = conv(192, name="branch_pool")(average_pool(x, 3, 1, 1), train)
        return jnp.concatenate([a, b, c, d], axis=-1)


class ReductionB(nn.Module):
    """Halves the image by a 3x3, a 7x7 with 3x3, and a max-pool branch."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ho wo 1280"]:
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        a = conv(192, name="branch3x3_1")(x, train)
        a = conv(320, 3, 2, 0, name="branch3x3_2")(a, train)
        b = conv(192, name="branch7x7x3_1")(x, train)
        b = conv(192, (1, 7), name="branch7x7x3_2")(b, train)
        b = conv(192, (7, 1), name="branch7x7x3_3")(b, train)
        b = conv(192, 3, 2, 0, name="branch7x7x3_4")(b, train)
        return jnp.concatenate([a, b, max_pool(x, 3, 2, (0, 0))], axis=-1)


class InceptionC(nn.Module):
    """1x1, split 3x3, double split 3x3 and pooled branches."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w 2048"]:
        conv = functools.partial(_ConvNorm, dtype=self.dtype)

        def split(y: Array, name: str) -> list[Array]:
            return [conv(384, (1, 3), name=f"{name}a")(y, train), conv(384, (3, 1), name=f"{name}b")(y, train)]

        a = conv(320, name="branch1x1")(x, train)
        b = split(conv(384, name="branch3x3_1")(x, train), "branch3x3_2")
        c0 = conv(448, name="branch3x3dbl_1")(x, train)
        c = split(conv(384, 3, name="branch3x3dbl_2")(c0, train), "branch3x3dbl_3")
        d = conv(192, name="branch_pool")(average_pool(x, 3, 1, 1), train)
        return jnp.concatenate([a, *b, *c, d], axis=-1)


# The blocks of each image size, with the number of channels that they leave open.
STAGES: tuple[tuple[tuple[Any, ...], ...], ...] = (
    ((InceptionA, 32), (InceptionA, 64), (InceptionA, 64)),
    ((ReductionA,), (InceptionB, 128), (InceptionB, 160), (InceptionB, 160), (InceptionB, 192)),
    ((ReductionB,), (InceptionC,), (InceptionC,)),
)


class InceptionV3(nn.Module):
    """An Inception v3.

    Attributes:
      num_classes: number of logits.
      dropout: rate before the classifier in training, for which `apply` then needs the stream `dropout`.
      dtype: computation dtype; None takes that of the input and the parameters.

    Raises:
      ValueError: at the first call, if `num_classes` is below 1 or the images are not `[N, H, W, C]` or smaller
        than 75x75.
    """

    num_classes: int = 1000
    dropout: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Computes logits `[N, num_classes]` of images `[N, H, W, C]`; `train` as in `nn.BatchNorm`."""
        check_call(self.num_classes, x)
        if min(x.shape[1:3]) < 75:
            raise ValueError(f"x: Inception v3 takes images of at least 75x75 pixels, found shape {x.shape}")
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        x = conv(32, 3, 2, 0, name="stem1")(x, train)
        x = conv(32, 3, 1, 0, name="stem2")(x, train)
        x = conv(64, 3, name="stem3")(x, train)
        x = max_pool(x, 3, 2, (0, 0))
        x = conv(80, name="stem4")(x, train)
        x = conv(192, 3, 1, 0, name="stem5")(x, train)
        x = max_pool(x, 3, 2, (0, 0))
        for stage, blocks in enumerate(STAGES, start=1):
            for block, (module, *inner) in enumerate(blocks, start=1):
                x = module(*inner, dtype=self.dtype, name=f"stage{stage}_block{block}")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
