"""Tables as plain text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

LINE = 80  # characters of a terminal's line
NARROW = 24  # columns of no more characters are not broken
WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False}  # words
BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|dB|kB|MB|s)(?!\w))")
NO_BREAK = "\N{NO-BREAK SPACE}"


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False, width: int | None = None) -> list[str]:
    """Lines of a table whose columns begin below one another, with dashes under the first row if it is ruled.

    Where lines would become longer than `width`, a wide last column goes on in the next lines; if that is too little,
    long names of the first column stand on lines of their own.

    >>> aligned([("layer", "bits"), ("head", "8")])
    ['layer  bits', 'head   8']
    >>> aligned([("layer", "bits"), ("a_long_name", "8")], width=12)
    ['layer   bits', 'a_long_name', '        8']
    >>> aligned([("layer", "feeds"), ("conv", "a sum, a second sum, a head")], width=32)
    ['layer  feeds', 'conv   a sum, a second sum, a', '       head']
    >>> aligned([("layer", ""), ("head", "")], width=80)
    ['layer', 'head']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        others = sum(widths[:-1]) + 2 * len(widths[:-1])
        words = (len(word) for row in rows for word in row[-1].split())
        widths[-1] = min(widths[-1], max(width - others, NARROW, *words))
        widths[0] = min(widths[0], max(len(rows[0][0]), width - sum(widths[1:]) - 2 * len(widths[1:])))
    rules = [tuple("-" * size for size in widths)] if ruled else []
    lines = []
    for first, *rest, last in (*rows[:1], *rules, *rows[1:]):
        lines += [first] if len(first) > widths[0] else []
        cells = ["" if len(first) > widths[0] else first, *rest]
        for part in textwrap.wrap(last, max(1, widths[-1]), **WHOLE) or [""]:  # a last column may be empty
            lines.append("  ".join(map(str.ljust, [*cells, part], widths)).rstrip())
            cells = [""] * len(cells)
    return lines


def with_units(text: str) -> str:
    """The text with numbers and their units in one piece, which no line ends within.

    >>> len(with_units("9 % in 0.6 s").split(" "))
    3
    """
    return BEFORE_UNIT.sub(NO_BREAK, text)


def hanging(name: str, text: str) -> list[str]:
    """Lines of a text beside its name.

    >>> hanging("images  ", "one " * 20)[1]
    '          one one'
    >>> hanging("time    ", "one " * 17 + "222 s")[1]
    '          222 s'
    """
    indent, text = " " * (len(name) + 2), with_units(text)
    lines = textwrap.wrap(text, LINE, initial_indent=name, subsequent_indent=indent, **WHOLE)
    return [line.replace(NO_BREAK, " ") for line in lines] or [name.rstrip()]
