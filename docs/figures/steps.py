"""The steps of the method in their order."""

from __future__ import annotations

from typing import Any

from drawing import BLUE, GRAY, GREEN, INK, ORANGE, main
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

STEPS = ("equalize", "ranges", "weights", "rounding", "other\nranges", "reconstruct", "adapt", "fine-tune")
WIDTH, HEIGHT = 8, 3.1  # inches


def box(axes: Any, left: float, low: float, width: float, text: str, color: str, height: float = 0.56) -> None:
    """A box with text in it."""
    look = {"facecolor": color + "1f", "edgecolor": color}
    axes.add_patch(FancyBboxPatch((left, low), width, height, "round,pad=0,rounding_size=0.07", **look))
    axes.text(left + width / 2, low + height / 2, text, ha="center", va="center", fontsize=9.5)


def arrow(axes: Any, begin: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow with text above it."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=GRAY, shrinkA=0, shrinkB=0))
    middle = (begin[0] + end[0]) / 2
    axes.text(middle, begin[1] + 0.08, text, ha="center", fontsize=10, fontstyle="italic", color=INK)


def measure(small: bool) -> None:
    """Nothing: the figure is of words alone."""


def draw(_: None) -> Figure:
    """Three rows: what there is, the steps, and the judge below all of them."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    box(axes, 0.1, 2.3, 1.6, "float network", BLUE)
    arrow(axes, (1.7, 2.58), (2.45, 2.58), "trace")
    box(axes, 2.45, 2.3, 0.95, "graph", BLUE)
    arrow(axes, (3.4, 2.58), (4.55, 2.58), "synthesize")
    box(axes, 4.55, 2.3, 1.6, "images to fit to", ORANGE)
    box(axes, 6.3, 2.3, 1.6, "images held out", GREEN)
    pitch = (WIDTH - 0.2 + 0.12) / len(STEPS)
    for place, name in enumerate(STEPS):
        left = 0.1 + place * pitch
        box(axes, left, 1.2, pitch - 0.12, name, ORANGE)
        if place:
            arrow(axes, (left - 0.12, 1.48), (left, 1.48))
    arrow(axes, (2.92, 2.3), (2.92, 1.82))
    arrow(axes, (5.35, 2.3), (5.35, 1.82))
    box(
        axes,
        0.1,
        0.15,
        WIDTH - 0.2,
        "judge, after each step: closer to the float network than before? If not, drop it",
        GREEN,
    )
    arrow(axes, (4.47, 1.2), (4.47, 0.71))
    return figure


if __name__ == "__main__":
    main("steps", measure, draw)
