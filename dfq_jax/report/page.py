"""A report as one HTML file that loads nothing: pure functions of records."""

from __future__ import annotations

import importlib.resources
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dfq_jax.report import figures
from dfq_jax.report.details import Details, Picture
from dfq_jax.report.heat_map import heat_map, sensitivity_words
from dfq_jax.report.layer_rows import BARS, layer_rows
from dfq_jax.report.markup import Markup, element, joined
from dfq_jax.report.words import decimals, for_people, sentences
from dfq_jax.stages import Sensitivity

if TYPE_CHECKING:
    from dfq_jax.report.report import Report

WITHOUT_DETAILS = (
    "This report holds no errors of layers, no histograms and no pictures: they take the float network's weights and "
    "images, and are measured where asked for (dfq-jax quantize --report, or dfq_jax.quantize(..., details=True)) and "
    "kept in the saved file."
)
OF_BUDGET = "bits by layer: "
VERDICT = re.compile(r"(.*): (kept|dropped), (.*)", re.DOTALL)


def report_page(report: Report, title: str) -> str:
    """The page of a report; `title` says of what."""
    details = report.details
    body = [
        element("h1", f"Quantization of {title}"),
        element("p", f"Recipe {report.recipe}. {report.convention}.", class_="soft"),
        *(element("p", warning, class_="warning", role="alert") for warning in report.warnings),
        _cards(report),
        element("h2", "What was done"),
        *(element("p", sentence) for sentence in sentences(report)),
        _decisions(report.steps),
    ]
    if details is None:
        body.append(element("p", WITHOUT_DETAILS, class_="soft"))
    elif details.pictures:
        body.append(_gallery(details))
    body += [_errors(details), _bits(report), _layers(report)]
    if details is not None and details.sensitivity is not None:
        found = Sensitivity.from_json(json.dumps(details.sensitivity))
        body += [element("h2", "What each layer costs"), *_sensitivity(found)]
    body += [_in_float(report), reproduction(report.command, report.key, report.versions, report.settings)]
    return document(f"Quantization of {title}", body)


def sensitivity_page(
    found: Sensitivity, title: str, *, command: str = "", versions: Mapping[str, str] | None = None
) -> str:
    """The page of a sensitivity.

    >>> page = sensitivity_page(dfq_jax.sensitivity(graph, variables, images, bits=(2, 8)), "two layers")
    >>> page.startswith("<!doctype html>"), page.count("<table")
    (True, 2)

    Args:
      found: from `sensitivity`.
      title: of the network.
      command: that measured it.
      versions: of the packages that it was measured with.
    """
    body = [
        element("h1", f"Sensitivity of {title}"),
        *_sensitivity(found),
        reproduction(command, (), versions or {}, {}),
    ]
    return document(f"Sensitivity of {title}", body)


def document(title: str, body: Sequence[str]) -> str:
    """A whole file: the template with its style and script, and the elements of a page."""
    folder = importlib.resources.files(__package__)
    template, css, js = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return string.Template(template).substitute(title=joined(title), css=css, js=js, body=joined(*body))


# --- sections ---


def _cards(report: Report) -> Markup:
    """What most want to know, in large figures."""
    size = report.size
    cards = [
        ("Size", *for_people(size["quantized"]), f"{size['float'] / size['quantized']:.1f} times smaller than float32"),
    ]
    if report.agreement is not None:
        cards.append(
            ("Agreement", f"{report.agreement:.1f} %", f"same class as the float network, on {report.compared_on}")
        )
    if report.sqnr is not None:
        cards.append(("Output SQNR", f"{report.sqnr:.1f} dB", "signal to quantization noise of the outputs"))
    quantized = [layer for layer in report.layers if layer.weight_bits is not None]
    weights = sum(layer.weights for layer in report.layers)
    if weights:
        bits = sum((layer.weight_bits or 32) * layer.weights for layer in report.layers) / weights
        cards.append(("Bits of a weight", decimals(bits), "on average, kernels left in float as 32"))
    cards.append(("Layers", f"{len(quantized)} of {len(report.layers)}", "with quantized weights"))
    cards.append(("Time", f"{sum(report.seconds.values()):.0f} s", "compilation included"))
    parts = (
        element("div", element("dt", a), element("dd", b, element("small", c, class_="soft"))) for a, b, c in cards
    )
    return element("dl", *parts, class_="cards")


def _decisions(steps: Sequence[str]) -> Markup:
    """What was decided on the way, in order."""
    items = []
    for step in (step for step in steps if not step.startswith(OF_BUDGET)):
        found = VERDICT.fullmatch(step)
        words, verdict, why = found.groups() if found else (step, "done", "")
        text = [words, element("br"), element("small", why.replace("->", "→"))] if why else [words]
        items.append(element("li", element("span", verdict, class_=f"verdict {verdict}"), element("span", *text)))
    return element("ul", *items, class_="decisions")


def _gallery(details: Details) -> Markup:
    """Images, the worst first."""

    def figure(picture: Picture) -> Markup:
        said = f"divergence {picture.divergence:.2g}"
        if picture.classes is not None:
            before, after = picture.classes
            said += f", class {before}" + ("" if before == after else f" became {after}")
        image = element("img", src=f"data:image/png;base64,{picture.png}", alt=said)
        return element("figure", image, element("figcaption", said))

    half = (len(details.pictures) + 1) // 2
    words = (
        f"Of {details.measured_on}, those on which the quantized network's outputs are furthest from the float "
        "network's, and nearest to them."
    )
    shown = [element("h2", "Images"), element("p", words, class_="soft")]
    for name, part in (("Furthest", details.pictures[:half]), ("Nearest", details.pictures[half:])):
        shown += [element("h3", name), element("div", *map(figure, part), class_="gallery")] if part else []
    return element("section", *shown)


def _errors(details: Details | None) -> Markup:
    """The error along the network."""
    if details is None:
        return Markup()
    words = (
        f"The error of each layer's output, on {details.measured_on}. Higher is better: at 20 dB the error is a tenth "
        "of the signal, and 6 dB less double it. Its own is what quantizing the layer adds; what its input carries "
        "comes from the layers before."
    )
    found = {
        "in all": [layer.sqnr for layer in details.layers],
        "its own": [layer.own for layer in details.layers],
        "carried": [layer.carried for layer in details.layers],
    }
    figure = element("figure", figures.curves(found, "Error of each layer's output"), class_="wide")
    return element("section", element("h2", "Error along the network"), element("p", words, class_="soft"), figure)


def _bits(report: Report) -> Markup:
    """Bits by layer, where they are not all the same."""
    weights, inputs = ([getattr(layer, f"{part}_bits") for layer in report.layers] for part in ("weight", "activation"))
    if len({*weights}) == len({*inputs}) == 1:
        return Markup()
    figure = element("figure", figures.widths(weights, inputs, "Bits of each layer"), class_="wide")
    shown = [element("h2", "Bits by layer"), figure]
    budget = [step.removeprefix(OF_BUDGET) for step in report.steps if step.startswith(OF_BUDGET)]
    if budget:
        items = [element("li", step.replace("->", "→")) for step in budget]
        words = "Chosen within the budget, by the divergence of the outputs from the float network's:"
        shown += [element("p", words, class_="soft"), element("ol", *items)]
    return element("section", *shown)


def _layers(report: Report) -> Markup:
    """All layers, to sort and to open."""
    keys = [("order", "order in the network", False), ("bits", "bits", False)]
    keys += [(key, label, False) for key, label, _ in BARS]
    words = (
        "Worst first by any figure; press twice for best first. Open a layer to see its values against its steps: "
        "the clipping range is shaded, a line stands at each level, and heights are square roots of counts."
    )
    rows = element("div", *layer_rows(report), id="layers", data_sortable=True)
    return element("section", element("h2", "Layers"), element("p", words, class_="soft"), sorts("layers", keys), rows)


def sorts(target: str, keys: Sequence[tuple[str, str, bool]]) -> Markup:
    """Buttons that sort rows; keys with what they are called and whether the largest come first."""
    buttons = (
        element(
            "button", label, type="button", data_sorts=target, data_key=key, data_falling=str(falling).lower(),
            aria_pressed=str(key == "order").lower(),
        )
        for key, label, falling in keys
    )  # fmt: skip
    return element("div", element("span", "Sort by", class_="soft"), *buttons, class_="sort")


def _sensitivity(found: Sensitivity) -> list[Markup]:
    keys = [("order", "order in the network", False), ("worst", "cost", True)]
    words = (element("p", sentence) for sentence in sensitivity_words(found))
    return [*words, sorts("heat", keys), element("div", heat_map(found), class_="wide")]


def _in_float(report: Report) -> Markup:
    """What was left in float, and why."""
    left = [
        (layer.name, "its weights stay in float by the convention")
        for layer in report.layers
        if layer.weight_bits is None
    ]
    left += report.skipped
    shown = [element("h2", "What stayed in float")]
    if left:
        rows = (element("tr", element("th", name, scope="row"), element("td", reason)) for name, reason in left)
        shown.append(element("table", *rows, class_="facts"))
    else:
        shown.append(element("p", "All products of the network are quantized."))
    return element("section", *shown)


def reproduction(
    command: str, key: Sequence[int], versions: Mapping[str, str], settings: Mapping[str, object]
) -> Markup:
    """How to do it again."""
    shown = [element("h2", "How to do it again")]
    if command:
        shown.append(element("pre", command))
    facts = [(name, version) for name, version in versions.items()]
    if key:
        facts.insert(0, ("key", f"jax.random.wrap_key_data(jnp.array({list(key)}, jnp.uint32))"))
    rows = (
        element("tr", element("th", name, scope="row"), element("td", element("code", fact))) for name, fact in facts
    )
    shown.append(element("table", *rows, class_="facts"))
    if settings:
        whole = element("pre", json.dumps(settings, indent=1))
        shown.append(element("details", element("summary", "All settings of the recipe"), whole))
    return element("section", *shown)
