"""The compiled steps of fine-tuning."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import NO_YNN, State, cpu_jit, descend, drawn, on_all, random_crop, random_flip, repeat
from dfq_jax.graph import Graph
from dfq_jax.stages.finetuning.config import FinetuneConfig
from dfq_jax.stages.finetuning.losses import DistillationLosses, distillation_loss
from dfq_jax.stages.finetuning.student import (
    StudentParameters,
    project,
    soft_kernels,
    soft_student,
    student_outputs,
    teacher_outputs,
)

MOMENTUM = 0.9
# Gradients to weights in units of the scale are small: optax's own 1e-8 would swallow them in large networks.
ADAM_EPSILON = 1e-10


@functools.cache
def student_optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """One optimizer for each kind of parameter; cached, since compilation is keyed on it."""

    def make(rate: float) -> optax.GradientTransformation:
        if config.schedule == "cosine":
            rate = optax.cosine_decay_schedule(rate, config.steps)
        elif config.schedule == "step":
            quarters = {round(i * config.steps / 4): 0.1 for i in (1, 2, 3)}
            rate = optax.piecewise_constant_schedule(rate, quarters)
        if config.optimizer == "sgd":
            return optax.sgd(rate, momentum=MOMENTUM, nesterov=True)
        return optax.adam(rate, eps=ADAM_EPSILON)

    rates = {
        "kernels": config.weight_rate,
        "scales": config.scale_rate,
        "steps": config.step_rate,
        "affine": config.affine_rate,
    }

    def labels(parameters: StudentParameters) -> StudentParameters:
        return StudentParameters(**{kind: dict.fromkeys(part, kind) for kind, part in parameters._asdict().items()})

    return optax.multi_transform({kind: make(rate) for kind, rate in rates.items()}, labels)


def augment_minibatch(
    config: FinetuneConfig, key: Key[Array, ""], images: Float[Array, "n *s c"]
) -> Float[Array, "n *s c"]:
    """The random changes of one step; the key is consumed."""
    flip_key, crop_key = jax.random.split(key)
    if config.flip:
        images = random_flip(flip_key, images)
    if config.crop:
        images = random_crop(crop_key, images, config.crop)
    return images


@functools.partial(cpu_jit, options=NO_YNN, static_argnames=("graph", "config", "mesh"), donate_argnames="state")
def advance_student(
    graph: Graph,
    config: FinetuneConfig,
    steps: int | Int[Array, ""],
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    labels: Int[Array, " n"] | None,
    state: State,
    key: Key[Array, ""],
    mesh: Mesh | None = None,
) -> tuple[State, DistillationLosses]:
    """Optimize the student for `steps` steps.

    Args:
      graph: at the size of a minibatch; static, as are all settings.
      config: rates, and weights of the terms.
      steps: how many; an argument: one program serves any number.
      variables: of the teacher.
      qvariables: that the student started from.
      images: that minibatches are drawn from.
      labels: of the images; None for the teacher's choice.
      state: donated.
      key: of the whole run; the step number is folded in.
      mesh: of the devices that share a minibatch; static.

    Returns:
      The new state, and the losses of the last step.
    """
    optimizer, classes = student_optimizer(config), graph.num_classes

    def step(state: State) -> tuple[State, DistillationLosses]:
        draw_key, augment_key = jax.random.split(jax.random.fold_in(key, state.step))
        # Drawn whole on each device: sharded as the images are, parts of it would be sent around.
        order = on_all(jax.random.permutation(draw_key, len(images)), mesh)
        chosen = on_all(order[: config.batch_size], mesh)
        x = augment_minibatch(config, augment_key, drawn(images, chosen, mesh))
        teacher = teacher_outputs(graph, variables, x)
        own_labels = None if labels is None else labels[chosen]

        def loss(parameters: StudentParameters) -> tuple[jax.Array, DistillationLosses]:
            soft = soft_kernels(parameters)
            student = student_outputs(graph, soft_student(graph, qvariables, parameters), x, soft)
            losses = distillation_loss(config, classes, teacher, student, own_labels)
            return losses.total, losses

        state, losses = descend(optimizer, loss, state)
        return state._replace(parameters=project(state.parameters, graph, qvariables)), losses

    return repeat(step, state, steps)
