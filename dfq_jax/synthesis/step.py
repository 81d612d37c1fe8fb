"""One batch of images in the making, and the compiled steps of its optimizer.

`init_batch` and `advance` are pure and compose with `jax.jit` and `jax.vmap`; the loop around them is in `loop`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import descend
from dfq_jax.graph import Graph
from dfq_jax.synthesis.augment import augment, finish
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.objective import Evaluation, Moments, Targets, class_margin, evaluate
from dfq_jax.synthesis.source import make_source


class BatchState(NamedTuple):
    """One batch of images in the making."""

    parameters: Any  # of the source: images themselves, or latents and generator
    optimizer: Any
    step: Int[Array, ""]


def init_batch(
    graph: Graph, config: SynthesisConfig, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> tuple[BatchState, Targets]:
    """A fresh source and balanced random labels for one batch; the key is consumed."""
    source_key, label_key = jax.random.split(key)
    parameters = make_source(config, graph.input.shape).init(source_key)
    classes = max(graph.num_classes, 1)
    order = jax.random.permutation(label_key, classes).astype(jnp.int32)
    labels = order[jnp.arange(config.batch_size) % classes]  # other classes in each batch where there are many
    state = BatchState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))
    return state, Targets(labels, jnp.float32(jnp.finfo(jnp.float32).min))  # finite, for `jax_debug_infs`


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def batch_images(graph: Graph, config: SynthesisConfig, state: BatchState) -> Float[Array, "n ..."]:
    """The images of a batch as they would be if it were finished, `[N, H, W, C]`."""
    return finish(config, make_source(config, graph.input.shape).images(state.parameters))


@functools.partial(jax.jit, static_argnames=("graph", "config", "optimizer", "steps"), donate_argnames="state")
def advance(
    graph: Graph,
    config: SynthesisConfig,
    optimizer: optax.GradientTransformation,
    steps: int,
    variables: Any,
    state: BatchState,
    targets: Targets,
    key: Key[Array, ""],
    others: dict[str, Moments] | None = None,
    share: Float[Array, ""] | float = 1.0,
) -> tuple[BatchState, Evaluation]:
    """Optimize a batch for `steps` steps.

    Args:
      graph, config, optimizer, steps: static.
      variables: float variables, an argument (closing over them would compile the weights in).
      state: donated.
      targets: labels and response level.
      key: of the batch; the step number is folded in for each step's augmentation and swing convolutions.
      others, share: see `objective.evaluate`.

    Returns:
      The new state, and the evaluation of the last step (before its update).
    """

    source = make_source(config, graph.input.shape)

    def step(state: BatchState, _: None = None) -> tuple[BatchState, Evaluation]:
        augment_key, swing_key = jax.random.split(jax.random.fold_in(key, state.step))

        def loss(parameters: Any) -> tuple[jax.Array, Evaluation]:
            images = augment(config, augment_key, source.images(parameters))
            result = evaluate(graph, config, variables, images, targets, others, share, swing_key)
            return result.loss, result

        gradient, result = jax.grad(loss, has_aux=True)(state.parameters)
        parameters, optimizer_state = descend(optimizer, gradient, state.optimizer, state.parameters, value=result.loss)
        new = BatchState(parameters, optimizer_state, state.step + 1)
        # Images whose loss is not finite stay as they are: NaN everywhere would hide the layer that it began at.
        finite = jnp.isfinite(result.loss)
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state), result

    return repeat(step, state, steps)


def repeat(step: Callable[..., tuple[Any, Any]], state: Any, steps: int) -> tuple[Any, Any]:
    """`steps` times `state -> (state, result)` in one compiled call; the last result."""
    if steps == 1:
        return step(state)
    state, results = jax.lax.scan(step, state, length=steps)
    return state, jax.tree.map(lambda r: r[-1], results)


@functools.partial(jax.jit, static_argnames=("graph", "quantile", "relabel"))
def response_targets(
    graph: Graph, variables: Any, images: jax.Array, labels: jax.Array, *, quantile: float, relabel: bool
) -> Targets:
    """The response level that BN-matched images show by themselves, each for the class it looks most like."""
    logits = graph.logits(graph.apply_fn(variables, images)).astype(jnp.float32)
    likeliest = logits.argmax(1).astype(jnp.int32)
    level = jnp.quantile(class_margin(logits, likeliest), quantile)
    return Targets(likeliest if relabel else labels, jnp.maximum(level, 0.0))
