"""The commands. Each prints tables to stdout, progress to stderr, and JSON to a file if asked to."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dfq_jax import zoo
from dfq_jax.cli.demo import demo
from dfq_jax.cli.export import export
from dfq_jax.cli.models import model_of, resolve
from dfq_jax.cli.output import (
    accuracy_facts,
    check_targets,
    convention_facts,
    environment,
    print_table,
    top5_with_margin,
    with_margin,
    write_json,
)
from dfq_jax.cli.progress import Reporter, open_display
from dfq_jax.data import accuracy
from dfq_jax.graph import GraphWarning
from dfq_jax.recipes import Quantized, Recipe, get_recipe, load
from dfq_jax.recipes import quantize as quantize_network
from dfq_jax.stages import Convention
from dfq_jax.synthesis import SynthesisError
from dfq_jax.zoo import PackagedWeights

MODEL_HELP = "A name from `dfq-jax models`, or package.module:function (the current folder is importable)."
DATA_HELP = "Labeled images: bundled, npz:FILE, folder:DIR or tfds:NAME/SPLIT."
ModelName = Annotated[str, arg(metavar="MODEL", help=MODEL_HELP)]
Data = Annotated[str, arg(metavar="DATA", help=DATA_HELP)]
OptionalModel = Annotated[str | None, arg(metavar="MODEL")]
OptionalData = Annotated[str | None, arg(metavar="DATA", help=DATA_HELP)]
Weights = Annotated[str | None, arg(metavar="FILE|hf:ORG/REPO")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
Count = Annotated[int | None, arg(metavar="N")]
Bits = Annotated[int | Literal["none"], arg(metavar="N|none")]


def inspect(model: Positional[ModelName], *, checkpoint: Weights = None) -> None:
    """Print the layers that are found in a network, and what would not be quantized.

    Args:
        checkpoint: Weights for a model of the zoo, as for quantize; its structure is shown without, too.
    """
    print(resolve(model, checkpoint, weights=False).graph.table())


def quantize(
    model: Positional[ModelName],
    *,
    checkpoint: Weights = None,
    recipe: str = "fast",
    bits: str = "w8a8",
    edge_bits: Bits = 8,
    edge_input_bits: Count = None,
    second_input_bits: Count = None,
    seed: int = 0,
    images: Count = None,
    steps: Count = None,
    batch_size: Count = None,
    evaluate: OptionalData = None,
    limit: Count = None,
    output: OptionalFile = None,
    resume: OptionalFile = None,
    json: OptionalFile = None,
) -> None:
    """Quantize a network without data.

    Args:
        checkpoint: Weights for a model of the zoo: a file (safetensors, npz, Flax msgpack or a torch state dict), a
            directory of Orbax, or hf:ORG/REPO[/FILE][@REVISION] of the Hugging Face hub.
        recipe: instant, fast, best, finetune, paper or noise.
        bits: Bits of weights and activations: w8a8, w4a4, w2a4, w4a16 (float activations), ...
        edge_bits: Bits of the first and the last layer; none for the same as all others.
        edge_input_bits: Bits of the inputs of these two layers, where they differ.
        second_input_bits: Bits of the second layer's input, where they differ.
        seed: Seed of all that is random.
        images: Number of images to make, in place of the recipe's.
        steps: Optimizer steps for each batch of images, in place of the recipe's.
        batch_size: Images optimized together, in place of the recipe's.
        evaluate: Measure float and quantized accuracy on labeled images: bundled, npz:FILE, folder:DIR or
            tfds:NAME/SPLIT.
        limit: Evaluate on the first N images only.
        output: Save the quantized network (safetensors).
        resume: Keep images in this file, unfinished and finished, until all is done; the same command goes on from it,
            bit for bit with as many CPU threads.
        json: Write what was done and measured, for machines.
    """
    began = time.perf_counter()
    check_targets(output, json, resume)
    chosen = _adjusted(get_recipe(recipe), images, steps, batch_size)
    convention = Convention.parse(
        bits,
        edge_bits=None if edge_bits == "none" else edge_bits,
        edge_input_bits=edge_input_bits,
        second_input_bits=second_input_bits,
    )
    target = resolve(model, checkpoint)
    data = None if evaluate is None else target.load_data(evaluate, limit)
    with open_display() as display, warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphWarning)  # the table begins with it
        reporter = Reporter(display)
        try:
            quantized = quantize_network(
                target.network,
                target.variables,
                input_shape=target.input_shape,
                recipe=chosen,
                convention=convention,
                key=seed,
                on_progress=reporter.on_progress,
                on_stage=reporter.on_stage,
                checkpoint=resume,
            )
        except SynthesisError as error:
            raise ValueError(str(error)) from error
        except KeyboardInterrupt as interrupt:
            if resume is not None and resume.exists():
                interrupt.add_note(f"the same command goes on from {str(resume)!r}")
            raise
        seconds = dict(quantized.report.seconds)
        before = after = None
        if data is not None:
            (reference, labels), seconds["evaluate_float"] = reporter.timed(
                "evaluating the float network", target.classify, *target.traced_function, data
            )
            (found, _), seconds["evaluate_quantized"] = reporter.timed(
                "evaluating the quantized network",
                target.classify,
                quantized.apply,
                quantized.variables,
                data,
            )
            before, after = accuracy(reference, labels), accuracy(found, labels, reference)
    if output is not None:
        quantized.save(output, model=model, seed=seed)
    print(quantized.report.table())
    if after is not None:
        rows = [
            ("float", with_margin(before), top5_with_margin(before), "", str(before.n)),
            (
                quantized.convention.name.upper(),
                with_margin(after),
                top5_with_margin(after),
                f"{after.agreement:.2f}",
                str(after.n),
            ),
        ]
        print()
        print_table(("network", "top-1 %", "top-5 %", "agreement %", "images"), rows, right=("agreement %", "images"))
    seconds["total"] = round(time.perf_counter() - began, 3)
    if json is not None:
        measured = {
            "data": evaluate,
            "n": None if after is None else after.n,
            "float": None if before is None else accuracy_facts(before),
            "quantized": None if after is None else accuracy_facts(after),
        }
        write_json(json, {"model": model, **measured, **_description(quantized, seconds)})


def evaluate(
    file: Positional[Annotated[Path, arg(metavar="FILE", help="What `dfq-jax quantize --output` saved.")]],
    *,
    data: Data,
    model: OptionalModel = None,
    limit: Count = None,
    integer: bool = False,
    json: OptionalFile = None,
) -> None:
    """Measure the accuracy of a saved quantized network.

    Args:
        model: The model it was made from, where the file does not say; its weights are not needed.
        limit: Evaluate on the first N images only.
        integer: Compute in integers instead of simulating them.
        json: Write what was measured, for machines.
    """
    began = time.perf_counter()
    check_targets(json)
    name = model or model_of(file)
    target = resolve(name, weights=False)
    quantized = load(file, target.network, target.variables)
    images = target.load_data(data, limit)
    with open_display() as display:
        apply_fn = quantized.apply_integer if integer else quantized.apply
        (found, labels), seconds = Reporter(display).timed(
            "evaluating the quantized network", target.classify, apply_fn, quantized.variables, images
        )
    result = accuracy(found, labels)
    name_of_bits = quantized.convention.name.upper()
    row = (name_of_bits, with_margin(result), top5_with_margin(result), str(result.n), f"{seconds:.1f}")
    print_table(("network", "top-1 %", "top-5 %", "images", "seconds"), [row], right=("images", "seconds"))
    print(f"convention: {quantized.convention.describe()}")
    if json is not None:
        timing = {"evaluate_quantized": seconds, "total": round(time.perf_counter() - began, 3)}
        measured = {"data": data, "n": result.n, "integer": integer, "quantized": accuracy_facts(result)}
        write_json(json, {"model": name, "file": str(file), **measured, **_description(quantized, timing)})


def models(*, json: OptionalFile = None) -> None:
    """List the models of the zoo.

    Top-1 is that of the float network as its source published it, or as measured for the bundled ones.

    Args:
        json: Write the list, for machines.
    """
    check_targets(json)
    facts = [
        {
            "name": entry.name,
            "input": list(entry.input_shape[1:]),
            "classes": entry.num_classes,
            "parameters": entry.num_parameters,
            "macs": entry.macs,
            "float_top1": entry.float_top1,
            "weights": _origin(entry.weights),
            "trained_on": entry.trained_on,
            "source": entry.source,
        }
        for entry in zoo.list_models()
    ]
    header = ("name", "input", "classes", "parameters", "MACs", "float top-1 %", "weights", "trained on", "source")
    rows = [
        (
            model["name"],
            "x".join(map(str, model["input"])),
            str(model["classes"]),
            _short(model["parameters"]),
            _short(model["macs"]),
            "" if model["float_top1"] is None else f"{model['float_top1']:.2f}",
            model["weights"],
            model["trained_on"],
            model["source"],
        )
        for model in facts
    ]
    print_table(header, rows, right=("classes", "parameters", "MACs", "float top-1 %"))
    if json is not None:
        write_json(json, {"models": facts})


def _short(number: int) -> str:
    """In millions, with three digits at least."""
    millions = number / 1e6
    return f"{millions:.{max(0, 2 - math.floor(math.log10(millions)))}f} M"


def _origin(weights: str | PackagedWeights | None) -> str:
    """Where a model's weights come from."""
    if isinstance(weights, PackagedWeights):
        return f"extra {weights.extra}"
    return "--checkpoint" if weights is None else "bundled"


COMMANDS = {
    "demo": demo,
    "inspect": inspect,
    "quantize": quantize,
    "evaluate": evaluate,
    "export": export,
    "models": models,
}


def _adjusted(recipe: Recipe, images: int | None, steps: int | None, batch_size: int | None) -> Recipe:
    """The recipe with what was asked for on the command line."""
    if images is not None and batch_size is None:
        # Images beyond those asked for would be made only to be thrown away.
        batch_size = min(images, recipe.synthesis.batch_size)
    fields = {"num_images": images, "steps": steps, "batch_size": batch_size}
    given = {f"synthesis_{name}": value for name, value in fields.items() if value is not None}
    return recipe.replace(**given)


def _description(quantized: Quantized, seconds: dict[str, float]) -> dict[str, Any]:
    """How a network was quantized, for JSON."""
    return {
        "seconds": seconds,
        "convention": convention_facts(quantized.convention),
        "recipe": dataclasses.asdict(quantized.recipe),
        "key": quantized.report.key,
        "versions": environment(),
        "report": quantized.report.to_dict(),
    }
