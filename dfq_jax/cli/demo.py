"""`dfq-jax demo`: what recipes make of the bundled network, in a few minutes."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

from dfq_jax.base import environment, hanging
from dfq_jax.cli.models import Measurement, resolve
from dfq_jax.cli.options import OptionalFile
from dfq_jax.cli.output import (
    accuracy_facts,
    check_targets,
    convention_facts,
    print_table,
    with_margin,
    write_json,
)
from dfq_jax.recipes import RECIPES, Quantized, Recipe, Reporter, progress_bar

MODEL = "fashion_resnet20"
DATA = "bundled"
BITS = "w4a4"
EDGE_BITS = 8
SEED = 0
DEMONSTRATED = ("noise", "paper", "fast")  # from naive to best

RANGE_WORDS = {
    "max": "largest value",
    "mean_peak": "mean of peaks",
    "percentile": "percentile",
    "mse": "least square error",
    "lp": "L2.4 search",
    "min_max": "min-max",
}
HEADER = ("recipe", "top-1 %", "agreement %", "seconds")


def demo(*, json: OptionalFile = None) -> None:
    """Quantize the bundled network to 4 bits in three ways, and compare them on 10,000 test images.

    Args:
      json: Write the results, for machines.
    """
    began = time.perf_counter()
    check_targets(json)
    model = resolve(MODEL)
    data = model.load_data(DATA)
    rows: list[tuple[str, ...]] = []
    results: list[dict[str, Any]] = []
    with progress_bar() as bar:
        before = model.measure(bar, "float: evaluating", model.traced_function, data)
        for name in DEMONSTRATED:
            reporter = Reporter(bar.display, name)
            quantized = model.quantize(reporter, recipe=RECIPES[name], bits=BITS, edge_bits=EDGE_BITS, key=SEED)
            network = (quantized.apply, quantized.variables)
            after = model.measure(reporter, "evaluating", network, data, before)
            rows.append(_row(quantized, after))
            results.append(_facts(quantized, after))
    convention = quantized.convention
    shared = convention.describe().replace(f" ({convention.weight_range} ranges)", "")  # each row has its own
    rows.insert(0, ("float", with_margin(before.accuracy), "", ""))
    print_table(HEADER, rows, right=("agreement %", "seconds"))
    lines = [(f"{name:<8}", _words(RECIPES[name])) for name in DEMONSTRATED]
    lines.append(("convention: ", shared))
    lines.append(("", f"{MODEL} on all {len(data):,} test images of Fashion-MNIST, none used to quantize; seed {SEED}"))
    print("", *itertools.chain.from_iterable(hanging(*line) for line in lines), sep="\n")
    if json is not None:
        content = {
            "model": MODEL,
            "data": DATA,
            "n": len(data),
            "float": accuracy_facts(before.accuracy),
            "recipes": results,
            "convention": shared,
            "key": quantized.report.key,
            "seconds": {"evaluate_float": before.seconds, "total": round(time.perf_counter() - began, 3)},
            "versions": environment(),
        }
        write_json(json, content)


def _row(quantized: Quantized, measured: Measurement) -> tuple[str, ...]:
    """Of the table."""
    found, seconds = measured.accuracy, sum(quantized.report.seconds.values())
    return quantized.recipe.name, with_margin(found), f"{found.agreement:.2f}", f"{seconds:.1f}"


def _facts(quantized: Quantized, measured: Measurement) -> dict[str, Any]:
    """For JSON."""
    return {
        "name": quantized.recipe.name,
        "quantized": accuracy_facts(measured.accuracy),
        "seconds": {**quantized.report.seconds, "evaluate_quantized": measured.seconds},
        "convention": convention_facts(quantized.convention),
        "recipe": dataclasses.asdict(quantized.recipe),
        "report": quantized.report.to_dict(),
    }


def _words(recipe: Recipe) -> str:
    """Images, ranges and what follows."""
    count = recipe.synthesis.num_images
    images = f"{count} images of noise" if recipe.source == "noise" else f"{count} synthesized images"
    steps = [] if recipe.reconstruction is None else ["learned rounding"]
    if recipe.batch_norm is not None:
        steps.append(f"{recipe.batch_norm.method} BatchNorm")
    if recipe.bias_correction:
        steps.append("bias correction")
    estimator, weights = (RANGE_WORDS.get(name, name) for name in (recipe.estimator, recipe.weight_range))
    if recipe.range_search is not None:
        estimator = "chosen by outputs"
    then = ", ".join(steps) or "nothing"
    return f"{images}; activation ranges: {estimator}, weight ranges: {weights}; then {then}"
