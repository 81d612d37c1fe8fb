"""The layers of a page, each a row that opens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dfq_jax.report import figures
from dfq_jax.report.details import LayerDetails, Spread
from dfq_jax.report.markup import Markup, breakable, element
from dfq_jax.report.words import decimals, or_exact

if TYPE_CHECKING:
    from dfq_jax.report.report import LayerReport, Report

# What a row shows of a layer as bars: key, what it is called, and in one word.
BARS = (
    ("weights", "weight SQNR", "weights"),
    ("inputs", "input SQNR", "input"),
    ("own", "own error", "own"),
    ("carried", "carried error", "carried"),
)


def layer_rows(report: Report) -> list[Markup]:
    """One row for each layer; the one of the largest error of its own is open."""
    found = {layer.name: layer for layer in report.details.layers} if report.details else {}
    known = {name: layer.own for name, layer in found.items() if layer.own is not None}
    worst = min(known, key=known.__getitem__) if known else None
    return [
        _row(number, layer, found.get(layer.name), layer.name == worst) for number, layer in enumerate(report.layers, 1)
    ]


def _row(number: int, layer: LayerReport, details: LayerDetails | None, is_open: bool) -> Markup:
    found = {"weights": None if layer.weight_bits is None else or_exact(layer.weight_sqnr)}
    if details is not None:
        read = None if details.inputs is None else or_exact(details.inputs.sqnr)
        found.update(inputs=read, own=or_exact(details.own), carried=or_exact(details.carried))
    data = {f"data_{key}": f"{value:.4f}" for key, value in found.items() if value is not None and math.isfinite(value)}
    bits = f"W{layer.weight_bits or '–'} A{layer.activation_bits or '–'}"
    bars = [_bar(key, word, found[key]) for key, _, word in BARS if key in found]
    summary = element(
        "summary",
        element("span", str(number), class_="number"),
        element("span", breakable(layer.name), class_="name"),
        element("span", bits),
        element("span", *bars, class_="bars"),
    )
    order = {"data_order": str(number), "data_bits": str(layer.weight_bits or 32)}
    return element("details", summary, _inside(layer, details), class_="layer", open=is_open, **order, **data)


def _bar(key: str, word: str, value: float | None) -> Markup:
    """A figure in decibel; None for what is in float."""
    if value is None:
        return element("span", element("span", word, element("b", "–")), class_=f"bar {key}")
    share = 100 * min(max(value / figures.MOST_DECIBEL, 0.0), 1.0)
    head = element("span", word, element("b", "exact" if math.isinf(value) else f"{value:.1f} dB"))
    return element("span", head, element("i", element("i", style=f"width:{share:.0f}%")), class_=f"bar {key}")


def _inside(layer: LayerReport, details: LayerDetails | None) -> Markup:
    """What an open row shows."""
    facts = [f"{layer.kind}, {layer.weights:,} weights." if layer.weights else f"{layer.kind}."]
    if layer.low is not None and layer.high is not None:
        facts.append(f"Its input is clipped to [{layer.low:.4g}, {layer.high:.4g}].")
    shown: list[Markup] = []
    if details is not None and details.weights is not None and details.scales is not None:
        low, high = details.scales
        steps = f"one step of {low:.3g}" if low == high else f"steps from {low:.3g} to {high:.3g}, one a channel"
        label = "weights, in steps of their channel"
        words = f"Weights: {steps}; {_clipped(details.weights)}"
        shown.append(_histogram(details.weights, f"Weights of {layer.name}", label, words))
    if details is not None and details.inputs is not None:
        words = f"Input: steps of {details.inputs.step:.3g}; {_clipped(details.inputs)}"
        shown.append(_histogram(details.inputs, f"Input of {layer.name}", "values of the input", words))
    text = element("p", " ".join([*facts, layer.note]).strip())
    pair = element("div", *shown, class_="pair") if shown else ""
    return element("div", text, pair, class_="inside")


def _histogram(spread: Spread, title: str, label: str, words: str) -> Markup:
    return element("figure", figures.histogram(spread, title, label), element("figcaption", words))


def _clipped(spread: Spread) -> str:
    return f"{decimals(100 * spread.clipped)} % of the values lie beyond the range."
