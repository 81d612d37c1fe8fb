"""The README's picture: a float network, images made from it, and the quantized network."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from drawing import BLUE, GRAY, INK, ORANGE, main
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dfq_jax import RECIPES, image_grid, quantize
from dfq_jax.data import accuracy, load_data, predict
from dfq_jax.zoo import load_model

KERNEL = "params/stage2_block1/conv1/kernel"
PAPER, CARD = "#ffffff", "#f5f7f9"
WIDTH, HEIGHT = 12, 3.6  # inches of 100 pixels


class Found(NamedTuple):
    """What the picture tells."""

    weights: np.ndarray  # of one layer, in steps of their quantizers
    codes: np.ndarray  # the same weights, quantized
    pictures: np.ndarray
    bytes: dict[str, int]
    top1: dict[str, float]
    agreement: float


def measure(small: bool) -> Found:
    """A bundled network quantized to 4 bits by the recipe "fast", and both of them on the bundled test images."""
    model = load_model("fashion_resnet20")
    recipe = RECIPES["fast"]
    if small:
        recipe = recipe.replace(synthesis_num_images=32, synthesis_steps=2, reconstruction=None)
    q = quantize(model.module, model.variables, input_shape=model.input_shape, recipe=recipe, bits="w4a4", key=0)
    data = load_data("bundled", limit=100 if small else None)
    size = 100 if small else 500

    def classes(apply_fn: Any, variables: Any) -> Any:
        return predict(apply_fn, variables, data.batches(model.preprocessing, size))

    first, labels = classes(q.graph.apply_fn, model.variables)
    second, _ = classes(q.apply, q.variables)
    before, after = accuracy(first, labels), accuracy(second, labels, first)
    weights, kernel = (q.graph.leaves_by_path(variables)[KERNEL] for variables in (model.variables, q.variables))
    return Found(
        weights=np.ravel(weights / kernel.scale),
        codes=np.ravel(kernel.centered()),
        pictures=image_grid(q.images[:24], model.preprocessing, columns=6),
        bytes=q.report.size,
        top1={"float": before.top1, "quantized": after.top1},
        agreement=after.agreement,
    )


def card(canvas: Any, left: float, width: float, title: str, *below: str) -> None:
    """A box with a title above and two lines below what is drawn in it."""
    box = FancyBboxPatch(
        (left, 0.35), width, HEIGHT - 0.7, "round,pad=0,rounding_size=0.15", facecolor=CARD, edgecolor="#d8dee4"
    )
    canvas.add_patch(box)
    middle = left + width / 2
    canvas.text(middle, HEIGHT - 0.68, title, ha="center", va="center", fontsize=15, fontweight="bold")
    for line, text in enumerate(below):
        canvas.text(middle, 0.9 - 0.3 * line, text, ha="center", va="center", fontsize=13)


def inset(figure: Figure, left: float, width: float) -> Any:
    """Axes inside a card."""
    axes = figure.add_axes((left / WIDTH, 1.2 / HEIGHT, width / WIDTH, 1.45 / HEIGHT))
    axes.set(yticks=[], xticks=[])
    axes.spines[:].set_visible(False)
    axes.patch.set_alpha(0)
    return axes


def draw(found: Found) -> Figure:
    """Three cards, with an arrow from each to the next."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER, layout="none")
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    canvas.axis("off")
    size = {name: f"{count / 1e6:.2f} MB" for name, count in found.bytes.items()}
    top1, agreement = found.top1, f"agrees on {found.agreement:.1f} % of images"
    card(canvas, 0.3, 3.15, "float network", f"{size['float']}, top-1 {top1['float']:.1f} %", "ResNet-20, 32 bits")
    card(canvas, 4.3, 3.4, "synthesized images", "from its BatchNorm statistics", "no data needed")
    card(canvas, 8.55, 3.15, "quantized network", f"{size['quantized']}, top-1 {top1['quantized']:.1f} %", agreement)
    for left, right in ((3.53, 4.22), (7.78, 8.47)):
        arrow = FancyArrowPatch((left, HEIGHT / 2), (right, HEIGHT / 2), arrowstyle="-|>", mutation_scale=28, lw=3)
        arrow.set_color(GRAY)
        canvas.add_patch(arrow)
    codes, counts = np.unique(found.codes, return_counts=True)
    limit = np.abs(codes).max() + 1
    left, right = (inset(figure, place, 2.65) for place in (0.55, 8.8))
    left.hist(found.weights, np.linspace(-limit, limit, 80), color=BLUE, histtype="stepfilled")
    right.bar(codes, counts, 0.4, color=ORANGE)
    for axes in (left, right):
        axes.set_xlim(-limit, limit)
        axes.axhline(0, color=INK, linewidth=1)
    axes = inset(figure, 4.5, 3.0)
    axes.imshow(found.pictures, interpolation="nearest")
    return figure


if __name__ == "__main__":
    main("overview", measure, draw)
