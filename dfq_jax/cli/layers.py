"""`dfq-jax sensitivity` and `dfq-jax inspect`: a network layer by layer."""

from __future__ import annotations

import dataclasses
import json as json_format
import warnings
from pathlib import Path
from typing import Annotated, Any

import jax
from jaxtyping import Array, Float
from tyro.conf import Positional, arg

from dfq_jax.base import environment, hanging, require, write_atomically
from dfq_jax.cli.models import Model, model_of, resolve
from dfq_jax.cli.options import Count, ModelName, OptionalFile, Page, Weights
from dfq_jax.cli.output import check_targets, write_json
from dfq_jax.graph import Graph, GraphWarning, compute_kernels, doubtful_statistics, on_device
from dfq_jax.recipes import RECIPES, Reporter, load, progress_bar
from dfq_jax.report import sensitivity_page
from dfq_jax.stages import check_widths, enough_images
from dfq_jax.stages import sensitivity as measure
from dfq_jax.synthesis import SynthesisConfig, synthesize

ModelOrFile = Annotated[str, arg(metavar="MODEL|FILE")]


def stand_in_images(
    graph: Graph, variables: Any, config: SynthesisConfig, key: Array, reporter: Reporter
) -> Float[Array, "n ..."]:
    """Images made from a float network; Gaussian noise where it has no BatchNorm to make them from."""
    if not graph.batch_norms:
        return jax.random.normal(key, (config.num_images, *graph.input.shape[1:]))
    reporter.on_stage("images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphWarning)  # a table says it
        result = synthesize(graph, variables, key, config, on_progress=reporter.on_progress)
    if not result.completed:
        raise KeyboardInterrupt
    return result.images


def _synthesis(graph: Graph, num_images: int | None) -> SynthesisConfig:
    """That of the recipe fast, for few images."""
    if num_images is None:
        num_images = enough_images(graph)
    config = RECIPES["fast"].synthesis
    return dataclasses.replace(config, num_images=num_images, batch_size=min(num_images, config.batch_size))


def sensitivity(
    model: Positional[ModelName],
    *,
    checkpoint: Weights = None,
    bits: tuple[int, ...] = (2, 3, 4, 6, 8),
    images: Count = None,
    noise: bool = False,
    seed: int = 0,
    report: Page = None,
    json: OptionalFile = None,
    command: str = "",
) -> None:
    """Print what each layer costs: the divergence of the outputs with its weights or its input alone quantized.

    Args:
      checkpoint: Weights for a model of the zoo, as for quantize.
      bits: The widths.
      images: How many images to make and measure on; by default 8 of 224 x 224, and up to 32 smaller ones.
      noise: Measure on noise of the moments that BatchNorms promise, and make no images.
      seed: Seed of the images.
      report: Write a page with the costs as a map of colors.
      json: Write all that was measured, also with all quantized but one layer, for machines.
    """
    check_targets(json, report)
    if report is not None:
        require("matplotlib", "report")
    if noise and images is not None:
        raise ValueError(f"images: expected none beside --noise, found {images}")
    bits = check_widths("bits", bits)
    graph, variables = _network(resolve(model, checkpoint))
    with progress_bar() as reporter:
        seen = None
        if not noise:
            seen = stand_in_images(graph, variables, _synthesis(graph, images), jax.random.key(seed), reporter)
        reporter.on_stage("measuring the sensitivity of layers")
        found = measure(graph, variables, seen, bits=bits, on_progress=reporter.on_progress)
    for doubt in doubtful_statistics(graph, variables):
        print("\n".join(hanging("WARNING: ", doubt)))
    print(found.table())
    if report is not None:
        page = sensitivity_page(found, model, command=command, versions=environment())
        write_atomically(report, page.encode())
    if json is not None:
        write_json(json, {"model": model, "seed": seed, **json_format.loads(found.to_json())})


def _network(target: Model) -> tuple[Graph, Any]:
    """The graph and the variables that `quantize` works with."""
    return compute_kernels(target.graph, on_device(target.function[1]))


def inspect(model: Positional[ModelOrFile], *, checkpoint: Weights = None, images: Count = None, seed: int = 0) -> None:
    """Print the layers of a network, and what would not be quantized; or those of a saved quantized network.

    Of a saved one, the report, and where the float network's weights are at hand the error of each layer: of its
    output, its own, and what its input carries there.

    Args:
      model: A name from `dfq-jax models`, package.module:function, or what `dfq-jax quantize --output` saved.
      checkpoint: Weights for a model of the zoo, as for quantize; its structure is shown without, too.
      images: How many images to make and compare a saved network on, as for sensitivity.
      seed: Seed of the images.
    """
    if not Path(model).is_file():
        print(resolve(model, checkpoint, weights=False).graph.table())
        return
    name = model_of(Path(model))
    try:
        target, without = resolve(name, checkpoint), ""
    except ValueError as error:
        if checkpoint is not None:
            raise
        target, without = resolve(name, weights=False), str(error)
    quantized = load(model, target.network, target.variables)
    print(quantized.report.table())
    if without:
        print("\n".join(hanging("layers are not compared with the float network's: ", without)))
        return
    graph, variables = _network(target)
    with progress_bar() as reporter:
        made = stand_in_images(graph, variables, _synthesis(graph, images), jax.random.key(seed), reporter)
    print(f"\nerror of each layer, on {len(made)} images made from the float network:")
    print(quantized.compare_layers(variables, made).table())
