"""The one call that runs a recipe: `quantize`."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.base import may_transfer
from dfq_jax.graph import (
    Graph,
    GraphWarning,
    as_function,
    check_images,
    check_variables,
    compute_kernels,
    computed_kernels,
    doubtful_statistics,
    on_device,
    trace,
)
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.recipe import Recipe, get_recipe
from dfq_jax.report import Report, doubtful_structure, layer_reports, packed_size
from dfq_jax.stages import (
    ESTIMATORS,
    BatchNormConfig,
    BlockProgress,
    Comparison,
    Convention,
    Ranges,
    adapt_batch_norm,
    analytic_comparison,
    analytic_correction,
    analytic_summaries,
    apply_estimator,
    compare,
    correct_bias,
    equalize,
    estimate_ranges,
    find_pairs,
    finetune,
    gptq,
    gptq_from_noise,
    quantize_params,
    reconstruct,
    squant,
)
from dfq_jax.synthesis import Progress, remove_checkpoint, synthesize

# Fewer held-out images than this decide nothing.
MIN_HELD_OUT = 8
# What the networks are compared on, in the words of the report.
THESE_IMAGES = "these images"
MOMENT_NOISE = "noise of the moments that BatchNorms promise"
# Noise is not data: where it is the judge, a smaller gain than this share of the divergence decides nothing.
LEAST_GAIN_ON_NOISE = 0.1
ROUNDING_NAMES = {"squant": "SQuant", "gptq": "GPTQ"}


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
    key: Key[Array, ""] | int = 0,
    images: Float[Array, "n ..."] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Quantized:
    """Quantize a trained network without data.

    Args:
      model: a Linen module, an NNX module, or a function `(variables, x) -> outputs` in inference mode.
      variables: its variables (optional for NNX).
      input_shape: shape of its input, `[N, H, W, C]`; N is free.
      recipe: a name in `RECIPES`, or a `Recipe` (`RECIPES["fast"].replace(synthesis_steps=500)`).
      bits: "w8a8", "w4a4", "w4a16" (float activations), ...
      edge_bits: bits of the first and last layer; None for the same as all others.
      convention: everything about bits, in place of `bits` and `edge_bits`. Weight ranges are the recipe's, unless its
        `weight_range` names others.
      key: a JAX key or a seed; consumed.
      images: preprocessed images to use in place of what the recipe would take, `[N, H, W, C]`: synthetic images,
        noise, or (recipe "instant") BatchNorm parameters. Ranges, corrections and the comparison are then theirs.
      on_progress: called while images are made, while blocks are reconstructed (a block counts as a batch), and during
        fine-tuning.
      on_stage: called with the name of each stage as it begins.
      checkpoint: file to keep images in, unfinished and finished, until all is done; the same call resumes from it. So
        it gives the same network, bit for bit, as an uninterrupted call, given as many CPU threads: with another number
        of them images differ in their last digits, and that grows.

    Returns:
      The quantized network.

    Raises:
      ValueError, TypeError: arguments, weights or a network that cannot be quantized so, before any long work; or
        outputs, of the float or the quantized network, that are no finite numbers.
      OSError: the checkpoint cannot be written.
      KeyboardInterrupt: interrupted during synthesis, reconstruction or fine-tuning; a checkpoint, if asked for, is
        kept.

    Warns:
      GraphWarning: BatchNorms were not recognized or their statistics look untrained, or a good part of the network
        stays in float. The head of the report says so too.
    """
    recipe = get_recipe(recipe)
    if convention is None:
        convention = Convention.parse(bits, edge_bits=edge_bits)
    elif not isinstance(convention, Convention):
        raise TypeError(f"convention: expected a Convention, found {convention!r}; for a name use bits=...")
    convention = convention.with_default(recipe.weight_range)
    key = as_key(key)
    keys = _Keys(*jax.random.split(key, len(_Keys._fields)))
    input_shape = _as_shape(input_shape)
    apply_fn, variables = as_function(model, variables)
    variables = on_device(variables)
    clock = _Clock(on_stage)
    with clock("trace"):
        graph, variables = compute_kernels(trace(apply_fn, variables, input_shape), variables)
        check_variables(graph, variables)
    doubts = (*doubtful_statistics(graph, variables), *doubtful_structure(graph))
    for doubt in doubts:
        warnings.warn(doubt, GraphWarning, stacklevel=3)
    with clock("images"):
        found = _images(graph, variables, recipe, convention, keys, images, on_progress, checkpoint)
    images = found.images
    job = _Job(
        graph=graph,
        variables=variables,
        recipe=recipe,
        convention=convention,
        images=images,
        keys=keys,
        analytic=found.analytic,
    )
    if recipe.equalize:
        with clock("equalization"):
            job = job.equalized()
    with clock("ranges"):
        ranges = job.ranges
    with clock("weights"):
        candidates = [job.nearest(ranges)]
    if recipe.rounding != "nearest":
        with clock("rounding"):
            candidates = job.round(*candidates)
    if recipe.reconstruction is not None:
        with clock("reconstruction"):
            candidates = [job.reconstruct(job.settle(candidates), on_progress)]
    with clock("adapt"):
        # What rounding is worth shows behind the adaptation, which makes up for part of its errors.
        result = job.settle([job.adapt(candidate) for candidate in candidates])
    if recipe.finetune is not None:
        with clock("fine-tuning"):
            result = job.finetune(result, on_progress)
    qvariables = result.variables
    with clock("compare"):
        compared = job.compare(qvariables, images)
    report = Report(
        recipe=recipe.name,
        settings=json.loads(json.dumps(dataclasses.asdict(recipe))),  # as it comes back from a file
        convention=convention.describe(),
        key=np.asarray(jax.random.key_data(key)).reshape(-1).tolist(),
        images=found.origin,
        compared_on=found.kind,
        warnings=doubts,
        seconds=clock.seconds,
        agreement=compared.agreement if found.kind == THESE_IMAGES else None,  # noise is of no class
        sqnr=compared.sqnr,
        layers=layer_reports(graph, job.variables, qvariables),
        skipped=tuple((s.name, s.reason) for s in graph.skipped),
        steps=(*_computed(graph), *result.steps),
        size=packed_size(graph.leaves(qvariables)),
    )
    if found.checkpoint is not None:
        remove_checkpoint(found.checkpoint)
    return Quantized(
        variables=qvariables, graph=graph, report=report, recipe=recipe, convention=convention, images=images
    )


class _Keys(NamedTuple):
    """A key for each stage that draws at random."""

    images: jax.Array
    reconstruction: jax.Array
    finetuning: jax.Array


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Quantized variables, what was decided on the way to them, and their divergence once it is known."""

    variables: Any
    steps: tuple[str, ...] = ()
    divergence: float | None = None

    def moved(self, variables: Any) -> _Candidate:
        """With other variables, not judged yet."""
        return _Candidate(variables, self.steps)

    def noting(self, step: str) -> _Candidate:
        return dataclasses.replace(self, steps=(*self.steps, step))


@dataclasses.dataclass(kw_only=True)
class _Job:
    """What the stages of one call share."""

    graph: Graph
    variables: Any
    recipe: Recipe
    convention: Convention
    images: Any
    keys: _Keys
    analytic: bool  # whether BatchNorm parameters take the place of images
    steps: tuple[str, ...] = ()  # decided before there is a candidate

    def __post_init__(self) -> None:
        held_out = round(self.recipe.held_out * len(self.images))
        if held_out < MIN_HELD_OUT:
            held_out = 0
        # Steps are fitted to one part of the images and judged on the other.
        self.fitted = self.images[: len(self.images) - held_out]
        self.held_out = self.images[len(self.images) - held_out :]

    def equalized(self) -> _Job:
        """The job with equalized weight ranges, unless nearest rounding loses by them, as far as there is a judge."""
        if not find_pairs(self.graph)[0]:
            return self
        other = dataclasses.replace(self, variables=equalize(self.graph, self.variables))
        if not (len(self.held_out) or self.graph.batch_norms):
            return dataclasses.replace(other, steps=("equalization",))
        candidates = [job.judge(job.nearest(job.ranges)) for job in (self, other)]
        chosen = self.choose("equalization", *candidates)
        taken = other if chosen.variables is candidates[1].variables else self
        taken.steps = chosen.steps
        return taken

    def nearest(self, ranges: Ranges) -> _Candidate:
        return _Candidate(quantize_params(self.graph, self.variables, ranges, self.convention), self.steps)

    @functools.cached_property
    def ranges(self) -> Ranges:
        graph, variables, recipe, convention = self.graph, self.variables, self.recipe, self.convention
        if convention.activation_bits is None:
            return {}
        if self.analytic:
            return apply_estimator(
                graph, analytic_summaries(graph, variables), convention, ESTIMATORS[recipe.estimator]
            )
        return estimate_ranges(
            graph, variables, self.images, convention, estimator=recipe.estimator, batch_size=recipe.batch_size
        )

    def round(self, nearest: _Candidate) -> list[_Candidate]:
        """Rounding that knows more than the nearest code, beside the nearest where there is something to judge by."""
        graph, variables, config = self.graph, self.variables, self.recipe.gptq
        if self.recipe.rounding == "squant":
            rounded = squant(graph, variables, nearest.variables)
        elif self.analytic:
            rounded = gptq_from_noise(graph, variables, nearest.variables, config)
        else:
            size = self.recipe.batch_size
            rounded = gptq(graph, variables, nearest.variables, self.fitted, config, batch_size=size)
        if len(self.held_out):
            return [nearest, nearest.moved(rounded)]
        return [nearest.moved(rounded).noting(ROUNDING_NAMES[self.recipe.rounding])]

    def settle(self, candidates: list[_Candidate]) -> _Candidate:
        """The better of nearest and other rounding."""
        return self.choose(ROUNDING_NAMES[self.recipe.rounding], *candidates) if len(candidates) > 1 else candidates[0]

    def reconstruct(self, candidate: _Candidate, on_progress: Callable[[Progress], None] | None) -> _Candidate:
        """Learned rounding; it judges each block by itself, on images held out of those it is given."""

        def report(progress: BlockProgress) -> None:
            on_progress(
                Progress(
                    progress.index + 1,
                    progress.num_blocks,
                    progress.step,
                    progress.steps,
                    progress.loss,
                    progress.seconds,
                    progress.eta,
                )
            )

        qvariables, info = reconstruct(
            self.graph,
            self.variables,
            candidate.variables,
            self.fitted,
            self.keys.reconstruction,
            self.recipe.reconstruction,
            on_progress=None if on_progress is None else report,
        )
        if not info.completed:
            raise KeyboardInterrupt("reconstruction was interrupted; call reconstruct() to keep finished blocks")
        dropped = [block.name for block in info.blocks if not block.kept]
        return candidate.moved(qvariables).noting(
            f"reconstruction: {len(info.blocks) - len(dropped)} of {len(info.blocks)} blocks kept"
            + (f", dropped {', '.join(dropped)}" if dropped else "")
        )

    def adapt(self, candidate: _Candidate) -> _Candidate:
        """Adaptation of BatchNorm statistics and biases."""
        graph, variables, config = self.graph, self.variables, self.recipe.batch_norm
        if self.analytic and config is not None:
            return self.consider(
                "analytic correction of BatchNorms and biases",
                candidate,
                lambda q: analytic_correction(graph, variables, q, config),
            )
        if config is not None and graph.batch_norms:
            candidate = self.adapt_statistics(candidate, config)
        if self.recipe.bias_correction:
            # Behind a BatchNorm whose statistics are adapted nothing is left to correct.
            candidate = self.consider(
                "bias correction",
                candidate,
                lambda q: correct_bias(graph, variables, q, self.fitted, normalized=config is None),
            )
        return candidate

    def adapt_statistics(self, start: _Candidate, config: BatchNormConfig) -> _Candidate:
        """BatchNorm statistics adapted to the images, in full, or by half where that is better."""

        def adapted(config: BatchNormConfig) -> Any:
            return adapt_batch_norm(
                self.graph, self.variables, start.variables, self.fitted, config, batch_size=self.recipe.batch_size
            )

        name = f"{config.method} BatchNorm adaptation, {config.order.replace('_', ' ')}"
        result = self.consider(name, start, lambda _: adapted(config))
        if not len(self.held_out):
            return result
        half = dataclasses.replace(config, prior_images=2 * config.prior_images + len(self.fitted))
        return self.choose("half of it", result, result.moved(adapted(half)))

    def finetune(self, candidate: _Candidate, on_progress: Callable[[Progress], None] | None) -> _Candidate:
        """Distillation; it chooses among its own steps on images held out of those it is given."""

        def step(qvariables: Any) -> Any:
            tuned, info = finetune(
                self.graph,
                self.variables,
                qvariables,
                self.fitted,
                self.keys.finetuning,
                self.recipe.finetune,
                on_progress=on_progress,
            )
            if not info.completed:
                raise KeyboardInterrupt("fine-tuning was interrupted; call finetune() to keep the best so far")
            return tuned

        return self.consider("fine-tuning", candidate, step)

    def consider(self, name: str, current: _Candidate, step: Callable[[Any], Any]) -> _Candidate:
        """`step` taken, unless it raises the error on the held-out images."""
        other = current.moved(step(current.variables))
        return self.choose(name, current, other) if len(self.held_out) else other.noting(name)

    def choose(self, name: str, current: _Candidate, other: _Candidate) -> _Candidate:
        """The one of less error on the held-out images."""
        current, other = self.judge(current), self.judge(other)
        on_noise = not len(self.held_out)
        most = current.divergence * (1 - LEAST_GAIN_ON_NOISE if on_noise else 1)
        taken, verdict = (other, "kept") if other.divergence <= most else (current, "dropped")
        change = f"{current.divergence:.4g} -> {other.divergence:.4g}"
        judge = f"divergence on {MOMENT_NOISE}" if on_noise else "held-out divergence"
        return taken.noting(f"{name}: {verdict}, {judge} {change}")

    def judge(self, candidate: _Candidate) -> _Candidate:
        """With its divergence from the float network, found once."""
        if candidate.divergence is not None:
            return candidate
        return dataclasses.replace(candidate, divergence=self.compare(candidate.variables, self.held_out).divergence)

    def compare(self, qvariables: Any, images: Any) -> Comparison:
        """With the float network on images, or without them on noise of the moments behind BatchNorms."""
        if self.analytic or not len(images):
            return analytic_comparison(self.graph, self.variables, qvariables)
        return compare(self.graph, self.variables, qvariables, images, batch_size=self.recipe.batch_size)


def _computed(graph: Graph) -> list[str]:
    kernels = computed_kernels(graph)
    return [f"kernels computed from parameters: {', '.join(kernels)}"] if kernels else []


# --- arguments ---


def as_key(key: Any) -> Key[Array, ""]:
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


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        found = tuple(map(operator.index, shape))
    except TypeError:
        found = ()
    if len(found) < 2 or any(d < 1 for d in found):
        raise ValueError(f"input_shape: expected a shape [N, ..., C] such as (1, 32, 32, 3), found {shape!r}.")
    return found


# --- images ---


class _Images(NamedTuple):
    """The images to work with, and where they came from."""

    images: Any
    origin: str
    kind: str = THESE_IMAGES  # for the report, what the networks are compared on
    analytic: bool = False  # nothing is fitted to them
    checkpoint: str | Path | None = None  # the file that holds them


def _images(
    graph: Graph,
    variables: Any,
    recipe: Recipe,
    convention: Convention,
    keys: _Keys,
    images: Any,
    on_progress: Callable[[Progress], None] | None,
    checkpoint: str | Path | None,
) -> _Images:
    if images is not None:
        images = jnp.asarray(images)
        check_images(graph, images)
        return _Images(images, f"{len(images)} given")
    count = recipe.synthesis.num_images
    needed = convention.activation_bits is not None or graph.batch_norms
    if recipe.source == "analytic" and graph.batch_norms:
        # Nothing is measured on them; exporters that run the network have something to run it on.
        noise = jax.random.normal(keys.images, (min(count, 32), *graph.input.shape[1:]), jnp.float32)
        return _Images(noise, "none (BatchNorm parameters in their place)", MOMENT_NOISE, analytic=True)
    if recipe.source != "synthesis" or not needed:
        noise = jax.random.normal(keys.images, (count, *graph.input.shape[1:]), jnp.float32)
        return _Images(noise, f"{count} of Gaussian noise", "Gaussian noise, unlike any image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphWarning)  # what it would say has been said
        result = synthesize(
            graph,
            variables,
            keys.images,
            recipe.synthesis,
            on_progress=on_progress,
            checkpoint=checkpoint,
            keep_checkpoint=True,
        )
    if not result.completed:
        raise KeyboardInterrupt("synthesis was interrupted; call synthesize() to keep unfinished images")
    loss = np.mean(result.losses)
    origin = f"{count} synthesized in {recipe.synthesis.steps} steps (final loss {loss:.3g})"
    return _Images(result.images, origin, checkpoint=checkpoint)


class _Clock:
    """Wall time of named stages."""

    def __init__(self, on_stage: Callable[[str], None] | None):
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage
        self._stage = ""

    def __call__(self, stage: str) -> _Clock:
        self._stage = stage
        if self._on_stage is not None:
            self._on_stage(stage)
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._stage] = round(time.perf_counter() - self._began, 3)
