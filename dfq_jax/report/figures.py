"""Figures of a page: matplotlib's SVG, in the colors of the page around it."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_jax.base import require
from dfq_jax.report.details import Spread
from dfq_jax.report.markup import Markup, element

# Colors that stand for those of the page, which are others in the dark.
INK, FAINT, FIRST, SECOND, THIRD = "#000001", "#000002", "#000003", "#000004", "#000005"
NAMES = {INK: "var(--ink)", FAINT: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)", THIRD: "var(--third)"}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}
MOST_STEPS = 64  # of which each is drawn
MOST_DECIBEL = 60.0  # all that is better looks alike


def _styled(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """A function that draws, in the page's style."""

    @functools.wraps(draw)
    def styled(*args: Any) -> Markup:
        with require("matplotlib", "report").rc_context(STYLE):
            return draw(*args)

    return styled


def _axes(width: float, height: float, left: float) -> Any:
    """Axes of a figure; all sizes in inches, `left` of the space for labels of the y axis."""
    below, above = 0.42, 0.3
    place = (left / width, below / height, 1 - (left + 0.15) / width, 1 - (below + above) / height)
    return require("matplotlib.figure", "report").Figure(figsize=(width, height)).add_axes(place)


def _svg(axes: Any, title: str) -> Markup:
    """What was drawn, as an element of a page: without a file's head, in the page's colors and type."""
    file = io.StringIO()
    with require("matplotlib", "report").rc_context({"svg.hashsalt": title}):  # two figures share no names of parts
        axes.figure.savefig(file, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"|font-family: [^;"]*;?', "", text)
    text = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", text)
    for color, name in NAMES.items():
        text = text.replace(color, name)
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    # Taken over as it is: matplotlib has escaped what it was given to write.
    content = Markup(element("title", title) + " ".join(body.rsplit("</svg>", 1)[0].split()))
    return element("svg", content, viewBox=box[1] if box else None, role="img")


@_styled
def histogram(spread: Spread, title: str, label: str) -> Markup:
    """Values against the range and the steps that they meet; heights are square roots, which show the tails."""
    axes, step = _axes(4.2, 2.1, 0.15), spread.step
    heights = np.sqrt(np.asarray(spread.counts, np.float64))
    heights /= max(heights.max(), 1e-12)
    axes.axvspan(spread.low - step / 2, spread.high + step / 2, color=SECOND, alpha=0.12, linewidth=0)
    edges = np.linspace(spread.first, spread.last, len(heights) + 1)
    axes.stairs(heights, edges, fill=True, color=FIRST, clip_on=False)
    if (spread.high - spread.low) / step < MOST_STEPS:
        levels = np.arange(spread.low, spread.high + step / 2, step)
        x = np.stack([levels, levels, np.full_like(levels, np.nan)], 1).reshape(-1)
        axes.plot(x, np.tile([0.0, 1.05, np.nan], len(levels)), color=SECOND, linewidth=0.6, clip_on=False)
    for end in (spread.low - step / 2, spread.high + step / 2):
        axes.plot([end, end], [0, 1.08], color=SECOND, linewidth=1.6, clip_on=False)
    axes.set(xlim=(spread.first, spread.last), ylim=(0, 1.08), yticks=[], xlabel=label)
    axes.spines["left"].set_visible(False)
    return _svg(axes, title)


@_styled
def curves(found: Mapping[str, Sequence[float | None]], title: str) -> Markup:
    """Decibel by layer, in the order they run."""
    axes = _axes(9.6, 2.7, 0.5)
    looks: list[dict[str, Any]] = [
        {"color": INK, "linewidth": 2},
        {"color": THIRD, "linewidth": 1.2, "marker": "o", "markersize": 3},
        {"color": SECOND, "linewidth": 1.2, "linestyle": "--"},
    ]
    for (name, values), look in zip(found.items(), looks, strict=True):
        shown = [MOST_DECIBEL if value is None else min(value, MOST_DECIBEL) for value in values]
        axes.plot(range(1, len(shown) + 1), shown, label=name, clip_on=False, **look)
    axes.set(ylabel="SQNR, dB")
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    return _by_layer(axes, len(shown), title)


@_styled
def widths(weights: Sequence[int | None], inputs: Sequence[int | None], title: str) -> Markup:
    """Bits by layer, in the order they run; none for float."""
    axes = _axes(9.6, 1.9, 0.5)
    places = np.arange(1, len(weights) + 1)
    for offset, values, color, name in ((-0.2, weights, FIRST, "weights"), (0.2, inputs, SECOND, "input")):
        axes.bar(places + offset, [value or 0 for value in values], 0.38, color=color, label=name)
    axes.set(ylabel="bits", yticks=[0, 2, 4, 6, 8])
    return _by_layer(axes, len(weights), title)


def _by_layer(axes: Any, count: int, title: str) -> Markup:
    axes.set_xlabel("layer, by its number below", loc="left")
    axes.set(xlim=(0.4, count + 0.6))
    axes.set_xticks(range(1, count + 1, -(-count // 30)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    return _svg(axes, title)


def heat(values: np.ndarray) -> list[list[tuple[str, str]]]:
    """A color for each value of a table, dark for the small ones, by their logarithms; and one to write on it."""
    colormap = require("matplotlib", "report").colormaps["viridis"]
    to_hex = require("matplotlib.colors", "report").to_hex
    logs = np.log10(np.maximum(values, 1e-9))
    low, high = logs.min(), logs.max()
    shares = (logs - low) / max(high - low, 1e-9)
    return [[(to_hex(colormap(v)), "#ffffff" if v < 0.6 else "#000000") for v in row] for row in shares]
