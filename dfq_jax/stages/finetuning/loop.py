"""Fine-tuning a quantized network by distillation, without data.

The whole quantized network learns to answer as the float one does, on synthetic images: the data-free form of
quantization-aware training of GDFQ (Xu et al., arXiv 2003.03603), IntraQ (arXiv 2111.09136), HAST (arXiv 2303.14085)
and SynQ (ICLR 2025). BatchNorm statistics stay as they are. What is returned is the best of what was seen on the way,
judged by the divergence from the float network on images held out; labels of real images play no part.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import catch_interrupt, platform_of, products
from dfq_jax.graph import Graph, check_images
from dfq_jax.quantizers import is_quantized
from dfq_jax.stages.comparison import compare
from dfq_jax.stages.finetuning.config import FinetuneConfig
from dfq_jax.stages.finetuning.step import advance, init_state
from dfq_jax.stages.finetuning.student import hard_variables, init_parameters
from dfq_jax.stages.rounding.learned import changed_codes
from dfq_jax.synthesis import Progress, largest_divisor

# Optimizer steps in one compiled call, by backend.
DEFAULT_CHUNK = {"cpu": 1}
ACCELERATOR_CHUNK = 50
REPORT_EVERY_STEPS = 10


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
) -> tuple[Any, Finetuning]:
    """Teach a quantized network to answer as the float network does.

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

    Returns:
      Quantized variables of the same structure, never worse on the images held out than those given, and what happened.
      Ctrl-C returns the best so far.

    Raises:
      GraphError: the variables are not those of the graph.
      ValueError: `qvariables` are not quantized, there are too few or unusable images, or labels do not fit.
      FloatingPointError: the student's outputs became NaN or infinite.
    """
    check_images(graph, images)
    if not is_quantized(qvariables):
        raise ValueError("qvariables: found float variables; quantize_params makes quantized ones to start from.")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, one to learn from and one held out, found {len(images)}.")
    graph.leaves(variables)  # refuses other trees
    labels = None if labels is None else _checked_labels(graph, labels, len(images))
    run = _Run(graph, variables, qvariables, jnp.asarray(images), key, config, labels, on_progress)
    with catch_interrupt() as interrupted:
        completed = run.all_steps(interrupted)
    return run.result(completed)


class _Run:
    """The state of one call of `finetune`."""

    def __init__(
        self,
        graph: Graph,
        variables: Any,
        qvariables: Any,
        images: jax.Array,
        key: Any,
        config: FinetuneConfig,
        labels: jax.Array | None,
        on_progress: Callable[[Progress], None] | None,
    ):
        self.started = time.perf_counter()
        held_out = min(max(round(config.held_out * len(images)), 1), len(images) - 1)
        train = len(images) - held_out
        self.images, self.held_out = images[:train], images[train:]
        self.labels = None if labels is None else labels[:train]
        # A minibatch holds no image twice.
        self.config = dataclasses.replace(config, batch_size=min(config.batch_size, train))
        self.graph = graph.at((self.config.batch_size, *images.shape[1:]), images.dtype)
        self.variables, self.start = variables, qvariables
        self.key, self.on_progress = key, on_progress
        chunk = config.chunk or DEFAULT_CHUNK.get(platform_of(images, qvariables), ACCELERATOR_CHUNK)
        self.chunk = largest_divisor(chunk, config.steps)
        self.state = init_state(self.config, init_parameters(self.graph, self.config, variables, qvariables))
        self.done = 0
        self.evaluations: list[Evaluation] = []
        self.best, self.best_variables = self.evaluate(qvariables, None), qvariables

    def all_steps(self, interrupted: Callable[[], bool]) -> bool:
        """Whether all steps were done."""
        config, steps, losses = self.config, self.config.steps, None
        while self.done < steps and not interrupted():
            with products(config.precision):
                self.state, losses = advance(
                    self.graph,
                    config,
                    self.chunk,
                    self.variables,
                    self.start,
                    self.images,
                    self.labels,
                    self.state,
                    self.key,
                )
            before, self.done = self.done, self.done + self.chunk
            if self._crossed(before, steps, max(steps // REPORT_EVERY_STEPS, 1)) and self.on_progress is not None:
                self.report(float(losses.total))
            if self._crossed(before, steps, config.evaluations):
                self.consider(float(losses.total))
        if self.done > self.evaluations[-1].step:  # interrupted: what was learned since is not lost
            self.consider(float(losses.total))
        return self.done == steps

    def _crossed(self, before: int, steps: int, parts: int) -> bool:
        """Whether the latest steps led into another of so many equal parts of the run."""
        return before * parts // steps < self.done * parts // steps

    def consider(self, loss: float) -> None:
        """The student as it is now is taken if it is the best so far."""
        candidate = hard_variables(self.graph, self.start, self.state.parameters)
        found = self.evaluate(candidate, loss)
        if found.divergence < self.best.divergence:
            self.best, self.best_variables = found, candidate

    def evaluate(self, candidate: Any, loss: float | None) -> Evaluation:
        compared = compare(self.graph, self.variables, candidate, self.held_out, batch_size=self.config.batch_size)
        if not math.isfinite(compared.divergence):
            raise FloatingPointError(
                f"the student's outputs became NaN or infinite by step {self.done} of fine-tuning. Try a lower "
                f"weight_rate than {self.config.weight_rate:g} and affine_rate than {self.config.affine_rate:g}."
            )
        self.evaluations.append(Evaluation(self.done, compared.divergence, compared.agreement, loss))
        return self.evaluations[-1]

    def report(self, loss: float) -> None:
        seconds = time.perf_counter() - self.started
        eta = seconds / self.done * (self.config.steps - self.done)
        self.on_progress(Progress(1, 1, self.done, self.config.steps, loss, seconds, eta))

    def result(self, completed: bool) -> tuple[Any, Finetuning]:
        before, after = (self.graph.leaves_by_path(v) for v in (self.start, self.best_variables))
        seconds = time.perf_counter() - self.started
        found = Finetuning(tuple(self.evaluations), self.best, changed_codes(before, after), completed, seconds)
        return self.best_variables, found


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
