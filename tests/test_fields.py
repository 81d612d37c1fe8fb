"""Every field of every config refuses what means nothing, by its name."""

import dataclasses

import pytest

from dfq_jax.export.stablehlo import StableHLOExporter
from dfq_jax.export.tflite import TFLiteExporter
from dfq_jax.recipes.recipe import RECIPES, Recipe
from dfq_jax.runtime import Policy
from dfq_jax.stages import BatchNormConfig, Convention, FinetuneConfig, GPTQConfig, ReconstructionConfig
from dfq_jax.synthesis import RefineConfig, SynthesisConfig

RECORDS = [
    BatchNormConfig(),
    Convention(),
    FinetuneConfig(),
    GPTQConfig(),
    Policy(),
    ReconstructionConfig(),
    RECIPES["best"],
    RefineConfig(),
    StableHLOExporter(),
    SynthesisConfig(),
    TFLiteExporter(),
]
# What a recipe is called is up to its maker, a time is `measure_policy`'s, and a path is tried when used.
FREE = {(Recipe, "name"), (Policy, "measured"), (Policy, "network"), (TFLiteExporter, "python")}


@pytest.mark.untyped
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_bad_fields(record):
    for field in dataclasses.fields(record):
        if (type(record), field.name) in FREE:
            continue
        for value in ("nothing of the kind", float("nan"), -1, (), [1], {}):
            if value == getattr(record, field.name):
                continue  # no rules are ()
            with pytest.raises(ValueError, match=f"^{field.name}: expected .*, found "):
                dataclasses.replace(record, **{field.name: value})
