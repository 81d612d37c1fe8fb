"""The parts of recipe `best` on a CIFAR-10 ResNet, each left out in turn, and what might join them.

    python benchmarks/reconstruction.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:more.npz

Prints the figures of `recipes.py`, first and last layer 8-bit, and before them what to choose by: the SQNR of outputs
in dB on images that nothing was fitted to, those of another key and such as are made in other ways (`UNSEEN`).
`--steps` is the number of steps for each block, `--parts` picks rows by their first letters.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from network import EDGES, Network, add_arguments
from recipes import Images, cell, run, unseen

from dfq_jax import RECIPES, Convention
from dfq_jax.stages.comparison import compare

BEST = RECIPES["best"]
# Images to judge by: like those that are learned from, by GENIE's generator, and smooth ones as Sony's DGH makes.
UNSEEN: dict[str, dict[str, Any]] = {
    "like these": {},
    "by a generator": {"num_images": 128, "source": "generator", "swing": True, "steps": 250, "learning_rate": 0.1},
    "smooth": {"num_images": 64, "steps": 200, "extra_pixels": 8, "smoothing": 1.25, "flip": True, "class_weight": 1.0,
               "total_variation_weight": 0.01},
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "best": {},
    "activations always quantized (no QDrop)": {"reconstruction_drop": 0.0},
    "weight scales kept (no GENIE-M)": {"reconstruction_scale_rate": 0.0},
    "activation steps kept (no LSQ)": {"reconstruction_step_rate": 0.0},
    "biases kept": {"reconstruction_bias_rate": 0.0},
    "from nearest codes, not SQuant's": {"rounding": "nearest"},
    "half the images": {"synthesis_num_images": 128},
    "with the prediction difference (PD-Quant)": {"reconstruction_prediction_weight": 1.0},
    "without mirror images": {"reconstruction_flip": False},
    "blocks of at least 4 layers": {"reconstruction_min_layers": 4},
    "twice the images in a step": {"reconstruction_batch_size": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w3a3", "w2a4"])
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=[""], help="first letters of rows; all if left out")
    parser.add_argument("--steps", type=int, default=BEST.reconstruction.steps)
    parser.add_argument("--cache", type=Path, help="folder to keep images in")
    arguments = parser.parse_args()

    network = Network(arguments)
    print(f"{network}; {arguments.steps} steps a block, keys {arguments.keys}")
    images = Images(network, arguments.cache)
    for bits in arguments.bits:
        convention = Convention.parse(bits, **EDGES["8"]).with_default(BEST.weight_range)
        print(f"\n{convention.describe()}\nSQNR on images {', '.join(UNSEEN)}; drop of top-1 / agreement, seconds")
        for part, changes in PARTS.items():
            if not part.startswith(tuple(arguments.parts)):
                continue
            recipe = BEST.replace(reconstruction_steps=arguments.steps).replace(**changes)
            scores, levels = [], []
            for key in arguments.keys:
                quantized, found = run(network, recipe, convention, key, images)
                scores.append(found)
                others = (unseen(network, dataclasses.replace(BEST.synthesis, **made), key) for made in UNSEEN.values())
                levels.append([sqnr(network, quantized.variables, x) for x in others])
            levels = " ".join(f"{level:.2f}" for level in np.mean(levels, 0))
            print(f"{part}: {levels} dB; {cell(np.array(scores))}", flush=True)


def sqnr(network: Network, qvariables: Any, images: np.ndarray) -> float:
    return compare(network.graph, network.variables, qvariables, images).sqnr


if __name__ == "__main__":
    main()
