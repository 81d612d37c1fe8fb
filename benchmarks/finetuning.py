"""Fine-tuning on a CIFAR-10 ResNet: the recipe `finetune` with and without its last stage.

    python benchmarks/finetuning.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

For each convention and key, the drop of top-1 on `--data` and the agreement with the float network over `--data` and
`--more` together, of the start (ranges, SQuant, adapted BatchNorm statistics) and of the fine-tuned network, and the
seconds that fine-tuning took. Labels are used for the printed drop alone: steps are judged on synthetic images held
out. `--set weight_rate=0.003` changes a field of `FinetuneConfig`; `--cache` keeps the images of each key in a folder.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from network import Network, add_arguments

from dfq_jax import Quantized, quantize, synthesize
from dfq_jax.recipes import RECIPES, Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--edges", nargs="+", default=["all"], help="edge bits; all: as every layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=RECIPES["finetune"].synthesis.num_images)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()

    fields = dict(item.split("=", 1) for item in arguments.set)
    recipe = RECIPES["finetune"].replace(
        synthesis_num_images=arguments.images, **{f"finetune_{n}": _value(v) for n, v in fields.items()}
    )
    bench = Bench(arguments, recipe)
    print(f"{bench}\n{arguments.images} images; {recipe.finetune}", flush=True)
    for bits in arguments.bits:
        for edge in arguments.edges:
            for key in arguments.keys:
                bench.row(bits, None if edge == "all" else int(edge), key)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


class Bench(Network):
    """The network, and one row for each convention and key."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe):
        super().__init__(arguments)
        self.cache, self.model, self.recipe = arguments.cache, arguments.model, recipe

    def row(self, bits: str, edge_bits: int | None, key: int) -> None:
        start, tuned = (
            self.quantize(r, bits, edge_bits, key) for r in (self.recipe.replace(finetune=None), self.recipe)
        )
        print(f"{bits} edges {edge_bits or 'all'} key {key}: {self.cell(start)} -> {self.cell(tuned)}")
        print(f"  {tuned.report.steps[-1]}, {tuned.report.seconds['fine-tuning']:.0f} s", flush=True)

    def cell(self, quantized: Quantized) -> str:
        top1, agreement = self.score(quantized.variables)
        return f"drop {self.float_top1 - top1:.2f} / agreement {agreement:.2f}"

    def quantize(self, recipe: Recipe, bits: str, edge_bits: int | None, key: int) -> Quantized:
        return quantize(
            self.module,
            self.variables,
            input_shape=self.input_shape,
            recipe=recipe,
            bits=bits,
            edge_bits=edge_bits,
            key=key,
            images=self.synthesize(key),
        )

    def synthesize(self, key: int) -> jax.Array:
        config = self.recipe.synthesis
        cache = self.cache and self.cache / f"{self.model}_{key}.npy"
        if cache and cache.exists():
            return jnp.asarray(np.load(cache))[: config.num_images]
        images = synthesize(self.graph, self.variables, jax.random.key(key), config).images
        if cache:
            np.save(cache, np.asarray(images))
        return images


if __name__ == "__main__":
    main()
