"""The cheapest choice of bits for every part of a network within limits: an integer program.

One binary variable says whether a part has a width. What depends on the widths of two parts, as the operations of a
layer do on those of its weights and its input, is linear in variables for pairs of widths: they are products of the
binary ones, since their sums over either width are the binary variables of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from dfq_jax.stages.parts import Part, Widths

SECONDS, GAP = 20.0, 1e-4  # after which, or this close to the optimum, the best found is taken


class Limit(NamedTuple):
    """What a choice may take at most.

    Attributes:
      name: of the limit.
      most: the most.
      single: what each width of a part takes.
      pairs: what the product of the widths of two parts is taken times.
    """

    name: str
    most: float
    single: Mapping[tuple[Part, int], float] = {}
    pairs: Mapping[tuple[Part, Part], float] = {}

    def used(self, widths: Widths) -> float:
        """What a choice takes."""
        single = sum(self.single.get(item, 0.0) for item in widths.items())
        return single + sum(factor * widths[a] * widths[b] for (a, b), factor in self.pairs.items())


def cheapest(
    costs: Mapping[Part, Mapping[int, float]], limits: Sequence[Limit], near: tuple[Widths, int] | None = None
) -> dict[Part, int] | None:
    """Choose a width for each part, so that the sum of their costs is least.

    >>> costs = {("weights", "a"): {2: 5.0, 4: 1.0}, ("weights", "b"): {2: 1.0, 4: 0.5}}
    >>> cheapest(costs, [Limit("bits", 6.0, single={(part, b): float(b) for part in costs for b in (2, 4)})])
    {('weights', 'a'): 4, ('weights', 'b'): 2}

    Args:
      costs: of each width that a part may have.
      limits: that the choice keeps.
      near: a choice, and in how many parts another one may differ from it.

    Returns:
      The widths; None if no choice is within the limits.
    """
    singles = [(part, bits) for part, options in costs.items() for bits in options]
    products = dict.fromkeys(pair for limit in limits for pair in limit.pairs)
    pairs = [(a, b, i, j) for a, b in products for i in costs[a] for j in costs[b]]
    place = {item: n for n, item in enumerate([*singles, *pairs])}
    rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, and the bounds of their sum
    for part, options in costs.items():
        rows.append(({place[part, bits]: 1.0 for bits in options}, 1.0, 1.0))
    for a, b in products:
        for i in costs[a]:
            rows.append(({place[a, i]: -1.0} | {place[a, b, i, j]: 1.0 for j in costs[b]}, 0.0, 0.0))
        for j in costs[b]:
            rows.append(({place[b, j]: -1.0} | {place[a, b, i, j]: 1.0 for i in costs[a]}, 0.0, 0.0))
    for limit in limits:
        taken = {place[item]: amount for item, amount in limit.single.items() if item in place}
        taken |= {place[a, b, i, j]: limit.pairs[a, b] * i * j for a, b, i, j in pairs if (a, b) in limit.pairs}
        unit = max(taken.values(), default=1.0)  # solvers want numbers of one size
        rows.append(({n: amount / unit for n, amount in taken.items()}, -np.inf, limit.most / unit))
    if near is not None:
        widths, changes = near
        rows.append(({place[item]: 1.0 for item in widths.items()}, float(len(widths) - changes), np.inf))
    return _solve(costs, singles, len(place), rows)


def _solve(
    costs: Mapping[Part, Mapping[int, float]],
    singles: Sequence[tuple[Part, int]],
    size: int,
    rows: Sequence[tuple[dict[int, float], float, float]],
) -> dict[Part, int] | None:
    matrix = lil_array((len(rows), size))
    for n, (coefficients, *_) in enumerate(rows):
        for column, value in coefficients.items():
            matrix[n, column] = value
    goal = np.zeros(size)
    goal[: len(singles)] = [costs[part][bits] for part, bits in singles]
    goal /= max(np.abs(goal).max(), 1e-300)
    found = milp(
        goal,
        # Pairs are integers by themselves, but told so HiGHS is twice as fast, and seldom has to repair a solution, of
        # which it prints a line that no option silences.
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [high for *_, high in rows]),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    return {part: bits for (part, bits), value in zip(singles, found.x, strict=False) if value > 0.5}
