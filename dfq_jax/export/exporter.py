"""What an exporter is, and what exporters have in common.

An exporter is a module of this room named after the format, which holds an `Exporter` called `EXPORTER`; it is imported
when asked for. To add one, write the module and enter its name in `Format`. The library that a format needs comes with
the extra named in the exporter and is imported when used (`require`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float

from dfq_jax.base import check_field

if TYPE_CHECKING:
    from dfq_jax.recipes import Quantized
else:  # which imports this room
    Quantized = Any

Format = Literal["onnx", "qwix", "stablehlo", "tflite"]
FORMATS = get_args(Format)

Runner = Callable[[Float[np.ndarray, "n ..."]], Float[np.ndarray, "n ..."]]


@runtime_checkable
class Exporter(Protocol):
    """One file format.

    Attributes:
      name: of the format, one of `FORMATS`.
      extra: of the package, with the libraries that the format needs: `pip install 'dfq_jax[extra]'`.
    """

    name: str
    extra: str

    def write(self, quantized: Quantized, path: str | os.PathLike[str]) -> None:
        """Write the network to a file, whole or not at all.

        Raises:
          ImportError: a library is missing; the message names the extra.
          ValueError: the format cannot express the network; the message names the operation and the layer near it.
          OSError: the file cannot be written; nothing is left behind.
        """
        ...

    def open(self, path: str | os.PathLike[str]) -> Runner:
        """Load a written file in its runtime.

        Returns:
          A function of a preprocessed batch `[N, H, W, C]`, float32, any N, that gives the logits `[N, classes]`.

        Raises:
          ImportError: the runtime is missing; the message names the extra.
          ValueError: the file is no network of this format.
        """
        ...


def get_exporter(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
      ValueError: there is no such format.
      ImportError: this installation lacks its module.
    """
    check_field("format", name, f"one of {', '.join(FORMATS)}", lambda v: v in FORMATS)
    module = f"{__package__}.{name}"
    try:
        return importlib.import_module(module).EXPORTER
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(f"format: this installation of dfq_jax has no exporter for {name!r} ({module}).") from None


def as_batch(x: Any, shape: Sequence[Any]) -> np.ndarray:
    """A batch for a written file; sizes in `shape` that are no integers may be any.

    Raises:
      ValueError: it has another shape than the file takes.
    """
    x = np.asarray(x)
    expected = [size if isinstance(size, int) else None for size in shape]
    if x.ndim != len(expected) or any(size not in (None, found) for size, found in zip(expected, x.shape, strict=True)):
        wanted = ", ".join("N" if size is None else str(size) for size in expected)
        raise ValueError(f"x: the file takes [{wanted}], found {x.shape}.")
    return x
