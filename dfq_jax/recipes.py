"""Named recipes: every choice on the way from a float network to a quantized one, as a frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dfq_jax.batch_norm import BatchNormConfig
from dfq_jax.ranges import ESTIMATORS
from dfq_jax.synthesis import SynthesisConfig
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
      held_out: share of the images that adaptation is not fitted to; each step is kept only if it lowers the divergence
        from the float network on them. 0 keeps every step unseen.
      batch_size: images in one pass of the network.
    """

    name: str
    source: str = "synthesis"
    synthesis: SynthesisConfig = SynthesisConfig()
    estimator: str = "lp"
    weight_range: str = "lp"
    bias_correction: bool = False
    batch_norm: BatchNormConfig | None = None
    held_out: float = 0.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {SOURCES}, found {self.source!r}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator: expected one of {sorted(ESTIMATORS)}, found {self.estimator!r}.")
        if self.weight_range not in WEIGHT_RANGES:
            raise ValueError(f"weight_range: expected one of {sorted(WEIGHT_RANGES)}, found {self.weight_range!r}.")
        if not isinstance(self.held_out, (int, float)) or not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share of at least 0 and below 1, found {self.held_out!r}.")
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


def get_recipe(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"recipe: expected a Recipe or one of {sorted(RECIPES)}, found {recipe!r}.")
    return RECIPES[recipe]


def recipe_from(fields: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made these fields of."""
    norm = fields["batch_norm"]
    return Recipe(
        **{
            **fields,
            "synthesis": SynthesisConfig(**fields["synthesis"]),
            "batch_norm": None if norm is None else BatchNormConfig(**norm),
        }
    )
