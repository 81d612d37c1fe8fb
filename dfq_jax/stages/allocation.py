"""Bits for each layer within a budget: by what each costs alone, and then by what they cost together."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import LINE, Progress, aligned, check_field
from dfq_jax.graph import Graph
from dfq_jax.quantizers import storage_bits
from dfq_jax.stages.assignment import Limit, cheapest
from dfq_jax.stages.budget import Budget
from dfq_jax.stages.convention import Convention
from dfq_jax.stages.mixed import MixedNetwork, Part, Widths
from dfq_jax.stages.rules import FLOAT_BITS, LayerRule
from dfq_jax.stages.sensitivity import Sensitivity, progress

ALONE = "least sum of divergences alone"
ROUNDS = 6  # of measuring what each change does where the search stands
LEAST = 1e-9  # divergences below it are rounding
LEAST_GAIN = 0.01  # share of the divergence that a round has to take away to be followed by another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits by layer, and what is known of them.

    Attributes:
      convention: with a rule for each layer.
      layers: `(name, weight bits, activation bits, divergence of its weights alone, of its input alone)` of each; bits
        of activations that were not chosen are the convention's, None for float; divergences of these may be unknown.
      divergence: of the network with all of it quantized so, measured.
      used: what it takes of each limit, and the limit.
      decisions: how it was found, in words.
    """

    convention: Convention
    layers: tuple[tuple[str, int, int | None, float | None, float | None], ...]
    divergence: float
    used: Mapping[str, tuple[float, float]]
    decisions: tuple[str, ...]

    def table(self) -> str:
        """Plain text."""
        rows: list[tuple[str, ...]] = [("layer", "weight bits", "input bits", "weights alone", "input alone")]
        for name, weight_bits, bits, *alone in self.layers:
            rows.append(
                (name, str(weight_bits), str(bits or "float"), *("-" if v is None else f"{v:.3g}" for v in alone))
            )
        lines = [f"{name}: {used:.6g} of {most:.6g}" for name, (used, most) in self.used.items()]
        lines += self.decisions
        return "\n".join(lines + aligned(rows, width=LINE))

    __str__ = table


def allocate(
    graph: Graph,
    variables: Any,
    found: Sensitivity,
    budget: Budget,
    images: Float[Array, "n ..."] | None = None,
    *,
    convention: Convention = Convention(),
    estimator: str = "lp",
    on_progress: Callable[[Progress], None] | None = None,
) -> Allocation:
    """Choose bits for each layer within a budget.

    An integer program chooses those of the least sum of the divergences that each part has alone, or adds when all are
    quantized. Of the two, and of the bits that the convention has, those of least divergence, measured with all of it
    quantized, are where a search begins: what each change of one width does there is measured, and the integer program
    takes the best of them together, in fewer parts where the outcome is no better.

    >>> found = dfq_jax.sensitivity(graph, variables, images)
    >>> allocation = allocate(graph, variables, found, Budget(average_weight_bits=4.0), images)
    >>> allocation.used["average_weight_bits"][0] <= 4
    True

    Args:
      graph: from `trace`.
      variables: float variables, as `found` was measured with.
      found: from `sensitivity`, with the same convention and estimator.
      budget: the limits.
      images: as for `sensitivity`; other images judge better. Without, noise.
      convention: all but the bits; what its rules say of layers holds.
      estimator: of activation ranges.
      on_progress: called after each measurement.

    Raises:
      ValueError: no choice is within the budget, which the message says the least of; or bad arguments.
    """
    check_field("found", found, "a Sensitivity", lambda v: isinstance(v, Sensitivity))
    check_field("budget", budget, "a Budget", lambda v: isinstance(v, Budget))
    network = MixedNetwork(graph, variables, images, _all_bits(graph, found, convention), convention, estimator)
    names = tuple(network.weights)
    check_field("found", found.layers, f"sensitivities of the layers {names}", lambda v: v == names)
    search = _Search(network, found, budget, convention, on_progress)
    widths, divergence = search.run()
    return search.result(widths, divergence)


def _all_bits(graph: Graph, found: Sensitivity, convention: Convention) -> tuple[int, ...]:
    """The widths of the sensitivity, and those that the convention gives to tensors."""
    given = {convention.tensor_bits(graph, tensor) for tensor in graph.tensors}
    ruled = {bits for rule in convention.rules for name, bits in rule.said.items() if name.endswith("_bits")}
    return tuple(sorted({*found.bits, *given, *ruled} - {None}))


class _Search:
    """The choice of bits for one network."""

    def __init__(
        self,
        network: MixedNetwork,
        found: Sensitivity,
        budget: Budget,
        convention: Convention,
        on_progress: Callable[[Progress], None] | None,
    ):
        self.network, self.graph, self.found, self.convention = network, network.graph, found, convention
        self.on_progress, self.began = on_progress, time.perf_counter()
        self.chooses_inputs = budget.bit_operations is not None
        self.options = self._options(*budget.widths(found.bits))
        self.limits = [limit for limit in self._limits(budget) if limit.most is not None]
        self.decisions: list[str] = []
        least = {part: min(options) for part, options in self.options.items()}
        for limit in self.limits:
            if (smallest := limit.used(least)) > limit.most:
                shown = math.ceil(smallest) if limit.name == "weight_bytes" else smallest
                raise ValueError(
                    f"{limit.name}: expected at least {shown:.10g}, what the fewest bits take, found {limit.most:.10g}."
                )

    def _options(self, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> dict[Part, tuple[int, ...]]:
        """The widths that each part may have; one where a rule of the convention has chosen."""
        graph, network = self.graph, self.network
        every = network.uniform.values()

        def choice(known: set[int], allowed: Sequence[int]) -> tuple[int, ...]:
            return tuple(known) if len(known) == 1 else tuple(b for b in allowed if b in known)

        options: dict[Part, tuple[int, ...]] = {}
        for name, part in network.weights.items():
            options[part] = choice({c.layer_bits(graph, graph.layer(name)) for c in every}, weight_bits)
        for part in network.inputs.values():
            tensor = graph.tensor(part[1])
            known = {c.tensor_bits(graph, tensor) for c in every}
            given = known if self.chooses_inputs else {self.convention.tensor_bits(graph, tensor)}
            options[part] = choice(known if len(known) == 1 else given, activation_bits)
        return options

    def _limits(self, budget: Budget) -> list[Limit]:
        """The limits of a budget for this network; `most` is None where there is none."""
        graph, shapes = self.graph, self.graph.shapes_by_path
        kernels = {part: graph.together(part[1]) for part in dict.fromkeys(self.network.weights.values())}
        sizes = {part: sum(math.prod(shapes[path].shape) for path in paths) for part, paths in kernels.items()}
        quantized = {path for paths in kernels.values() for path in paths}
        rest = sum(4 * math.prod(shape.shape) for path, shape in shapes.items() if path not in quantized)
        choices = [(part, bits) for part in kernels for bits in self.options[part]]
        average = {(part, bits): bits * sizes[part] / sum(sizes.values()) for part, bits in choices}
        stored = {(part, bits): float(sum(self._bytes(path, bits) for path in kernels[part])) for part, bits in choices}
        first = next(iter(kernels))
        for bits in self.options[first]:
            stored[first, bits] += rest
        return [
            Limit("average_weight_bits", budget.average_weight_bits, average),
            Limit("weight_bytes", budget.weight_bytes, stored),
            self._operations(budget.bit_operations),
        ]

    def _bytes(self, path: str, bits: int) -> int:
        """Of a kernel as `packed_size` counts it."""
        graph, shape = self.graph, self.graph.shapes_by_path[path].shape
        layer = next(readers[0] for other, readers in graph.kernels.items() if other in graph.together(path))
        convention = self.network.uniform[bits]
        scales = math.prod(shape[a] for a in convention.scale_axes(graph, layer))
        values = 1 if convention.is_symmetric(graph, layer) else 2
        return -(-math.prod(shape) * storage_bits(bits) // 8) + 4 * scales * values

    def _operations(self, most: float | None) -> Limit:
        """Multiply-accumulates times bits."""
        network, single, pairs = self.network, dict[tuple[Part, int], float](), dict[tuple[Part, Part], float]()
        for layer in self.graph.layers:
            weights, read = network.weights.get(layer.name), network.inputs.get(layer.name)
            if weights is not None and read is not None:
                pairs[weights, read] = pairs.get((weights, read), 0.0) + layer.macs
                continue
            part = weights or next(iter(network.weights.values()))
            for bits in self.options[part]:
                own = bits if weights is not None else FLOAT_BITS
                single[part, bits] = single.get((part, bits), 0.0) + layer.macs * FLOAT_BITS * own
        return Limit("bit_operations", most, single, pairs)

    # --- searching ---

    def run(self) -> tuple[Widths, float]:
        """The best choice that is found, and its divergence."""
        starts = {form: cheapest(costs, self.limits) for form, costs in self._costs().items()}
        kept = {form: widths for form, widths in starts.items() if widths is not None} | self._as_given()
        if not kept:
            raise ValueError("budget: expected limits that one choice of bits keeps together, found none that does.")
        divergences = dict(zip(kept, self.network.divergences(kept.values()), strict=True))
        self.decisions += [f"{form}: divergence {value:.4g}" for form, value in divergences.items()]
        best = min(divergences, key=divergences.__getitem__)
        widths, divergence = kept[best], divergences[best]
        changes = max(1, len(widths) // 4)
        for round_ in range(ROUNDS):
            gains, last = self._gains(widths, divergence, round_), divergence
            while changes >= 1:
                other = cheapest(gains, self.limits, (widths, changes))
                (value,) = self.network.divergences([other]) if other not in (None, widths) else (math.inf,)
                if value < divergence:
                    moved = sum(other[part] != bits for part, bits in widths.items())
                    self.decisions.append(f"{moved} widths changed together: {divergence:.4g} -> {value:.4g}")
                    widths, divergence, changes = other, value, 2 * moved
                    break
                changes //= 2
            if divergence > (1 - LEAST_GAIN) * last:
                break
        return widths, divergence

    def _as_given(self) -> dict[str, Widths]:
        """The bits that the convention has, where they are within the limits."""
        graph, convention = self.graph, self.convention
        given = {part: convention.layer_bits(graph, graph.layer(name)) for name, part in self.network.weights.items()}
        given |= {part: convention.tensor_bits(graph, graph.tensor(part[1])) for part in self.network.inputs.values()}
        fits = all(bits in self.options[part] for part, bits in given.items())
        return (
            {convention.name: given} if fits and all(limit.used(given) <= limit.most for limit in self.limits) else {}
        )

    def _costs(self) -> dict[str, dict[Part, dict[int, float]]]:
        """By form, what each width of a part costs; no more than fewer bits do."""
        found, network = self.found, self.network
        alone = found.weights + found.input
        shares = 1 + (found.total - found.without).clip(0) / alone.clip(LEAST)  # of what each adds to all the others
        forms = {ALONE: (found.weights, found.input)}
        forms[f"{ALONE} and within all"] = (found.weights * shares, found.input * shares)
        return {
            form: self._of_parts(network.weights, weights) | self._of_parts(network.inputs, read)
            for form, (weights, read) in forms.items()
        }

    def _of_parts(
        self, parts: Mapping[str, Part], values: Float[np.ndarray, "layers bits"]
    ) -> dict[Part, dict[int, float]]:
        """What each width of some parts costs: no more than fewer bits do, and nothing where it is not known."""
        least = np.minimum.accumulate(values, axis=1)
        rows = {part: least[self.found.layers.index(name)] for name, part in parts.items()}
        known = {part: dict(zip(self.found.bits, map(float, row), strict=True)) for part, row in rows.items()}
        return {part: {b: costs.get(b, 0.0) for b in self.options[part]} for part, costs in known.items()}

    def _gains(self, widths: Widths, divergence: float, round_: int) -> dict[Part, dict[int, float]]:
        """What the next fewer and the next more bits of each part do to the divergence, where the search stands."""
        start = self.network.record(widths)
        gains: dict[Part, dict[int, float]] = {}
        for step, (part, bits) in enumerate(widths.items()):
            options = self.options[part]
            place = options.index(bits)
            others = [options[i] for i in (place - 1, place + 1) if 0 <= i < len(options)]
            values = self.network.divergences([{**widths, part: b} for b in others], start)
            gains[part] = {bits: 0.0} | {b: v - divergence for b, v in zip(others, values, strict=True)}
            if self.on_progress is not None:
                self.on_progress(progress(round_, ROUNDS, step, len(widths), divergence, self.began, part[1]))
        return gains

    # --- the result ---

    def result(self, widths: Widths, divergence: float) -> Allocation:
        """What was found, as rules."""
        network, found, rules, layers = self.network, self.found, [], []
        for i, name in enumerate(found.layers):
            bits, read = widths[network.weights[name]], widths.get(network.inputs.get(name))
            rule = LayerRule(pattern=re.escape(name), weight_bits=bits)
            chosen = self.chooses_inputs and read is not None
            rules.append(dataclasses.replace(rule, activation_bits=read) if chosen else rule)
            layers.append((name, bits, read, self._alone(found.weights[i], bits), self._alone(found.input[i], read)))
        return Allocation(
            convention=dataclasses.replace(self.convention, rules=(*self.convention.rules, *rules)),
            layers=tuple(layers),
            divergence=divergence,
            used={limit.name: (limit.used(widths), limit.most) for limit in self.limits},
            decisions=tuple(self.decisions),
        )

    def _alone(self, row: Float[np.ndarray, " bits"], bits: int | None) -> float | None:
        """The divergence of a part alone, where it is known."""
        return float(row[self.found.bits.index(bits)]) if bits in self.found.bits else None
