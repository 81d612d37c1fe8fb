"""Allocations, against all choices of bits there are."""

import functools
import itertools

import model_grid
import numpy as np
import pytest
from compilations import Compilations

from dfq_jax.report import packed_size
from dfq_jax.stages import (
    Budget,
    Convention,
    LayerRule,
    allocate,
    compare,
    estimate_ranges,
    quantize_params,
    sensitivity,
)
from dfq_jax.stages.assignment import Limit, cheapest

BITS = (2, 3, 4, 8)


@functools.cache
def parts(build, **fields):
    graph, variables, images = model_grid.network_of(build())
    convention = Convention(edge_bits=None, **fields)
    return graph, variables, images, convention, sensitivity(graph, variables, images, bits=BITS, convention=convention)


def quantized(graph, variables, images, convention):
    return quantize_params(graph, variables, estimate_ranges(graph, variables, images, convention), convention)


def allocated(build, budget, **fields):
    graph, variables, images, convention, found = parts(build, **fields)
    result = allocate(graph, variables, found, budget, images, convention=convention)
    return graph, variables, images, result, quantized(graph, variables, images, result.convention)


def operations(graph, convention):
    return sum(
        layer.macs * convention.layer_bits(graph, layer) * convention.tensor_bits(graph, graph.tensor(layer.tensor))
        for layer in graph.layers
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_integer_program_is_exact(seed):
    rng = np.random.default_rng(seed)
    weights, reads = [[(kind, str(i)) for i in range(3)] for kind in ("weights", "input")]
    costs = {part: {b: float(rng.exponential()) for b in (2, 3, 5)} for part in (*weights, *reads)}
    single = {(part, b): float(b * rng.uniform(1, 9)) for part in weights for b in (2, 3, 5)}
    pairs = {pair: float(rng.uniform(1, 9)) for pair in zip(weights, reads, strict=True)} | {
        (weights[0], reads[1]): 2.0
    }
    limits = [Limit("size", 60.0, single), Limit("operations", 180.0, {}, pairs)]
    choices = [dict(zip(costs, bits, strict=True)) for bits in itertools.product((2, 3, 5), repeat=6)]
    start = dict.fromkeys(costs, 2)

    def cost(choice):
        return sum(costs[part][b] for part, b in choice.items())

    for near in (None, (start, 2)):
        fine = [c for c in choices if all(limit.used(c) <= limit.most for limit in limits)]
        if near is not None:
            fine = [c for c in fine if sum(c[part] != b for part, b in start.items()) <= 2]
        found = cheapest(costs, limits, near)
        assert found in fine if fine else found is None
        assert not fine or cost(found) == pytest.approx(min(map(cost, fine)), rel=1e-3)


def test_against_all_choices():
    budget = Budget(average_weight_bits=4)
    graph, variables, images, result, _ = allocated(model_grid.mlp, budget)
    sizes = {layer.name: np.prod(layer.kernel_shape) for layer in graph.layers}
    divergences = []
    for bits in itertools.product(BITS, repeat=len(sizes)):
        if sum(b * size for b, size in zip(bits, sizes.values(), strict=True)) <= 4 * sum(sizes.values()):
            rules = tuple(LayerRule(pattern=name, weight_bits=b) for name, b in zip(sizes, bits, strict=True))
            network = quantized(graph, variables, images, Convention(edge_bits=None, rules=rules))
            divergences.append(compare(graph, variables, network, images).divergence)
    assert min(divergences) * 0.999 <= result.divergence <= min(divergences) * 1.2


@pytest.mark.parametrize("build", [model_grid.cifar_resnet8, model_grid.mobilenet_v2, model_grid.shared_kernel])
def test_what_is_said_is_so(build):
    graph, variables, images, convention, _ = parts(build)
    uniform = quantized(graph, variables, images, convention)
    size, spent = packed_size(graph.leaves(uniform))["quantized"], operations(graph, convention)
    budget = Budget(weight_bytes=size, bit_operations=spent)
    graph, variables, images, result, network = allocated(build, budget)
    assert packed_size(graph.leaves(network))["quantized"] == result.used["weight_bytes"][0] <= size
    assert operations(graph, result.convention) == pytest.approx(result.used["bit_operations"][0])
    assert result.used["bit_operations"][0] <= spent
    divergence = compare(graph, variables, network, images).divergence
    assert result.divergence == pytest.approx(divergence, rel=1e-2)
    assert divergence <= compare(graph, variables, uniform, images).divergence * 1.001
    for name, bits, read, *_ in result.layers:
        layer = graph.layer(name)
        assert result.convention.layer_bits(graph, layer) == bits
        assert result.convention.tensor_bits(graph, graph.tensor(layer.tensor)) == read
        assert name in result.table()


def test_activations_stay_as_they_are():
    graph, *_, result, _ = allocated(model_grid.cifar_resnet8, Budget(average_weight_bits=3), second_input_bits=8)
    wanted = Convention(edge_bits=None, second_input_bits=8)
    for tensor in graph.tensors:
        assert result.convention.tensor_bits(graph, tensor) == wanted.tensor_bits(graph, tensor)
    *_, result, _ = allocated(model_grid.cifar_resnet8, Budget(average_weight_bits=3), activation_bits=None)
    assert {read for _, _, read, *_ in result.layers} == {None}
    assert len({bits for _, bits, *_ in result.layers}) > 1


def test_what_a_target_has_and_what_rules_say():
    build, budget = model_grid.cifar_resnet8, Budget(average_weight_bits=5, targets=("onnx",))
    *_, result, _ = allocated(build, budget)
    assert {bits for _, bits, *_ in result.layers} == {4, 8}
    graph = parts(build)[0]
    names = [layer.name for layer in graph.layers]
    rules = (LayerRule(pattern=names[1], weight_bits=6), LayerRule(pattern=names[-1], weight_bits=None))
    *_, result, _ = allocated(build, Budget(average_weight_bits=3), rules=rules)
    assert result.convention.rules[:2] == rules
    assert dict(layer[:2] for layer in result.layers)[names[1]] == 6
    assert names[-1] not in [name for name, *_ in result.layers]


def test_one_program_for_all():
    graph, variables, images, convention, found = parts(model_grid.cifar_resnet8)
    with Compilations() as compiled:
        allocate(graph, variables, found, Budget(average_weight_bits=3.5), images, convention=convention)
    assert compiled["_outputs"] == compiled["_recorded"] == 0


def test_budgets_that_cannot_be_met():
    graph, variables, images, convention, found = parts(model_grid.cifar_resnet8)
    smallest = quantized(graph, variables, images, Convention(weight_bits=2, activation_bits=2, edge_bits=None))
    size = packed_size(graph.leaves(smallest))["quantized"]
    for budget, message in (
        (Budget(weight_bytes=100), f"weight_bytes: expected at least {size}, what the fewest bits take, found 100"),
        (Budget(average_weight_bits=1.5), "average_weight_bits: expected at least 2, "),
        (Budget(bit_operations=1.0), "bit_operations: expected at least "),
        (Budget(average_weight_bits=3, targets=("tflite",)), "average_weight_bits: expected at least 4, "),
        (Budget(average_weight_bits=3, weight_bits=(5,)), "weight_bits: expected some that are known"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(graph, variables, found, budget, images, convention=convention)
    exact = allocate(graph, variables, found, Budget(weight_bytes=size), images, convention=convention)
    assert {bits for _, bits, *_ in exact.layers} == {2}


def test_bad_input():
    for fields, message in (
        ({}, "budget: expected at least one of"),
        ({"average_weight_bits": 0}, "average_weight_bits: expected a positive number, found 0"),
        ({"weight_bytes": 9, "targets": ("cuda",)}, "targets: expected some of"),
        ({"weight_bytes": 9, "targets": "onnx"}, "targets: expected some of"),
        ({"weight_bytes": 9, "weight_bits": (1,)}, "weight_bits: expected integers from 2 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            Budget(**fields)
    graph, variables, images, *_ = parts(model_grid.cifar_resnet8)
    found = parts(model_grid.mlp)[-1]
    for arguments, message in (
        (("found", Budget(average_weight_bits=4)), "found: expected a Sensitivity, found 'found'"),
        ((parts(model_grid.cifar_resnet8)[-1], 4), "budget: expected a Budget, found 4"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(graph, variables, *arguments, images)
    with pytest.raises(ValueError, match="found: expected sensitivities of the layers"):
        allocate(graph, variables, found, Budget(average_weight_bits=4), images)
