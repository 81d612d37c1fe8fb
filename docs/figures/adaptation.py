"""What BatchNorm adaptation does to the channels of one BatchNorm, on images that it has not seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from drawing import BLUE, GRAY, ORANGE, Network, images_of, main, network
from matplotlib.figure import Figure

from dfq_jax import Convention, adapt_batch_norm, batch_norm_moments, estimate_ranges, quantize_params

BATCH_NORM = "stage1_block2/bn2"
BITS = "w3a3"


class Found(NamedTuple):
    """Of each channel behind the BatchNorm: mean and standard deviation, `[channels]`, by network."""

    means: dict[str, np.ndarray]
    deviations: dict[str, np.ndarray]


def behind(net: Network, variables: Any, images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of the normalized input, before scale and bias."""
    bn = net.graph.batch_norm(BATCH_NORM)
    mean, variance = (np.asarray(m) for m in batch_norm_moments(net.graph, variables, images)[BATCH_NORM])
    leaves = net.graph.leaves_by_path(variables)
    size = np.sqrt(np.asarray(leaves[bn.var]) + bn.epsilon)
    return (mean - np.asarray(leaves[bn.mean])) / size, np.sqrt(variance) / size


def measure(small: bool) -> Found:
    """The float network, the quantized one, and the adapted one, on images of another key than those adapted to."""
    net = network("fashion_resnet20")
    fitted, held_out = (images_of(net, seed, small) for seed in (0, 1))
    convention = Convention.parse(BITS)
    ranges = estimate_ranges(net.graph, net.variables, fitted, convention)
    quantized = quantize_params(net.graph, net.variables, ranges, convention)
    adapted = adapt_batch_norm(net.graph, net.variables, quantized, fitted)
    networks = {"float": net.variables, "quantized": quantized, "adapted": adapted}
    moments = {name: behind(net, variables, held_out) for name, variables in networks.items()}
    return Found(*({name: m[i] for name, m in moments.items()} for i in (0, 1)))


def draw(found: Found) -> Figure:
    """Means against means and deviations against deviations, channel by channel."""
    figure = Figure(figsize=(8, 4))
    titles = {"mean of each channel": "lower right", "standard deviation of each channel": "upper left"}
    for axes, (title, place), values in zip(figure.subplots(1, 2), titles.items(), found, strict=True):
        every = np.concatenate(list(values.values()))
        room = 0.06 * np.ptp(every)
        ends = (every.min() - room, every.max() + room)
        axes.plot(ends, ends, color=GRAY, linewidth=1, zorder=1)
        axes.scatter(values["float"], values["quantized"], 30, color="white", edgecolors=ORANGE, label="quantized")
        axes.scatter(values["float"], values["adapted"], 30, color=BLUE, label="after adaptation")
        axes.set(xlim=ends, ylim=ends, aspect="equal", title=title, xlabel="float network", ylabel="W3A3 network")
        axes.legend(loc=place, handletextpad=0.2)
    return figure


if __name__ == "__main__":
    main("adaptation", measure, draw)
