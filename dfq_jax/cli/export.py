"""`dfq-jax export`: a saved quantized network as a file that other runtimes run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional, arg

from dfq_jax.base import environment
from dfq_jax.cli.layers import stand_in_images
from dfq_jax.cli.models import Model, Progress, model_of, resolve
from dfq_jax.cli.options import Count, OptionalData, OptionalFile, OptionalModel, Saved
from dfq_jax.cli.output import check_targets, print_table, write_json
from dfq_jax.data import Dataset
from dfq_jax.export import Format, Runner, get_exporter
from dfq_jax.quantizers import dequantized, quantization
from dfq_jax.recipes import Quantized, Reporter, load, progress_bar
from dfq_jax.stages import sqnr

RANGE_IMAGES = 64


def export(
    file: Positional[Saved],
    *,
    to: Format,
    output: Annotated[Path, arg(metavar="FILE")],
    verify: OptionalData = None,
    model: OptionalModel = None,
    limit: Count = None,
    json: OptionalFile = None,
) -> None:
    """Write a saved quantized network in another format, and compare it with this library.

    Args:
      to: The format.
      output: What to write.
      verify: Images to run both on: bundled, npz:FILE, folder:DIR or tfds:NAME/SPLIT; labels are not used.
      model: The model it was made from, where the file does not say; its weights are not needed.
      limit: Verify on the first N images only.
      json: Write what was measured, for machines.
    """
    began = time.perf_counter()
    check_targets(output, json)
    exporter = get_exporter(to)
    name = model or model_of(file)
    target = resolve(name, weights=False)
    if to == "qwix":  # its files have parameters alone: writing and running them takes the model's code
        exporter = dataclasses.replace(exporter, module=target.network)
    quantized = load(file, target.network, target.variables)
    # What cannot be verified is refused before anything is written.
    data = None if verify is None else target.load_data(verify, limit)
    if to == "tflite" and quantization(quantized.variables).by_tensor:
        exporter.check(quantized)
        with progress_bar() as reporter:
            quantized = dataclasses.replace(quantized, images=_images(quantized, reporter))
    exporter.write(quantized, output)
    size = output.stat().st_size
    found: dict[str, Any] = {"file": str(output), "format": to, "bytes": size}
    row = [to, f"{size:,}"]
    if data is not None:
        with progress_bar() as reporter:
            run = exporter.open(output)
            (reference, other), _ = reporter.timed(f"running {output.name}", _both, quantized, run, target, data)
        found["n"] = len(reference)
        found["agreement"] = 100.0 * float((reference.argmax(1) == other.argmax(1)).mean())
        found["sqnr"] = sqnr(reference, other)
        row += [f"{found['agreement']:.2f}", f"{found['sqnr']:.1f}", str(found["n"])]
    header = ("format", "bytes", "agreement %", "SQNR dB", "images")[: len(row)]
    print_table(header, [tuple(row)], right=header[1:])
    if json is not None:
        finite = None if found.get("sqnr") == float("inf") else found.get("sqnr")
        seconds = {"total": round(time.perf_counter() - began, 3)}
        content = {"model": name, **found, "sqnr": finite, "seconds": seconds, "versions": environment()}
        write_json(json, content)


def _images(quantized: Quantized, reporter: Reporter) -> Any:
    """What LiteRT takes ranges of residual sums from, made anew: saved networks have no images."""
    config = dataclasses.replace(quantized.recipe.synthesis, num_images=RANGE_IMAGES)
    return stand_in_images(quantized.graph, dequantized(quantized.variables), config, jax.random.key(0), reporter)


def _both(
    quantized: Quantized, run: Runner, target: Model, data: Dataset, on_progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, classes]` of the network as simulated here, and as the runtime gives them."""
    pairs, done = [], 0
    for x, _ in target.batches(data):
        pairs.append((np.asarray(quantized.graph.logits(quantized(jnp.asarray(x)))), np.asarray(run(x))))
        done += len(x)
        on_progress(done, len(data))
    ours, theirs = map(np.concatenate, zip(*pairs, strict=True))
    return ours, theirs
