"""Named recipes: every choice on the way from a float network to a quantized one, as a frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from dfq_jax.base import check_field, check_fields, known_fields
from dfq_jax.graph import Graph
from dfq_jax.quantizers import WEIGHT_RANGES
from dfq_jax.stages import (
    ESTIMATORS,
    BatchNormConfig,
    FinetuneConfig,
    GPTQConfig,
    RangeSearchConfig,
    ReconstructionConfig,
    gptq,
    gptq_from_noise,
    squant,
)
from dfq_jax.synthesis import SOURCES as IMAGE_SOURCES
from dfq_jax.synthesis import SynthesisConfig

SOURCES = ("synthesis", "noise", "analytic")


def _gptq(graph: Graph, variables: Any, qvariables: Any, images: Any, config: GPTQConfig, batch_size: int) -> Any:
    if images is None:
        return gptq_from_noise(graph, variables, qvariables, config)
    return gptq(graph, variables, qvariables, images, config, batch_size=batch_size)


# Better codes than the nearest ones, by name: the title in reports, and a function that gives quantized variables. Its
# arguments are as of `_gptq`: there are no images where BatchNorm parameters take their place, and the config is the
# recipe's field of that name, if it has one. A new rounding is a file in `stages/rounding` and a row here.
ROUNDINGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "squant": ("SQuant", lambda graph, variables, qvariables, *_: squant(graph, variables, qvariables)),
    "gptq": ("GPTQ", _gptq),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way from a float network to a quantized one.

    Attributes:
      name: of the recipe.
      source: where images come from: "synthesis", "noise" (standard Gaussian, as many as `synthesis.num_images`), or
        "analytic": none at all, ranges and corrections come from BatchNorm parameters.
      synthesis: how images are made.
      equalize: equalize weight ranges across layers first (DFQ, arXiv 1906.04721), and stretch those of
        depthwise layers (`stretch_channels`); another tree of the same float function, judged as the other steps are.
      estimator: of activation ranges, a name in `stages.ESTIMATORS`.
      range_search: trying other ranges, by BatchNorm parameters and by images, by what they do to the outputs; None for
        those of `estimator` alone.
      weight_range: of weight ranges, a name in `quantizers.WEIGHT_RANGES`; what a `Convention` takes that names none.
      rounding: of weights: "nearest", or a name in `ROUNDINGS`: "squant" or "gptq".
      gptq: settings of that rounding.
      reconstruction: learned rounding on top of it, block by block; None for none.
      bias_correction: correct the means of layer outputs that no BatchNorm follows (all, if `batch_norm` is None).
      batch_norm: adaptation of BatchNorm statistics; None for none.
      finetune: distillation of the float network into the quantized one, after all else; None for none.
      at_least_instant: take what the recipe "instant" gives where that is better on images held out.
      held_out: share of the images that nothing is fitted to; each step is kept only if it lowers the divergence from
        the float network on them. 0 keeps every step unseen.
      judge_source: of the images held out, as `synthesis.source`: what is fitted to images is flattered by others of
        their kind. None for the same as of all others. (Of images that are given, the last are held out.)
      batch_size: images in one pass of the network.
    """

    name: str
    source: str = "synthesis"
    synthesis: SynthesisConfig = SynthesisConfig()
    equalize: bool = False
    estimator: str = "lp"
    range_search: RangeSearchConfig | None = None
    weight_range: str = "lp"
    rounding: str = "nearest"
    gptq: GPTQConfig = GPTQConfig()
    reconstruction: ReconstructionConfig | None = None
    bias_correction: bool = False
    batch_norm: BatchNormConfig | None = None
    finetune: FinetuneConfig | None = None
    at_least_instant: bool = False
    held_out: float = 0.0
    judge_source: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        names: dict[str, Sequence[str]] = {
            "source": SOURCES,
            "estimator": sorted(ESTIMATORS),
            "weight_range": sorted(WEIGHT_RANGES),
            "rounding": ("nearest", *ROUNDINGS),
        }
        for name, known in names.items():
            check_field(name, getattr(self, name), f"one of {known}", known.__contains__)
        for name, kind in NESTED.items():
            value = getattr(self, name)
            if value is not None or getattr(Recipe, name) is not None:  # None where that is the default
                check_field(name, value, f"a {kind.__name__}", kind.__instancecheck__)
        check_fields(self, "True or False", "equalize", "bias_correction", "at_least_instant")
        check_fields(self, "an integer of at least 1", "batch_size")
        for name in ("range_search", "reconstruction", "finetune"):
            if self.source == "analytic" and getattr(self, name) is not None:
                raise ValueError(f"{name}: takes images, of which the source 'analytic' has none.")
        known = f"one of {IMAGE_SOURCES}, or None"
        check_field("judge_source", self.judge_source, known, (None, *IMAGE_SOURCES).__contains__)
        check_field(
            "held_out",
            self.held_out,
            "a share of at least 0 and below 1",
            lambda v: isinstance(v, (int, float)) and 0 <= v < 1,
        )

    def replace(self, **fields: Any) -> Recipe:
        """A copy with other fields; those of records in it by a prefix: `synthesis_steps=500`."""
        own = {f.name for f in dataclasses.fields(self)}
        nested: dict[str, dict[str, Any]] = {}
        for name in [n for n in fields if n not in own]:
            prefix = next((p for p in NESTED if name.startswith(p + "_")), None)
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


# Fields that are records of their own, by type: `Recipe.replace` reaches into them by prefix.
NESTED: dict[str, Any] = {
    name: kind
    for name, hint in get_type_hints(Recipe).items()
    for kind in (hint, *get_args(hint))
    if dataclasses.is_dataclass(kind)
}

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
        # No images: what BatchNorm parameters tell is enough for many networks, and takes seconds.
        Recipe(
            name="instant",
            source="analytic",
            equalize=True,
            rounding="squant",
            batch_norm=BatchNormConfig(),
            bias_correction=True,
        ),
        # The winners of the ablation tables; each step stays only where it helps by the judge. Where blocks are
        # learned, the search of ranges tensor by tensor before it is not worth its time.
        Recipe(
            name="fast",
            equalize=True,
            range_search=RangeSearchConfig(one_by_one=False),
            rounding="squant",
            reconstruction=ReconstructionConfig(steps=300),
            batch_norm=BatchNormConfig(method="regression"),
            bias_correction=True,
            at_least_instant=True,
            held_out=0.5,
            judge_source="fourier",
        ),
        # All that `fast` does, with more steps on more images.
        Recipe(
            name="best",
            synthesis=SynthesisConfig(num_images=256),
            equalize=True,
            range_search=RangeSearchConfig(one_by_one=False),
            rounding="squant",
            reconstruction=ReconstructionConfig(),
            batch_norm=BatchNormConfig(method="regression"),
            bias_correction=True,
            at_least_instant=True,
            held_out=0.25,
            judge_source="fourier",
        ),
        # The whole network taught by the float one, from where `fast` ends; for the lowest bits in all layers.
        Recipe(
            name="finetune",
            synthesis=SynthesisConfig(num_images=256),
            rounding="squant",
            batch_norm=BatchNormConfig(method="regression"),
            bias_correction=True,
            finetune=FinetuneConfig(),
            at_least_instant=True,
            held_out=0.25,
            judge_source="fourier",
        ),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe as given, or that of a name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"recipe: expected a Recipe or one of {sorted(RECIPES)}, found {recipe!r}.")
    return RECIPES[recipe]


def recipe_from(fields: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made these fields of.

    Raises:
      ValueError: there are fields that a recipe does not have.
    """
    nested = {
        name: None if fields[name] is None else kind(**known_fields(kind, fields[name]))
        for name, kind in NESTED.items()
        if name in fields
    }
    return Recipe(**{**known_fields(Recipe, fields), **nested})
