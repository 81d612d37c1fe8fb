"""What was done to a network, for people (`table`, notebooks) and for machines (`to_json`)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dfq_jax.base import LINE, aligned, hanging, known_fields, write_atomically
from dfq_jax.graph import Graph
from dfq_jax.quantizers import QTensor, quantization
from dfq_jax.report.details import Details, details_from
from dfq_jax.report.markup import element
from dfq_jax.report.page import report_page
from dfq_jax.stages import Comparison, kind_of, sqnr

# From this share of the multiply-accumulates on, what stays in float is said at the head of the report.
FLOAT_SHARE = 0.25
# Below these a result is said to have fallen apart: percent of equal classes, and decibel, at which the error is as
# large as the outputs.
LEAST_AGREEMENT, LEAST_SQNR = 50.0, 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer after quantization."""

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    weight_sqnr: float | None  # decibel
    low: float | None  # clipping range of its input
    high: float | None
    weights: int = 0  # how many
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """The choices made and how the quantized network compares with the float one.

    Attributes:
      recipe: name of the recipe, and its fields.
      convention: one line with bits, granularity and ranges.
      key: data of the JAX key.
      images: where the images came from, and how many.
      compared_on: what `agreement` and `sqnr` were measured on, in words.
      warnings: what may not be as it was meant: lost or untrained BatchNorms, much of the network in float, outputs far
        from the float network's.
      seconds: wall time of each stage, compilation included.
      agreement: percent of the examples that both networks put in the same class; None without classes, and on noise,
        which is of no class.
      sqnr: of the outputs on the same, decibel.
      layers: one entry for each layer.
      skipped: what was left in float, and why.
      steps: what was decided on the way, in order.
      target: what was asked for by a target, whether it is met, and what the network found has on the target's images;
        None without one.
      versions: of the packages that it was computed with.
      command: that did it, where it was one.
      details: errors and values of each layer and pictures of the images, where asked for.
    """

    recipe: str
    settings: dict[str, Any]
    convention: str
    key: list[int]
    images: str
    seconds: dict[str, float]
    agreement: float | None
    sqnr: float | None
    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str], ...]
    steps: tuple[str, ...]
    size: dict[str, int]
    compared_on: str = "these images"
    warnings: tuple[str, ...] = ()
    target: dict[str, Any] | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""
    details: Details | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: the SQNR of what is exact becomes None."""
        return _finite(dataclasses.asdict(self))

    def to_json(self) -> str:
        """The facts as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def summary(self) -> list[tuple[str, str]]:
        """The facts above the table of layers."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        rows = [("WARNING", warning) for warning in self.warnings]
        rows += [("recipe", self.recipe), ("convention", self.convention), ("images", self.images), ("time", stages)]
        compared = [] if self.agreement is None else [f"agreement {self.agreement:.1f} %"]
        compared += [] if self.sqnr is None else [f"output SQNR {self.sqnr:.1f} dB"]
        if compared:
            rows.append(("compared", f"{', '.join(compared)} (on {self.compared_on})"))
        if self.target is not None:
            rows.append(("target", self.target["text"]))
        ratio = self.size["quantized"] / self.size["float"]
        rows.append(("weights", f"{self.size['quantized']} bytes packed, {ratio:.2f} of float32"))
        rows += [("", step) for step in self.steps]
        return rows

    def rows(self) -> list[tuple[str, ...]]:
        """The table of layers, as text."""

        def text(value: Any, form: str = "") -> str:
            return "float" if value is None else format(value, form)

        return [
            (
                layer.name,
                layer.kind,
                text(layer.weight_bits),
                text(layer.activation_bits),
                "-" if layer.weight_sqnr is None else f"{layer.weight_sqnr:.1f}",
                "-" if layer.low is None else f"[{layer.low:.3g}, {layer.high:.3g}]",
            )
            for layer in self.layers
        ]

    HEADER = ("layer", "kind", "bits", "input", "SQNR dB", "input range")

    def table(self, *, layers: bool = True) -> str:
        """Plain text in lines of 80 characters: the summary, the table of layers if asked for, and what is in float."""
        lines = []
        for name, value in self.summary():
            lines += hanging(f"{name:<16}", value)
        if layers:
            lines += aligned([self.HEADER, *self.rows()], width=LINE)
        for name, reason in self.skipped:
            lines += hanging("not quantized: ", f"{name}: {reason}")
        return "\n".join(lines)

    __str__ = table

    def __repr__(self) -> str:
        """In a line, as details hold pictures."""
        return f"Report(recipe {self.recipe}, {len(self.layers)} layers, {self.size['quantized']} bytes)"

    def save_html(self, path: str | os.PathLike[str], *, title: str = "a network") -> None:
        """Write the report as one HTML file, which loads nothing and is read on any screen.

        Args:
          path: of the file.
          title: what was quantized.

        Raises:
          ImportError: matplotlib, which draws its figures, is not installed.
          OSError: the file cannot be written.
        """
        write_atomically(path, report_page(self, title).encode())

    def _repr_html_(self) -> str:
        """The page in a frame of its own; where it cannot be drawn, the table."""
        try:
            page = report_page(self, "a network")
        except ImportError as error:
            return element("pre", self.table(), element("p", str(error)))
        return element("iframe", srcdoc=page, style="width:100%;height:40em;border:0")


def report_from(fields: Mapping[str, Any]) -> Report:
    """The report that `Report.to_dict` made these fields of.

    Raises:
      ValueError: there are fields that a report does not have.
    """
    fields = known_fields(Report, fields)
    layers = tuple(LayerReport(**known_fields(LayerReport, layer)) for layer in fields["layers"])
    skipped = tuple((name, reason) for name, reason in fields["skipped"])
    tuples = {name: tuple(fields.get(name, ())) for name in ("steps", "warnings")}
    details = None if fields.get("details") is None else details_from(fields["details"])
    return Report(**{**fields, **tuples, "layers": layers, "skipped": skipped, "details": details})


def doubtful_structure(graph: Graph) -> tuple[str, ...]:
    """What tracing left out that matters to the whole network, in words: lost BatchNorms, products in float."""
    doubts = []
    lost = [item.name for item in graph.unrecognized_batch_norms]
    if lost:
        doubts.append(
            f"{len(lost)} of {len(lost) + len(graph.batch_norms)} BatchNorms were not recognized ({_some(lost)}): "
            "nothing is synthesized from their statistics, and nothing adapts them."
        )
    products = [item for item in graph.skipped if item.kind == "product"]
    left = sum(item.macs for item in products)
    share = left / max(left + sum(layer.macs for layer in graph.layers), 1)
    if share > FLOAT_SHARE:
        doubts.append(
            f"{len(products)} of {len(products) + len(graph.layers)} products, with {100 * share:.0f} % of the "
            f"multiply-accumulates, stay in float ({_some([item.name for item in products])}): "
            f"{'; '.join(dict.fromkeys(item.reason for item in products))}."
        )
    return tuple(doubts)


def doubtful_result(compared: Comparison) -> tuple[str, ...]:
    """What a comparison on images says against a result, in words: little is left of the float network's outputs."""
    if compared.agreement is not None and compared.agreement < LEAST_AGREEMENT:
        measured = f"only {compared.agreement:.0f} % of its images keep the class that the float network puts them in"
    elif compared.agreement is None and compared.sqnr < LEAST_SQNR:
        measured = f"the error of its outputs is larger than they are (SQNR {compared.sqnr:.1f} dB)"
    else:
        return ()
    return (f"the result has fallen apart: {measured}. Take more bits, or a recipe that does more.",)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def layer_reports(graph: Graph, variables: Any, qvariables: Any) -> tuple[LayerReport, ...]:
    """One entry for each layer, from the float and the quantized variables."""
    before = graph.leaves_by_path(variables)
    # On the host nothing is compiled for the shapes of kernels.
    after, quantizers = jax.tree.map(np.asarray, (graph.leaves_by_path(qvariables), quantization(qvariables)))
    reports = []
    for layer in graph.layers:
        kernel = after[layer.kernel]
        quantized = isinstance(kernel, QTensor)
        # What is quantized for layers alone is so for those with quantized kernels.
        params = (quantizers.by_tensor if quantized else quantizers.for_all).get(layer.tensor)
        reports.append(
            LayerReport(
                name=layer.name,
                kind=kind_of(layer),
                weight_bits=kernel.bits if quantized else None,
                activation_bits=None if params is None else params.bits,
                weights=kernel.size,
                weight_sqnr=sqnr(before[layer.kernel], kernel.dequantize()) if quantized else None,
                low=None if params is None else float(params.lo),
                high=None if params is None else float(params.hi),
            )
        )
    return tuple(reports)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finite(item) for item in value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def packed_size(leaves: list[Any]) -> dict[str, int]:
    """Bytes of all leaves in float32 and as stored."""
    as_float = sum(4 * leaf.size for leaf in leaves)
    stored = sum(leaf.nbytes_packed if isinstance(leaf, QTensor) else 4 * leaf.size for leaf in leaves)
    return {"float": int(as_float), "quantized": int(stored)}
