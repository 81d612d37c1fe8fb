"""The table of steps, in order: `quantize` folds a candidate through those that its recipe asks for.

A step is a function of the work, which is what all steps of one call share, and of a candidate; it gives the candidate
changed, or as it was where there is nothing to do or the judge finds the change no better.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.base import Progress, compiles_ahead, remove_checkpoint
from dfq_jax.graph import Graph
from dfq_jax.quantizers import MAX_BITS
from dfq_jax.recipes.images import BITS, JUDGING, TARGET, Images, file_of, make_images, settings_of
from dfq_jax.recipes.judge import Candidate, Judge
from dfq_jax.recipes.recipe import RECIPES, ROUNDINGS, Recipe
from dfq_jax.stages import (
    ESTIMATORS,
    BatchNormConfig,
    Convention,
    adapt_batch_norm,
    ahead,
    analytic_correction,
    analytic_summaries,
    apply_estimator,
    candidate_ranges,
    correct_bias,
    equalize,
    estimate_ranges,
    find_pairs,
    find_stretchable,
    finetune,
    quantize_params,
    reconstruct,
    search_ranges,
    stretch_channels,
    with_ranges,
)

ANALYTIC = "analytic correction of BatchNorms and biases"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What the steps of one call share.

    Attributes:
      graph: from `trace`.
      variables: float ones, as given.
      recipe, convention: what is asked for.
      images: what there is to work with.
      keys: for each step that draws at random, by its name.
      on_progress: called while blocks are reconstructed and during fine-tuning.
      checkpoint: the file of images; long steps keep theirs beside it.
      begun: what `_equalize` decides between, by where ranges come from and by forms of variables; a recipe compared
        with begins so, too.
    """

    graph: Graph
    variables: Any
    recipe: Recipe
    convention: Convention
    images: Images
    keys: Mapping[str, Key[Array, ""]]
    on_progress: Callable[[Progress], None] | None = None
    checkpoint: str | Path | None = None
    begun: dict[tuple[bool, str, tuple[str, ...]], Candidate] = dataclasses.field(default_factory=dict)

    @property
    def ranges_are_analytic(self) -> bool:
        """Whether the first ranges come from BatchNorm parameters."""
        return self.images.analytic or (self.recipe.range_search is not None and bool(self.graph.batch_norms))

    @functools.cached_property
    def judge(self) -> Judge:
        """Who decides what is kept."""
        return Judge(
            graph=self.graph,
            variables=self.variables,
            images=self.images.held_out,
            batch_size=self.recipe.batch_size,
        )

    def make_images(self, name: str, count: int, source: str) -> Array:
        """More images as the recipe makes them, or would, with the key of a name and a file of that name."""
        sets = [(self.keys[name], settings_of(self.recipe, count, source))]
        options: Any = {"on_progress": self.on_progress, "checkpoint": file_of(self.checkpoint, name)}
        (made,) = make_images(self.graph, self.variables, sets, **options)
        return made.images

    def long(self, step: str) -> dict[str, Any]:
        """The options of a step that shows its progress and can be resumed."""
        file = file_of(self.checkpoint, step)
        return {"on_progress": self.on_progress, "checkpoint": file, "keep_checkpoint": True}


# --- the steps ---


def _equalize(work: Work, start: Candidate) -> Candidate:
    """Equalized weight ranges and stretched channels, unless nearest rounding loses by them."""
    graph, judge, forms = work.graph, work.judge, list[tuple[str, Callable[..., Any], bool]]()
    if find_pairs(graph)[0]:
        forms.append(("equalization", equalize, judge.can_judge))
    if find_stretchable(graph, work.convention):
        # They cost nothing that noise could see, and by what they gain there it cannot tell.
        stretch = functools.partial(stretch_channels, convention=work.convention)
        forms.append(("stretched channels of depthwise layers", stretch, judge.has_images))
    result, taken = start, tuple[str, ...]()
    for name, form, is_judged in forms:
        before = _begun(work, taken, result) if is_judged and result.quantized is None else result
        other = _begun(work, (*taken, name), before, functools.partial(form, graph, before.variables))
        result = judge.choose(name, before, other) if is_judged else other.noting(name)
        taken = (*taken, name) if result.variables is other.variables else taken
    return result


def _begun(work: Work, forms: tuple[str, ...], start: Candidate, make: Callable[[], Any] | None = None) -> Candidate:
    """A candidate with nearest codes of its variables or of those that are made, which have these forms; made once."""
    key = work.ranges_are_analytic, work.recipe.estimator, forms
    if key not in work.begun:
        variables = start.variables if make is None else make()
        work.begun[key] = _quantize(work, _measure(work, Candidate(variables=variables)))
    return dataclasses.replace(work.begun[key], decisions=start.decisions, divergence=None)


def _measure(work: Work, start: Candidate) -> Candidate:
    """Ranges of activations."""
    graph, variables, recipe, convention = work.graph, start.variables, work.recipe, work.convention
    if start.ranges is not None:
        return start
    if not convention.quantizes_activations(graph):
        ranges = {}
    elif work.ranges_are_analytic:
        summaries = analytic_summaries(graph, variables, convention)
        ranges = apply_estimator(graph, summaries, convention, ESTIMATORS[recipe.estimator])
    else:
        settings: dict[str, Any] = {"estimator": recipe.estimator, "batch_size": recipe.batch_size}
        ranges = estimate_ranges(graph, variables, work.images.images, convention, **settings)
    return dataclasses.replace(start, ranges=ranges)


def _quantize(work: Work, start: Candidate) -> Candidate:
    """Quantized variables with the nearest codes."""
    if start.quantized is not None:
        return start
    return start.moved(quantize_params(work.graph, start.variables, start.ranges, work.convention))


def _round(work: Work, nearest: Candidate) -> Candidate:
    """Rounding that knows more than the nearest code."""
    name = work.recipe.rounding
    title, run = ROUNDINGS[name]
    images, config = None if work.images.analytic else work.images.fitted, getattr(work.recipe, name, None)
    rounded = run(work.graph, *nearest.networks, images, config, work.recipe.batch_size)
    return work.judge.consider(title, nearest, rounded)


def _search(work: Work, start: Candidate) -> Candidate:
    """Ranges by what they do to the outputs: sets for all tensors, then of one tensor after the other."""
    graph, judge, config = work.graph, work.judge, work.recipe.range_search
    if not start.ranges or not judge.can_judge:
        return start
    settings: Any = (work.images.fitted, work.convention, config)
    sets = candidate_ranges(graph, start.variables, *settings, batch_size=work.recipe.batch_size)
    result = start
    for name, ranges in sets.items():
        if ranges == start.ranges:
            continue  # judged already
        result = judge.choose(f"ranges by {name}", result, start.moved(with_ranges(start.quantized, ranges)))
    if not config.one_by_one:
        return result
    searched, found = search_ranges(graph, *result.networks, work.images.fitted, sets, config)
    return judge.choose(f"other ranges of {len(found.changed)} tensors", result, result.moved(searched))


def _reconstruct(work: Work, start: Candidate) -> Candidate:
    """Learned rounding; it judges each block by itself, on images held out of those it is given."""
    if _has_little_to_learn(work):
        return start.noting(f"reconstruction: left out, {MAX_BITS} bits leave next to nothing to learn")
    settings: Any = (work.images.fitted, work.keys["reconstruction"], work.recipe.reconstruction)
    qvariables, info = reconstruct(work.graph, *start.networks, *settings, **work.long("reconstruction"))
    if not info.completed:
        raise KeyboardInterrupt("reconstruction was interrupted; call reconstruct() to keep finished blocks")
    dropped = [block.name for block in info.blocks if not block.kept]
    decision = f"reconstruction: {len(info.blocks) - len(dropped)} of {len(info.blocks)} blocks kept"
    start = start.noting(decision + (f", dropped {', '.join(dropped)}" if dropped else ""))
    return work.judge.consider("all of them", start, qvariables) if work.judge.has_images else start.moved(qvariables)


def _has_little_to_learn(work: Work) -> bool:
    """Whether all weights and tensors that are quantized have the most bits."""
    graph, convention = work.graph, work.convention
    widths = [convention.layer_bits(graph, layer) for layer in graph.layers]
    widths += [convention.tensor_bits(graph, tensor) for tensor in graph.tensors]
    return min((bits for bits in widths if bits is not None), default=MAX_BITS) == MAX_BITS


def _adapt(work: Work, candidate: Candidate) -> Candidate:
    """BatchNorm statistics and biases."""
    graph, config = work.graph, work.recipe.batch_norm
    if work.images.analytic and config is not None:
        return work.judge.consider(ANALYTIC, candidate, analytic_correction(graph, *candidate.networks, config))
    if config is not None and graph.batch_norms:
        candidate = _adapt_statistics(work, candidate, config)
    if work.recipe.bias_correction:
        # Behind a BatchNorm whose statistics are adapted nothing is left to correct.
        corrected = correct_bias(graph, *candidate.networks, work.images.fitted, normalized=config is None)
        candidate = work.judge.consider("bias correction", candidate, corrected)
    return candidate


def _adapt_statistics(work: Work, start: Candidate, config: BatchNormConfig) -> Candidate:
    """BatchNorm statistics adapted to the images, or to noise, as far as is best by the judge."""
    images = work.images.fitted

    def adapted(share: float) -> Any:
        """By a share of what the images say."""
        prior = (len(images) + config.prior_images) / share - len(images)
        shrunk = dataclasses.replace(config, prior_images=prior)
        return adapt_batch_norm(work.graph, *start.networks, images, shrunk, batch_size=work.recipe.batch_size)

    name = f"{config.method} BatchNorm adaptation, {config.order.replace('_', ' ')}"
    if not work.judge.has_images:
        return work.judge.consider(name, start, adapted(1.0))
    # Images of another key are always better off by half of it than by all.
    result = work.judge.consider(f"half of {name}", start, adapted(0.5))
    result = work.judge.consider("a quarter of it", result, adapted(0.25))
    other = start.moved(analytic_correction(work.graph, *start.networks))
    return work.judge.choose(f"{ANALYTIC} in its place", result, other)


def _finetune(work: Work, candidate: Candidate) -> Candidate:
    """Distillation; it chooses among its own steps on images held out of those it is given."""
    settings: Any = (work.images.fitted, work.keys["fine-tuning"], work.recipe.finetune)
    tuned, info = finetune(work.graph, *candidate.networks, *settings, **work.long("fine-tuning"))
    if not info.completed:
        raise KeyboardInterrupt("fine-tuning was interrupted; call finetune() to keep the best so far")
    return work.judge.consider("fine-tuning", candidate, tuned)


def _compare_with_instant(work: Work, result: Candidate) -> Candidate:
    """What needs no images, where it is better."""
    if not work.graph.batch_norms:
        return result
    instant = dataclasses.replace(work, recipe=RECIPES["instant"], images=work.images.without())
    other = run_steps(instant, Candidate(variables=work.variables))
    other = other.moved(other.quantized)  # judged by noise so far
    return work.judge.choose("the result of the recipe instant in its place", result, other)


# --- the table ---


class Step(NamedTuple):
    """A title for who waits, the function, and the recipe's field that asks for it; without one, every recipe does."""

    title: str
    run: Callable[[Work, Candidate], Candidate]
    field: str | None = None

    def is_in(self, recipe: Recipe) -> bool:
        """Whether the recipe asks for it."""
        return self.field is None or getattr(recipe, self.field) not in (None, False, "nearest")


STEPS = {
    "equalization": Step("equalizing weight ranges", _equalize, "equalize"),
    "ranges": Step("measuring activation ranges", _measure),
    "weights": Step("quantizing weights", _quantize),
    "rounding": Step("rounding weights", _round, "rounding"),
    "range search": Step("searching activation ranges", _search, "range_search"),
    "reconstruction": Step("reconstructing blocks", _reconstruct, "reconstruction"),
    "adapt": Step("adapting statistics", _adapt),
    "fine-tuning": Step("fine-tuning the network", _finetune, "finetune"),
    "instant": Step("comparing with instant", _compare_with_instant, "at_least_instant"),
}
# Those that draw at random, show progress and can be resumed (`Work.long`): each has a key and a file of its own.
LONG_STEPS = ("reconstruction", "fine-tuning")
# All that draws at random. New ones come last: by JAX's default generator the others keep their keys then.
DRAWING = ("images", *LONG_STEPS, JUDGING, TARGET, BITS)
Around = Callable[[str], AbstractContextManager[Any]]


def run_steps(work: Work, candidate: Candidate, around: Around = lambda _: nullcontext()) -> Candidate:
    """Fold a candidate through the steps of the work's recipe, each in a context by its name."""
    _compile_ahead(work)
    for name, step in STEPS.items():
        if step.is_in(work.recipe):
            with around(name):
                candidate = step.run(work, candidate)
    return candidate


def _compile_ahead(work: Work) -> None:
    """Compile what later steps run while the first ones do their work on the host."""
    graph, variables, recipe, images = work.graph, work.variables, work.recipe, work.images.fitted
    if not compiles_ahead(variables):
        return
    convention = dataclasses.replace(work.convention, weight_range="min_max")  # of any ranges shapes are the same
    ranges = {tensor.name: (jnp.float32(0), jnp.float32(1)) for tensor in graph.tensors}
    quantized = jax.eval_shape(lambda v: quantize_params(graph, v, ranges, convention), variables)
    work.judge.compile_ahead(Candidate(variables=variables, quantized=quantized))
    if recipe.reconstruction is not None and not _has_little_to_learn(work):
        ahead.reconstruct(graph, variables, quantized, images, recipe.reconstruction)
    is_analytic, config = work.images.analytic, recipe.batch_norm
    if config is not None and graph.batch_norms:
        if not is_analytic:
            ahead.adapt_batch_norm(graph, variables, quantized, images, config, batch_size=recipe.batch_size)
        ahead.analytic_correction(graph, variables, quantized, config if is_analytic else BatchNormConfig())
    if recipe.bias_correction and not is_analytic:
        ahead.correct_bias(graph, variables, quantized, images, normalized=config is None)


# All that `quantize` calls `on_stage` with.
STAGES = {
    "trace": "tracing the network",
    "images": "making images",
    "budget": "choosing bits for each layer",
    **{name: step.title for name, step in STEPS.items()},
    "target": "measuring what the target asks for",
    "compare": "comparing with the float network",
    "details": "comparing layer by layer",
}


# --- checkpoints ---


def remove_checkpoints(checkpoint: str | Path, recipe: Recipe, *, images: bool) -> None:
    """Remove the files of a call of `quantize` with this recipe, that of the images only if there is one."""
    files = [*([checkpoint] if images else []), file_of(checkpoint, TARGET), file_of(checkpoint, BITS)]
    files += [file_of(checkpoint, name) for name in LONG_STEPS if STEPS[name].is_in(recipe)]
    for file in files:
        remove_checkpoint(file)
