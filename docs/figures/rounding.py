"""How soft rounding decides: the rounding variables of one block while it is reconstructed.

It goes the way of `reconstruct`, whose parts it takes, for one block, and stops to look.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from drawing import BLUE, GRAY, Network, images_of, main, network
from matplotlib.figure import Figure

from dfq_jax import Convention, ReconstructionConfig, apply_quantized, estimate_ranges, quantize_params
from dfq_jax.graph import subnetwork
from dfq_jax.stages.rounding.block import Cache, advance_block, init_block
from dfq_jax.stages.rounding.block import draw as random_numbers
from dfq_jax.stages.rounding.soft import rectified_sigmoid

BLOCK = "stage1_block1/conv1"
SHARES = (0.0, 0.2, 0.4, 0.7, 1.0)  # of the steps
BINS = 25


def input_of(net: Network, variables: Any, images: jax.Array) -> jax.Array:
    """What the block reads, in the float or in the quantized network."""
    for block in net.graph.blocks:
        if block.name == BLOCK:
            return images
        sub = subnetwork(net.graph, block, len(images))
        images = jax.jit(apply_quantized, static_argnums=0)(sub.graph, sub.select(net.graph, variables), images)
    raise ValueError(f"BLOCK: the network has no block {BLOCK!r}.")


def measure(small: bool) -> dict[int, np.ndarray]:
    """The rounding variables h(v) of all weights of the block, by step."""
    net = network("fashion_resnet20")
    images, convention = images_of(net, 0, small), Convention.parse("w4a4")
    ranges = estimate_ranges(net.graph, net.variables, images, convention)
    quantized = quantize_params(net.graph, net.variables, ranges, convention)
    config = ReconstructionConfig(steps=10 if small else 1000)
    block = next(block for block in net.graph.blocks if block.name == BLOCK)
    sub = subnetwork(net.graph, block, config.batch_size)
    as_float, own = (sub.select(net.graph, variables) for variables in (net.variables, quantized))
    float_inputs, inputs = (input_of(net, variables, images) for variables in (net.variables, quantized))
    cache = Cache(float_inputs, inputs, jax.jit(apply_quantized, static_argnums=0)(sub.graph, as_float, float_inputs))
    state, bases = init_block(sub.graph, config, as_float, own, frozenset())
    draws = random_numbers(jax.random.key(0), config, 1, len(sub.layers))
    found, seen = {}, 0
    for step in (round(share * config.steps) for share in SHARES):
        if step > seen:
            given = None, None, own, bases, cache, len(images)
            state, _ = advance_block(sub.graph, config, step - seen, *given, state, draws)
        kernels = state.parameters.kernels.values()
        found[step] = np.concatenate([np.ravel(rectified_sigmoid(kernel.rounding)) for kernel in kernels])
        seen = step
    return found


def draw(found: dict[int, np.ndarray]) -> Figure:
    """A histogram for each step."""
    figure = Figure(figsize=(8, 2.5))
    edges = np.linspace(0, 1, BINS + 1)
    for axes, (step, values) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        axes.hist(values, edges, weights=np.full(len(values), 100 / len(values)), color=BLUE)
        between = 100 * np.mean((values > 0.05) & (values < 0.95))
        axes.text(0.5, 0.93, f"{between:.0f} % undecided", ha="center", fontsize=9.5, transform=axes.transAxes)
        axes.set(xticks=[0, 0.5, 1], xlim=(-0.04, 1.04), title=f"step {step:,}", ylim=(0, 75))
        axes.set_xticklabels(["0", "h", "1"])
        axes.grid(axis="y", color="#e6e8eb")
        axes.set_axisbelow(True)
        axes.tick_params(colors=GRAY, labelcolor="black", length=2)
    figure.axes[0].set_ylabel("% of weights")
    return figure


if __name__ == "__main__":
    main("rounding", measure, draw)
