"""Checks of the fields of frozen records, all with one form of message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any


def is_non_negative(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def known_fields(record: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass as read from a file.

    Raises:
      ValueError: the dataclass has not all of them; all the others are named.
    """
    if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(record)}):
        raise ValueError(f"unknown fields of {record.__name__}: {unknown}")
    return dict(fields)


def check_field(name: str, value: object, wanted: str, ok: Callable[[Any], bool]) -> None:
    """Refuse a value by the name of its field.

    Raises:
      ValueError: `ok(value)` is false.
    """
    if not ok(value):
        raise ValueError(f"{name}: expected {wanted}, found {value!r}.")
