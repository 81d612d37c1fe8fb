"""Fine-tuning a quantized network by distillation, without data.

The whole quantized network learns to answer as the float one does, on synthetic images: the data-free form of
quantization-aware training of GDFQ (Xu et al., arXiv 2003.03603), IntraQ (arXiv 2111.09136), HAST (arXiv 2303.14085)
and SynQ (ICLR 2025). BatchNorm statistics stay as they are. What is returned is the best of what was seen on the way,
judged by the divergence from the float network on images held out; labels of real images play no part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import (
    Loop,
    Plan,
    Progress,
    State,
    Turn,
    check_kind,
    init_state,
    mesh_of,
    on_all,
    platform_of,
    sharded,
)
from dfq_jax.graph import Graph
from dfq_jax.quantizers import changed_codes
from dfq_jax.stages.comparison import Comparison, comparer
from dfq_jax.stages.finetuning.config import FinetuneConfig
from dfq_jax.stages.finetuning.step import advance_student, student_optimizer
from dfq_jax.stages.finetuning.student import hard_student, init_student
from dfq_jax.stages.learning import check_learning, held_out_count

# Optimizer steps in one compiled call; one on CPU.
ACCELERATOR_CHUNK = 50


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The student on the images held out, after so many steps.

    Attributes:
      step: 0 for the network as it was given.
      divergence: from the float network, as `Comparison.divergence`.
      agreement: percent of the images in the float network's class; None without class scores.
      loss: of the latest minibatch; None at step 0.
    """

    step: int
    divergence: float
    agreement: float | None
    loss: float | None


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """What was done.

    Attributes:
      evaluations: along the way, the first at step 0.
      best: the one that is returned: of least divergence, the earliest of equals.
      changed: share of the weights whose code changed.
      completed: false where Ctrl-C came first.
      seconds: wall time, compilation included.
    """

    evaluations: tuple[Evaluation, ...]
    best: Evaluation
    changed: float
    completed: bool
    seconds: float


def finetune(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    key: Key[Array, ""],
    config: FinetuneConfig = FinetuneConfig(),
    *,
    labels: Int[Array, " n"] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> tuple[Any, Finetuning]:
    """Teach a quantized network to answer as the float network does.

    >>> config = dfq_jax.FinetuneConfig(steps=1, batch_size=8)
    >>> better, done = finetune(graph, variables, qvariables, images, jax.random.key(0), config)
    >>> done.completed
    True

    Args:
      graph: from `trace`.
      variables: the float variables, of the teacher.
      qvariables: the quantized variables to start from, of any rounding; bits, zero points and BatchNorm statistics
        stay as they are, and so do kernels that are not quantized.
      images: `[N, H, W, C]`, preprocessed. The last of them are held out.
      key: a JAX key; consumed.
      config: steps, rates, and weights of the terms.
      labels: `[N]`, the class that each image was made for; the class that the teacher sees in it if None. They count
        where `config.label_weight` is above 0.
      on_progress: called every few steps.
      checkpoint: a file to save unfinished work to and to resume it from; removed at the end. Resuming gives the same
        network, bit for bit, as an uninterrupted run on the same machine.
      keep_checkpoint: leave the file there at the end: the same call returns the network without learning.

    Returns:
      Quantized variables of the same structure, never worse on the images held out than those given, and what happened.
      Ctrl-C returns the best so far.

    Raises:
      TypeError: `config` is something else.
      GraphError: the variables are not those of the graph.
      ValueError: `qvariables` are not quantized, there are too few or unusable images, labels do not fit, or a
        checkpoint of other work.
      OSError: the checkpoint cannot be written.
      FloatingPointError: the student's outputs became NaN or infinite.
    """
    check_kind("config", config, FinetuneConfig)
    check_learning(graph, variables, qvariables, images)
    labels = None if labels is None else _checked_labels(graph, labels, len(images))
    loop = _StudentLoop(graph, variables, qvariables, jnp.asarray(images), key, config, labels)
    completed = loop.run(
        on_progress=on_progress, checkpoint=checkpoint, keep_checkpoint=keep_checkpoint, precision=config.precision
    )
    return loop.result(completed)


class _StudentLoop(Loop):
    """The loop of one call of `finetune`: its work is a state, and the best variables that were seen."""

    def __init__(
        self,
        graph: Graph,
        variables: Any,
        qvariables: Any,
        images: jax.Array,
        key: Any,
        config: FinetuneConfig,
        labels: jax.Array | None,
    ):
        train = len(images) - held_out_count(config.held_out, len(images))
        # Several devices share what minibatches are drawn from, as they share each minibatch.
        mesh = mesh_of(images, variables)
        self.images, self.held_out = (sharded(part, mesh) for part in (images[:train], images[train:]))
        self.labels = None if labels is None else on_all(labels[:train], mesh)
        # A minibatch holds no image twice.
        self.config = dataclasses.replace(config, batch_size=min(config.batch_size, train))
        self.graph = graph.at((self.config.batch_size, *images.shape[1:]), images.dtype)
        self.variables, self.start = variables, qvariables
        self.evaluations: list[Evaluation] = []
        self.latest: jax.Array | None = None
        chunk = config.chunk or (1 if platform_of(images, qvariables) == "cpu" else ACCELERATOR_CHUNK)
        super().__init__(Plan(num_batches=1, steps=config.steps, chunk=chunk), key, mesh)

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        arrays = self.variables, self.start, self.images, self.held_out, self.labels
        return ("fine-tuning", self.graph.digest, self.config), arrays

    def begin(self, batch: int) -> tuple[State, Any]:
        self.evaluate(self.start, 0, None)
        return self.init_state(), self.start

    def init_state(self) -> State:
        parameters = init_student(self.graph, self.config, self.variables, self.start)
        return init_state(student_optimizer(self.config), parameters)

    def advance(self, turn: Turn, work: tuple[State, Any]) -> tuple[tuple[State, Any], jax.Array]:
        state, best = work
        fixed = self.variables, self.start, self.images, self.labels
        state, losses = advance_student(self.graph, self.config, self.length(turn), *fixed, state, self.key, self.mesh)
        self.latest = losses.total
        before, after = (step * self.config.evaluations // self.config.steps for step in (turn.begin, turn.end))
        return (state, self.better(state, best, turn.end) if before < after else best), losses.total

    def better(self, state: State, best: Any, step: int) -> Any:
        """The student as it is now if it is the best so far, else the best before it."""
        lowest = min(e.divergence for e in self.evaluations)
        candidate = hard_student(self.graph, self.start, state.parameters)
        return candidate if self.evaluate(candidate, step, float(self.latest)).divergence < lowest else best

    @functools.cached_property
    def compared(self) -> Callable[[Any], Comparison]:
        """A student with the teacher, on images held out."""
        return comparer(self.graph, self.variables, self.held_out, batch_size=self.config.batch_size)

    def evaluate(self, candidate: Any, step: int, loss: float | None) -> Evaluation:
        compared = self.compared(candidate)
        if not math.isfinite(compared.divergence):
            raise FloatingPointError(
                f"the student's outputs became NaN or infinite by step {step} of fine-tuning. Try a lower "
                f"weight_rate than {self.config.weight_rate:g} and affine_rate than {self.config.affine_rate:g}."
            )
        self.evaluations.append(Evaluation(step, compared.divergence, compared.agreement, loss))
        return self.evaluations[-1]

    def result(self, completed: bool) -> tuple[Any, Finetuning]:
        state, variables = self.work[0]
        if self.done > self.evaluations[-1].step:  # interrupted: what was learned since is not lost
            variables = self.better(state, variables, self.done)
        best = min(self.evaluations, key=lambda evaluation: evaluation.divergence)
        changed, seconds = changed_codes(self.start, variables), time.perf_counter() - self.started
        return variables, Finetuning(tuple(self.evaluations), best, changed, completed, seconds)

    # --- checkpoints ---

    def facts(self) -> dict[str, Any]:
        return {"evaluations": list(map(dataclasses.astuple, self.evaluations))}

    def resume(self, facts: dict[str, Any]) -> None:
        self.evaluations = [Evaluation(*evaluation) for evaluation in facts["evaluations"]]

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        return jax.eval_shape(self.init_state), self.start


def _checked_labels(graph: Graph, labels: Any, count: int) -> jax.Array:
    classes, labels = graph.num_classes, jnp.asarray(labels)
    if classes < 2:
        raise ValueError("labels: the network has no class scores of shape [N, classes]; leave labels out.")
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: expected {count} integers, one for each image, found shape {labels.shape} of {labels.dtype}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels: expected classes from 0 to {classes - 1}, found {low} to {high}.")
    return labels
