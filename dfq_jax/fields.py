"""Checks of the fields of frozen configs, all with one form of message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def is_non_negative(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def check_field(name: str, value: object, wanted: str, ok: Callable[[Any], bool]) -> None:
    """Refuse a value by the name of its field.

    Raises:
      ValueError: `ok(value)` is false.
    """
    if not ok(value):
        raise ValueError(f"{name}: expected {wanted}, found {value!r}.")
