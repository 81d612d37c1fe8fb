"""What is computed with: versions of packages, and the backend."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import jax

PACKAGES = ("dfq_jax", "jax", "jaxlib", "flax", "numpy", "optax", "safetensors")


def package_version(package: str) -> str:
    """The version of a package that is installed, or of this one wherever it is."""
    if package == "dfq_jax":
        return sys.modules[package].__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, str]:
    """What numbers are computed with here."""
    versions = {package: package_version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions, "backend": jax.default_backend()}
