"""The parts of recipe `best` on a CIFAR-10 ResNet, each left out in turn, and what might join them.

    python benchmarks/reconstruction.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:more.npz

Prints the same figures as `recipes.py`; first and last layer 8-bit. `--steps` is the number of steps for each block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from network import EDGES, Network, add_arguments
from recipes import Images, cell, score

from dfq_jax import RECIPES, Convention

PARTS: dict[str, dict[str, Any]] = {
    "best": {},
    "activations always quantized (no QDrop)": {"reconstruction_drop": 0.0},
    "weight scales kept (no GENIE-M)": {"reconstruction_scale_rate": 0.0},
    "activation steps kept (no LSQ)": {"reconstruction_step_rate": 0.0},
    "biases kept": {"reconstruction_bias_rate": 0.0},
    "from nearest codes, not SQuant's": {"rounding": "nearest"},
    "half the images": {"synthesis_num_images": 128},
    "with the prediction difference (PD-Quant)": {"reconstruction_prediction_weight": 1.0},
    "blocks of at least 4 layers": {"reconstruction_min_layers": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["w3a3", "w2a4"])
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=RECIPES["best"].reconstruction.steps)
    parser.add_argument("--cache", type=Path, help="folder to keep images in")
    arguments = parser.parse_args()

    network = Network(arguments)
    print(f"{network}; {arguments.steps} steps a block, keys {arguments.keys}")
    images = Images(arguments.cache and arguments.cache / arguments.model)
    for bits in arguments.bits:
        convention = Convention.parse(bits, **EDGES["8"])
        print(f"\n{convention.describe()}\ndrop of top-1 / agreement, seconds", flush=True)
        for part, changes in PARTS.items():
            recipe = RECIPES["best"].replace(reconstruction_steps=arguments.steps).replace(**changes)
            scores = [score(network, recipe, convention, key, images) for key in arguments.keys]
            print(f"{part}: {cell(np.array(scores))}", flush=True)


if __name__ == "__main__":
    main()
