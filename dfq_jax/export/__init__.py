"""Quantized networks as files: our own (`artifact`), and those of other runtimes; ranges for these (`interchange`)."""

from dfq_jax.export import artifact, interchange
from dfq_jax.export.container import ArtifactError
from dfq_jax.export.exporter import FORMATS, Exporter, Format, Runner, get_exporter

__all__ = ["FORMATS", "ArtifactError", "Exporter", "Format", "Runner", "artifact", "get_exporter", "interchange"]
