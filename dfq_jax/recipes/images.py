"""What a network is quantized with: images given, images made from the network, or noise."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dfq_jax.base import RUN_ONCE, cpu_jit
from dfq_jax.graph import Graph, GraphWarning, check_images
from dfq_jax.recipes.judge import MOMENT_NOISE
from dfq_jax.recipes.recipe import Recipe
from dfq_jax.stages import Convention
from dfq_jax.synthesis import Synthesis, synthesize

ANALYTIC_IMAGES = 32
THESE_IMAGES = "these images"


class Images(NamedTuple):
    """Images, where they came from and what they are, in the report's words."""

    images: Any
    origin: str
    kind: str = THESE_IMAGES
    analytic: bool = False  # BatchNorm parameters take their place, and nothing is fitted to them
    checkpoint: str | Path | None = None  # the file that holds them


def is_synthesized(graph: Graph, recipe: Recipe, convention: Convention) -> bool:
    """Whether a recipe makes images; weights alone, without BatchNorms behind them, need none."""
    return recipe.source == "synthesis" and (convention.activation_bits is not None or bool(graph.batch_norms))


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=1)
def _noise(key: Key[Array, ""], shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


def find_images(
    graph: Graph,
    variables: Any,
    recipe: Recipe,
    convention: Convention,
    key: Key[Array, ""],
    given: Any,
    **options: Any,
) -> Images:
    """The images given, or what the recipe takes; `options` are `synthesize`'s."""
    if given is not None:
        given = jnp.asarray(given)
        check_images(graph, given)
        return Images(given, f"{len(given)} given")
    count = recipe.synthesis.num_images
    if not is_synthesized(graph, recipe, convention):
        analytic = recipe.source == "analytic" and bool(graph.batch_norms)
        # Where nothing is measured on them, exporters that run the network still have something to run it on.
        shape = (min(count, ANALYTIC_IMAGES) if analytic else count, *graph.input.shape[1:])
        noise = _noise(key, shape)
        if analytic:
            return Images(noise, "none (BatchNorm parameters in their place)", MOMENT_NOISE, analytic=True)
        return Images(noise, f"{count} of Gaussian noise", "Gaussian noise, unlike any image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphWarning)  # what it would say has been said
        made = synthesize(graph, variables, key, recipe.synthesis, keep_checkpoint=True, **options)
    if not made.completed:
        raise KeyboardInterrupt("synthesis was interrupted; call synthesize() to keep unfinished images")
    return Images(made.images, _origin(made, recipe.synthesis.steps), checkpoint=options["checkpoint"])


def _origin(made: Synthesis, steps: int) -> str:
    """How images were made, and how far they are from what the network was trained on."""
    errors = {name: 100 * error.std for name, error in made.statistic_errors.items()}
    worst = max(errors, key=errors.__getitem__)
    return (
        f"{len(made.images)} synthesized in {steps} steps (final loss {np.mean(made.losses):.3g}; BatchNorm deviations "
        f"are off by {np.median(list(errors.values())):.2g} % in the median, by {errors[worst]:.2g} % in {worst})"
    )
