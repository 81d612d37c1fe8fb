"""A small generator whose weights and latents are optimized together, fresh for each batch (GENIE-D).

GENIE (Jeon et al., arXiv 2212.04780) does not optimize pixels: a convolutional network, trained from scratch on this
batch alone, maps one latent vector per image to the image. Its upsampling ties neighboring pixels to each other, which
natural images have and free pixels lack; its last normalization fixes the statistics of each input channel.

    latent -> dense to 128 features at a quarter of the size -> BatchNorm -> up x2 -> 3x3 convolution to 64
           -> BatchNorm -> leaky ReLU 0.2 -> up x2 -> 3x3 convolution to the image's channels -> tanh -> BatchNorm

BatchNorms normalize by the batch, as in training; the last one has neither scale nor bias.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

LATENT_SIZE = 256
WIDE, NARROW = 128, 64  # features before and after the first convolution
LEAK = 0.2
BATCH_NORM_EPSILON = 1e-5

GeneratorParameters = dict[str, Any]


def init_generator(key: Key[Array, ""], shape: tuple[int, ...]) -> GeneratorParameters:
    """Latents and weights for images of `shape` `[N, *spatial, C]`; the key is consumed.

    Latents are standard Gaussian; weights are uniform within 1 / sqrt(fan in).
    """
    count, *spatial, channels = shape
    latent_key, dense_key, bias_key, first_key, second_key = jax.random.split(key, 5)
    base = tuple(math.ceil(size / 4) for size in spatial)
    kernel = (3,) * len(spatial)

    def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    # Biases that the next BatchNorm takes out again are left out.
    return {
        "latent": jax.random.normal(latent_key, (count, LATENT_SIZE), jnp.float32),
        "generator": {
            "dense": {
                "kernel": uniform(dense_key, (LATENT_SIZE, *base, WIDE), LATENT_SIZE),
                "bias": uniform(bias_key, (*base, WIDE), LATENT_SIZE),
            },
            "norm1": {"scale": jnp.ones(WIDE), "bias": jnp.zeros(WIDE)},
            "conv1": {"kernel": uniform(first_key, (*kernel, WIDE, NARROW), math.prod(kernel) * WIDE)},
            "norm2": {"scale": jnp.ones(NARROW), "bias": jnp.zeros(NARROW)},
            "conv2": {
                "kernel": uniform(second_key, (*kernel, NARROW, channels), math.prod(kernel) * NARROW),
                "bias": jnp.zeros(channels),
            },
        },
    }


def generate(parameters: GeneratorParameters, shape: tuple[int, ...]) -> Float[Array, "n *s c"]:
    """The images of `init_generator`'s parameters; sizes that are no multiple of 4 are cut from larger images."""
    weights = parameters["generator"]
    latent, dense = parameters["latent"], weights["dense"]
    x = (latent @ dense["kernel"].reshape(LATENT_SIZE, -1)).reshape(-1, *dense["bias"].shape) + dense["bias"]
    x = _batch_norm(x, **weights["norm1"])
    x = upsampled_conv(x, weights["conv1"]["kernel"])
    x = jax.nn.leaky_relu(_batch_norm(x, **weights["norm2"]), LEAK)
    x = jnp.tanh(upsampled_conv(x, weights["conv2"]["kernel"]) + weights["conv2"]["bias"])
    return _batch_norm(x[tuple(slice(size) for size in shape)], 1.0, 0.0)


def upsampled_conv(x: Float[Array, "n *s c"], kernel: Float[Array, "*k c d"]) -> Float[Array, "n *t d"]:
    """A convolution with a kernel of size 3 ("SAME", zeros outside) of `x` repeated twice along each spatial axis.

    Repeated pixels meet several taps of the kernel: along one axis an even output sees (left; own, own), an odd one
    (own, own; right). So each phase of the output is a convolution of `x` itself with a kernel of size 2, whose taps
    are sums of those of the given one: in two dimensions 16 products in place of 36, and `x` is never repeated. All
    phases are one matrix product, whose gradients are matrix products too.
    """
    spatial = x.ndim - 2
    axes = tuple(range(1, spatial + 1))
    sizes = x.shape[1:-1]
    padded = jnp.pad(x, [(0, 0)] + [(1, 1)] * spatial + [(0, 0)])
    taps = list(itertools.product((0, 1), repeat=spatial))
    windows = (tuple(slice(t, t + size + 1) for t, size in zip(tap, sizes, strict=True)) for tap in taps)
    patches = jnp.concatenate([padded[:, *window] for window in windows], axis=-1)
    # [taps, C, phases, D]: phase 0 of an axis sums the taps (0), (1, 2); phase 1 the taps (0, 1), (2).
    per_axis = jnp.array([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # phase, tap, tap of the kernel
    for axis in range(spatial):
        kernel = jnp.moveaxis(jnp.tensordot(per_axis, kernel, (2, 2 * axis)), (0, 1), (2 * axis, 2 * axis + 1))
    order = (*range(1, 2 * spatial, 2), 2 * spatial, *range(0, 2 * spatial, 2), 2 * spatial + 1)
    kernel = kernel.transpose(order)
    features = kernel.shape[-1]
    products = patches @ kernel.reshape(patches.shape[-1], -1)
    products = products.reshape(*products.shape[:-1], len(taps), features)
    # Phase 0 stands one place before phase 1: pixel i reads places i - 1, i in the one and i, i + 1 in the other.
    phases = []
    for number, phase in enumerate(taps):
        window = tuple(slice(p, p + size) for p, size in zip(phase, sizes, strict=True))
        phases.append(products[:, *window, number])
    # Interleave: [N, *s, *phases, D] -> [N, s1, p1, s2, p2, ..., D]
    stacked = jnp.stack(phases, axis=spatial + 1).reshape(-1, *sizes, *(2,) * spatial, features)
    order = (0, *itertools.chain.from_iterable((a, a + spatial) for a in axes), 2 * spatial + 1)
    return lax.reshape(stacked.transpose(order), (x.shape[0], *(2 * size for size in sizes), features))


def _batch_norm(x: jax.Array, scale: jax.Array | float, bias: jax.Array | float) -> jax.Array:
    """BatchNorm by the statistics of this batch."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0.0)
    factor = scale * lax.rsqrt(var + BATCH_NORM_EPSILON)
    return x * factor + (bias - mean * factor)
