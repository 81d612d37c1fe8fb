"""A report in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dfq_jax.stages import LayerComparison, LayerError

if TYPE_CHECKING:
    from dfq_jax.report.details import Details
    from dfq_jax.report.report import Report


def decimals(value: float) -> str:
    """A number with as many decimals as say something.

    >>> decimals(4.0), decimals(4.123), decimals(0.01234)
    ('4', '4.12', '0.012')
    """
    if value and abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def for_people(*sizes: int) -> list[str]:
    """Sizes in one unit, that of the smallest.

    >>> for_people(24_100, 120_000), for_people(240_000)
    (['24.1 kB', '120.0 kB'], ['0.24 MB'])
    """
    return [f"{size / 1e6:.2f} MB" if min(sizes) >= 1e5 else f"{size / 1e3:.1f} kB" for size in sizes]


def sentences(report: Report) -> list[str]:
    """What was done and what came of it."""
    size = report.size
    images = report.images.removeprefix("none (").removesuffix(")") if report.images.startswith("none (") else None
    quantized, whole = for_people(size["quantized"], size["float"])
    said = [
        f"Images: {report.images}." if images is None else f"No images were made: {images}.",
        f"All variables of the network take {quantized} in place of {whole}.",
    ]
    found = []
    if report.agreement is not None:
        found.append(f"{report.agreement:.1f} % keep the class that the float network puts them in")
    if report.sqnr is not None:
        found.append(f"the outputs have a signal-to-quantization-noise ratio of {report.sqnr:.1f} dB")
    if found:
        said.append(f"On {report.compared_on}, {', and '.join(found)}.")
    verdicts = [verdict for step in report.steps for verdict in ("kept", "dropped") if f": {verdict}, " in step]
    if verdicts:
        tried, kept = len(verdicts), verdicts.count("kept")
        said.append(
            f"Of {tried} change{'' if tried == 1 else 's'} tried, {kept} {'was' if kept == 1 else 'were'} kept: what "
            "brings the outputs closer to the float network's, on what none was fitted to."
        )
    return said + ([] if report.details is None else _errors(report.details))


def _errors(details: Details) -> list[str]:
    """Where the error is made."""
    errors = [
        LayerError(name=layer.name, **{part: or_exact(getattr(layer, part)) for part in ("sqnr", "own", "carried")})
        for layer in details.layers
    ]
    worst = sorted(errors, key=lambda error: error.own)[:3]
    names = _listed([f"{error.name} ({error.own:.1f} dB)" for error in worst])
    said = [f"The layers with the largest errors of their own are {names}."]
    falls_at = LayerComparison(layers=tuple(errors)).falls_at
    if falls_at is not None:
        said.append(f"The error first becomes much larger than before at {falls_at}.")
    return said


def or_exact(value: float | None) -> float:
    """What a file cannot say: without an error a ratio to it is infinite."""
    return math.inf if value is None else value


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
