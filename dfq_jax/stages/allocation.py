"""Bits for each layer within a budget: by what each costs alone, and then by what they cost together."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import LINE, Progress, aligned, check_field
from dfq_jax.graph import Graph
from dfq_jax.stages.assignment import cheapest
from dfq_jax.stages.budget import Budget
from dfq_jax.stages.convention import Convention, check_convention
from dfq_jax.stages.limits import Choices, all_widths, choices_within
from dfq_jax.stages.mixed import MixedNetwork
from dfq_jax.stages.parts import Part, Widths
from dfq_jax.stages.rules import LayerRule
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
    settings: Any = {"convention": convention, "estimator": estimator, "on_progress": on_progress}
    return allocator(graph, variables, found, images, **settings)(budget)


def allocator(
    graph: Graph,
    variables: Any,
    found: Sensitivity,
    images: Float[Array, "n ..."] | None = None,
    *,
    convention: Convention = Convention(),
    estimator: str = "lp",
    on_progress: Callable[[Progress], None] | None = None,
) -> Callable[[Budget], Allocation]:
    """`allocate` for many budgets of one network, which is made ready for measuring once.

    >>> found = dfq_jax.sensitivity(graph, variables, images)
    >>> within = allocator(graph, variables, found, images)
    >>> [within(Budget(average_weight_bits=b)).used["average_weight_bits"][0] <= b for b in (3.0, 4.0)]
    [True, True]

    Args:
      graph: from `trace`.
      variables: float variables, as `found` was measured with.
      found: from `sensitivity`, with the same convention and estimator.
      images: to judge by, as for `allocate`.
      convention: all but the bits.
      estimator: of activation ranges.
      on_progress: called after each measurement.

    Returns:
      A function of a budget.

    Raises:
      ValueError: bad arguments; the function, if no choice is within the budget.
    """
    check_convention(convention)
    check_field("found", found, "a Sensitivity", lambda v: isinstance(v, Sensitivity))
    bits = all_widths(graph, convention, found.bits)
    network = MixedNetwork(graph, variables, images, bits, convention, estimator)
    names = tuple(network.weights)
    check_field("found", found.layers, f"sensitivities of the layers {names}", lambda v: v == names)

    def within(budget: Budget) -> Allocation:
        choices = choices_within(graph, budget, convention, found.bits)
        search = _Search(network, found, choices, convention, on_progress)
        return search.result(*search.run())

    return within


class _Search:
    """The choice of bits for one network."""

    def __init__(
        self,
        network: MixedNetwork,
        found: Sensitivity,
        choices: Choices,
        convention: Convention,
        on_progress: Callable[[Progress], None] | None,
    ):
        self.network, self.graph, self.found, self.convention = network, network.graph, found, convention
        self.options, self.limits, self.chooses_inputs = choices
        self.on_progress, self.began = on_progress, time.perf_counter()
        self.decisions: list[str] = []

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
