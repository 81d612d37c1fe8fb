"""Quantized networks as files: our own (`artifact`), and those of other runtimes; ranges for these (`interchange`)."""

import importlib
from typing import Any

from dfq_jax.export import artifact
from dfq_jax.export.container import ArtifactError
from dfq_jax.export.exporter import FORMATS, Exporter, Format, Runner, get_exporter

__all__ = ["FORMATS", "ArtifactError", "Exporter", "Format", "Runner", "artifact", "get_exporter", "interchange"]


def __getattr__(name: str) -> Any:
    """`interchange` when it is asked for: it imports Flax, which takes a second and most commands need not."""
    if name == "interchange":
        return importlib.import_module("dfq_jax.export.interchange")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
