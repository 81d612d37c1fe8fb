"""The loop of synthesis: compiled chunks of steps, batch after batch, whatever the source of images.

Between chunks it does what only the host can do: show progress, stop early, save a checkpoint, notice NaN, and return
what there is on Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import catch_interrupt, platform_of, products
from dfq_jax.graph import Graph, GraphWarning, doubtful_statistics
from dfq_jax.synthesis.checkpoint import Checkpoint
from dfq_jax.synthesis.checks import check_synthesizable
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.objective import Evaluation, Moments, Targets
from dfq_jax.synthesis.source import make_optimizer
from dfq_jax.synthesis.step import BatchState, advance, batch_images, init_batch, response_targets

# Optimizer steps in one compiled call. On accelerators dispatch is the cost of a call; on CPU it is memory, which each
# call asks for anew (`python benchmarks/synthesis_speed.py` measures it). But nothing is reported within a call, and
# Ctrl-C waits for its end: on CPU it does at most so many multiply-accumulates of the forward pass, some seconds of it.
ACCELERATOR_CHUNK = 50
CPU_MAX_CHUNK = 25
CPU_CHUNK_MACS = 6e10
# Steps between reports to the host, which must wait for the device for each of them.
REPORT_EVERY_STEPS = 10
CHECKPOINT_EVERY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known between two chunks."""

    batch: int
    num_batches: int
    step: int
    steps: int
    loss: float
    seconds: float
    eta: float  # seconds left, at the speed so far


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """Finished images, and how well they match.

    Attributes:
      images: `[N, H, W, C]` float32, preprocessed scale.
      labels: `[N]`, the class each image was made for; its likeliest class with the response term alone, and zeros
        where classes play no part.
      losses: final loss of each batch.
      layer_losses: BatchNorm term of each layer, averaged over batches.
      completed: false if interrupted; images are then those finished so far and the unfinished batch as it is.
      seconds: wall time, compilation included.
    """

    images: Float[Array, "n ..."]
    labels: Int[Array, " n"]
    losses: tuple[float, ...]
    layer_losses: dict[str, float]
    completed: bool
    seconds: float


class SynthesisError(RuntimeError):
    """Synthesis cannot go on; the message says where and what to try."""


def synthesize(
    graph: Graph,
    variables: Any,
    key: Key[Array, ""],
    config: SynthesisConfig = SynthesisConfig(),
    *,
    optimizer: optax.GradientTransformation | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> Synthesis:
    """Make images from the network's own BatchNorm statistics.

    Args:
      graph: from `trace`.
      variables: float variables.
      key: a JAX key; consumed. The same key gives bit-identical images on the same machine and versions.
      config: number of images, steps, terms of the loss.
      optimizer: an optax transformation in place of the config's optimizer and schedule.
      on_progress: called between chunks, at most every few steps.
      checkpoint: a file to save unfinished work to and to resume it from; removed at the end. Resuming gives the
        same images, bit for bit, as an uninterrupted run on the same machine; with another number of CPU threads sums
        are taken in another order, and images differ.
      keep_checkpoint: leave the file there at the end, with the finished images: the same call returns them at once.

    Returns:
      The images and how well they match. Ctrl-C returns what there is, `completed=False`.

    Raises:
      GraphError: the network has no BatchNorm, or class scores are needed and it has none.
      ValueError: weights with NaN or infinity, variances below zero, or a checkpoint of other work.
      OSError: the checkpoint cannot be written.
      SynthesisError: the loss became NaN or infinite; names the layer where it did first.

    Warns:
      GraphWarning: BatchNorm statistics look as if they were never updated.
    """
    check_synthesizable(graph, variables, config)
    for doubt in doubtful_statistics(graph, variables):
        warnings.warn(doubt, GraphWarning, stacklevel=2)
    started = time.perf_counter()
    optimizer = make_optimizer(config) if optimizer is None else optimizer
    run = _Run(graph, variables, key, config, optimizer, started)
    saved = None if checkpoint is None else Checkpoint(checkpoint, run.identity())
    if saved is not None:
        run.restore(saved)
    with products(config.precision), catch_interrupt() as interrupted:
        last_save = time.perf_counter()
        for progress in run.visits():
            if progress is not None and on_progress is not None:
                on_progress(progress)
            due = time.perf_counter() - last_save > CHECKPOINT_EVERY_SECONDS
            if saved is not None and (due or interrupted()):
                run.save(saved)
                last_save = time.perf_counter()
            if interrupted():
                break
    result = run.result()
    if saved is not None and result.completed:
        run.save(saved) if keep_checkpoint else saved.remove()
    return result


class _Run:
    """The state of one call of `synthesize`."""

    def __init__(self, graph: Graph, variables: Any, key: Any, config: SynthesisConfig, optimizer: Any, started: float):
        # Trace at the batch that is used, so that weights of any tree compile once.
        self.graph = graph.at((config.batch_size, *graph.input.shape[1:]), jnp.float32)
        self.variables = jax.tree.map(jnp.asarray, variables)  # NumPy arrays would travel at every step
        self.key, self.config, self.optimizer = key, config, optimizer
        self.started = started
        self.keys: dict[int, tuple[jax.Array, jax.Array]] = {}
        self.states: dict[int, BatchState] = {}
        self.targets: dict[int, Targets] = {}
        self.evaluations: dict[int, Evaluation] = {}
        self.moments: dict[int, dict[str, Moments]] = {}
        self.best: dict[int, tuple[float, int]] = {}  # lowest loss, and the step it was seen at
        self.position = 0
        self.total = 0
        self.stopped: set[int] = set()
        chunk = config.chunk or default_chunk(self.graph, platform_of(variables))
        self.response_step = round(config.steps * config.response_start) if config.response_weight else None
        self.chunk = largest_divisor(chunk, config.steps, self.response_step or config.steps)

    def identity(self) -> str:
        """What a checkpoint must have been made by to be resumed."""
        config = dataclasses.asdict(self.config)
        optimizer = jax.eval_shape(_init, self.graph, self.config, self.optimizer, self.key)[0].optimizer
        key = jax.random.key_data(self.key).tolist()
        return f"{self.graph.digest} {config} {optimizer} {key} {self.chunk} {_fingerprint(self.variables)}"

    def schedule(self) -> Iterator[int]:
        """Which batch each chunk works on: one after the other, or in turn when they share statistics."""
        rounds = self.config.steps // self.chunk
        batches = range(self.config.num_batches)
        if self.config.statistics == "set":
            return (b for _ in range(rounds) for b in batches)
        return (b for b in batches for _ in range(rounds))

    def visits(self) -> Iterator[Progress | None]:
        """Do the work; yields between chunks, with a report now and then."""
        order = list(self.schedule())
        self.total = len(order)
        first, begun = self.position, time.perf_counter()
        for self.position in range(first, len(order)):
            batch = order[self.position]
            if batch in self.stopped:
                continue
            step = self.visit(batch)
            self.position += 1  # done: a checkpoint written now resumes at the next one
            report = None
            if step % REPORT_EVERY_STEPS < self.chunk or step == self.config.steps:
                loss = self.check(batch, step)
                now = time.perf_counter()
                left = (now - begun) / (self.position - first) * (len(order) - self.position)
                report = Progress(
                    batch + 1, self.config.num_batches, step, self.config.steps, loss, now - self.started, left
                )
            yield report
        self.position = len(order)

    def visit(self, batch: int) -> int:
        """One chunk of one batch; returns its step number."""
        if batch not in self.keys:
            self.keys[batch] = tuple(jax.random.split(jax.random.fold_in(self.key, batch)))
        init_key, step_key = self.keys[batch]
        if batch not in self.states:
            self.states[batch], self.targets[batch] = _init(self.graph, self.config, self.optimizer, init_key)
        state = self.states[batch]
        if self.steps_done(batch) - self.chunk == self.response_step:
            self.targets[batch] = response_targets(
                self.graph,
                self.variables,
                batch_images(self.graph, self.config, state),
                self.targets[batch].labels,
                quantile=self.config.response_quantile,
                relabel=self.config.class_weight == 0,
            )
        others, share = self.others(batch)
        self.states[batch], self.evaluations[batch] = advance(
            self.graph,
            self.config,
            self.optimizer,
            self.chunk,
            self.variables,
            state,
            self.targets[batch],
            step_key,
            others,
            share,
        )
        if self.config.statistics == "set":
            self.moments[batch] = self.evaluations[batch].moments
        return self.steps_done(batch)

    def steps_done(self, batch: int) -> int:
        visited = self.position + 1
        rounds = self.config.steps // self.chunk
        if self.config.statistics == "set":
            return self.chunk * (visited // self.config.num_batches + (batch < visited % self.config.num_batches))
        return self.chunk * (visited - batch * rounds)

    def others(self, batch: int) -> tuple[dict[str, Moments] | None, float]:
        """What the other batches add to the moments of the whole set."""
        if self.config.statistics != "set":
            return None, 1.0
        known = [m for b, m in self.moments.items() if b != batch]
        share = 1.0 / (len(known) + 1)
        if not known:
            zeros = {bn.name: Moments(jnp.zeros(bn.channels), jnp.zeros(bn.channels)) for bn in self.graph.batch_norms}
            return zeros, share
        return jax.tree.map(lambda *m: share * sum(m), *known), share

    def check(self, batch: int, step: int) -> float:
        """Loss of the latest step; notices NaN and plateaus."""
        result = self.evaluations[batch]
        loss = float(result.loss)
        if not np.isfinite(loss):
            layer_losses = np.asarray(result.layer_losses)
            bad = [bn.name for bn, v in zip(self.graph.batch_norms, layer_losses, strict=True) if not np.isfinite(v)]
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.states[batch].parameters)):
                what = "images themselves" if self.config.source == "pixels" else "generator or its latents"
                where = f"in the {what}, by an update too large"
            elif bad:
                where = f"first at BatchNorm {bad[0]!r}"
            else:
                where = "outside the BatchNorm terms (logits or image terms)"
            raise SynthesisError(
                f"the synthesis loss became {loss} at step {step} of batch {batch + 1}, {where}. Try a lower "
                f"learning_rate than {self.config.learning_rate:g}."
            )
        # The response term raises the loss as it begins: what came before says nothing about a plateau.
        if self.config.patience and step > (self.response_step or 0):
            lowest, at = self.best.get(batch, (np.inf, step))
            if loss < lowest * (1 - self.config.min_improvement):
                self.best[batch] = (loss, step)
            elif step - at >= self.config.patience:
                self.stopped.add(batch)
        return loss

    def result(self) -> Synthesis:
        order = sorted(self.states)
        finished = (batch_images(self.graph, self.config, self.states[b]) for b in order)
        images = np.concatenate([np.asarray(images) for images in finished])[: self.config.num_images]
        if self.config.uses_classes:
            labels = np.concatenate([np.asarray(self.targets[b].labels) for b in order])[: self.config.num_images]
        else:
            labels = np.zeros(len(images), np.int32)
        evaluations = [self.evaluations[b] for b in order if b in self.evaluations]
        losses = np.mean([np.asarray(e.layer_losses) for e in evaluations], axis=0)
        return Synthesis(
            images=jnp.asarray(images),
            labels=jnp.asarray(labels),
            losses=tuple(float(e.loss) for e in evaluations),
            layer_losses={bn.name: float(v) for bn, v in zip(self.graph.batch_norms, losses, strict=True)},
            completed=self.position >= self.total,
            seconds=time.perf_counter() - self.started,
        )

    # --- checkpoints ---

    def save(self, checkpoint: Checkpoint) -> None:
        work = {b: (self.states[b], self.targets[b], self.evaluations[b]) for b in self.states}
        checkpoint.save(work, position=self.position, best=self.best, stopped=sorted(self.stopped))

    def restore(self, checkpoint: Checkpoint) -> None:
        loaded = checkpoint.load(self._template)
        if loaded is None:
            return
        work, meta = loaded
        for batch, (state, targets, evaluation) in work.items():
            self.states[batch], self.targets[batch], self.evaluations[batch] = state, targets, evaluation
            if self.config.statistics == "set":
                self.moments[batch] = evaluation.moments
        self.position = meta["position"]
        self.best = {int(b): (loss, step) for b, (loss, step) in meta["best"].items()}
        self.stopped = set(meta["stopped"])

    def _template(self) -> Any:
        """Structure of one batch's saved work."""

        def work(variables: Any, key: Any) -> Any:
            state, targets = init_batch(self.graph, self.config, self.optimizer, key)
            others, share = self.others(0)
            _, evaluation = advance(
                self.graph, self.config, self.optimizer, 1, variables, state, targets, key, others, share
            )
            return state, targets, evaluation

        return jax.eval_shape(work, self.variables, self.key)


def default_chunk(graph: Graph, platform: str) -> int:
    """Optimizer steps in one compiled call that suit the platform and the network at its batch size."""
    if platform != "cpu":
        return ACCELERATOR_CHUNK
    macs = graph.input.shape[0] * sum(layer.macs for layer in graph.layers)
    return max(1, min(CPU_MAX_CHUNK, int(CPU_CHUNK_MACS // max(macs, 1))))


_init = jax.jit(init_batch, static_argnums=(0, 1, 2))


def largest_divisor(chunk: int, *lengths: int) -> int:
    """The longest chunk, at most `chunk`, that divides every length: each stage compiles once."""
    return max(c for c in range(1, chunk + 1) if all(n % c == 0 for n in lengths))


def _fingerprint(variables: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
