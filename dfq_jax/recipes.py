"""Named recipes, and the one call that runs them: `quantize`."""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax import artifact
from dfq_jax.adapters import as_function
from dfq_jax.batch_norm import BatchNormConfig, adapt_batch_norm, correct_bias
from dfq_jax.convention import Convention, quantize_params
from dfq_jax.evaluation import sqnr
from dfq_jax.execute import OPERANDS, TENSORS, apply_quantized
from dfq_jax.graph import QUANTIZATION, Graph, GraphError, is_quantized, trace, with_quantization
from dfq_jax.qtensor import QTensor
from dfq_jax.ranges import ESTIMATORS, batches, check_images, estimate_ranges
from dfq_jax.report import LayerReport, Report, packed_size
from dfq_jax.synthesis import Progress, SynthesisConfig, synthesize
from dfq_jax.synthesis.checks import check_variables, num_classes
from dfq_jax.weights import WEIGHT_RANGES

SOURCES = ("synthesis", "noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way from a float network to a quantized one.

    Attributes:
      name: of the recipe.
      source: where images come from: "synthesis", or "noise" (standard Gaussian, as many as `synthesis.num_images`).
      synthesis: how images are made.
      estimator: of activation ranges, a name in `ranges.ESTIMATORS`.
      weight_range: of weight ranges, a name in `weights.WEIGHT_RANGES`.
      bias_correction: correct the means of layer outputs that no BatchNorm follows (all, if `batch_norm` is None).
      batch_norm: adaptation of BatchNorm statistics; None for none.
      batch_size: images in one pass of the network.
    """

    name: str
    source: str = "synthesis"
    synthesis: SynthesisConfig = SynthesisConfig()
    estimator: str = "lp"
    weight_range: str = "lp"
    bias_correction: bool = False
    batch_norm: BatchNormConfig | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {SOURCES}, found {self.source!r}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator: expected one of {sorted(ESTIMATORS)}, found {self.estimator!r}.")
        if self.weight_range not in WEIGHT_RANGES:
            raise ValueError(f"weight_range: expected one of {sorted(WEIGHT_RANGES)}, found {self.weight_range!r}.")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, found {self.batch_size!r}.")

    def replace(self, **fields: Any) -> Recipe:
        """A copy with other fields; those of `synthesis` and `batch_norm` by a prefix: `synthesis_steps=500`."""
        own = {f.name for f in dataclasses.fields(self)}
        nested: dict[str, dict[str, Any]] = {}
        for name in [n for n in fields if n not in own]:
            prefix = next((p for p in ("synthesis", "batch_norm") if name.startswith(p + "_")), None)
            if prefix is None or fields.get(prefix, getattr(self, prefix)) is None:
                raise ValueError(f"{name}: recipe {self.name!r} has no such field; it has {sorted(own)}.")
            nested.setdefault(prefix, {})[name[len(prefix) + 1 :]] = fields.pop(name)
        for prefix, values in nested.items():
            base = fields.get(prefix, getattr(self, prefix))
            known = {f.name for f in dataclasses.fields(base)}
            if unknown := set(values) - known:
                raise ValueError(f"{prefix}_{sorted(unknown)[0]}: no such field; {prefix} has {sorted(known)}.")
            fields[prefix] = dataclasses.replace(base, **values)
        return dataclasses.replace(self, **fields)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The baseline that everyone starts from: ranges of the largest activation on Gaussian noise.
        Recipe(name="noise", source="noise", estimator="max", weight_range="min_max"),
        # AAC and ABN as published, where the publication is recoverable.
        Recipe(
            name="paper",
            synthesis=SynthesisConfig(response_weight=0.1),
            estimator="mean_peak",
            weight_range="min_max",
            batch_norm=BatchNormConfig(method="absolute"),
        ),
        # The winners of the ablation table.
        Recipe(name="fast", batch_norm=BatchNormConfig(method="differential"), bias_correction=True),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized network.

    Attributes:
      variables: the variables with `QTensor` kernels, adapted BatchNorm statistics and the collection "quantization".
      graph: the traced network.
      report: what was done.
      recipe, convention: how.
      images: the images it was made with, `[N, H, W, C]`.
    """

    variables: Any
    graph: Graph
    report: Report
    recipe: Recipe
    convention: Convention
    images: Any

    @property
    def apply(self) -> Callable[[Any, jax.Array], Any]:
        """`(variables, x) -> outputs`: the same contract as the float network, ready for `jax.jit`."""
        return functools.partial(apply_quantized, self.graph)

    @property
    def apply_integer(self) -> Callable[[Any, jax.Array], Any]:
        """As `apply`, with int8 products."""
        return functools.partial(apply_quantized, self.graph, integer=True)

    def __call__(self, x: Float[Array, "n ..."]) -> Any:
        return _apply(self.graph, self.variables, x)

    def save(self, path: str | Path, **header: Any) -> None:
        """Write one safetensors file that `dfq_jax.load` reads; `header` adds facts of your own."""
        save_quantized(path, self, **header)


@functools.partial(jax.jit, static_argnames="graph")
def _apply(graph: Graph, variables: Any, x: jax.Array) -> Any:
    return apply_quantized(graph, variables, x)


def get_recipe(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"recipe: expected a Recipe or one of {sorted(RECIPES)}, found {recipe!r}.")
    return RECIPES[recipe]


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
      recipe: "fast", "paper" or "noise", or a `Recipe` (`RECIPES["fast"].replace(synthesis_steps=500)`).
      bits: "w8a8", "w4a4", "w4a16" (float activations), ...
      edge_bits: bits of the first and last layer; None for the same as all others.
      convention: everything about bits, in place of `bits` and `edge_bits`.
      key: a JAX key or a seed.
      images: preprocessed images to use in place of synthetic ones, `[N, H, W, C]`.
      on_progress: called while images are made.
      on_stage: called with the name of each stage as it begins.
      checkpoint: file to keep unfinished synthesis in; the same call resumes from it.

    Returns:
      The quantized network.

    Raises:
      ValueError, TypeError: arguments, weights or a network that cannot be quantized so; before any long work.
      KeyboardInterrupt: interrupted during synthesis (a checkpoint, if asked for, is kept).
    """
    recipe = get_recipe(recipe)
    if convention is None:
        convention = Convention.parse(bits, edge_bits=edge_bits, weight_range=recipe.weight_range)
    elif not isinstance(convention, Convention):
        raise TypeError(f"convention: expected a Convention, found {convention!r}; for a name use bits=...")
    key = as_key(key)
    input_shape = _as_shape(input_shape)
    apply_fn, variables = as_function(model, variables)
    variables = _on_device(variables)
    clock = _Clock(on_stage)
    with clock("trace"):
        graph = trace(apply_fn, variables, input_shape)
        check_variables(graph, variables)
    with clock("images"):
        images, origin = _images(graph, variables, recipe, convention, key, images, on_progress, checkpoint)
    with clock("ranges"):
        ranges = {}
        if convention.activation_bits is not None:
            ranges = estimate_ranges(
                graph, variables, images, convention, estimator=recipe.estimator, batch_size=recipe.batch_size
            )
    with clock("weights"):
        qvariables = quantize_params(graph, variables, ranges, convention)
    steps: list[str] = []
    with clock("adapt"):
        if recipe.batch_norm is not None and graph.batch_norms:
            qvariables = adapt_batch_norm(
                graph, variables, qvariables, images, recipe.batch_norm, batch_size=recipe.batch_size
            )
            steps.append(
                f"{recipe.batch_norm.method} BatchNorm adaptation, {recipe.batch_norm.order.replace('_', ' ')}"
            )
        if recipe.bias_correction:
            # Behind a BatchNorm whose statistics are adapted nothing is left to correct.
            qvariables = correct_bias(graph, variables, qvariables, images, normalized=recipe.batch_norm is None)
            steps.append("bias correction")
    with clock("compare"):
        compared = _compare(graph, variables, qvariables, images, recipe.batch_size)
    report = Report(
        recipe=recipe.name,
        settings=dataclasses.asdict(recipe),
        convention=convention.describe(),
        key=np.asarray(jax.random.key_data(key)).reshape(-1).tolist(),
        images=origin,
        seconds=clock.seconds,
        agreement=compared[0],
        sqnr=compared[1],
        layers=_layer_reports(graph, variables, qvariables),
        skipped=tuple((s.name, s.reason) for s in graph.skipped),
        steps=tuple(steps),
        size=packed_size(graph.leaves(qvariables)),
    )
    return Quantized(
        variables=qvariables, graph=graph, report=report, recipe=recipe, convention=convention, images=images
    )


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


def _on_device(variables: Any) -> Any:
    """NumPy leaves as JAX arrays: transferred once, and in a type that JAX computes in."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)


def _images(
    graph: Graph,
    variables: Any,
    recipe: Recipe,
    convention: Convention,
    key: jax.Array,
    images: Any,
    on_progress: Callable[[Progress], None] | None,
    checkpoint: str | Path | None,
) -> tuple[Any, str]:
    """The images to work with, and where they came from."""
    if images is not None:
        images = jnp.asarray(images)
        check_images(graph, images)
        return images, f"{len(images)} given"
    count = recipe.synthesis.num_images
    needed = convention.activation_bits is not None or graph.batch_norms
    if recipe.source == "noise" or not needed:
        noise = jax.random.normal(key, (count, *graph.input.shape[1:]), jnp.float32)
        return noise, f"{count} of Gaussian noise"
    result = synthesize(graph, variables, key, recipe.synthesis, on_progress=on_progress, checkpoint=checkpoint)
    if not result.completed:
        raise KeyboardInterrupt("synthesis was interrupted; call synthesize() to keep unfinished images")
    loss = np.mean(result.losses)
    return result.images, f"{count} synthesized in {recipe.synthesis.steps} steps (final loss {loss:.3g})"


def _compare(
    graph: Graph, variables: Any, qvariables: Any, images: Any, batch_size: int
) -> tuple[float | None, float | None]:
    """Agreement in percent, where the outputs are class scores, and output SQNR on the images."""
    classes = num_classes(graph)

    def scores(outputs: Any) -> np.ndarray:
        return np.asarray(graph.logits(outputs), np.float64).reshape(-1, max(classes, 1))

    pairs = [
        (scores(_float(graph, variables, batch)), scores(_apply(graph, qvariables, batch)))
        for batch in batches(images, batch_size)
    ]
    reference, other = map(np.concatenate, zip(*pairs, strict=True))
    agreement = None if classes < 2 else 100.0 * float((reference.argmax(1) == other.argmax(1)).mean())
    return agreement, sqnr(reference, other)


@functools.partial(jax.jit, static_argnames="graph")
def _float(graph: Graph, variables: Any, x: jax.Array) -> Any:
    return graph.apply_fn(variables, x)


def _layer_reports(graph: Graph, variables: Any, qvariables: Any) -> tuple[LayerReport, ...]:
    before = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    after = dict(zip(graph.leaf_paths, graph.leaves(qvariables), strict=True))
    collection = qvariables[QUANTIZATION]
    quantizers = {**collection[TENSORS], **collection[OPERANDS]}
    reports = []
    for layer in graph.layers:
        kernel, params = after[layer.kernel], quantizers.get(layer.tensor)
        quantized = isinstance(kernel, QTensor)
        reports.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                weight_bits=kernel.bits if quantized else None,
                activation_bits=None if params is None else params.bits,
                weight_sqnr=sqnr(before[layer.kernel], kernel.dequantize()) if quantized else None,
                low=None if params is None else float(params.lo),
                high=None if params is None else float(params.hi),
            )
        )
    return tuple(reports)


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


# --- files ---


def save_quantized(path: str | Path, quantized: Quantized, **header: Any) -> None:
    """Write a quantized network to one safetensors file."""
    facts = {
        **header,
        "graph": quantized.graph.digest,
        "input_shape": list(quantized.graph.input.shape),
        "recipe": dataclasses.asdict(quantized.recipe),
        "convention": dataclasses.asdict(quantized.convention),
        "report": quantized.report.to_dict(),
    }
    artifact.save(path, quantized.variables, header=facts)


def load(path: str | Path, model: Any, variables: Any = None) -> Quantized:
    """Read a quantized network back.

    Args:
      path: a file written by `Quantized.save`.
      model: the same model it was made from.
      variables: a tree of the model's structure: its float variables, or `jax.eval_shape` of them. Optional for NNX
        modules, and for Linen modules that `init` with a key and an input alone.

    Returns:
      The quantized network (without the images it was made with).

    Raises:
      ArtifactError: the file is damaged, foreign, or of another model; the message says what differs.
    """
    _, header = artifact.load(path)
    missing = {"graph", "input_shape", "recipe", "convention", "report"} - set(header)
    if missing:
        raise artifact.ArtifactError(f"{path}: the header lacks {sorted(missing)}; was it written by Quantized.save?")
    shape = tuple(header["input_shape"])
    if variables is None and hasattr(model, "init"):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    apply_fn, variables = as_function(model, variables)
    variables = _on_device(variables)
    try:
        graph = trace(apply_fn, variables, shape)
    except GraphError as error:
        raise artifact.ArtifactError(
            f"{path}: the model given cannot be what the file was made from: {error}"
        ) from error
    restored, _ = artifact.restore(path, variables, expect={"graph": graph.digest})
    # A file has leaves only: empty parts of the collection are added again, so that trees have one structure.
    collection = restored[QUANTIZATION] if is_quantized(restored) else {}
    return Quantized(
        variables=with_quantization(restored, {TENSORS: {}, OPERANDS: {}, **collection}),
        graph=graph,
        report=_report_from(header["report"]),
        recipe=_recipe_from(header["recipe"]),
        convention=Convention(**header["convention"]),
        images=None,
    )


def _report_from(fields: Mapping[str, Any]) -> Report:
    layers = tuple(LayerReport(**layer) for layer in fields["layers"])
    skipped = tuple((name, reason) for name, reason in fields["skipped"])
    return Report(**{**fields, "layers": layers, "skipped": skipped, "steps": tuple(fields["steps"])})


def _recipe_from(fields: Mapping[str, Any]) -> Recipe:
    norm = fields["batch_norm"]
    return Recipe(
        **{
            **fields,
            "synthesis": SynthesisConfig(**fields["synthesis"]),
            "batch_norm": None if norm is None else BatchNormConfig(**norm),
        }
    )
