"""Libraries that come with an extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import a library that comes with an extra.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {module} ({error}): pip install 'dfq_jax[{extra}]'") from error
