"""Which settings of synthesis match the network best in the least time.

    python benchmarks/synthesis_defaults.py fashion_resnet20 cifar_resnet20=resnet20-12fca82f.th --batch 32 \
        --settings "" source=pixels,steps=150 source=fourier,learning_rate=0.4

Chosen by the synthetic loss and the errors of BatchNorm statistics alone: no image of a data set and no accuracy is
looked at. Each network is a name of the zoo, with a file of weights behind "=" where the zoo has none itself. A setting
is fields of `SynthesisConfig`, the empty one the defaults. Each row is a network and a setting: over keys the mean and
spread of the final loss, the errors of means and deviations (`statistic_errors`: the layers' median, and the worst),
and the seconds of the last key, for which earlier ones have compiled. `--data` adds what real images show.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from dfq_jax import SynthesisConfig, as_function, statistic_errors, synthesize, trace
from dfq_jax.data import load_data
from dfq_jax.zoo import load_model

CONFIG = SynthesisConfig()


def config_from(setting: str, batch: int) -> SynthesisConfig:
    """The config of `field=value,...`."""
    fields: dict[str, Any] = {}
    for name, value in (pair.split("=") for pair in setting.split(",") if pair):
        fields[name] = value if isinstance(getattr(CONFIG, name), str) else ast.literal_eval(value)
    return dataclasses.replace(CONFIG, num_images=batch, batch_size=batch, **fields)


def summary(errors: dict[str, Any]) -> list[float]:
    """Median and largest error of means, and those of standard deviations."""
    values = np.asarray(list(errors.values()))
    return [*np.median(values, 0), *values.max(0)]


def made(graph: Any, variables: Any, key: int, config: SynthesisConfig) -> list[float]:
    """Loss, errors and seconds of one batch."""
    result = synthesize(graph, variables, jax.random.key(key), config)
    return [result.losses[0], *summary(statistic_errors(graph, variables, result.images)), result.seconds]


def row(name: str, setting: str, numbers: list[list[float]]) -> str:
    """A row of the table, from the numbers of each key."""
    loss, mean, std, worst_mean, worst_std, _ = np.mean(numbers, 0)
    spread = f" +- {statistics.stdev(n[0] for n in numbers):.2g}" if len(numbers) > 1 else ""
    seconds = numbers[-1][-1]
    cells = (f"{loss:.4g}{spread}", f"{mean:.3f}, {worst_mean:.3f}", f"{std:.3f}, {worst_std:.3f}", f"{seconds:.0f}")
    return f"| {name} | {setting or 'defaults'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="NAME or NAME=WEIGHTS")
    parser.add_argument("--settings", nargs="+", default=[""], help="field=value,...")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--data", help="real images, to compare with")
    arguments = parser.parse_args()
    print(f"batch {arguments.batch}, keys {arguments.keys}; jax {jax.__version__}\n")
    print("| network | setting | loss | means: median, worst | deviations: median, worst | seconds |")
    print("|---|---|---|---|---|---|")
    for name, _, weights in (network.partition("=") for network in arguments.networks):
        model = load_model(name, weights or None)
        apply_fn, variables = as_function(model.module, model.variables)
        graph = trace(apply_fn, variables, model.input_shape)
        for setting in arguments.settings:
            config = config_from(setting, arguments.batch)
            numbers = [made(graph, variables, key, config) for key in range(arguments.keys)]
            print(row(name, setting, numbers), flush=True)
        if arguments.data:
            images = model.preprocessing(load_data(arguments.data).images[: arguments.batch])
            errors = summary(statistic_errors(graph, variables, images))
            print(row(name, f"{len(images)} real images", [[float("nan"), *errors, 0.0]]), flush=True)


if __name__ == "__main__":
    main()
