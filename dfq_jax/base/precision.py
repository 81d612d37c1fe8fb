"""Precision of float32 products: one policy for every backend.

GPUs multiply float32 in TF32 (three digits) and TPUs in bfloat16 (two) unless they are asked for more. What *decides*
(ranges, corrections, statistics, rounding by moments, comparisons, the choice among candidates) is computed in full
precision everywhere: `full_precision`. What is *optimized* (images, learned rounding, fine-tuning) may be fast; a field
`precision` of its config says how, and `products` applies it. The float network itself follows the caller's own setting
(`jax.default_matmul_precision`), which holds when a traced program runs, not when it is traced: see
`tracing.program.Op`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from dfq_jax.base.contexts import within
from dfq_jax.base.fields import check_field

PRECISIONS = ("default", "high", "highest")

full_precision = within(jax.default_matmul_precision, "highest")  # whatever JAX's setting is


def products(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which float32 products have the precision of a config's field; None keeps JAX's setting."""
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


def check_precision(value: object) -> None:
    """Refuse a field `precision` that is no precision.

    Raises:
      ValueError: it is none of `PRECISIONS`, nor None.
    """
    check_field(
        "precision", value, f"one of {PRECISIONS}, or None for JAX's setting", lambda v: v is None or v in PRECISIONS
    )
