"""Every field of every config refuses what means nothing, by its name."""

import dataclasses

import jax
import model_grid
import pytest

import dfq_jax
from dfq_jax.export.stablehlo import StableHLOExporter
from dfq_jax.export.tflite import TFLiteExporter
from dfq_jax.recipes.recipe import RECIPES, Recipe
from dfq_jax.runtime import Policy
from dfq_jax.stages import (
    BatchNormConfig,
    Convention,
    FinetuneConfig,
    GPTQConfig,
    ReconstructionConfig,
    candidate_ranges,
    gptq,
    search_ranges,
)
from dfq_jax.synthesis import RefineConfig, SynthesisConfig, refine

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


@pytest.mark.untyped
@pytest.mark.parametrize("wrong", ["best", None, {"steps": 3}])
def test_what_is_no_config_is_refused_by_name(wrong):
    graph, variables, images = model_grid.network_of(model_grid.mlp())
    key, convention = jax.random.key(0), dfq_jax.Convention()
    ranges = dfq_jax.estimate_ranges(graph, variables, images, convention)
    networks = (graph, variables, dfq_jax.quantize_params(graph, variables, ranges, convention))
    calls = {
        "SynthesisConfig": [lambda: dfq_jax.synthesize(graph, variables, key, wrong)],
        "RefineConfig": [lambda: refine(*networks, images, key, wrong)],
        "GPTQConfig": [lambda: gptq(*networks, images, wrong), lambda: dfq_jax.gptq_from_noise(*networks, wrong)],
        "ReconstructionConfig": [lambda: dfq_jax.reconstruct(*networks, images, key, wrong)],
        "FinetuneConfig": [lambda: dfq_jax.finetune(*networks, images, key, wrong)],
        "BatchNormConfig": [
            lambda: dfq_jax.adapt_batch_norm(*networks, images, wrong),
            lambda: dfq_jax.analytic_correction(*networks, wrong),
        ],
        "RangeSearchConfig": [
            lambda: candidate_ranges(graph, variables, images, convention, wrong),
            lambda: search_ranges(*networks, images, {"own": ranges}, wrong),
        ],
    }
    for kind, own in calls.items():
        for call in own:
            with pytest.raises(TypeError, match=f"^config: expected a {kind}, found "):
                call()
