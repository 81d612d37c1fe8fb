"""`dfq-jax demo`: what recipes make of the bundled network, in a few minutes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from dfq_jax.cli.models import resolve
from dfq_jax.cli.output import (
    accuracy_facts,
    check_targets,
    convention_facts,
    environment,
    print_table,
    with_margin,
    write_json,
)
from dfq_jax.cli.progress import Reporter, open_display
from dfq_jax.data import accuracy
from dfq_jax.recipes import RECIPES, Recipe, quantize

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
HEADER = ("recipe", "images", "input ranges", "weight ranges", "then", "top-1 %", "agreement %", "seconds")


def demo(*, json: Annotated[Path | None, arg(metavar="FILE")] = None) -> None:
    """Quantize the bundled network to 4 bits in three ways, and compare them on 10,000 test images.

    Args:
        json: Write the results, for machines.
    """
    began = time.perf_counter()
    check_targets(json)
    model = resolve(MODEL)
    data = model.load_data(DATA)
    with open_display() as display:
        reporter = Reporter(display)
        (reference, labels), seconds = reporter.timed("float: evaluating", model.classify, *model.traced_function, data)
        before = accuracy(reference, labels)
        rows = [("float", "", "", "", "", with_margin(before), "", "")]
        results: list[dict[str, Any]] = []
        for name in DEMONSTRATED:
            reporter = Reporter(display, name)
            quantized = quantize(
                model.network,
                model.variables,
                input_shape=model.input_shape,
                recipe=RECIPES[name],
                bits=BITS,
                edge_bits=EDGE_BITS,
                key=SEED,
                on_progress=reporter.on_progress,
                on_stage=reporter.on_stage,
            )
            (found, _), evaluated = reporter.timed(
                "evaluating", model.classify, quantized.apply, quantized.variables, data
            )
            after = accuracy(found, labels, reference)
            stages = quantized.report.seconds
            rows.append(
                (
                    name,
                    *_words(quantized.recipe),
                    with_margin(after),
                    f"{after.agreement:.2f}",
                    f"{sum(stages.values()):.1f}",
                )
            )
            results.append(
                {
                    "name": name,
                    "quantized": accuracy_facts(after),
                    "seconds": {**stages, "evaluate_quantized": evaluated},
                    "convention": convention_facts(quantized.convention),
                    "recipe": dataclasses.asdict(quantized.recipe),
                    "report": quantized.report.to_dict(),
                }
            )
    convention = quantized.convention
    shared = convention.describe().replace(f" ({convention.weight_range} ranges)", "")  # each row has its own
    print_table(HEADER, rows, right=("agreement %", "seconds"))
    print(f"convention: {shared}")
    print(f"{MODEL} on all {before.n:,} test images of Fashion-MNIST, none used to quantize; seed {SEED}")
    if json is not None:
        write_json(
            json,
            {
                "model": MODEL,
                "data": DATA,
                "n": before.n,
                "float": accuracy_facts(before),
                "recipes": results,
                "convention": shared,
                "key": quantized.report.key,
                "seconds": {"evaluate_float": seconds, "total": round(time.perf_counter() - began, 3)},
                "versions": environment(),
            },
        )


def _words(recipe: Recipe) -> tuple[str, str, str, str]:
    """Images, ranges and what follows, for a row of the table."""
    count = recipe.synthesis.num_images
    images = f"{count} of noise" if recipe.source == "noise" else f"{count} synthesized"
    steps = [] if recipe.batch_norm is None else [f"{recipe.batch_norm.method} BatchNorm"]
    if recipe.bias_correction:
        steps.append("bias correction")
    estimator, weights = (RANGE_WORDS.get(name, name) for name in (recipe.estimator, recipe.weight_range))
    return images, estimator, weights, ", ".join(steps) or "nothing"
