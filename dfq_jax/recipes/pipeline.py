"""The one call that runs a recipe: `quantize`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from dfq_jax.base import (
    Progress,
    check_alike,
    check_mesh,
    compiling_ahead,
    environment,
    fingerprint,
    is_writer,
    may_transfer,
    mesh_of,
    noting_lost_processes,
    on_all,
    require,
    spans_processes,
)
from dfq_jax.graph import (
    Graph,
    GraphWarning,
    as_function,
    check_variables,
    compute_kernels,
    computed_kernels,
    doubtful_statistics,
    on_device,
    trace,
)
from dfq_jax.recipes.bits import Outcome, allocated, allocator_of
from dfq_jax.recipes.images import THESE_IMAGES, Images, find_images
from dfq_jax.recipes.judge import Candidate
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.recipe import Recipe, get_recipe
from dfq_jax.recipes.steps import DRAWING, Work, remove_checkpoints, run_steps
from dfq_jax.recipes.target import Target, smallest
from dfq_jax.report import (
    Details,
    Report,
    doubtful_result,
    doubtful_structure,
    examine,
    image_grid,
    layer_reports,
    packed_size,
)
from dfq_jax.stages import Budget, Comparison, Convention, Sensitivity, choices_within


@compiling_ahead()
@may_transfer
def quantize(
    model: Any,
    variables: Any = None,
    *,
    input_shape: Sequence[int],
    recipe: str | Recipe = "fast",
    bits: str = "w8a8",
    edge_bits: int | None = 8,
    convention: Convention | None = None,
    budget: Budget | None = None,
    target: Target | None = None,
    key: Key[Array, ""] | int = 0,
    images: Float[Array, "n ..."] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    details: bool | Callable[[np.ndarray], Any] = False,
    mesh: Mesh | None = None,
) -> Quantized:
    """Quantize a trained network without data.

    >>> quantized = quantize(apply_fn, variables, input_shape=(1, 6), recipe="instant", bits="w8a8")
    >>> quantized(images).shape
    (8, 3)

    Args:
      model: a Linen module, an NNX module, or a function `(variables, x) -> outputs` in inference mode.
      variables: its variables (optional for NNX).
      input_shape: shape of its input, `[N, H, W, C]`; N is free.
      recipe: a name in `RECIPES`, or a `Recipe` (`RECIPES["fast"].replace(synthesis_steps=500)`).
      bits: "w8a8", "w4a4", "w4a16" (float activations), ...
      edge_bits: bits of the first and last layer; None for the same as all others.
      convention: everything about bits, in place of `bits` and `edge_bits`. Weight ranges are the recipe's, unless its
        `weight_range` names others.
      budget: what the network may take: bits are chosen layer by layer within it, by the divergence of the outputs (see
        `sensitivity` and `allocate`), in place of those of the convention, whose rules still hold.
      target: how good the network has to be, for the smallest that is, as far as `Target` is met by bits of weights
        chosen layer by layer: some sizes are tried (see `Quantized.report`). If none is, the best of them is returned,
        and the report and a warning say so. With it, a checkpoint keeps images alone.
      key: a JAX key or a seed; consumed.
      images: preprocessed images to use in place of what the recipe would take, `[N, H, W, C]`: synthetic images,
        noise, or (recipe "instant") BatchNorm parameters. Ranges, corrections and the comparison are then theirs.
      on_progress: called while images are made, while blocks are reconstructed (a block counts as a batch), and during
        fine-tuning.
      on_stage: called with the name of each stage as it begins.
      checkpoint: file to keep images in, unfinished and finished, until all is done; blocks and students are kept
        beside it (FILE.reconstruction, FILE.fine-tuning). The same call resumes from them. So it gives the same
        network, bit for bit, as an uninterrupted call, given as many CPU threads: with another number of them images
        differ in their last digits, and that grows.
      keep_checkpoint: leave the files there at the end, for what is still to be done with the network: the same call
        has its images, blocks and student at once.
      details: measure in the end what a page of the report shows: the error of each layer, its values against its
        steps, and pictures of the images (see `report.examine`); `quantized.report.save_html` writes the page. In
        place of True, the preprocessing that makes images of pixels 0...255, which is undone for the pictures.
      mesh: the devices to use, of one process or several, which all make the same call: images are sharded over all of
        them, however its axes are named, and variables have a copy on each, those returned too. The first process
        alone reads and writes checkpoints. None for the device, or the devices, where the variables lie.

    Returns:
      The quantized network.

    Raises:
      ValueError, TypeError: arguments, weights or a network that cannot be quantized so, or rules for no layer of it,
        or a budget that the fewest bits do not meet, before any long work; or outputs, of the float or the quantized
        network, that are no finite numbers.
      OSError: the checkpoint cannot be written.
      KeyboardInterrupt: interrupted during synthesis, reconstruction or fine-tuning; a checkpoint, if asked for, is
        kept.

    Warns:
      GraphWarning: BatchNorms were not recognized or their statistics look untrained, or a good part of the network
        stays in float; or the result has fallen apart: fewer than half of the images keep their class, or the outputs'
        error is as large as they are; or no network met the target. The head of the report says so too.
    """
    recipe = get_recipe(recipe)
    convention = _as_convention(convention, bits, edge_bits).with_default(recipe.weight_range)
    _check_wishes(budget, target)
    key = _as_key(key)
    keys = dict(zip(DRAWING, jax.random.split(key, len(DRAWING)), strict=True))
    input_shape = _as_shape(input_shape)
    preprocessing = details if callable(details) else None
    if details:
        _check_pictures(input_shape, preprocessing)
    apply_fn, variables = as_function(model, variables)
    variables = on_device(variables)
    mesh = check_mesh(mesh_of(variables) if mesh is None else mesh)
    clock = _Clock(on_stage, mesh)
    with clock("trace"):
        _check_alike(mesh, key, variables, images, recipe, convention, budget, target, input_shape)
        variables = on_all(variables, mesh)
        graph, variables = compute_kernels(trace(apply_fn, variables, input_shape), variables)
        check_variables(graph, variables)
        convention.check(graph)
        if budget is not None:
            choices_within(graph, budget, convention)
        if target is not None:
            target.check(graph, images)
    doubts = _warned(*doubtful_statistics(graph, variables), *doubtful_structure(graph))
    with clock("images"):
        options: Any = {"on_progress": on_progress, "checkpoint": checkpoint}
        found = find_images(graph, variables, recipe, convention, keys, images, **options)
    work = Work(
        graph=graph, variables=variables, recipe=recipe, convention=convention, images=found, keys=keys, **options
    )
    outcome = _quantized(work, budget, target, images, clock)
    work, result = outcome.work, outcome.network
    with clock("compare"):
        judge = work.judge if found.analytic else dataclasses.replace(work.judge, images=found.images)
        compared = judge.compare(result)
    if found.kind == THESE_IMAGES:
        doubts += _warned(*doubtful_result(compared))
    else:
        compared = dataclasses.replace(compared, agreement=None)  # noise is of no class
    extra = None
    if details:
        with clock("details"):
            extra = _details(graph, result, found, outcome.costs, preprocessing)
    doubts += _warned(*outcome.doubts)
    facts: Any = {"warnings": doubts, "seconds": clock.seconds, "target": outcome.target, "details": extra}
    report = _report(work, result, compared, key=key, **facts)
    if checkpoint is not None and not keep_checkpoint and is_writer(mesh):
        remove_checkpoints(checkpoint, recipe, images=found.checkpoint is not None)
    return Quantized(
        variables=result.quantized,
        graph=graph,
        report=report,
        recipe=recipe,
        convention=work.convention,
        images=found.images,
    )


def _quantized(work: Work, budget: Budget | None, target: Target | None, given: Any, clock: _Clock) -> Outcome:
    """The network, with bits by layer if those are to be chosen."""
    if target is not None:
        return smallest(work, target, given, clock)
    start, costs = Candidate(variables=work.variables), None
    if budget is not None:
        with clock("budget"):
            costs, allocate = allocator_of(work)
            work, start = allocated(work, allocate(budget))
    return Outcome(work, run_steps(work, start, clock), costs)


def _warned(*doubts: str) -> tuple[str, ...]:
    """The doubts, which the caller of `quantize` is warned of."""
    for doubt in doubts:
        warnings.warn(doubt, GraphWarning, stacklevel=4)
    return doubts


def _details(graph: Graph, result: Candidate, images: Images, costs: Sensitivity | None, preprocessing: Any) -> Details:
    """What a page shows of the result, on the images; noise is nothing to look at."""
    is_noise = images.kind != THESE_IMAGES
    kind = "arrays of Gaussian noise" if is_noise else "images"
    found = examine(graph, *result.networks, images.images, kind=kind, preprocessing=preprocessing)
    pictures = () if is_noise else found.pictures
    return dataclasses.replace(
        found, pictures=pictures, sensitivity=None if costs is None else json.loads(costs.to_json())
    )


def _report(work: Work, result: Candidate, compared: Comparison, *, key: jax.Array, **facts: Any) -> Report:
    graph, images, kernels = work.graph, work.images, computed_kernels(work.graph)
    computed = [f"kernels computed from parameters: {', '.join(kernels)}"] if kernels else []
    return Report(
        recipe=work.recipe.name,
        settings=json.loads(json.dumps(dataclasses.asdict(work.recipe))),  # as it comes back from a file
        convention=work.convention.describe(),
        key=np.asarray(jax.random.key_data(key)).reshape(-1).tolist(),
        images=images.origin,
        compared_on=images.kind,
        agreement=compared.agreement,
        sqnr=compared.sqnr,
        layers=layer_reports(graph, result.variables, result.quantized),
        skipped=tuple((s.name, s.reason) for s in graph.skipped),
        steps=(*computed, *result.decisions),
        size=packed_size(graph.leaves(result.quantized)),
        versions=environment(),
        **facts,
    )


class _Clock:
    """Wall time of named stages."""

    def __init__(self, on_stage: Callable[[str], None] | None, mesh: Mesh | None):
        self.seconds: dict[str, float] = {}
        self._on_stage, self._mesh = on_stage, mesh

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._on_stage is not None:
            self._on_stage(stage)
        began = time.perf_counter()
        with noting_lost_processes(self._mesh):
            yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - began, 3)


# --- arguments ---


def _check_wishes(budget: Budget | None, target: Target | None) -> None:
    """Refuse what is no budget or no target, or both at once."""
    for name, value, kind in (("budget", budget, Budget), ("target", target, Target)):
        if not isinstance(value, kind | None):
            raise TypeError(f"{name}: expected a {kind.__name__} or None, found {value!r}.")
    if budget is not None and target is not None:
        raise ValueError("target: expected None beside a budget, found both.")


def _check_alike(mesh: Mesh | None, key: Any, variables: Any, images: Any, *settings: Any) -> None:
    """Refuse arguments that differ between the processes of a mesh, which would wait for each other forever."""
    if spans_processes(mesh):
        digests = {"variables": fingerprint(variables), "images": fingerprint(images), "recipe": repr(settings)}
        check_alike(mesh, **digests, key=str(jax.random.key_data(key)))


def _as_convention(convention: Convention | None, bits: str, edge_bits: int | None) -> Convention:
    if convention is None:
        return Convention.parse(bits, edge_bits=edge_bits)
    if not isinstance(convention, Convention):
        raise TypeError(f"convention: expected a Convention, found {convention!r}; for a name use bits=...")
    return convention


def _as_key(key: Any) -> Key[Array, ""]:
    """A JAX key from a key or a seed."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        try:
            return jax.random.key(int(key))
        except OverflowError:
            raise ValueError(f"key: expected a seed of at most 64 bits, found {key}.") from None
    if hasattr(key, "dtype") and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "shape", None) == (2,):
        return jax.random.wrap_key_data(key)
    raise TypeError(f"key: expected a JAX key or an integer seed, found {key!r}.")


def _check_pictures(shape: tuple[int, ...], preprocessing: Any) -> None:
    """Refuse, before any long work, what pictures could not be made with."""
    require("PIL.Image", "report")
    if len(shape) == 4:
        image_grid(np.zeros((1, *shape[1:]), np.float32), preprocessing)


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        found = tuple(map(operator.index, shape))
    except TypeError:
        found = ()
    if len(found) < 2 or any(d < 1 for d in found):
        raise ValueError(f"input_shape: expected a shape [N, ..., C] such as (1, 32, 32, 3), found {shape!r}.")
    return found
