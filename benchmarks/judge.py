"""How often the judge of the recipes chooses wrong: each of its decisions beside what real images say.

    python benchmarks/judge.py --checkpoint resnet20-12fca82f.th --data npz:test.npz --more npz:train_sample.npz

For each decision of `quantize` prints the ratio of the divergences after and before, by the judge's own measures, by
others that it could ask, and on the real images of `--data` and `--more`, without their labels. At the end, for each
measure and for means of them: how many decisions of those where real images see a difference of at least `--least` are
wrong, and what all wrong ones cost together, as the factor by which the real divergence is larger than it had to be.
Real images decide nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from network import EDGES, Network, add_arguments
from recipes import field, unseen

from dfq_jax import RECIPES, Convention, quantize
from dfq_jax.recipes import steps
from dfq_jax.recipes.judge import Candidate, Judge
from dfq_jax.stages import analytic_comparison, comparer

DECIDED = {"kept": {"as decided": 0.5}, "dropped": {"as decided": 2.0}}
SOURCES = ("pyramid", "fourier")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--recipe", default="fast", choices=sorted(RECIPES))
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--edges", default="8", choices=EDGES, help="first and last layer")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--least", type=float, default=0.02, help="share of the real divergence that is a difference")
    parser.add_argument(
        "--real", type=int, help="real images that decisions are compared on, at most; all if not given"
    )
    parser.add_argument("--log", type=Path, help="count in what was printed before, and run nothing")
    arguments = parser.parse_args()

    if arguments.log:
        summarize(decisions(arguments.log.read_text()), arguments.least)
        return
    network = Network(arguments)
    print(network)
    recipe = RECIPES[arguments.recipe].replace(**dict(map(field, arguments.set)))
    seen: list[dict[str, float]] = []
    for bits, key in itertools.product(arguments.bits, arguments.keys):
        print(f"\n{bits}, key {key}", flush=True)
        sets = {s: unseen(network, dataclasses.replace(recipe.synthesis, source=s), key) for s in SOURCES}
        sets["real"] = network.images[: arguments.real]
        steps.Judge = watch(network, sets, recipe.batch_size, seen)  # a step asks for a judge by this name
        convention = Convention.parse(bits, **EDGES[arguments.edges])
        settings: dict[str, Any] = {"recipe": recipe, "convention": convention, "key": key}
        result = quantize(network.module, network.variables, input_shape=network.input_shape, **settings)
        print("  top-1 {:.2f}, agreement {:.2f}".format(*network.score(result.variables)), flush=True)
    summarize(seen, arguments.least)


def watch(network: Network, sets: dict[str, Any], batch_size: int, seen: list[dict[str, float]]) -> type[Judge]:
    """A judge that also notes what others would have said."""
    compared = {
        name: comparer(network.graph, network.variables, images, batch_size=batch_size) for name, images in sets.items()
    }
    known: dict[int, tuple[Any, dict[str, float]]] = {}  # with the variables, lest another tree take their place

    def others(candidate: Candidate) -> dict[str, float]:
        if id(candidate.quantized) not in known:
            found = {name: compare(candidate.quantized).divergence for name, compare in compared.items()}
            noise = analytic_comparison(network.graph, *candidate.networks)
            known[id(candidate.quantized)] = candidate.quantized, {**found, "noise of moments": noise.divergence}
        return known[id(candidate.quantized)][1]

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Watched(Judge):
        def choose(self, name: str, current: Candidate, other: Candidate) -> Candidate:
            if not self.has_images:
                return super().choose(name, current, other)
            before, after = ({"the judge": self.compare(c).divergence, **others(c)} for c in (current, other))
            ratios = {measure: after[measure] / before[measure] for measure in before}
            taken = super().choose(name, current, other)
            kept = taken.quantized is other.quantized
            seen.append(ratios | DECIDED["kept" if kept else "dropped"])
            words = ", ".join(f"{measure} {ratio:.3f}" for measure, ratio in ratios.items())
            print(f"  {name}: {'kept' if kept else 'dropped'}; {words}", flush=True)
            return taken

    return Watched


def decisions(text: str) -> list[dict[str, float]]:
    """The ratios of each decision that was printed."""
    found = [re.fullmatch(r"  .*: (kept|dropped); (.*)", line) for line in text.splitlines()]
    pairs = [[part.rsplit(" ", 1) for part in match[2].split(", ")] for match in found if match]
    verdicts = [DECIDED[match[1]] for match in found if match]
    return [
        {name: float(ratio) for name, ratio in pair} | verdict for pair, verdict in zip(pairs, verdicts, strict=True)
    ]


def summarize(seen: list[dict[str, float]], least: float) -> None:
    """Wrong decisions by each measure, and by means of them."""
    measures = [m for m in seen[0] if m != "real"]
    groups = [(m,) for m in measures]
    groups += itertools.combinations([m for m in measures if m != "as decided"], 2)
    real = np.log([s["real"] for s in seen])
    counts = np.abs(real) > math.log(1 + least)
    print(f"\nof {len(seen)} decisions {counts.sum()} matter; wrong ones, and what they cost")
    for group in groups:
        mean = np.mean([np.log([s[m] for s in seen]) for m in group], axis=0)
        wrong = counts & ((mean <= 0) != (real <= 0))
        print(f"  {' and '.join(group)}: {wrong.sum()}, {np.exp(np.abs(real[wrong]).sum()):.2f}", flush=True)


if __name__ == "__main__":
    main()
