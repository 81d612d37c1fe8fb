"""Recipes x bits on a CIFAR-10 ResNet, over several keys, through `dfq_jax.quantize`.

    python benchmarks/recipes.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

Prints, as they come, the drop of top-1 on `--data`, the agreement with the float network over `--data` and `--more`
together, and the seconds of `quantize`: mean over keys and in brackets the spread (largest minus smallest). Images
depend on the key and on how they are made: they are made once and used for all rows, and the seconds of each row count
them. `--cache` keeps them, and the seconds they took, in a folder. Labels serve the printed drop alone.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from network import EDGES, Network, add_arguments

from dfq_jax import RECIPES, Convention, Quantized, Recipe, SynthesisConfig, quantize, synthesize
from dfq_jax.recipes import remove_checkpoints

UNSEEN_KEY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=["instant", "fast", "best"], choices=sorted(RECIPES))
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4", "w3a3", "w2a4"])
    parser.add_argument("--edges", nargs="+", default=list(EDGES), choices=EDGES, help="first and last layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipes")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()

    network = Network(arguments)
    print(network)
    changes = dict(map(field, arguments.set))
    images = Images(network, arguments.cache)
    for name in arguments.recipes:
        recipe = RECIPES[name].replace(**changes)
        keys = arguments.keys[:1] if recipe.source == "analytic" else arguments.keys  # the same for all keys
        print(f"\n{_describe(recipe)}\nkeys {keys}: drop of top-1 / agreement, seconds")
        for bits in arguments.bits:
            for edges in arguments.edges:
                convention = Convention.parse(bits, **EDGES[edges]).with_default(recipe.weight_range)
                scores = np.array([run(network, recipe, convention, key, images)[1] for key in keys])
                print(f"{convention.describe()}: {cell(scores)}", flush=True)


class Images:
    """Files of images and the seconds they took to make, by how they are made and the key."""

    def __init__(self, network: Network, folder: Path | None):
        self.network = network
        self.temporary = None if folder else tempfile.TemporaryDirectory()  # removed with this object
        self.folder = Path(folder or self.temporary.name)

    def file(self, recipe: Recipe, key: int) -> Path:
        """Where `quantize` keeps those that the recipe makes from the key, and finds them again."""
        settings = f"{recipe.source} {recipe.synthesis} {recipe.held_out} {recipe.judge_source}"
        return self.folder / f"{self.network.name}_{zlib.crc32(settings.encode()):08x}_{key}"

    def seconds(self, file: Path, now: float) -> float:
        """That they took when they were made, which is now if they were not before."""
        note = file.with_suffix(".seconds")
        if not note.exists():
            note.write_text(str(now))
        return float(note.read_text())


def run(
    network: Network, recipe: Recipe, convention: Convention, key: int, images: Images, **options: Any
) -> tuple[Quantized, np.ndarray]:
    """The quantized network; its drop of top-1, its agreement, and the seconds it took with those of its images.

    `options` are `quantize`'s.
    """
    file = images.file(recipe, key) if recipe.source == "synthesis" else None
    quantized = quantize(
        network.module,
        network.variables,
        input_shape=network.input_shape,
        recipe=recipe,
        convention=convention,
        key=key,
        checkpoint=file,
        keep_checkpoint=True,
        **options,
    )
    seconds = dict(quantized.report.seconds)
    if file is not None:
        seconds["images"] = images.seconds(file, seconds["images"])
        remove_checkpoints(file, recipe, images=False)
    top1, agreement = network.score(quantized.variables)
    drop, total = network.float_top1 - top1, sum(seconds.values())
    for step in (*quantized.report.steps, f"{drop:.2f} / {agreement:.2f}, {total:.0f} s"):
        print(f"  key {key}: {step}", flush=True)
    return quantized, np.array([drop, agreement, total])


@functools.cache
def unseen(network: Network, config: SynthesisConfig, key: int) -> jax.Array:
    """Images that no recipe has seen, since its keys are other ones."""
    return synthesize(network.graph, network.variables, jax.random.key(UNSEEN_KEY + key), config).images


def cell(scores: np.ndarray) -> str:
    (drop, agreement, seconds), spread = scores.mean(0), np.ptp(scores, axis=0)
    return f"{drop:.2f} ({spread[0]:.2f}) / {agreement:.2f} ({spread[1]:.2f}), {seconds:.0f} s"


def _describe(record: Any) -> str:
    """A record with those fields that are not at their defaults."""
    if not dataclasses.is_dataclass(record):
        return repr(record)
    fields = {f.name: (getattr(record, f.name), f.default) for f in dataclasses.fields(record)}
    changed = (f"{name}={_describe(value)}" for name, (value, default) in fields.items() if value != default)
    return f"{type(record).__name__}({', '.join(changed)})"


def field(change: str) -> tuple[str, Any]:
    """Name and value of a field of a recipe, from "name=value"."""
    name, text = change.split("=", 1)
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


if __name__ == "__main__":
    main()
