"""What a layout is: a table of rules from the names of one program's weights to paths in a module's variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TRANSFORMS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    # name: (axes the source must have or -1 for any, how to turn them)
    "copy": (-1, lambda array: array),
    "conv": (4, lambda array: array.transpose(2, 3, 1, 0)),  # OIHW -> HWIO, grouped and depthwise ones too
    "linear": (2, lambda array: array.transpose(1, 0)),  # [out, in] -> [in, out]
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    r"""Where the arrays of some names go.

    Attributes:
        pattern: regular expression for the whole name in the file.
        target: '/'-joined path in the variables, with ``\1``... for the pattern's groups; None to leave the
            array out.
        transform: ``copy``, ``conv`` (OIHW to HWIO) or ``linear`` (transpose).

    Raises:
        ValueError: if the pattern is no regular expression or the transform is unknown.
    """

    pattern: str
    target: str | None
    transform: str = "copy"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform: must be one of {', '.join(TRANSFORMS)}, not {self.transform!r}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one program names and arranges its weights.

    Attributes:
        name: what to call it.
        description: one line for error messages.
        signature: regular expressions, each of which matches some whole name of every file in this layout; by
            them a file's layout is recognized.
        rules: the table; the first rule that matches a name holds.

    Raises:
        ValueError: if there are no rules.
    """

    name: str
    description: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError(f"rules: layout {self.name!r} has none")

    def matches(self, names: Mapping[str, Any]) -> bool:
        """Whether a file with these names looks like this layout."""
        return bool(self.signature) and all(
            any(re.fullmatch(pattern, name) for name in names) for pattern in self.signature
        )

    def place(self, name: str) -> tuple[Rule, str | None] | None:
        """The rule for a name and the path it gives (None: left out); None if no rule knows the name."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                return rule, None if rule.target is None else match.expand(rule.target)
        return None
