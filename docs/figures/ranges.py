"""Where each estimator puts the end of a clipping range, on the histogram of one activation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from drawing import BLUE, GRAY, INK, ORANGE, images_of, main, network
from matplotlib.figure import Figure

from dfq_jax import ESTIMATORS, analytic_summaries, summarize
from dfq_jax.data import load_data

TENSOR = "stage1_block2/conv1"  # what a residual sum and a ReLU give
BITS = (4, 8)
ANALYTIC = "lp, analytic"  # of BatchNorm parameters alone


class Found(NamedTuple):
    """Of one tensor: shares of its values in equal bins, and the upper end of its range by estimator and bits."""

    edges: np.ndarray
    synthetic: np.ndarray
    real: np.ndarray
    ends: dict[str, dict[int, float]]


def shares(summary, edges: np.ndarray) -> np.ndarray:
    """A summary's histogram in other bins, of sum 1."""
    counts, _ = np.histogram(np.asarray(summary.centers), edges, weights=np.asarray(summary.counts))
    return counts / np.asarray(summary.counts).sum()


def measure(small: bool) -> Found:
    """Ranges by synthetic images; real ones are only looked at."""
    net = network("fashion_resnet20")
    real = jnp.asarray(net.model.preprocessing(load_data("bundled", limit=8 if small else 256).images))
    synthetic = images_of(net, 0, small)
    seen, real = (summarize(net.graph, net.variables, x)[TENSOR] for x in (synthetic, real))
    ends = {name: {b: float(f(seen, bits=b)[1]) for b in BITS} for name, f in ESTIMATORS.items()}
    analytic = analytic_summaries(net.graph, net.variables)[TENSOR]
    ends[ANALYTIC] = {b: float(ESTIMATORS["lp"](analytic, bits=b)[1]) for b in BITS}
    edges = np.linspace(0, max(float(seen.hi), float(real.hi)), 81)
    return Found(edges, shares(seen, edges), shares(real, edges), ends)


def draw(found: Found) -> Figure:
    """The histogram, and a row for each estimator below it."""
    figure = Figure(figsize=(8, 5.4))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 6))
    above.stairs(found.synthetic, found.edges, fill=True, color=BLUE, alpha=0.35, label="64 synthesized images")
    above.stairs(found.real, found.edges, color=INK, label="256 real images, for comparison")
    above.set(yscale="log", ylabel="share of values", title=f"The input of {TENSOR}, a ReLU's output")
    above.legend(loc="upper right")
    above.tick_params(axis="x", length=0)
    order = sorted(found.ends, key=lambda name: found.ends[name][BITS[0]])
    for row, name in enumerate(order):
        four, eight = (found.ends[name][b] for b in BITS)
        below.plot([four, eight], [row, row], color=GRAY, linewidth=1, zorder=1)
        below.scatter(eight, row, 40, color="white", edgecolors=BLUE, label="8 bits" if row == 0 else None)
        below.scatter(four, row, 40, color=ORANGE, label="4 bits" if row == 0 else None)
    below.set_yticks(range(len(order)), order)
    below.grid(axis="y", color="#e6e8eb")
    below.tick_params(axis="y", length=0)
    below.spines["left"].set_visible(False)
    below.set(xlim=(0, found.edges[-1] * 1.02), xlabel="upper end of the clipping range (the lower end is 0)")
    below.set_axisbelow(True)
    below.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main("ranges", measure, draw)
