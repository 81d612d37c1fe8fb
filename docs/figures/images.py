"""What BatchNorm matching makes of noise, step by step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import optax
from drawing import main, network
from matplotlib.figure import Figure

from dfq_jax import SynthesisConfig, image_grid
from dfq_jax.synthesis import advance_batch, batch_images, init_batch

STEPS = (0, 5, 15, 30, 60)
SOURCES = ("pyramid", "pixels")
ROWS = 4


class Followed(NamedTuple):
    """A batch of images by step."""

    pictures: list[np.ndarray]
    losses: list[float]


def follow(source: str, batch_size: int) -> Followed:
    """Optimize a batch of images, and look at it at each of `STEPS`."""
    model, graph, variables = network("fashion_resnet20")
    graph = graph.at((batch_size, *graph.input.shape[1:]), np.float32)
    config = SynthesisConfig(source=source, batch_size=batch_size, steps=STEPS[-1])
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps), b2=config.b2)
    start_key, step_key = jax.random.split(jax.random.key(0))
    state, targets = init_batch(graph, config, optimizer, start_key)
    found, seen = Followed([], []), 0
    for step in STEPS:
        state, _ = advance_batch(graph, config, optimizer, step - seen, variables, state, targets, step_key)
        images = batch_images(graph, config, state)
        found.pictures.append(image_grid(images[:ROWS], model.preprocessing, columns=1))
        # The loss that a step reports is that of the images in front of it.
        state, losses = advance_batch(graph, config, optimizer, 1, variables, state, targets, step_key)
        found.losses.append(float(losses.loss))
        seen = step + 1
    return found


def measure(small: bool) -> dict[str, Followed]:
    """Images by step, of each source."""
    return {source: follow(source, ROWS if small else 64) for source in SOURCES}


def draw(found: dict[str, Followed]) -> Figure:
    """A column for each step, with its loss."""
    figure = Figure(figsize=(8, 3.9))
    for part, (source, (pictures, losses)) in zip(figure.subfigures(1, len(found)), found.items(), strict=True):
        part.suptitle(f"source “{source}”", fontsize=12)
        for place, (axes, step) in enumerate(zip(part.subplots(1, len(STEPS)), STEPS, strict=True)):
            axes.imshow(pictures[place], interpolation="nearest")
            axes.set_title(f"step {step}" if step == 0 else f"{step}")
            axes.set_xlabel(f"loss {losses[place]:.3g}" if step == 0 else f"{losses[place]:.2g}")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    main("images", measure, draw)
