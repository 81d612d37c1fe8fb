"""The commands. Each prints tables to stdout, progress to stderr, and JSON to a file if asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tyro.conf import Positional

from dfq_jax import zoo
from dfq_jax.base import hanging
from dfq_jax.cli.demo import demo
from dfq_jax.cli.export import export
from dfq_jax.cli.layers import inspect, sensitivity
from dfq_jax.cli.models import Measurement, Model, model_of, resolve
from dfq_jax.cli.options import (
    BudgetOptions,
    ConventionOptions,
    Count,
    Data,
    Devices,
    ModelName,
    OptionalData,
    OptionalFile,
    OptionalFolder,
    OptionalModel,
    Page,
    Saved,
    SynthesisOptions,
    TargetOptions,
    Weights,
    mesh_of_devices,
)
from dfq_jax.cli.output import (
    accuracy_facts,
    check_targets,
    network_facts,
    print_table,
    top5_with_margin,
    with_margin,
    write_json,
)
from dfq_jax.cli.pages import check_pages, report, write_images
from dfq_jax.data import Dataset
from dfq_jax.graph import GraphWarning
from dfq_jax.recipes import (
    Quantized,
    Reporter,
    get_recipe,
    is_synthesized,
    load,
    progress_bar,
    remove_checkpoints,
)
from dfq_jax.zoo import PackagedWeights


def quantize(
    model: Positional[ModelName],
    *,
    checkpoint: Weights = None,
    recipe: str = "fast",
    bits: str = "w8a8",
    convention: ConventionOptions = ConventionOptions(),
    budget: BudgetOptions = BudgetOptions(),
    target: TargetOptions = TargetOptions(),
    seed: int = 0,
    devices: Devices = None,
    synthesis: SynthesisOptions = SynthesisOptions(),
    evaluate: OptionalData = None,
    limit: Count = None,
    output: OptionalFile = None,
    resume: OptionalFile = None,
    layers: bool = False,
    report: Page = None,
    save_images: OptionalFolder = None,
    json: OptionalFile = None,
    command: str = "",
) -> None:
    """Quantize a network without data.

    Args:
      checkpoint: Weights for a model of the zoo: a file (safetensors, npz, Flax msgpack or a torch state dict), a
          directory of Orbax, or hf:ORG/REPO[/FILE][@REVISION] of the Hugging Face hub.
      recipe: instant, fast, best, finetune, paper or noise.
      bits: Bits of weights and activations: w8a8, w4a4, w2a4, w4a16 (float activations), ...
      seed: Seed of all that is random.
      devices: Share the images among so many of this machine's devices, or all of them.
      evaluate: Measure float and quantized accuracy on labeled images: bundled, npz:FILE, folder:DIR or
          tfds:NAME/SPLIT.
      limit: Evaluate on the first N images only.
      output: Save the quantized network (safetensors).
      resume: Keep images in this file, unfinished and finished, and learned blocks and networks beside it, until all
          is done; the same command goes on from it, bit for bit with as many CPU threads.
      layers: Print the table of layers, too.
      report: Write a page with figures: what was done, each layer's errors and values, the images.
      save_images: Write the images that were made as PNG files.
      json: Write what was done and measured, for machines.
    """
    began = time.perf_counter()
    check_targets(output, json, resume, report)
    settings = {"recipe": synthesis.within(get_recipe(recipe)), "convention": convention.of(bits), "key": seed}
    settings |= {"budget": budget.budget(), "target": target.target(), "mesh": mesh_of_devices(devices)}
    network = resolve(model, checkpoint)
    check_pages(report, save_images, network, settings["recipe"])
    settings["details"] = report is not None and (network.undone or True)
    data = None if evaluate is None else network.load_data(evaluate, limit)
    with _resuming(resume):
        with progress_bar() as reporter, warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphWarning)  # the table begins with it
            quantized = network.quantize(reporter, checkpoint=resume, keep_checkpoint=True, **settings)
            found = {} if data is None else _measure(network, quantized, data, reporter)
        quantized = dataclasses.replace(quantized, report=dataclasses.replace(quantized.report, command=command))
        if output is not None:
            quantized.save(output, model=model, seed=seed)
        _print(quantized, found, layers)
        if report is not None:
            quantized.report.save_html(report, title=model)
        if save_images is not None:
            write_images(save_images, quantized.images, network.undone)
        if json is not None:
            facts = {name: accuracy_facts(found[name].accuracy) if found else None for name in ("float", "quantized")}
            seconds = quantized.report.seconds | {f"evaluate_{name}": m.seconds for name, m in found.items()}
            facts = {"model": model, "data": evaluate, "n": found["float"].accuracy.n if found else None, **facts}
            write_json(json, facts | network_facts(quantized, seconds, began))
    if resume is not None:
        images = is_synthesized(quantized.graph, quantized.recipe, quantized.convention)
        remove_checkpoints(resume, quantized.recipe, images=images)


@contextlib.contextmanager
def _resuming(file: Path | None) -> Iterator[None]:
    """An interrupt says how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if file is not None and file.exists():
            interrupt.add_note(f"the same command goes on from {str(file)!r}")
        raise


def _measure(target: Model, quantized: Quantized, data: Dataset, reporter: Reporter) -> dict[str, Measurement]:
    """The float and the quantized network on the same images."""
    before = target.measure(reporter, "evaluating the float network", target.traced_function, data)
    network = (quantized.apply, quantized.variables)
    after = target.measure(reporter, "evaluating the quantized network", network, data, before)
    return {"float": before, "quantized": after}


def _print(quantized: Quantized, found: dict[str, Measurement], layers: bool) -> None:
    """The report, with the table of layers if asked for, and what was measured."""
    print(quantized.report.table(layers=layers))
    if not found:
        return
    rows = [
        (name, with_margin(a), top5_with_margin(a), "" if a.agreement is None else f"{a.agreement:.2f}", str(a.n))
        for name, (_, a, _) in zip(("float", quantized.name), found.values(), strict=True)
    ]
    print()
    print_table(("network", "top-1 %", "top-5 %", "agreement %", "images"), rows, right=("agreement %", "images"))


def evaluate(
    file: Positional[Saved],
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
    apply_fn = quantized.apply_integer if integer else quantized.apply
    network = (apply_fn, quantized.variables)
    with progress_bar() as reporter:
        _, result, seconds = target.measure(reporter, "evaluating the quantized network", network, images)
    row = (quantized.name, with_margin(result), top5_with_margin(result), str(result.n), f"{seconds:.1f}")
    print_table(("network", "top-1 %", "top-5 %", "images", "seconds"), [row], right=("images", "seconds"))
    print("\n".join(hanging("convention: ", quantized.convention.describe())))
    if json is not None:
        measured = {"data": data, "n": result.n, "integer": integer, "quantized": accuracy_facts(result)}
        facts = network_facts(quantized, {"evaluate_quantized": seconds}, began)
        write_json(json, {"model": name, "file": str(file), **measured, **facts})


def models(*, verbose: bool = False, json: OptionalFile = None) -> None:
    """List the models of the zoo.

    Top-1 is that of the float network as its source published it, or as measured for the bundled ones.

    Args:
      verbose: Also say how many classes there are, in what data set, and whose weights these are.
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
    titles = ("name", "input", "classes", "weights", "MACs", "top-1 %", "from", "trained on", "source")
    texts = {"input": lambda shape: "x".join(map(str, shape)), "parameters": _short, "macs": _short}
    texts["float_top1"] = lambda percent: "" if percent is None else f"{percent:.2f}"
    columns = [(n, t) for n, t in zip(facts[0], titles, strict=True) if verbose or n not in VERBOSE]
    if not verbose:
        texts["weights"] = lambda origin: origin.split()[0]  # without the name of the extra
    rows = [tuple(texts.get(name, str)(model[name]) for name, _ in columns) for model in facts]
    print_table([title for _, title in columns], rows, right=("classes", "weights", "MACs", "top-1 %"))
    if json is not None:
        write_json(json, {"models": facts})


VERBOSE = ("classes", "trained_on", "source")  # columns that are too many for a line


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
    "sensitivity": sensitivity,
    "quantize": quantize,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "models": models,
}
