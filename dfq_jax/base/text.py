"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False) -> list[str]:
    """Lines of a table whose columns begin below one another, with dashes under the first row if it is ruled.

    >>> aligned([("layer", "bits"), ("head", "8")])
    ['layer  bits', 'head   8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rules = [tuple("-" * width for width in widths)] if ruled else []
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (*rows[:1], *rules, *rows[1:])]
