"""Images on which a quantized network's loss is smooth around them (after SADAG).

Sharpness-aware data generation (Dung et al., ICML 2024) asks that the gradient which an image gives to the quantized
network be like that of its neighbors: what is learned on the image then holds around it. The gradient of the squared
error of the logits with respect to the last layer's weights is the outer product of the residual r = z_float -
z_quantized and the features f that this layer reads, so that without any differentiation by weights

    similarity(x, x') = cos(f, f') cos(r, r').

Each step moves every image a distance `rho` down the gradient of <f, f'><r, r'> at x' = x, and then raises the
similarity of the image to that neighbor, keeps images different from each other (for each, the largest similarity to
another one is a penalty), and keeps the BatchNorm statistics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import (
    Loop,
    Plan,
    Progress,
    State,
    Turn,
    check_field,
    check_fields,
    check_kind,
    descend,
    full_precision,
    init_state,
    mesh_of,
    platform_of,
    repeat,
    sharded,
)
from dfq_jax.graph import Graph, apply_quantized, check_images
from dfq_jax.quantizers import is_quantized
from dfq_jax.synthesis.checks import check_synthesizable
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.loop import SynthesisError, default_chunk, default_lanes, default_seconds
from dfq_jax.synthesis.objective import NORM_EPSILON, FeatureReader, Observation, cosine, observe, statistics_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How images are refined.

    Attributes:
      steps: optimizer steps for each batch.
      batch_size: images refined together; BatchNorm statistics and diversity are taken over them.
      learning_rate: of Adam on the pixels, in units of the preprocessed image; it falls to zero as a cosine.
      rho: distance of the neighbor, the Euclidean norm over an image's pixels.
      similarity_weight: of 1 - similarity to the neighbor.
      diversity_weight: of the largest similarity, in absolute value, to another image of the batch.
      statistics: the weights of the BatchNorm and input terms, and whether convolutions swing.
    """

    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 0.02
    rho: float = 1.0
    similarity_weight: float = 1.0
    diversity_weight: float = 1.0
    statistics: SynthesisConfig = SynthesisConfig()

    def __post_init__(self) -> None:
        check_fields(self, "an integer of at least 1", "steps", "batch_size")
        check_fields(self, "a positive number", "learning_rate", "rho")
        check_fields(self, "a finite number of at least 0", "similarity_weight", "diversity_weight")
        check_field("statistics", self.statistics, "a SynthesisConfig", lambda v: isinstance(v, SynthesisConfig))


class Gradients(NamedTuple):
    """The two factors of the last layer's gradient, for each image."""

    features: Float[Array, "n f"]
    residuals: Float[Array, "n k"]


class Sharpness(NamedTuple):
    """The terms of one batch's loss."""

    loss: Float[Array, ""]
    statistics: Float[Array, ""]  # BatchNorm and input terms
    similarity: Float[Array, ""]  # to the neighbor, averaged
    overlap: Float[Array, ""]  # largest similarity to another image, averaged


@full_precision  # what is optimized is a small difference of two networks
def refine(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    key: Key[Array, ""],
    config: RefineConfig = RefineConfig(),
    *,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Float[Array, "n ..."]:
    """Refine synthetic images for a quantized network.

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: from `quantize_params`, of the same network.
      images: `[N, H, W, C]`, from `synthesize`.
      key: of swing convolutions; consumed.
      config: steps and weights.
      on_progress: called between chunks, at most every few steps.
      checkpoint: a file to save unfinished work to and to resume it from, bit for bit; removed at the end.

    Returns:
      As many images, `[N, H, W, C]` float32.

    Raises:
      TypeError: `config` is something else.
      GraphError: the network has no BatchNorm, or the variables are not those that were traced.
      ValueError: images of another shape, variables that are not quantized, damaged weights, or a checkpoint of other
        work.
      SynthesisError: the loss became NaN or infinite.
      KeyboardInterrupt: on Ctrl-C; a checkpoint, if asked for, is kept.
    """
    check_kind("config", config, RefineConfig)
    check_synthesizable(graph, variables, config.statistics)
    if not is_quantized(qvariables):
        raise ValueError("qvariables: hold no activation quantizers; pass what quantize_params returned.")
    check_images(graph, images)
    loop = _RefineLoop(graph, variables, qvariables, jnp.asarray(images, jnp.float32), key, config)
    if not loop.run(on_progress=on_progress, checkpoint=checkpoint):
        raise KeyboardInterrupt("refinement was interrupted")
    refined = jnp.concatenate([loop.work[batch].parameters for batch in sorted(loop.work)])[: len(images)]
    return sharded(refined, loop.mesh)


class _RefineLoop(Loop):
    """The loop of one call of `refine`: its work on a batch is the state of its optimizer."""

    def __init__(
        self, graph: Graph, variables: Any, qvariables: Any, images: jax.Array, key: Any, config: RefineConfig
    ):
        self.graph, self.variables, self.qvariables, self.images = graph, variables, qvariables, images
        self.config, self.optimizer = config, refine_optimizer(config)
        self.size = min(config.batch_size, len(images))
        sized, platform = graph.at((self.size, *images.shape[1:]), images.dtype), platform_of(variables)
        num_batches = math.ceil(len(images) / self.size)
        chunk, lanes = default_chunk(sized, platform), default_lanes(sized, platform, num_batches)
        seconds = default_seconds(platform)
        plan = Plan(num_batches=num_batches, steps=config.steps, chunk=chunk, seconds=seconds, lanes=lanes)
        super().__init__(plan, key, mesh_of(images, variables))
        self.keys = [jax.random.fold_in(key, batch) for batch in range(num_batches)]  # of steps

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        return ("refinement", self.graph.digest, self.config), (self.variables, self.qvariables, self.images)

    def begin(self, batch: int) -> State:
        # The last batch is filled up with images from the start, whose second versions are dropped.
        chosen = (batch * self.size + jnp.arange(self.size)) % len(self.images)
        return self.place(batch, init_state(self.optimizer, self.images[chosen]))

    def place(self, batch: int, work: State) -> State:
        # The step, and counts of the optimizer, are no images.
        return sharded(work, self.mesh, jax.tree.map(lambda leaf: 0 if leaf.ndim else -1, work))

    def advance(self, turn: Turn, work: State) -> tuple[State, jax.Array]:
        settings, key = (self.graph, self.config, self.optimizer), self.keys[turn.batch]
        steps = self.length(turn)
        state, seen = advance_refinement(*settings, steps, self.variables, self.qvariables, work, key)
        return state, seen.loss

    def check(self, turn: Turn, loss: float) -> None:
        if not math.isfinite(loss):
            raise SynthesisError(
                f"refinement: the loss of batch {turn.batch + 1} became {loss}. Try a lower learning_rate than "
                f"{self.config.learning_rate:g}."
            )


@functools.cache
def refine_optimizer(config: RefineConfig) -> optax.GradientTransformation:
    """The optimizer of a refinement; cached, since compilation is keyed on it."""
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))


@functools.partial(jax.jit, static_argnames=("graph", "config", "optimizer"), donate_argnames="state")
def advance_refinement(
    graph: Graph,
    config: RefineConfig,
    optimizer: optax.GradientTransformation,
    steps: int | Int[Array, ""],
    variables: Any,
    qvariables: Any,
    state: State,
    key: jax.Array,
) -> tuple[State, Sharpness]:
    """Optimize a batch for `steps` steps; `state` is donated, and the step number is folded into the key."""

    def step(state: State) -> tuple[State, Sharpness]:
        def loss(images: jax.Array) -> tuple[jax.Array, Sharpness]:
            seen = sharpness(graph, config, variables, qvariables, images, jax.random.fold_in(key, state.step))
            return seen.loss, seen

        return descend(optimizer, loss, state)

    return repeat(step, state, steps)


def sharpness(
    graph: Graph,
    config: RefineConfig,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    key: Key[Array, ""] | None = None,
) -> Sharpness:
    """The loss of a batch and its terms, differentiable by the images."""

    def gradients_at(x: jax.Array) -> tuple[Gradients, Observation]:
        seen = observe(graph, config.statistics, variables, x, key=key)
        features = FeatureReader(graph)
        logits = graph.logits(apply_quantized(graph, qvariables, x, after_layer=features)).astype(jnp.float32)
        return Gradients(features.value, seen.logits - logits), seen

    def strength(x: jax.Array) -> jax.Array:
        """Its gradient is that of <f, f'><r, r'> at x' = x, twice."""
        own, _ = gradients_at(x)
        return (jnp.square(own.features).sum(-1) * jnp.square(own.residuals).sum(-1)).sum()

    own, seen = gradients_at(images)
    direction = jax.grad(strength)(images)  # its pass of the network is the one above: XLA runs it once
    length = jnp.sqrt(jnp.square(direction).sum(tuple(range(1, images.ndim)), keepdims=True) + NORM_EPSILON)
    # As in sharpness-aware minimization, the way to the neighbor is taken as a constant.
    neighbor, _ = gradients_at(images - jax.lax.stop_gradient(config.rho * direction / length))
    similarity = (cosine(own.features, neighbor.features) * cosine(own.residuals, neighbor.residuals)).mean()
    overlap = largest_overlap(own)
    statistics = statistics_loss(config.statistics, seen, images)
    loss = statistics + config.similarity_weight * (1 - similarity) + config.diversity_weight * overlap
    return Sharpness(loss, statistics, similarity, overlap)


def largest_overlap(own: Gradients) -> Float[Array, ""]:
    """For each image the largest |similarity| of its gradient to that of another one, averaged; 0 for a lone image."""

    def pairs(x: jax.Array) -> jax.Array:
        return cosine(x[:, None], x[None])

    overlaps = jnp.abs(pairs(own.features) * pairs(own.residuals))
    return jnp.where(jnp.eye(len(overlaps), dtype=bool), 0.0, overlaps).max(1).mean()
