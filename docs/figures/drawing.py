"""What the scripts of this folder share: how a figure looks, where it goes, and the networks that it is of.

Each script measures by the library's own functions and draws one figure beside itself:

    python docs/figures/ranges.py             # as it stands in the documentation
    python docs/figures/ranges.py --small     # of fewer images and steps, to try

They take keys, so the same script gives the same figure on one machine and version of JAX.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import matplotlib
from matplotlib.figure import Figure

from dfq_jax import Graph, SynthesisConfig, as_function, synthesize, trace
from dfq_jax.zoo import ZooModel, load_model

# Colors that color-blind readers tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, GRAY, INK = "#0072b2", "#d55e00", "#009e73", "#8c959f", "#1f2328"
STYLE = {
    "svg.fonttype": "none",  # text stays text: readers can search it
    "svg.hashsalt": "dfq_jax",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 11,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",  # its own, so that it reads in the dark, too
    "figure.constrained_layout.use": True,
}


class Network(NamedTuple):
    """A bundled network."""

    model: ZooModel
    graph: Graph
    variables: Any


def network(name: str) -> Network:
    """A bundled network, traced."""
    model = load_model(name)
    apply_fn, variables = as_function(model.module, model.variables)
    return Network(model, trace(apply_fn, variables, model.input_shape), variables)


def images_of(net: Network, seed: int, small: bool, source: str = "pyramid") -> jax.Array:
    """Synthesized images, by default settings; few of few steps if small."""
    count, steps = (8, 2) if small else (64, 60)
    config = SynthesisConfig(num_images=count, batch_size=count, steps=steps, source=source)
    return synthesize(net.graph, net.variables, jax.random.key(seed), config).images


def main(name: str, measure: Callable[[bool], Any], draw: Callable[[Any], Figure]) -> None:
    """Measure, less if the command line says `--small`, draw what was found, and write it to NAME.svg."""
    parser = argparse.ArgumentParser(description=f"Draws {name}.svg.")
    parser.add_argument("--small", action="store_true", help="fewer images and steps")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="to write to")
    arguments = parser.parse_args()
    found = measure(arguments.small)
    with matplotlib.rc_context(STYLE):
        draw(found).savefig(arguments.folder / f"{name}.svg", metadata={"Date": None})
