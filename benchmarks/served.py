"""Networks to export and to time: trained where weights are at hand, otherwise random with statistics that fit them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax import BatchNormConfig, Convention, Graph, Quantized, adapt_batch_norm, as_function, quantize, trace
from dfq_jax.data import load_data
from dfq_jax.zoo import load_model

BUNDLED = {"fashion_resnet20": "bundled", "fashion_mobilenet": "bundled"}  # test images by network
TRAINED = {*BUNDLED, "efficientnet_lite0"}  # weights come with the package or with an extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A float network.

    Attributes:
      name: in the zoo.
      weights: where they came from.
      module, variables, graph: the network.
      preprocessing: from pixels to its input.
    """

    name: str
    weights: str
    module: Any
    variables: Any
    graph: Graph
    preprocessing: Any

    def quantize(self, bits: str, images: Any = None, *, convention: Convention | None = None) -> Quantized:
        """By the recipe without images: given ones, or noise, serve to compare and for LiteRT's ranges of sums."""
        shape = self.graph.input.shape
        if images is None:
            images = noise(1, (32, *shape[1:]))
        fields = {"bits": bits} if convention is None else {"convention": convention}
        return quantize(self.module, self.variables, input_shape=shape, recipe="instant", images=images, **fields)

    def images(self, data: str | None, limit: int) -> tuple[np.ndarray, str]:
        """Preprocessed images `[N, H, W, C]`, and what they are."""
        data = data or BUNDLED.get(self.name)
        shape = (limit, *self.graph.input.shape[1:])
        if data is None:
            return noise(2, shape), "noise"
        images = load_data(data, limit=limit).images
        steps = self.preprocessing
        if images.shape[1:] == shape[1:]:
            steps = dataclasses.replace(steps, resize=None, crop=None)
        return np.asarray(steps(images), np.float32), data


def serve(name: str, checkpoint: str | None = None) -> Served:
    """A network of the zoo with trained weights where there are, else with random ones."""
    known = checkpoint is not None or name in TRAINED
    model = load_model(name, checkpoint) if known else load_model(name, random_key=jax.random.key(0))
    apply_fn, variables = as_function(model.module, model.variables)
    graph = trace(apply_fn, variables, model.input_shape)
    if not known:
        variables = _with_statistics(graph, variables)
    return Served(
        name=name,
        weights="trained" if known else "random",
        module=model.module,
        variables=variables,
        graph=graph,
        preprocessing=model.preprocessing,
    )


def _with_statistics(graph: Graph, variables: Any) -> Any:
    """Random BatchNorm scales and biases, and the statistics that the network has on noise.

    A fresh residual network has scales of zero, and with arbitrary statistics activations grow from layer to layer.
    """
    rng = np.random.default_rng(0)
    updates = {}
    for bn in graph.batch_norms:
        for path, draw in (
            (bn.scale, functools.partial(rng.uniform, 0.5, 1.5)),
            (bn.bias, functools.partial(rng.normal, 0.0, 0.3)),
        ):
            if path is not None:
                updates[path] = jnp.asarray(draw(size=graph.leaf(variables, path).shape), jnp.float32)
    variables = graph.replace(variables, updates)
    images = jnp.asarray(noise(0, (8, *graph.input.shape[1:])))
    return adapt_batch_norm(graph, variables, variables, images, BatchNormConfig(method="absolute"))


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian noise whose mean and contrast differ from image to image, so that a network tells them apart."""
    rng = np.random.default_rng(seed)
    each = (shape[0], *[1] * (len(shape) - 2), shape[-1])
    return (rng.normal(size=each) + rng.uniform(0.2, 1.0, each) * rng.normal(size=shape)).astype(np.float32)
