"""What each layer of a compiled network runs as, and why."""

from __future__ import annotations

import numpy as np

from dfq_jax.base import aligned
from dfq_jax.runtime.plan import IntegerPlan
from dfq_jax.runtime.policy import INT8

HEADER = ("layer", "kind", "kernel", "runs as", "float / int8 time", "sums below", "why")


def kernel_rows(plan: IntegerPlan) -> list[tuple[str, ...]]:
    """One row for each layer, under `HEADER`: what it runs as, the measured speed, the bound on its sums, and why."""
    rows: list[tuple[str, ...]] = []
    for own in plan.layers:
        layer, decision = plan.graph.layer(own.name), own.decision
        ratio = plan.policy.ratio(own.name)
        runs = decision.runs + (f" ({plan.policy.accumulator} sums)" if decision.runs == INT8 else "")
        bound = "-" if not decision.largest_sum else f"2^{np.log2(decision.largest_sum):.1f}"
        rows.append(
            (
                layer.name,
                layer.kind + (f"/{layer.groups}" if layer.groups > 1 else ""),
                "x".join(map(str, layer.kernel_shape)),
                runs,
                "-" if ratio is None else f"{ratio:.2f}",
                bound,
                decision.reason or "-",
            )
        )
    return rows


def kernel_table(plan: IntegerPlan) -> str:
    """The rows of `kernel_rows` as plain text, and the measured speed of the whole network where there is one."""
    lines = aligned([HEADER, *kernel_rows(plan)])
    if plan.policy.network is not None:
        lines.append(f"the whole network: {plan.policy.network:.2f} times as fast as the float one, measured")
    return "\n".join(lines)
