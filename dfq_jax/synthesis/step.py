"""One batch of images in the making, and the compiled steps of its optimizer.

`init_batch` and `advance_batch` are pure and compose with `jax.jit` and `jax.vmap`; the loop around them is in `loop`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import State, descend, init_state, repeat
from dfq_jax.graph import Graph
from dfq_jax.synthesis.augment import augment, finish
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.objective import ImageLosses, OffsetMoments, Targets, class_margin, evaluate
from dfq_jax.synthesis.source import make_source


def init_batch(
    graph: Graph, config: SynthesisConfig, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> tuple[State, Targets]:
    """A fresh source and balanced random labels for one batch; the key is consumed."""
    source_key, label_key = jax.random.split(key)
    parameters = make_source(config, graph.input.shape).init(source_key)
    classes = max(graph.num_classes, 1)
    order = jax.random.permutation(label_key, classes).astype(jnp.int32)
    labels = order[jnp.arange(config.batch_size) % classes]  # other classes in each batch where there are many
    no_response = jnp.float32(jnp.finfo(jnp.float32).min)  # finite, for `jax_debug_infs`
    return init_state(optimizer, parameters), Targets(labels, no_response)


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def batch_images(graph: Graph, config: SynthesisConfig, state: State) -> Float[Array, "n ..."]:
    """The images of a batch as they would be if it were finished, `[N, H, W, C]`."""
    return finish(config, make_source(config, graph.input.shape).images(state.parameters))


@functools.partial(jax.jit, static_argnames=("graph", "config", "optimizer"), donate_argnames="state")
def advance_batch(
    graph: Graph,
    config: SynthesisConfig,
    optimizer: optax.GradientTransformation,
    steps: int | Int[Array, ""],
    variables: Any,
    state: State,
    targets: Targets,
    key: Key[Array, ""],
    others: dict[str, OffsetMoments] | None = None,
    share: Float[Array, ""] | float = 1.0,
) -> tuple[State, ImageLosses]:
    """Optimize a batch for `steps` steps.

    Args:
      graph: at the size of the batch; static, as are config and optimizer.
      config: weights of the terms, and how images change from step to step.
      optimizer: of the source's parameters.
      steps: how many; an argument: one program serves any number.
      variables: float variables, an argument (closing over them would compile the weights in).
      state: donated.
      targets: labels and response level.
      key: of the batch; the step number is folded in for each step's augmentation and swing convolutions.
      others: what the other batches add to the moments of the whole set, see `objective.evaluate`.
      share: of this batch in the moments.

    Returns:
      The new state, and the losses of the last step (before its update).
    """
    source = make_source(config, graph.input.shape)

    def step(state: State) -> tuple[State, ImageLosses]:
        augment_key, swing_key = jax.random.split(jax.random.fold_in(key, state.step))

        def loss(parameters: Any) -> tuple[jax.Array, ImageLosses]:
            images = augment(config, augment_key, source.images(parameters))
            losses = evaluate(graph, config, variables, images, targets, others, share, swing_key)
            return losses.loss, losses

        new, losses = descend(optimizer, loss, state)
        # Images whose loss is not finite stay as they are: NaN everywhere would hide the layer that it began at.
        finite = jnp.isfinite(losses.loss)
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state), losses

    return repeat(step, state, steps)


@functools.partial(jax.jit, static_argnames=("graph", "quantile", "relabel"))
def response_targets(
    graph: Graph, variables: Any, images: jax.Array, labels: jax.Array, *, quantile: float, relabel: bool
) -> Targets:
    """The response level that BN-matched images show by themselves, each for the class it looks most like."""
    logits = graph.logits(graph.apply_fn(variables, images)).astype(jnp.float32)
    likeliest = logits.argmax(1).astype(jnp.int32)
    level = jnp.quantile(class_margin(logits, likeliest), quantile)
    return Targets(likeliest if relabel else labels, jnp.maximum(level, 0.0))
