"""The layouts that `load_checkpoint` recognizes, one program a module."""

from dfq_jax.zoo.layouts.akamaster import AKAMASTER
from dfq_jax.zoo.layouts.efficientnet_lite import EFFICIENTNET_LITE
from dfq_jax.zoo.layouts.flax import FLAX
from dfq_jax.zoo.layouts.pytorchcv import PYTORCHCV
from dfq_jax.zoo.layouts.table import TRANSFORMS, Layout, Rule
from dfq_jax.zoo.layouts.timm import TIMM
from dfq_jax.zoo.layouts.torchvision import TORCHVISION

__all__ = [
    "AKAMASTER",
    "EFFICIENTNET_LITE",
    "FLAX",
    "LAYOUTS",
    "PYTORCHCV",
    "TIMM",
    "TORCHVISION",
    "TRANSFORMS",
    "Layout",
    "Rule",
]

LAYOUTS: tuple[Layout, ...] = (AKAMASTER, EFFICIENTNET_LITE, *TORCHVISION, *TIMM, *PYTORCHCV, FLAX)
