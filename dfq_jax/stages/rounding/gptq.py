"""GPTQ: codes from images, one weight after the other.

Frantar et al., "GPTQ" (arXiv 2210.17323), here for convolutions of every kind: the inputs of a layer are the patches
that its kernel meets. Rounding a weight makes an error in the layer's result; the weights still to come take on the
values that make up for it best, which the second moments of the inputs tell.

The form computed here is Babai's nearest-plane algorithm, which gives the same codes (Chen et al., arXiv 2507.18553):
with the Cholesky factor `H = R^T R` of the second moments, the error `|R (w - q)|^2` is made small by rounding from the
last weight to the first. It needs no inverse of H.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.base import batches, check_field, check_fields, check_kind, full_precision, is_non_negative
from dfq_jax.graph import BatchNormRule, Graph, KernelForm, LayerCall, apply_quantized, as_argument, check_images
from dfq_jax.quantizers import QTensor
from dfq_jax.stages.rounding.codes import KernelCodes, kernel_codes, quantized_kernels, with_codes

ORDERS = ("natural", "activation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """How codes are found.

    Attributes:
      damping: added to the diagonal of the second moments, relative to its mean.
      order: "activation" rounds first the weights whose inputs are largest, "natural" those that come last.
      centered: take the mean of the inputs off: the shift that errors make in a channel's mean is left to
        `adapt_batch_norm` or `correct_bias`, which take it away whatever the codes are.
      passes: the inputs are those of a network with codes of the pass before, at first the given ones.
      block: weights rounded between two matrix products.
      max_patches: patches of one batch of images that count, at most; all alike thinned out.
    """

    damping: float = 0.01
    order: str = "activation"
    centered: bool = True
    passes: int = 1
    block: int = 128
    max_patches: int = 1 << 15

    def __post_init__(self) -> None:
        check_fields(self, ORDERS, "order")
        check_field("damping", self.damping, "a positive number such as 0.01", lambda v: is_non_negative(v) and v > 0)
        check_fields(self, "an integer of at least 1", "passes", "block", "max_patches")
        check_fields(self, "True or False", "centered")


@full_precision
def gptq(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    config: GPTQConfig = GPTQConfig(),
    *,
    batch_size: int = 32,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Round weights with a view to the layers' inputs on images.

    All layers are treated at once in each pass, so the network is compiled once and memory holds one batch.

    >>> rounded = dfq_jax.gptq(graph, variables, qvariables, images)
    >>> rounded["dense1"]["kernel"].qvalue.shape
    (6, 4)

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: from `quantize_params`; BatchNorm statistics may be adapted already.
      images: `[N, H, W, C]`, preprocessed.
      config: order, damping, and what is reproduced.
      batch_size: images in one pass of the network.
      batch_norm: what each BatchNorm computes in place of itself; `analytic.gptq_from_noise` puts noise there.

    Returns:
      `qvariables` with other codes. A kernel that several layers read has codes for the inputs of all of them; one
      that they read as different matrices (`x @ w` and `h @ w.T`) keeps its codes.

    Raises:
      TypeError: `config` is something else.
      ValueError: no kernel is quantized, `variables` are not the float ones, no images, or images with NaN or infinity.
    """
    check_kind("config", config, GPTQConfig)
    check_images(graph, images)
    kernels = quantized_kernels(graph, variables, qvariables)
    for _ in range(config.passes):
        total = None
        for batch in batches(images, batch_size):
            new = _moments(graph, tuple(kernels), qvariables, batch, config.max_patches, as_argument(batch_norm))
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        updates = {}
        for path, (form, leaf, kernel) in kernels.items():
            updates[path] = _rounded(form, leaf, kernel, total[path], config)
        qvariables = graph.replace(qvariables, updates)
    return qvariables


# --- second moments of inputs ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMoments:
    """Sums over patches, for each group.

    Attributes:
      count: of patches.
      first: of the inputs x, `[G, D]`.
      second: of x x^T, `[G, D, D]`.
    """

    count: Any
    first: Any
    second: Any


@functools.partial(jax.jit, static_argnames=("graph", "paths", "max_patches"))
def _moments(
    graph: Graph,
    paths: tuple[str, ...],
    qvariables: Any,
    images: jax.Array,
    max_patches: int,
    batch_norm: BatchNormRule | None,
) -> dict[str, PatchMoments]:
    """PatchMoments of the inputs that each of some kernels meets, by its path."""
    totals: dict[str, PatchMoments] = {}

    def measure(call: LayerCall, result: jax.Array) -> jax.Array:
        if call.layer.kernel not in paths:
            return result
        x = _thinned(call.form.patches(call.operand), max_patches)
        second = jnp.einsum("mgd,mge->gde", x, x, precision=lax.Precision.HIGHEST)
        new = PatchMoments(jnp.float32(x.shape[0]), x.sum(0), second)
        path = call.layer.kernel  # layers that share a kernel add up
        totals[path] = new if path not in totals else jax.tree.map(jnp.add, totals[path], new)
        return result

    apply_quantized(graph, qvariables, images, batch_norm=batch_norm, after_layer=measure)
    return totals


def _thinned(x: Float[Array, "m g d"], count: int) -> Float[Array, "n g d"]:
    stride = -(-x.shape[0] // count)
    if stride > 1:
        stride += 1 - stride % 2  # odd, so as not to stay in a few columns of images of even width
    return x[::stride]


# --- rounding ---


@functools.partial(jax.jit, static_argnames=("form", "config"))
def _rounded(
    form: KernelForm, leaf: Float[Array, "..."], kernel: QTensor, moments: PatchMoments, config: GPTQConfig
) -> QTensor:
    """Compiled once for each shape."""
    return with_codes(form, kernel, round_kernel(kernel_codes(form, kernel, leaf), moments, config))


def round_kernel(kernel: KernelCodes, moments: PatchMoments, config: GPTQConfig) -> Float[Array, "g o i k"]:
    """Codes of a kernel."""
    shape = kernel.values.shape
    flat = KernelCodes(*(a.reshape(*shape[:2], -1) for a in kernel))
    second = moments.second / moments.count
    if config.centered:
        mean = moments.first / moments.count
        second = second - mean[:, :, None] * mean[:, None, :]
    return jax.vmap(functools.partial(_round_group, config=config))(flat, second).reshape(shape)


def _round_group(kernel: KernelCodes, second: Float[Array, "d d"], config: GPTQConfig) -> Float[Array, "o d"]:
    size = second.shape[0]
    diagonal = jnp.diagonal(second)
    # The floor stands for inputs that are never seen: their weights are rounded to nearest.
    damping = jnp.maximum(config.damping * diagonal.mean(), 1e-12)
    order = jnp.argsort(diagonal) if config.order == "activation" else jnp.arange(size)
    second = second[order][:, order] + damping * jnp.eye(size)
    values, low, high = (a[:, order] for a in (kernel.values, kernel.low, kernel.high))
    codes = nearest_plane(jnp.linalg.cholesky(second).T, values, low, high, block=config.block)
    return codes[:, jnp.argsort(order)]


def nearest_plane(
    upper: Float[Array, "d d"],
    values: Float[Array, "o d"],
    low: Float[Array, "o d"],
    high: Float[Array, "o d"],
    *,
    block: int,
) -> Float[Array, "o d"]:
    """Integers `q` from `low` to `high` with small `|upper (values - q)|` in each row (Babai's nearest plane).

    Args:
      upper: upper triangular, of positive diagonal.
      values: what to round.
      low: least integers.
      high: greatest integers.
      block: columns between two matrix products.
    """
    size = values.shape[1]
    block = min(block, size)
    padding = -size % block
    # Coordinates that are added come first, so they are rounded last, and are independent of all others.
    upper = jnp.pad(upper / jnp.diagonal(upper)[:, None], ((padding, 0), (padding, 0)))
    values, low, high = (jnp.pad(a, ((0, 0), (padding, 0))) for a in (values, low, high))
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def round_block(number: jax.Array, errors: jax.Array) -> jax.Array:
        """Errors `values - codes`, zero before a column is rounded; blocks from the last to the first."""
        start = size + padding - (number + 1) * block
        rows = lax.dynamic_slice_in_dim(upper, start, block, axis=0)
        inner = lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        own, least, most = (lax.dynamic_slice_in_dim(a, start, block, axis=1) for a in (values, low, high))
        ahead = own + exact(errors, rows.T)

        def round_column(step: jax.Array, found: jax.Array) -> jax.Array:
            column = block - 1 - step
            wanted = ahead[:, column] + exact(found, inner[column])
            code = jnp.clip(jnp.round(wanted), least[:, column], most[:, column])
            return found.at[:, column].set(own[:, column] - code)

        found = lax.fori_loop(0, block, round_column, jnp.zeros_like(own))
        return lax.dynamic_update_slice_in_dim(errors, found, start, axis=1)

    errors = lax.fori_loop(0, (size + padding) // block, round_block, jnp.zeros_like(values))
    return jnp.round(values - errors)[:, padding:]
