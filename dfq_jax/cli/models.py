"""From what a user types for MODEL to a network with its weights and preprocessing."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dfq_jax import zoo
from dfq_jax.data import Accuracy, Dataset, accuracy, load_data, predict
from dfq_jax.export import artifact
from dfq_jax.graph import ApplyFn, Graph, as_function, run, trace, where
from dfq_jax.recipes import Quantized, Reporter, quantize
from dfq_jax.report import image_grid
from dfq_jax.zoo import abstract_model

# Small batches stay in the cache of a CPU; accelerators are fast enough for any.
EVALUATION_BATCH = 100
Progress = Callable[[int, int], None]  # images done, images in all
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network to work on.

    Attributes:
      name: what it was asked for by: a zoo name or `package.module:function`.
      network: a Linen module, an NNX module or a function `(variables, x) -> outputs`.
      variables: its variables, or their shapes alone.
      input_shape: shape of its input, `[N, H, W, C]`.
      preprocessing: maps raw images `[N, H, W, C]`, uint8, to its input.
      resizes: preprocessing may change the size of images.
      channels: of raw images, 1 or 3; None for what they have.
    """

    name: str
    network: Any
    variables: Any
    input_shape: tuple[int, ...]
    preprocessing: Callable[[np.ndarray], Any]
    resizes: bool = False
    channels: int | None = None

    @functools.cached_property
    def function(self) -> tuple[ApplyFn, Any]:
        """`(variables, x) -> outputs` in inference mode, and the variables."""
        return as_function(self.network, self.variables)

    @functools.cached_property
    def graph(self) -> Graph:
        """The network as traced."""
        return trace(*self.function, self.input_shape)

    @functools.cached_property
    def traced_function(self) -> tuple[ApplyFn, Any]:
        """As `function`, run from the graph: the same outputs, and much faster for depthwise networks on CPU."""
        return functools.partial(run, self.graph), self.function[1]

    @functools.cached_property
    def undone(self) -> Callable[[np.ndarray], Any] | None:
        """The preprocessing, where it can be undone."""
        try:
            image_grid(np.zeros((1, *self.input_shape[1:]), np.float32), self.preprocessing)
        except ValueError:
            return None
        return self.preprocessing

    def load_data(self, spec: str, limit: int | None = None) -> Dataset:
        """Labeled images that fit the network.

        Raises:
          ValueError: they do not, or cannot be read; before anything is computed on them.
        """
        classes = self.graph.num_classes
        if not classes:
            raise ValueError(f"{self.name} gives no class scores [N, classes]: accuracy is not defined")
        shape = None if self.resizes else self.input_shape
        data = load_data(spec, limit=limit, input_shape=shape, channels=self.channels, num_classes=classes)
        image = data[0][0][None]
        found = np.shape(_guarded("preprocessing", lambda: self.preprocessing(image)))
        if found[1:] != self.input_shape[1:]:
            raise ValueError(f"{spec}: preprocessed images are {found[1:]}, {self.name} takes {self.input_shape[1:]}")
        return data

    def batches(self, data: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Preprocessed images with their labels."""
        return data.batches(self.preprocessing, EVALUATION_BATCH)

    def quantize(self, reporter: Reporter, **settings: Any) -> Quantized:
        """The network quantized, its progress shown; `settings` are those of `dfq_jax.quantize`."""
        return quantize(
            self.network,
            self.variables,
            input_shape=self.input_shape,
            on_progress=reporter.on_progress,
            on_stage=reporter.on_stage,
            **settings,
        )

    def measure(
        self,
        reporter: Reporter,
        what: str,
        network: tuple[ApplyFn, Any],
        data: Dataset,
        other: Measurement | None = None,
    ) -> Measurement:
        """The accuracy of this network, or of a quantized form of it, and its agreement with another one."""

        def classify(on_progress: Progress) -> tuple[np.ndarray, np.ndarray]:
            options = {"logits": self.graph.logits, "on_progress": lambda done: on_progress(done, len(data))}
            return predict(*network, self.batches(data), **options)

        (classes, labels), seconds = reporter.timed(what, classify)
        return Measurement(classes, accuracy(classes, labels, other and other.classes), seconds)


class Measurement(NamedTuple):
    """What a network made of labeled images: the likeliest classes of each, the accuracy, and in how much time."""

    classes: Int[np.ndarray, "n k"]
    accuracy: Accuracy
    seconds: float


def resolve(name: str, checkpoint: str | Path | None = None, *, weights: bool = True) -> Model:
    """Find a model.

    Args:
      name: a zoo name, or `package.module:function`; the current folder is importable.
      checkpoint: a file or directory of weights or a reference to the Hugging Face hub, for a model of the zoo.
      weights: whether the weights are needed; without them, models of the zoo have shapes only.

    Raises:
      ValueError: no such model, its function fails or gives something else, or the weights do not fit.
    """
    if ":" in name:
        if checkpoint is not None:
            raise ValueError(f"checkpoint: {name} loads its own weights; only models of the zoo take one")
        return _from_function(name)
    entries = {entry.name: entry for entry in zoo.list_models()}
    if name in entries and not weights and checkpoint is None:
        entry = entries[name]
        network, variables, _ = abstract_model(entry)
    else:
        try:
            loaded = zoo.load_model(name, checkpoint)
        except ValueError as error:
            if name in entries:
                raise
            raise ValueError(f"{error}; or give package.module:function for a model of your own") from error
        entry, network, variables = loaded.entry, loaded.module, loaded.variables
    steps = entry.preprocessing
    return Model(
        name=name,
        network=network,
        variables=variables,
        input_shape=tuple(entry.input_shape),
        preprocessing=steps,
        resizes=steps.resize is not None or steps.crop is not None,
        channels=steps.channels,
    )


# --- models of the user's own ---


def pixels_to_unit(images: UInt8[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Preprocessing of models that bring none: pixels 0...255 to 0...1."""
    return images.astype(np.float32) / 255


def _from_function(name: str) -> Model:
    function = _import(name)
    result = _guarded(f"{name}()", function)
    if not isinstance(result, tuple) or len(result) not in (3, 4):
        found = f"{len(result)} items" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"{name} must return (module or apply_fn, variables, input_shape) and optionally preprocessing; "
            f"it returned {found}"
        )
    network, variables, shape, *rest = result
    try:
        shape = tuple(int(extent) for extent in shape)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: input_shape must be like (1, 32, 32, 3), found {shape!r}") from None
    if rest and not callable(rest[0]):
        raise ValueError(f"{name}: preprocessing must be a function, found {type(rest[0]).__name__}")
    return Model(
        name=name,
        network=network,
        variables=variables,
        input_shape=shape,
        preprocessing=rest[0] if rest else pixels_to_unit,
        resizes=bool(rest),
    )


def _import(name: str) -> Callable[[], Any]:
    if not _FUNCTION.fullmatch(name):
        raise ValueError(f"{name!r} names no model: expected a zoo name or package.module:function")
    module_name, _, function_name = name.partition(":")
    # As for `python -m`: what lies in the current folder comes first.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{name}: importing it failed: {error}") from error
        raise ValueError(f"{name}: there is no module {error.name!r}, here or installed") from error
    except Exception as error:
        raise ValueError(f"{name}: importing it failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no" if function is None else "has a value, not a function,"
        raise ValueError(f"{name}: module {module_name} {what} {function_name!r}")
    return function


def _guarded(what: str, function: Callable[[], Any]) -> Any:
    """The user's code may fail in any way: that is bad input, not a defect of this program."""
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{what} failed: {type(error).__name__}: {error}{where(error)}") from error


def model_of(file: Path) -> str:
    """The model that a file says it was made from."""
    name = artifact.load(file)[1].get("model")
    if not isinstance(name, str):
        raise ValueError(f"{file} does not say what model it was made from; pass --model")
    if ":" in name:
        print(f"running {name}, which {file} names as its model", file=sys.stderr)
    return name
