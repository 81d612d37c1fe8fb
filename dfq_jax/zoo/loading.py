"""Models of the zoo with weights in them."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from dfq_jax.zoo.checkpoint import load_checkpoint
from dfq_jax.zoo.entry import ZooEntry, abstract_model
from dfq_jax.zoo.layouts import Layout
from dfq_jax.zoo.packaged import PackagedWeights
from dfq_jax.zoo.preprocessing import Preprocessing
from dfq_jax.zoo.registry import find_model

__all__ = ["ZooModel", "load_model"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ZooModel:
    """A loaded model.

    Attributes:
      name: its name in the zoo.
      module: the Linen module, or the NNX module in eval mode, holding `variables`.
      variables: nested dictionaries of arrays: the Linen collections ``params`` and ``batch_stats``, or the
        pure dictionary of the NNX module's state.
      input_shape: shape of one preprocessed image as a batch, ``(1, H, W, C)``.
      preprocessing: what turns pixels into its input.
      num_classes: number of logits.
      entry: the zoo's entry.
    """

    name: str
    module: nn.Module | nnx.Module
    variables: Mapping[str, Any]
    input_shape: tuple[int, int, int, int]
    preprocessing: Preprocessing
    num_classes: int
    entry: ZooEntry


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    random_key: Key[Array, ""] | None = None,
    *,
    layout: Layout | str | None = None,
) -> ZooModel:
    """Loads a model with the weights that come with the package, of a checkpoint, or random ones.

    >>> model = load_model("fashion_mobilenet")
    >>> model.input_shape, model.num_classes
    ((1, 28, 28, 1), 10)

    Args:
      name: a name of `list_models`.
      checkpoint: weights to load instead of the bundled ones: a file, a directory or ``hf:ORG/REPO``, as in
        `load_checkpoint`.
      random_key: a key from `jax.random.key` to initialize the weights with; the model is then untrained.
      layout: how `checkpoint` names its arrays; None to recognize it.

    Returns:
      The model with its variables as `jax.Array`.

    Raises:
      ValueError: if the name is unknown, the model needs a checkpoint and none is given, both a checkpoint
        and a key are given, or the checkpoint does not fit.
    """
    entry = find_model(name)
    if checkpoint is not None and random_key is not None:
        raise ValueError("random_key: give either a checkpoint or a key for random weights, not both")
    if layout is not None and checkpoint is None:
        raise ValueError("layout: says how a checkpoint is arranged; give checkpoint, too")
    if random_key is not None:
        module, variables = _initialize(entry, random_key)
    else:
        module, template, _ = abstract_model(entry)
        path = _trained_weights(entry) if checkpoint is None else checkpoint
        variables = _to_device(load_checkpoint(path, template, layout))
        if isinstance(module, nnx.Module):
            module = _fill(module, variables)
    return ZooModel(
        name=entry.name,
        module=module,
        variables=variables,
        input_shape=entry.input_shape,
        preprocessing=entry.preprocessing,
        num_classes=entry.num_classes,
        entry=entry,
    )


def _trained_weights(entry: ZooEntry) -> str:
    """The file of the weights that belong to an entry."""
    if entry.weights is None:
        raise ValueError(
            f"checkpoint: {entry.name!r} comes without weights; pass a file trained on {entry.trained_on}, "
            f"with Flax's own names (params/conv1/kernel...) or those of {entry.source}; or pass random_key "
            "for untrained weights"
        )
    if isinstance(entry.weights, PackagedWeights):
        return os.fspath(entry.weights.find())
    path = importlib.resources.files("dfq_jax.zoo") / "weights" / entry.weights
    if not path.is_file():
        raise ValueError(
            f"checkpoint: the weights {entry.weights!r} of {entry.name!r} are missing; install the package "
            "again, or pass a checkpoint"
        )
    return str(path)


def _initialize(entry: ZooEntry, key: Key[Array, ""]) -> tuple[nn.Module | nnx.Module, dict[str, Any]]:
    module, _, _ = abstract_model(entry)
    if isinstance(module, nnx.Module):
        module = entry.build(rngs=nnx.Rngs(key))
        return module, nnx.to_pure_dict(nnx.state(module))
    return module, jax.jit(module.init)(key, jnp.zeros(entry.input_shape, jnp.float32))


def _fill(module: nnx.Module, variables: dict[str, Any]) -> nnx.Module:
    """The abstract NNX module with arrays in place of its shapes."""
    definition, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, variables)
    return nnx.merge(definition, state)


def _to_device(variables: dict[str, Any]) -> dict[str, Any]:
    """NumPy leaves replaced by JAX arrays one by one, so that there are never two of all of them."""
    for key, leaf in variables.items():
        variables[key] = _to_device(leaf) if isinstance(leaf, dict) else jax.device_put(leaf)
    return variables
