"""The sensitivity of layers as a table of colors."""

from __future__ import annotations

import numpy as np

from dfq_jax.report import figures
from dfq_jax.report.markup import Markup, breakable, element
from dfq_jax.stages import Sensitivity

TITLES = {"weights": "its weights alone", "input": "its input alone", "both": "both"}


def sensitivity_words(found: Sensitivity) -> list[str]:
    """What a sensitivity says."""
    most = np.argsort(-found.both[:, 0], kind="stable")[:3]
    names = ", ".join(f"{found.layers[i]} ({found.both[i, 0]:.3g})" for i in most)
    totals = ", ".join(f"{bits} bits {total:.3g}" for bits, total in zip(found.bits, found.total, strict=True))
    return [
        f"How far the outputs move from the float network's (Kullback-Leibler divergence in nats, on "
        f"{found.measured_on}) with one layer alone quantized. Small is good.",
        f"Of most cost at {found.bits[0]} bits: {names}. With all quantized: {totals}.",
    ]


def _short(value: float) -> str:
    """A number in few characters."""
    return f"{value:.2g}" if value >= 1e-3 or value <= 0 else f"{value:.0e}".replace("e-0", "e-")


def heat_map(found: Sensitivity) -> Markup:
    """A row for each layer, a column for each width of weights, of input, and of both."""
    values = np.concatenate([getattr(found, part) for part in TITLES], axis=1)
    colors = figures.heat(values)
    groups = [element("th", "", rowspan="2")]
    widths: list[Markup] = []
    for title in TITLES.values():
        groups += [
            element("td", class_="gap", rowspan="2"),
            element("th", title, colspan=str(len(found.bits)), scope="colgroup"),
        ]
        widths += [element("th", str(bits), scope="col") for bits in found.bits]
    rows = []
    for number, name in enumerate(found.layers):
        cells = [element("th", breakable(name), scope="row")]
        for place, (value, (ground, ink)) in enumerate(zip(values[number], colors[number], strict=True)):
            cells += [element("td", class_="gap")] if place % len(found.bits) == 0 else []
            cells.append(element("td", _short(value), style=f"background:{ground};color:{ink}"))
        data = {"data_order": str(number), "data_worst": f"{found.both[number, 0]:.6g}"}
        rows.append(element("tr", *cells, **data))
    head = element("thead", element("tr", *groups), element("tr", *widths))
    return element("table", head, element("tbody", *rows), class_="heat", id="heat", data_sortable=True)
