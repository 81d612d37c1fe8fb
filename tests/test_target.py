"""Targets: the smallest network that is still good enough, and what is said where there is none."""

import math

import jax
import model_grid
import numpy as np
import pytest

from dfq_jax import RECIPES, Budget, LayerRule, Target, load, quantize
from dfq_jax.graph import GraphWarning
from dfq_jax.recipes.recipe import Recipe
from dfq_jax.recipes.target import SIZES
from dfq_jax.report import packed_size
from dfq_jax.stages import Convention, compare, estimate_ranges, quantize_params

CASE = model_grid.cifar_resnet8()
IMAGES = CASE.images()
# Nothing is chosen and nothing is fitted: what is found can be made again step by step.
PLAIN = Recipe(name="plain")
SMALL = {"synthesis_steps": 3, "synthesis_num_images": 16, "synthesis_batch_size": 16}


def run(target, **settings):
    settings = {"recipe": PLAIN, "images": IMAGES, "input_shape": CASE.input_shape, **settings}
    return quantize(CASE.model, CASE.variables, target=target, **settings)


def uniform(graph, variables, bits):
    """Divergence and bytes with weights of so many bits in all layers, step by step."""
    convention = Convention(weight_bits=bits, activation_bits=8, edge_bits=None)
    ranges = estimate_ranges(graph, variables, IMAGES, convention)
    quantized = quantize_params(graph, variables, ranges, convention)
    divergence = compare(graph, variables, quantized, IMAGES).divergence
    return divergence, packed_size(graph.leaves(quantized))["quantized"]


def test_smaller_than_the_smallest_uniform_one(tmp_path):
    graph, variables = model_grid.traced(model_grid.cifar_resnet8), CASE.function()[1]
    (two, least), (four, size), (eight, most) = (uniform(graph, variables, bits) for bits in (2, 4, 8))
    assert eight < four < two
    target = Target(divergence=math.sqrt(four * eight))
    result = run(target)
    facts = result.report.target
    assert facts["met"] and facts["asked"]["divergence"] == target.divergence
    assert least < facts["weight_bytes"] == result.report.size["quantized"] < most
    divergence = compare(graph, variables, result.variables, IMAGES).divergence
    assert divergence == pytest.approx(facts["found"]["divergence"]) and divergence <= target.divergence
    assert ("target", facts["text"]) in result.report.summary()
    assert any(f"target: {facts['weight_bytes']} bytes: agreement" in step for step in result.report.steps)
    # Asked for less, less is taken; and what uniform bits meet takes no more than they do.
    assert run(Target(divergence=1.001 * four)).report.size["quantized"] <= size + (most - least) / (SIZES - 1)
    result.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", CASE.model, CASE.variables)
    assert again.report.target == facts and again.convention == result.convention
    assert again.name == result.name and again.name.startswith("mixed W")
    np.testing.assert_array_equal(again(IMAGES), result(IMAGES))


def test_none_meets_it():
    with pytest.warns(
        GraphWarning, match="the target is out of reach of all sizes that were tried: divergence of at m"
    ):
        result = run(Target(divergence=1e-12))
    facts, tried = result.report.target, [step for step in result.report.steps if step.startswith("target: ")]
    assert not facts["met"] and "NOT MET" in facts["text"]
    assert "out of reach" in result.report.warnings[-1]
    assert all(step.endswith("missed") for step in tried)
    divergences = [float(step.split("divergence ")[1].split(",")[0]) for step in tried]
    assert facts["found"]["divergence"] == pytest.approx(min(divergences), rel=1e-2)


def test_rules_hold():
    rule = LayerRule(pattern="conv1", weight_bits=6)
    result = run(Target(divergence=0.1), convention=Convention(activation_bits=8, rules=(rule,)))
    assert result.convention.rules[0] == rule
    assert result.report.layers[0].weight_bits == 6
    assert {layer.activation_bits for layer in result.report.layers} == {8}


def test_images_of_its_own():
    """A recipe that makes no images has them made for the target, and is otherwise as it was."""
    recipe = RECIPES["instant"].replace(**SMALL)
    stages = []
    result = run(Target(agreement=1.0, num_images=24), recipe=recipe, images=None, on_stage=stages.append)
    facts, tried = result.report.target, [step for step in result.report.steps if step.startswith("target: ")]
    assert len({step.split()[1] for step in tried}) == len(tried) > 2
    assert facts["met"] and facts["text"].endswith("(on 24 images of the source 'pyramid' of their own)")
    assert result.report.agreement is None and facts["found"]["agreement"] >= 1
    assert "target" in stages and "target" in result.report.seconds


def test_steps_that_learn_begin_with_what_is_met_without(tmp_path):
    recipe = RECIPES["fast"].replace(
        **SMALL | {"synthesis_num_images": 32}, reconstruction_steps=2, equalize=False, range_search=None
    )
    target, file = Target(divergence=0.05, num_images=16), tmp_path / "images"
    result = run(target, recipe=recipe, images=None, checkpoint=file)
    tried = [step for step in result.report.steps if step.startswith("target: ")]
    cheap = [int(step.split()[1]) for step in tried if "without the steps that learn" in step and step.endswith("met")]
    dear = [int(step.split()[1]) for step in tried if "without the steps that learn" not in step]
    assert dear and (not cheap or max(dear) <= min(cheap))
    assert len(tried) <= 9
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "target: expected an agreement or a divergence, found None and None"),
        ({"agreement": 99.0, "divergence": 0.1}, "target: expected an agreement or a divergence, found 99.0 and 0.1"),
        ({"agreement": 100.5}, "agreement: expected a percentage above 0 and up to 100, found 100.5"),
        ({"agreement": 0.0}, "agreement: expected a percentage above 0"),
        ({"agreement": -1.0}, "agreement: expected a percentage above 0"),
        ({"agreement": math.nan}, "agreement: expected a percentage above 0"),
        ({"divergence": 0.0}, "divergence: expected a positive number"),
        ({"divergence": math.nan}, "divergence: expected a positive number"),
        ({"divergence": math.inf}, "divergence: expected a positive number"),
        ({"agreement": 99.0, "num_images": 0}, "num_images: expected an integer of at least 1"),
    ],
)
def test_bad_targets(fields, message):
    with pytest.raises(ValueError, match=message):
        Target(**fields)


def test_refused_before_any_work():
    def stage(name):
        assert name == "trace", name

    with pytest.raises(ValueError, match="target: expected None beside a budget, found both"):
        run(Target(agreement=99.0), budget=Budget(average_weight_bits=4.0), on_stage=stage)
    with pytest.raises(TypeError, match="target: expected a Target or None, found 99"):
        run(99.0, on_stage=stage)
    variables = {"kernel": jax.random.normal(jax.random.key(0), (6, 3))}
    with pytest.raises(ValueError, match=r"target: expected images=\.\.\., as the network has no BatchNorm"):
        quantize(
            lambda variables, x: x @ variables["kernel"],
            variables,
            input_shape=(1, 6),
            recipe="noise",
            target=Target(agreement=99.0),
            on_stage=stage,
        )


def test_without_classes():
    def apply_fn(variables, x):
        return jax.nn.relu(x @ variables["kernel"])[:, :1]

    variables = {"kernel": jax.random.normal(jax.random.key(0), (6, 3))}
    images = jax.random.normal(jax.random.key(1), (8, 6))
    settings = {"input_shape": (1, 6), "recipe": PLAIN, "images": images}
    with pytest.raises(ValueError, match="agreement: expected a divergence in its place"):
        quantize(apply_fn, variables, target=Target(agreement=99.0), **settings)
    result = quantize(apply_fn, variables, target=Target(divergence=0.5), **settings)
    assert result.report.target["met"] and result.report.target["found"]["agreement"] is None
