"""What a network is quantized with: images given, images made from the network, or noise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dfq_jax.base import RUN_ONCE, cpu_jit, mesh_of, sharded, sharded_as
from dfq_jax.graph import Graph, check_images
from dfq_jax.recipes.judge import MOMENT_NOISE
from dfq_jax.recipes.recipe import Recipe
from dfq_jax.stages import Convention
from dfq_jax.synthesis import Synthesis, SynthesisConfig, synthesize_sets

ANALYTIC_IMAGES = 32
MIN_HELD_OUT = 8  # fewer images decide nothing
JUDGING = "judging"  # what the images to judge on have as their name, and their key
TARGET = "target"  # likewise those that a target is measured on
BITS = "bits"  # and those that bits are chosen by, where a recipe makes none
THESE_IMAGES = "these images"


class Images(NamedTuple):
    """Images, where they came from and what they are, in the report's words."""

    images: Any
    origin: str
    kind: str = THESE_IMAGES
    num_fitted: int = 0  # the first are what steps are fitted to, the others the judge's
    analytic: bool = False  # BatchNorm parameters take their place, and nothing is fitted to them
    checkpoint: str | Path | None = None  # the file that holds them

    @property
    def fitted(self) -> Any:
        """The images that steps are fitted to."""
        return sharded_as(self.images[: self.num_fitted], self.images)

    @property
    def held_out(self) -> Any:
        """Those that it is judged on; maybe none."""
        return sharded_as(self.images[self.num_fitted :], self.images)

    def without(self) -> Images:
        """BatchNorm parameters in their place."""
        return self._replace(images=self.images[:0], num_fitted=0, analytic=True)


def is_synthesized(graph: Graph, recipe: Recipe, convention: Convention) -> bool:
    """Whether a recipe makes images; weights alone, without BatchNorms behind them, need none."""
    return recipe.source == "synthesis" and (convention.quantizes_activations(graph) or bool(graph.batch_norms))


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnums=1)
def _noise(key: Key[Array, ""], shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


def find_images(
    graph: Graph,
    variables: Any,
    recipe: Recipe,
    convention: Convention,
    keys: Mapping[str, Key[Array, ""]],
    given: Any,
    **options: Any,
) -> Images:
    """The images given, or what the recipe takes; `options` are `synthesize_sets`'."""
    if given is not None:
        expected = f"images: expected an array like [N, {', '.join(map(str, graph.input.shape[1:]))}]"
        try:
            given = jnp.asarray(given)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{expected}, found a {type(given).__name__}: {error}") from error
        check_images(graph, given)
        if given.shape[1:] != graph.input.shape[1:]:
            raise ValueError(f"{expected}, as input_shape says, found {given.shape}.")
        given = sharded(given, mesh_of(variables))
        return Images(given, f"{len(given)} given", num_fitted=len(given) - _num_held_out(recipe, len(given)))
    count = recipe.synthesis.num_images
    if not is_synthesized(graph, recipe, convention):
        analytic = recipe.source == "analytic" and bool(graph.batch_norms)
        # Where nothing is measured on them, exporters that run the network still have something to run it on.
        shape = (min(count, ANALYTIC_IMAGES) if analytic else count, *graph.input.shape[1:])
        noise = sharded(_noise(keys["images"], shape), mesh_of(variables))
        if analytic:
            origin = "none (BatchNorm parameters in their place)"
            return Images(noise, origin, MOMENT_NOISE, num_fitted=len(noise), analytic=True)
        fitted = count - _num_held_out(recipe, count)
        return Images(noise, f"{count} of Gaussian noise", "Gaussian noise, unlike any image", num_fitted=fitted)
    return _synthesized(graph, variables, recipe, keys, **options)


def file_of(checkpoint: str | Path | None, name: str) -> str | None:
    """The file beside that of the images that something else is kept in."""
    return None if checkpoint is None else f"{checkpoint}.{name}"


def _num_held_out(recipe: Recipe, count: int) -> int:
    held_out = round(recipe.held_out * count)
    return held_out if held_out >= MIN_HELD_OUT else 0


def settings_of(recipe: Recipe, count: int, source: str) -> SynthesisConfig:
    """How a recipe makes so many images of a source."""
    whole = recipe.synthesis
    return dataclasses.replace(whole, num_images=count, batch_size=min(whole.batch_size, count), source=source)


def make_images(graph: Graph, variables: Any, sets: Sequence[Any], **options: Any) -> list[Synthesis]:
    """`synthesize_sets`, of which nothing less than all images is of use."""
    made = synthesize_sets(graph, variables, sets, keep_checkpoint=True, **options)
    if not all(images.completed for images in made):
        raise KeyboardInterrupt("synthesis was interrupted; call synthesize() to keep unfinished images")
    return made


def _synthesized(
    graph: Graph, variables: Any, recipe: Recipe, keys: Mapping[str, Key[Array, ""]], *, checkpoint: Any, **options: Any
) -> Images:
    """Images to fit to, and images of another key and source to judge on."""
    whole, held_out = recipe.synthesis, _num_held_out(recipe, recipe.synthesis.num_images)
    sizes = {"images": whole.num_images - held_out, JUDGING: held_out}
    sources = {"images": whole.source, JUDGING: recipe.judge_source or whole.source}
    sets = [(keys[name], settings_of(recipe, count, sources[name])) for name, count in sizes.items() if count]
    made = make_images(graph, variables, sets, checkpoint=checkpoint, **options)
    origin = _origin(made[0], whole.steps)
    if held_out:
        origin += f", and {held_out} of the source {sources[JUDGING]!r} to judge on"
    images = sharded(jnp.concatenate([images.images for images in made]), mesh_of(variables))
    return Images(images, origin, num_fitted=sizes["images"], checkpoint=checkpoint)


def _origin(made: Synthesis, steps: int) -> str:
    """How images were made, and how far they are from what the network was trained on."""
    errors = {name: 100 * error.std for name, error in made.statistic_errors.items()}
    worst = max(errors, key=errors.__getitem__)
    return (
        f"{len(made.images)} synthesized in {steps} steps (final loss {np.mean(made.losses):.3g}; BatchNorm deviations "
        f"are off by {np.median(list(errors.values())):.2g} % in the median, by {errors[worst]:.2g} % in {worst})"
    )
