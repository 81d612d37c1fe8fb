"""What a budget leaves to choose from: the bits that each part of a network may have, and what all of them take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dfq_jax.base import check_field
from dfq_jax.graph import Graph
from dfq_jax.quantizers import storage_bits
from dfq_jax.stages.assignment import Limit
from dfq_jax.stages.budget import Budget
from dfq_jax.stages.convention import Convention, check_convention
from dfq_jax.stages.parts import Part, Parts, parts_of
from dfq_jax.stages.rules import FLOAT_BITS
from dfq_jax.stages.sensitivity import WIDTHS


class Choices(NamedTuple):
    """The choices of bits within a budget.

    Attributes:
      options: the widths that each part may have; one where a rule of the convention has chosen, or for what the budget
        does not speak of.
      limits: that the choice keeps.
      of_inputs: whether widths of activations are chosen, too.
    """

    options: Mapping[Part, tuple[int, ...]]
    limits: tuple[Limit, ...]
    of_inputs: bool


def choices_within(
    graph: Graph, budget: Budget, convention: Convention = Convention(), bits: Sequence[int] = WIDTHS
) -> Choices:
    """The choices of bits within a budget, which takes neither variables nor images.

    >>> choices_within(graph, Budget(average_weight_bits=4.0)).limits[0].most
    4.0

    Args:
      graph: from `trace`.
      budget: the limits.
      convention: all but the bits; what its rules say of layers holds.
      bits: the widths that a sensitivity knows.

    Raises:
      ValueError: no choice is within the budget, which the message says the least of.
    """
    check_convention(convention)
    check_field("budget", budget, "a Budget", lambda v: isinstance(v, Budget))
    parts, of_inputs = (
        parts_of(graph, convention, all_widths(graph, convention, bits)),
        budget.bit_operations is not None,
    )
    if not parts.weights:
        raise ValueError(
            "budget: expected layers to choose bits for, found that rules leave the weights of all in float."
        )
    options = _options(graph, parts, None if of_inputs else convention, *budget.widths(bits))
    limits = (*_sizes(graph, parts, options, budget), _operations(graph, parts, options, budget.bit_operations))
    found = Choices(options, tuple(limit for limit in limits if limit.most is not None), of_inputs)
    least = {part: min(widths) for part, widths in options.items()}
    for limit in found.limits:
        if (smallest := limit.used(least)) > limit.most:
            shown = math.ceil(smallest) if limit.name == "weight_bytes" else smallest
            raise ValueError(
                f"{limit.name}: expected at least {shown:.10g}, what the fewest bits take, found {limit.most:.10g}."
            )
    return found


def all_widths(graph: Graph, convention: Convention, bits: Sequence[int]) -> tuple[int, ...]:
    """The widths given, and those that the convention gives to tensors."""
    given = {convention.tensor_bits(graph, tensor) for tensor in graph.tensors}
    ruled = {width for rule in convention.rules for name, width in rule.said.items() if name.endswith("_bits")}
    return tuple(sorted({*bits, *given, *ruled} - {None}))


def _options(
    graph: Graph,
    parts: Parts,
    convention: Convention | None,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
) -> dict[Part, tuple[int, ...]]:
    """The widths that each part may have; those of inputs are the convention's, if there is one."""
    every = parts.uniform.values()

    def choice(known: set[int], allowed: Sequence[int]) -> tuple[int, ...]:
        return tuple(known) if len(known) == 1 else tuple(b for b in allowed if b in known)

    options: dict[Part, tuple[int, ...]] = {}
    for name, part in parts.weights.items():
        options[part] = choice({c.layer_bits(graph, graph.layer(name)) for c in every}, weight_bits)
    for part in parts.inputs.values():
        tensor = graph.tensor(part[1])
        known = {c.tensor_bits(graph, tensor) for c in every}
        given = known if convention is None else {convention.tensor_bits(graph, tensor)}
        options[part] = choice(known if len(known) == 1 else given, activation_bits)
    return options


def _sizes(graph: Graph, parts: Parts, options: Mapping[Part, Sequence[int]], budget: Budget) -> tuple[Limit, Limit]:
    """Bits of a weight on average, and bytes."""
    shapes = graph.shapes_by_path
    kernels = {part: graph.together(part[1]) for part in dict.fromkeys(parts.weights.values())}
    sizes = {part: sum(math.prod(shapes[path].shape) for path in paths) for part, paths in kernels.items()}
    quantized = {path for paths in kernels.values() for path in paths}
    rest = sum(4 * math.prod(shape.shape) for path, shape in shapes.items() if path not in quantized)
    average, stored, total = dict[tuple[Part, int], float](), dict[tuple[Part, int], float](), sum(sizes.values())
    for place, (part, paths) in enumerate(kernels.items()):
        for bits in options[part]:
            average[part, bits] = bits * sizes[part] / total
            own = sum(_bytes(graph, path, parts.uniform[bits], bits) for path in paths)
            stored[part, bits] = float(own + (rest if place == 0 else 0))
    return (
        Limit("average_weight_bits", budget.average_weight_bits, average),
        Limit("weight_bytes", budget.weight_bytes, stored),
    )


def _bytes(graph: Graph, path: str, convention: Convention, bits: int) -> int:
    """Of a kernel as `packed_size` counts it."""
    shape = graph.shapes_by_path[path].shape
    layer = next(readers[0] for other, readers in graph.kernels.items() if other in graph.together(path))
    scales = math.prod(shape[a] for a in convention.scale_axes(graph, layer))
    values = 1 if convention.is_symmetric(graph, layer) else 2
    return -(-math.prod(shape) * storage_bits(bits) // 8) + 4 * scales * values


def _operations(graph: Graph, parts: Parts, options: Mapping[Part, Sequence[int]], most: float | None) -> Limit:
    """Multiply-accumulates times bits."""
    single, pairs = dict[tuple[Part, int], float](), dict[tuple[Part, Part], float]()
    for layer in graph.layers:
        weights, read = parts.weights.get(layer.name), parts.inputs.get(layer.name)
        if weights is not None and read is not None:
            pairs[weights, read] = pairs.get((weights, read), 0.0) + layer.macs
            continue
        part = weights or next(iter(parts.weights.values()))
        for bits in options[part]:
            own = bits if weights is not None else FLOAT_BITS
            single[part, bits] = single.get((part, bits), 0.0) + layer.macs * FLOAT_BITS * own
    return Limit("bit_operations", most, single, pairs)
