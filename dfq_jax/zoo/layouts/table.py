"""What a layout is: a table of rules from the names of one program's weights to paths in a module's variables."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfq_jax.base import check_field

TRANSFORMS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    # name: (axes the source must have or -1 for any, how to turn them)
    "copy": (-1, lambda array: array),
    "conv": (4, lambda array: array.transpose(2, 3, 1, 0)),  # OIHW -> HWIO, grouped and depthwise ones too
    "linear": (2, lambda array: array.transpose(1, 0)),  # [out, in] -> [in, out]
    "conv_linear": (4, lambda array: array.reshape(len(array), -1).T),  # [out, C, H, W] -> [C H W, out]
}
_SUM = re.compile(r"\{(\d+)([+-]\d+)\}")


@dataclass(frozen=True, kw_only=True)
class Rule:
    r"""Where the arrays of some names go.

    >>> rule = Rule(pattern=r"layer(\d)\.conv\.weight", target=r"params/layer{\1+1}/kernel", transform="conv")
    >>> rule.path(rule.match("layer0.conv.weight"))
    'params/layer1/kernel'

    Attributes:
      pattern: regular expression for the whole name in the file.
      target: '/'-joined path in the variables, with ``\1``... for the pattern's groups and ``{\1+1}`` or
        ``{\1-2}`` for a group's number plus or minus another, as programs count from 0 or 1; None to leave
        the array out.
      transform: ``copy``, ``conv`` (OIHW to HWIO), ``linear`` (transpose) or ``conv_linear`` (a convolution
        over its whole input, for a dense layer that reads channels first).

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
        check_field("transform", self.transform, f"one of {', '.join(TRANSFORMS)}", TRANSFORMS.__contains__)

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)  # kept: tables have more patterns than `re` caches

    def match(self, name: str) -> re.Match[str] | None:
        """The match of a whole name."""
        return self._regex.fullmatch(name)

    def path(self, match: re.Match[str]) -> str | None:
        """The path for a match; None to leave the array out."""
        if self.target is None:
            return None
        return _SUM.sub(lambda found: str(int(found[1]) + int(found[2])), match.expand(self.target))


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
            match = rule.match(name)
            if match:
                return rule, rule.path(match)
        return None


# Rows of tables for torch's state dicts: the rules of one module. `name` is a regular expression for the module's name
# in the file, `path` the module's path in the variables.


def conv(name: str, path: str) -> tuple[Rule, ...]:
    """A convolution with or without bias."""
    return (
        Rule(pattern=name + r"\.weight", target=f"params/{path}/kernel", transform="conv"),
        Rule(pattern=name + r"\.bias", target=f"params/{path}/bias"),
    )


def linear(name: str, path: str, transform: str = "linear") -> tuple[Rule, ...]:
    """A dense layer with or without bias."""
    return (
        Rule(pattern=name + r"\.weight", target=f"params/{path}/kernel", transform=transform),
        Rule(pattern=name + r"\.bias", target=f"params/{path}/bias"),
    )


def norm(name: str, path: str) -> tuple[Rule, ...]:
    """A BatchNorm."""
    return (
        Rule(pattern=name + r"\.weight", target=f"params/{path}/scale"),
        Rule(pattern=name + r"\.bias", target=f"params/{path}/bias"),
        Rule(pattern=name + r"\.running_mean", target=f"batch_stats/{path}/mean"),
        Rule(pattern=name + r"\.running_var", target=f"batch_stats/{path}/var"),
        Rule(pattern=name + r"\.num_batches_tracked", target=None),
    )


def conv_norm(conv_name: str, norm_name: str, path: str) -> tuple[Rule, ...]:
    """A convolution and its BatchNorm as the submodules `conv` and `bn` of `zoo.layers.ConvNorm`."""
    return (*conv(conv_name, f"{path}/conv"), *norm(norm_name, f"{path}/bn"))
