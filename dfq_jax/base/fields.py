"""Checks of the fields of frozen records, all with one form of message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any


def is_non_negative(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


# What fields are asked to be, in words and as a test.
RULES: dict[str, Callable[[Any], bool]] = {
    "an integer of at least 1": lambda v: type(v) is int and v >= 1,
    "an integer of at least 0": lambda v: type(v) is int and v >= 0,
    "a finite number of at least 0": is_non_negative,
    "a finite number of at least 1": lambda v: is_non_negative(v) and v >= 1,
    "a positive number": lambda v: is_non_negative(v) and v > 0,
    "a number from 0 to 1": lambda v: is_non_negative(v) and v <= 1,
    "a number above 0 and below 1": lambda v: is_non_negative(v) and 0 < v < 1,
    "True or False": lambda v: isinstance(v, bool),
}


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
      ValueError: `ok(value)` is false, or the value is of a type that it cannot be asked of.
    """
    try:
        fine = ok(value)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"{name}: expected {wanted}, found {value!r}.")


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse, by name, what is no record of a kind.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, found {value!r}.")


def check_fields(record: Any, wanted: str | tuple[Any, ...], *names: str) -> None:
    """Refuse, by name, fields of a record that are not what `RULES` has under these words, or one of these choices.

    Raises:
      ValueError: one is not.
    """
    for name in names:
        if isinstance(wanted, str):
            check_field(name, getattr(record, name), wanted, RULES[wanted])
        else:
            check_field(name, getattr(record, name), f"one of {wanted}", lambda v: v in wanted)
