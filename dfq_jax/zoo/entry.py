"""What the zoo knows of a model: how it is built, what it reads, and how good and large it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from dfq_jax.base import check_field
from dfq_jax.zoo.packaged import PackagedWeights
from dfq_jax.zoo.preprocessing import Preprocessing

__all__ = ["Size", "ZooEntry", "abstract_model"]


class Size(NamedTuple):
    """How large a network is.

    Attributes:
      parameters: number of trained parameters, running statistics not counted.
      macs: multiply-accumulates of its convolutions and matrix products for one image.
    """

    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A model that `load_model` knows.

    Attributes:
      name: what to load it by.
      build: makes the Linen or NNX module; without arguments, an NNX one also takes ``rngs``.
      input_shape: shape of one preprocessed image as a batch, ``(1, H, W, C)``.
      num_classes: number of logits.
      preprocessing: what turns pixels into its input.
      float_top1: top-1 accuracy of the trained float32 network in percent, or None where it was not
        measured.
      trained_on: name of the training data.
      source: where the architecture and the weights come from.
      size: number of its parameters and multiply-accumulates, stated so that listing models builds none.
      weights: file of trained weights that comes with the package, those of another distribution, or None
        where a checkpoint must be given.

    Raises:
      ValueError: if the input shape is not ``(1, H, W, C)``, does not have the channels of the
        preprocessing, or `num_classes` or `float_top1` is out of range.
    """

    name: str
    build: Callable[..., nn.Module | nnx.Module]
    input_shape: tuple[int, int, int, int]
    num_classes: int
    preprocessing: Preprocessing
    float_top1: float | None
    trained_on: str
    source: str
    size: Size
    weights: str | PackagedWeights | None = None

    def __post_init__(self) -> None:
        shape = self.input_shape
        if len(shape) != 4 or shape[0] != 1 or min(shape) < 1:
            raise ValueError(f"input_shape: expected (1, H, W, C), found {shape}")
        if shape[3] != self.preprocessing.channels:
            raise ValueError(f"input_shape: {shape[3]} channels, but preprocessing has {self.preprocessing.channels}")
        check_field("num_classes", self.num_classes, "at least 1", lambda number: number >= 1)
        check_field("float_top1", self.float_top1, "percent or None", lambda top1: top1 is None or 0 <= top1 <= 100)

    def template(self) -> dict[str, Any]:
        """The model's variables as nested dictionaries of `jax.ShapeDtypeStruct`; computes nothing."""
        return abstract_model(self)[1]

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, running statistics not counted."""
        return self.size.parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers for one image of `input_shape`."""
        return self.size.macs


def abstract_model(entry: ZooEntry) -> tuple[nn.Module | nnx.Module, dict[str, Any], Any]:
    """The module, its variables as shapes, and the trained ones among them."""
    linen: list[nn.Module] = []

    def build() -> nnx.Module | None:
        module = entry.build()
        if isinstance(module, nn.Module):
            linen.append(module)
            return None
        return module

    # Which kind a constructor makes shows only when it runs, and running one of NNX would compute all its
    # weights.
    module = nnx.eval_shape(build)
    if module is not None:
        return module, nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    image = jax.ShapeDtypeStruct(entry.input_shape, jnp.float32)
    template = jax.eval_shape(linen[0].init, jax.random.key(0), image)
    return linen[0], template, template["params"]
