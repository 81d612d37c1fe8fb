"""Tables as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

LINE = 80  # characters of a terminal's line


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False, width: int | None = None) -> list[str]:
    """Lines of a table whose columns begin below one another, with dashes under the first row if it is ruled.

    Where lines would become longer than `width`, long names of the first column stand on lines of their own.

    >>> aligned([("layer", "bits"), ("head", "8")])
    ['layer  bits', 'head   8']
    >>> aligned([("layer", "bits"), ("a_long_name", "8")], width=12)
    ['layer   bits', 'a_long_name', '        8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        widths[0] = min(widths[0], max(len(rows[0][0]), width - sum(widths[1:]) - 2 * len(widths[1:])))
    rules = [tuple("-" * size for size in widths)] if ruled else []
    lines = []
    for first, *rest in (*rows[:1], *rules, *rows[1:]):
        lines += [first] if len(first) > widths[0] else []
        cells = ("" if len(first) > widths[0] else first, *rest)
        lines.append("  ".join(map(str.ljust, cells, widths)).rstrip())
    return lines


def hanging(name: str, text: str) -> list[str]:
    """Lines of a text beside its name.

    >>> hanging("images  ", "one " * 20)[1]
    '          one one'
    """
    breaks: Any = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, LINE, initial_indent=name, subsequent_indent=" " * (len(name) + 2), **breaks)
    return lines or [name.rstrip()]
