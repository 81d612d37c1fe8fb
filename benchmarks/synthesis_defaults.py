"""Which optimizer makes images in the fewest steps: the final loss of synthesis by learning rate, b2 and steps.

    python benchmarks/synthesis_defaults.py fashion_resnet20 cifar_resnet20=resnet20-12fca82f.th --batch 32

Chosen by the synthetic loss alone: no image of a data set and no accuracy is looked at. Each network is a name of the
zoo, with a file of weights behind "=" where the zoo has none itself. Each row is a network and a key.
"""

from __future__ import annotations

import argparse
import time

import jax
import optax

from dfq_jax import as_function, synthesize, trace
from dfq_jax.synthesis import SynthesisConfig
from dfq_jax.zoo import load_model

# Learning rate and b2 of Adam, and steps.
SETTINGS = ("0.3/0.999/300", "0.3/0.999/150", "0.5/0.95/150", "0.4/0.9/150", "0.5/0.9/150")


def final_loss(graph: object, variables: object, key: int, batch: int, setting: str) -> float:
    """The loss at the last step, of one batch."""
    rate, b2, steps = setting.split("/")
    config = SynthesisConfig(num_images=batch, batch_size=batch, steps=int(steps))
    optimizer = optax.adam(optax.cosine_decay_schedule(float(rate), config.steps), b2=float(b2))
    return synthesize(graph, variables, jax.random.key(key), config, optimizer=optimizer).losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="NAME or NAME=WEIGHTS")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="rate/b2/steps, the first one the reference")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--keys", type=int, default=3)
    arguments = parser.parse_args()
    print(f"batch {arguments.batch}; jax {jax.__version__}\n")
    print("| network, key |", " | ".join(arguments.settings), "| seconds |")
    print("|---|" + "---|" * (len(arguments.settings) + 1))
    for name, _, weights in (network.partition("=") for network in arguments.networks):
        model = load_model(name, weights or None)
        apply_fn, variables = as_function(model.module, model.variables)
        graph = trace(apply_fn, variables, model.input_shape)
        for key in range(arguments.keys):
            began = time.perf_counter()
            losses = [final_loss(graph, variables, key, arguments.batch, s) for s in arguments.settings]
            seconds = time.perf_counter() - began
            print(f"| {name}, {key} |", " | ".join(f"{v:.4f}" for v in losses), f"| {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
