"""What every room stands on: fields of records, files, arrays of images, precision, and steps of an optimizer."""

from dfq_jax.base.backend import platform_of
from dfq_jax.base.contexts import may_transfer
from dfq_jax.base.fields import check_field, is_non_negative, known_fields
from dfq_jax.base.files import replacing, write_atomically
from dfq_jax.base.images import batches, clip, low_pass, random_crop, random_flip, random_shift, random_window, smooth
from dfq_jax.base.interrupt import catch_interrupt
from dfq_jax.base.optimization import descend
from dfq_jax.base.precision import check_precision, full_precision, products

__all__ = [
    "batches",
    "catch_interrupt",
    "check_field",
    "check_precision",
    "clip",
    "descend",
    "full_precision",
    "is_non_negative",
    "known_fields",
    "low_pass",
    "may_transfer",
    "platform_of",
    "products",
    "random_crop",
    "random_flip",
    "random_shift",
    "random_window",
    "replacing",
    "smooth",
    "write_atomically",
]
