"""What was done to a network, for people (`table`, notebooks) and for machines (`to_json`)."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping
from typing import Any

from dfq_jax.evaluation import sqnr
from dfq_jax.execute import activation_quantizers
from dfq_jax.graph import Graph
from dfq_jax.qtensor import QTensor


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
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The choices made and how the quantized network compares with the float one.

    Attributes:
      recipe: name of the recipe, and its fields.
      convention: one line with bits, granularity and ranges.
      key: data of the JAX key.
      images: where the images came from, and how many.
      seconds: wall time of each stage, compilation included.
      agreement: percent of the images that both networks put in the same class; None without classes.
      sqnr: of the outputs on the images, decibel.
      layers: one entry for each layer.
      skipped: what was left in float, and why.
      steps: what was decided on the way, in order.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: the SQNR of what is exact becomes None."""
        return _finite(dataclasses.asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def summary(self) -> list[tuple[str, str]]:
        """The facts above the table of layers."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        rows = [("recipe", self.recipe), ("convention", self.convention), ("images", self.images), ("time", stages)]
        compared = [] if self.agreement is None else [f"agreement {self.agreement:.1f} %"]
        compared += [] if self.sqnr is None else [f"output SQNR {self.sqnr:.1f} dB"]
        if compared:
            rows.append(("on these images", ", ".join(compared)))
        ratio = self.size["quantized"] / self.size["float"]
        rows.append(("weights", f"{self.size['quantized']} bytes packed, {ratio:.2f} of float32"))
        rows += [("", step) for step in self.steps]
        return rows

    def rows(self) -> list[tuple[str, ...]]:
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

    HEADER = ("layer", "kind", "weight bits", "input bits", "weight SQNR dB", "input range")

    def table(self) -> str:
        """Plain text."""
        lines = [f"{name:<16}{value}" for name, value in self.summary()]
        rows = [self.HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.HEADER))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"not quantized: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)

    __str__ = table

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        facts = "".join(row(pair, "td") for pair in self.summary())
        layers = row(self.HEADER, "th") + "".join(row(r, "td") for r in self.rows())
        return f"<table>{facts}</table><table>{layers}</table>"


def report_from(fields: Mapping[str, Any]) -> Report:
    """The report that `Report.to_dict` made these fields of."""
    layers = tuple(LayerReport(**layer) for layer in fields["layers"])
    skipped = tuple((name, reason) for name, reason in fields["skipped"])
    return Report(**{**fields, "layers": layers, "skipped": skipped, "steps": tuple(fields["steps"])})


def layer_reports(graph: Graph, variables: Any, qvariables: Any) -> tuple[LayerReport, ...]:
    """One entry for each layer, from the float and the quantized variables."""
    before = dict(zip(graph.leaf_paths, graph.leaves(variables), strict=True))
    after = dict(zip(graph.leaf_paths, graph.leaves(qvariables), strict=True))
    quantizers = activation_quantizers(qvariables)
    reports = []
    for layer in graph.layers:
        kernel, params = after[layer.kernel], quantizers.get(layer.tensor)
        quantized = isinstance(kernel, QTensor)
        reports.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                weight_bits=kernel.bits if quantized else None,
                activation_bits=None if params is None else params.bits,
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
