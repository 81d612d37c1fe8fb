"""Synthesis: batch after batch of images, whatever their source."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import (
    CALL_SECONDS,
    Loop,
    Plan,
    Progress,
    State,
    Together,
    Turn,
    check_kind,
    fetched,
    memory_size,
    mesh_of,
    on_all,
    platform_of,
    sharded,
    usable_cores,
)
from dfq_jax.graph import Graph, GraphWarning, doubtful_statistics
from dfq_jax.synthesis.checks import check_synthesizable
from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.objective import OffsetMoments, Targets
from dfq_jax.synthesis.side_by_side import SideBySide
from dfq_jax.synthesis.source import image_optimizer
from dfq_jax.synthesis.statistics import StatisticErrors, relative_errors
from dfq_jax.synthesis.step import advance_batch, batch_images, init_batch, response_targets

# Optimizer steps in one compiled call. On accelerators dispatch is the cost of a call; on CPU it is memory, which each
# call asks for anew (`python benchmarks/synthesis_speed.py` measures it). But nothing is reported within a call, and
# Ctrl-C waits for its end: on CPU it does at most so many multiply-accumulates of the forward pass, some seconds of it;
# elsewhere, where speeds are far apart, as many steps as fit into so many seconds, once the first calls are timed.
ACCELERATOR_CHUNK = 50
CPU_MAX_CHUNK = 25
CPU_CHUNK_MACS = 6e10


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """Finished images, and how well they match.

    Attributes:
      images: `[N, H, W, C]` float32, preprocessed scale.
      labels: `[N]`, the class each image was made for; its likeliest class with the response term alone, and zeros
        where classes play no part.
      losses: final loss of each batch.
      layer_losses: BatchNorm term of each layer, averaged over batches.
      statistic_errors: of each BatchNorm, over all images as the last step saw them; see `statistic_errors`.
      completed: false if interrupted; images are then those finished so far and unfinished batches as they are.
      seconds: wall time, compilation included.
    """

    images: Float[Array, "n ..."]
    labels: Int[Array, " n"]
    losses: tuple[float, ...]
    layer_losses: dict[str, float]
    statistic_errors: dict[str, StatisticErrors]
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

    On CPU, batches that do not share statistics are made side by side, one on each core that the process may use and
    that there is memory for; the images are the same, bit for bit. So it is with variables that have a copy on each of
    several devices, if the number of batches is a multiple of that of the devices; else the devices share each batch.

    >>> config = dfq_jax.SynthesisConfig(num_images=4, batch_size=4, steps=1)
    >>> synthesize(graph, variables, jax.random.key(0), config).images.shape
    (4, 6)

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
      TypeError: `config` is something else.
      GraphError: the network has no BatchNorm, or class scores are needed and it has none.
      ValueError: weights with NaN or infinity, variances below zero, or a checkpoint of other work.
      OSError: the checkpoint cannot be written.
      SynthesisError: the loss became NaN or infinite; names the layer where it did first.

    Warns:
      GraphWarning: BatchNorm statistics look as if they were never updated.
    """
    check_kind("config", config, SynthesisConfig)
    loop = _image_loop(graph, variables, key, config, optimizer)
    for doubt in doubtful_statistics(graph, variables):
        warnings.warn(doubt, GraphWarning, stacklevel=2)
    completed = loop.run(
        on_progress=on_progress, checkpoint=checkpoint, keep_checkpoint=keep_checkpoint, precision=config.precision
    )
    return loop.result(completed)


def synthesize_sets(
    graph: Graph,
    variables: Any,
    sets: Sequence[tuple[Key[Array, ""], SynthesisConfig]],
    *,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> list[Synthesis]:
    """Make several sets of images as if by `synthesize`, the same bit for bit, and side by side on CPU.

    >>> configs = [dfq_jax.SynthesisConfig(num_images=n, batch_size=n, steps=1) for n in (4, 2)]
    >>> made = synthesize_sets(graph, variables, list(zip(jax.random.split(jax.random.key(0)), configs)))
    >>> [found.images.shape for found in made]
    [(4, 6), (2, 6)]

    Args:
      graph: from `trace`.
      variables: float variables.
      sets: the key, consumed, and the config of each; they have the same number of steps.
      on_progress: as of `synthesize`; the batches of all sets count.
      checkpoint: as of `synthesize`, one for all sets.
      keep_checkpoint: as of `synthesize`.

    Returns:
      What `synthesize` returns, of each; after Ctrl-C of those that have begun, not completed. It warns of nothing.
    """
    parts = [_image_loop(graph, variables, key, config, None) for key, config in sets]
    platform, in_turn = platform_of(variables), any(part.plan.in_turn for part in parts)
    total = sum(part.plan.num_batches for part in parts)
    lanes = 1 if in_turn else min(default_lanes(part.graph, platform, total) for part in parts)
    completed = Together(parts, lanes=lanes).run(
        on_progress=on_progress, checkpoint=checkpoint, keep_checkpoint=keep_checkpoint, precision=sets[0][1].precision
    )
    return [part.result(completed) for part in parts if part.work]


def _image_loop(graph: Graph, variables: Any, key: Any, config: SynthesisConfig, optimizer: Any) -> Any:
    """The loop of one call: batches that devices share, or whole ones on each.

    Whole batches take no sums over devices, but as much memory of each as on one device, and as many devices as there
    are batches. So they are made side by side where their number is a multiple of that of the devices, and they do
    not need each other: neither statistics of the set nor a plateau, at which one would end before others.
    """
    loop = _ImageLoop(graph, variables, key, config, optimizer)
    alone = config.statistics != "set" and not config.patience
    fills = loop.mesh is not None and loop.plan.num_batches % loop.mesh.size == 0
    return SideBySide(loop) if alone and fills else loop


class _ImageLoop(Loop):
    """The loop of one call of `synthesize`: its work on a batch is a state, targets, and losses of the latest step."""

    def __init__(self, graph: Graph, variables: Any, key: Any, config: SynthesisConfig, optimizer: Any):
        check_synthesizable(graph, variables, config)
        # Trace at the batch that is used, so that weights of any tree compile once.
        self.graph = graph.at((config.batch_size, *graph.input.shape[1:]), jnp.float32)
        self.variables = jax.tree.map(jnp.asarray, variables)  # NumPy arrays would travel at every step
        self.config = config
        # Of programs, which serve any number of images and calls of any length.
        self.settings = dataclasses.replace(config, num_images=config.batch_size, chunk=0, patience=0)
        self.optimizer = image_optimizer(self.settings) if optimizer is None else optimizer
        self.response_step = round(config.steps * config.response_start) if config.response_weight else None
        platform, in_turn = platform_of(variables), config.statistics == "set"
        plan = Plan(
            num_batches=config.num_batches,
            steps=config.steps,
            chunk=config.chunk or default_chunk(self.graph, platform),
            # Where a batch ends, and what others know of it, follows from where calls end.
            seconds=0.0 if config.chunk or config.patience or in_turn else default_seconds(platform),
            boundary=self.response_step or 0,  # the response term raises the loss as it begins
            in_turn=in_turn,
            lanes=1 if in_turn else default_lanes(self.graph, platform, config.num_batches),
            patience=config.patience,
            min_improvement=config.min_improvement,
        )
        super().__init__(plan, key, mesh_of(self.variables))
        self._keys: dict[int, tuple[Key[Array, ""], Key[Array, ""]]] = {}
        self._shares: dict[int, Float[Array, ""]] = {}

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        optimizer = jax.eval_shape(_init, self.graph, self.settings, self.optimizer, self.key)[0].optimizer
        return (self.graph.digest, dataclasses.asdict(self.config), optimizer), self.variables

    def program(self, batch: int) -> Hashable:
        """What it is compiled for."""
        return self.graph, self.settings, self.optimizer

    def keys(self, batch: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
        """To begin a batch with, and of its steps; made once."""
        if batch not in self._keys:
            with jax.ensure_compile_time_eval():  # also where only shapes are asked for
                beginning, steps = jax.random.split(jax.random.fold_in(self.key, batch))
            self._keys[batch] = beginning, steps
        return self._keys[batch]

    def begin(self, batch: int) -> tuple[State, Targets, None]:
        return self.place(batch, self.first(batch))

    def first(self, batch: int) -> tuple[State, Targets, None]:
        """The work on a batch before its first step, on the default device."""
        return (*_init(self.graph, self.settings, self.optimizer, self.keys(batch)[0]), None)

    def place(self, batch: int, work: Any) -> Any:
        if self.mesh is None:
            return work
        state, targets, losses = work
        axes = image_axes(self.graph, self.settings, self.optimizer)
        return (*sharded((state, targets), self.mesh, axes), on_all(losses, self.mesh))

    def prepare(self, turn: Turn, work: Any) -> Any:
        if turn.begin != self.response_step:
            return work
        state, targets, losses = work
        images, relabel = batch_images(self.graph, self.settings, state), self.config.class_weight == 0
        quantile = self.config.response_quantile
        targets = response_targets(
            self.graph, self.variables, images, targets.labels, quantile=quantile, relabel=relabel
        )
        return state, targets, losses

    def advance(self, turn: Turn, work: Any) -> tuple[Any, jax.Array]:
        state, targets, _ = work
        static, step_key = (self.graph, self.settings, self.optimizer), self.keys(turn.batch)[1]
        others = self.others(turn.batch)
        state, losses = advance_batch(*static, self.length(turn), self.variables, state, targets, step_key, *others)
        return (state, targets, losses), losses.loss

    def others(self, batch: int) -> tuple[dict[str, OffsetMoments] | None, Float[Array, ""]]:
        """What the other batches add to the moments of the whole set, and the share of this one."""
        if self.config.statistics != "set":
            return None, self.share_of(1)
        known = [losses.moments for b, (*_, losses) in self.work.items() if b != batch]
        share = self.share_of(len(known) + 1)
        # As many trees whatever is known: one program.
        unknown = [self.no_moments] * (max(self.plan.num_batches - 1, 1) - len(known))
        return _scaled_sum(share, *known, *unknown), share

    def share_of(self, batches: int) -> Float[Array, ""]:
        """Of one of so many batches; made once."""
        if batches not in self._shares:
            with jax.ensure_compile_time_eval():  # also where only shapes are asked for
                self._shares[batches] = on_all(jnp.asarray(1.0 / batches), self.mesh)
        return self._shares[batches]

    @functools.cached_property
    def no_moments(self) -> dict[str, OffsetMoments]:
        """Of batches that have not begun."""
        return {bn.name: OffsetMoments(*(jnp.zeros(bn.channels),) * 2) for bn in self.graph.batch_norms}

    def check(self, turn: Turn, loss: float) -> None:
        if np.isfinite(loss):
            return
        state, _, losses = self.work[turn.batch]
        layer_losses = np.asarray(losses.layer_losses)
        bad = [bn.name for bn, v in zip(self.graph.batch_norms, layer_losses, strict=True) if not np.isfinite(v)]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.parameters)):
            what = "generator or its latents" if self.config.source == "generator" else "images themselves"
            where = f"in the {what}, by an update too large"
        elif bad:
            where = f"first at BatchNorm {bad[0]!r}"
        else:
            where = "outside the BatchNorm terms (logits or image terms)"
        raise SynthesisError(
            f"the synthesis loss became {loss} at step {turn.end} of batch {turn.batch + 1}, {where}. Try a lower "
            f"learning_rate than {self.config.learning_rate:g}."
        )

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        return jax.eval_shape(lambda: self.advance(self.plan.turn(batch, 0), self.begin(batch))[0])

    def result(self, completed: bool) -> Synthesis:
        states, targets, losses = zip(*(self.work[b] for b in sorted(self.work)), strict=True)
        finished = (batch_images(self.graph, self.settings, state) for state in states)
        images = np.concatenate([fetched(images) for images in finished])[: self.config.num_images]
        if self.config.uses_classes:
            labels = np.concatenate([fetched(t.labels) for t in targets])[: self.config.num_images]
        else:
            labels = np.zeros(len(images), np.int32)
        layer_losses = np.mean([np.asarray(e.layer_losses) for e in losses], axis=0)
        # Of each batch, or of each image.
        moments = jax.tree.map(lambda *m: np.stack(m).reshape(-1, m[0].shape[-1]).mean(0), *(e.moments for e in losses))
        errors = relative_errors(self.graph, self.variables, moments)
        return Synthesis(
            images=sharded(jnp.asarray(images), self.mesh),
            labels=sharded(jnp.asarray(labels), self.mesh),
            losses=tuple(float(e.loss) for e in losses),
            layer_losses={bn.name: float(v) for bn, v in zip(self.graph.batch_norms, layer_losses, strict=True)},
            statistic_errors=jax.tree.map(float, errors),
            completed=completed,
            seconds=time.perf_counter() - self.started,
        )


def default_chunk(graph: Graph, platform: str) -> int:
    """Optimizer steps in one compiled call that suit the platform and the network at its batch size."""
    if platform != "cpu":
        return ACCELERATOR_CHUNK
    macs = graph.input.shape[0] * sum(layer.macs for layer in graph.layers)
    return max(1, min(CPU_MAX_CHUNK, int(CPU_CHUNK_MACS // max(macs, 1))))


def default_seconds(platform: str) -> float:
    """That a compiled call is to take, where its number of steps is not chosen by the work in it."""
    return 0.0 if platform == "cpu" else CALL_SECONDS


def default_lanes(graph: Graph, platform: str, num_batches: int) -> int:
    """How many batches take their steps side by side, where they do not need each other.

    On CPU, one for each core, within half of the memory; accelerators have no use for it.
    """
    if platform != "cpu":
        return 1
    # A step keeps what BatchNorms and layers read.
    kept = [graph.program.avals[v] for v in (*(t.value for t in graph.tensors), *(b.input for b in graph.batch_norms))]
    step = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept)
    room = usable_cores() if (memory := memory_size()) is None else memory // 2 // step
    return max(1, min(usable_cores(), num_batches, room))


@jax.jit
def _scaled_sum(share: Float[ArrayLike, ""], *trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: share * sum(leaves), *trees)


_init = jax.jit(init_batch, static_argnums=(0, 1, 2))


def image_axes(graph: Graph, config: SynthesisConfig, optimizer: optax.GradientTransformation) -> Any:
    """Of what `init_batch` gives, the axis of images in each array, which grows with their number; -1 for none."""

    def shapes(count: int) -> Any:
        sized = dataclasses.replace(config, batch_size=count)
        return jax.eval_shape(functools.partial(init_batch, graph, sized, optimizer), jax.random.key(0))

    def axis(one: Any, other: Any) -> int:
        return next((i for i, (m, n) in enumerate(zip(one.shape, other.shape, strict=True)) if m != n), -1)

    return jax.tree.map(axis, shapes(config.batch_size), shapes(2 * config.batch_size))
