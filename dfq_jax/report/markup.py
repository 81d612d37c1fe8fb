"""HTML as text that is escaped unless it was made here."""

from __future__ import annotations

import html
import re

from dfq_jax.base import with_units


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, *content: str, **attributes: str | bool | None) -> Markup:
    """One element. What is not `Markup` is escaped; "_" at the end of an attribute's name is left out, others are "-".

    >>> element("p", "a < b", element("b", "c"), class_="note", open=True)
    '<p class="note" open>a &lt; b<b>c</b></p>'

    Args:
      tag: its name.
      content: text and elements.
      attributes: of the element; True for one without a value, None and False for one that is left out.
    """
    said = ""
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            said += f" {name}" if value is True else f' {name}="{html.escape(value)}"'
    inner = joined(*content)
    return Markup(f"<{tag}{said}>" if tag in ("br", "img") else f"<{tag}{said}>{inner}</{tag}>")


def joined(*content: str) -> Markup:
    """Text and elements after one another."""
    return Markup("".join(item if isinstance(item, Markup) else html.escape(with_units(item)) for item in content))


def breakable(name: str) -> Markup:
    """A name whose lines may end after its separators.

    >>> breakable("block_0/conv")
    'block_<wbr>0/<wbr>conv'
    """
    return Markup(re.sub(r"[/_.]", r"\g<0><wbr>", html.escape(name)))
