"""Learned rounding by block reconstruction.

Block by block, from the input on, the roundings, scales and biases of a quantized network are learned so that each
block gives what its float block gives, behind earlier blocks as they are quantized by then. The method is that of BRECQ
(Li et al., arXiv 2102.05426) with AdaRound's soft rounding (arXiv 2004.10568), the dropped quantization of QDrop (arXiv
2203.05740), the learned weight scales of GENIE-M (arXiv 2212.04780) and learned activation steps (LSQ, arXiv
1902.08153); PD-Quant's prediction difference (arXiv 2212.07048) may join the error. No labels are used, and what does
not help on images held out is not taken.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.base import catch_interrupt, full_precision, platform_of, products
from dfq_jax.graph import Graph, Subnetwork, apply_quantized, check_images, merge_blocks, subnetwork
from dfq_jax.quantizers import QTensor, is_quantized
from dfq_jax.stages.rounding.block import (
    Cache,
    State,
    Variables,
    advance,
    hard_variables,
    init_parameters,
    make_optimizer,
    reconstruction_error,
)
from dfq_jax.stages.rounding.codes import common_form
from dfq_jax.stages.rounding.config import ReconstructionConfig

# Optimizer steps in one compiled call, by backend.
DEFAULT_CHUNK = {"cpu": 1}
ACCELERATOR_CHUNK = 100
REPORT_EVERY_STEPS = 50


@dataclasses.dataclass(frozen=True)
class BlockProgress:
    """What is known between two reports."""

    block: str
    index: int
    num_blocks: int
    step: int
    steps: int
    loss: float  # reconstruction error of the latest minibatch, soft weights
    seconds: float
    eta: float  # seconds left, at the speed so far


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """One block's squared output error on the images held out (summed over channels, averaged over the rest).

    Attributes:
      name: of the block.
      layers: in it.
      before: error as the block was given.
      after: error as learned, hard rounded.
      kept: whether what was learned is taken: it is where the error falls.
      flipped: share of the weights whose code changed.
      seconds: wall time, compilation included.
    """

    name: str
    layers: tuple[str, ...]
    before: float
    after: float
    kept: bool
    flipped: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What was done: results by block, in order; `completed` is false where Ctrl-C left blocks as they were."""

    blocks: tuple[BlockResult, ...]
    completed: bool
    seconds: float


def reconstruct(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    key: Key[Array, ""],
    config: ReconstructionConfig = ReconstructionConfig(),
    *,
    on_progress: Callable[[BlockProgress], None] | None = None,
) -> tuple[Any, Reconstruction]:
    """Learn rounding, scales, activation steps and biases of a quantized network, block by block.

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: the quantized variables to start from, of any rounding; bits and zero points stay as they are.
      images: `[N, H, W, C]`, preprocessed.
      key: a JAX key; consumed.
      config: steps, rates, and so on.
      on_progress: called every few steps.

    Returns:
      Quantized variables of the same structure, and what happened. Ctrl-C keeps the blocks finished so far.

    Raises:
      GraphError: the variables are not those of the graph.
      ValueError: `qvariables` are not quantized, or there are too few or unusable images.
    """
    check_images(graph, images)
    if not is_quantized(qvariables):
        raise ValueError("qvariables: found float variables; quantize_params makes quantized ones to start from.")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, one to learn from and one held out, found {len(images)}.")
    graph.leaves(variables)  # refuses other trees
    if config.prediction_weight and graph.num_classes < 2:
        raise ValueError("prediction_weight: the network has no class scores to compare; set it to 0.")
    run = _Run(graph, variables, qvariables, jnp.asarray(images), key, config, on_progress)
    with catch_interrupt() as interrupted:
        completed = run.all_blocks(interrupted)
    return run.qvariables, Reconstruction(tuple(run.results), completed, time.perf_counter() - run.started)


class _Run:
    """The state of one call of `reconstruct`."""

    def __init__(
        self, graph: Graph, variables: Any, qvariables: Any, images: jax.Array, key: Any, config: Any, on_progress: Any
    ):
        self.started = time.perf_counter()
        held_out = min(max(round(config.held_out * len(images)), 1), len(images) - 1)
        self.train = len(images) - held_out
        if config.flip and images.ndim > 2:  # vectors have no sides
            learned = images[: self.train]
            images = jnp.concatenate([learned, jnp.flip(learned, axis=-2), images[self.train :]])
            self.train *= 2
        # Nothing is gained by minibatches larger than the set; the first images are learned from.
        self.batch_size = min(config.batch_size, self.train)
        self.config = dataclasses.replace(config, batch_size=self.batch_size)
        self.graph = graph.at((self.batch_size, *images.shape[1:]), images.dtype)
        self.blocks = merge_blocks(self.graph.blocks, config.min_layers)
        self.variables, self.qvariables = variables, qvariables
        self.float_inputs = self.inputs = images
        self.float_logits = self.class_scores() if config.prediction_weight else None
        self.key, self.on_progress = key, on_progress
        self.chunk = config.chunk or DEFAULT_CHUNK.get(platform_of(images, qvariables), ACCELERATOR_CHUNK)
        # Leaves of earlier blocks: already learned, and other blocks rely on them. Kernels that other blocks read as
        # other matrices: what one block learns about them is noise to the others.
        self.seen = {path for path in self.graph.kernels if self.divides(path)}
        self.results: list[BlockResult] = []
        self.steps_done = 0

    def all_blocks(self, interrupted: Callable[[], bool]) -> bool:
        """Work through the blocks; whether all of them were finished."""
        for index, block in enumerate(self.blocks):
            started = time.perf_counter()
            sub = subnetwork(self.graph, block, self.batch_size)
            targets = self.outputs(sub, sub.select(self.graph, self.variables), self.float_inputs)
            learned = self.learn(sub, index, targets, interrupted)
            if learned is None:
                return False
            own, flipped = learned
            before = sub.select(self.graph, self.qvariables)
            errors = [self.held_out_error(sub, candidate, targets) for candidate in (before, own)]
            kept = errors[1] < errors[0]
            if kept:
                self.qvariables = sub.insert(self.graph, self.qvariables, own)
            seconds = time.perf_counter() - started
            self.results.append(BlockResult(block.name, block.layers, *errors, kept, flipped, seconds))
            self.seen.update(sub.leaves)
            if index + 1 < len(self.blocks):
                self.inputs = self.outputs(sub, own if kept else before, self.inputs)
                self.float_inputs = targets
        return True

    def divides(self, path: str) -> bool:
        """Whether several blocks read a kernel, as different matrices."""
        readers = {layer.name for layer in self.graph.kernels[path]}
        blocks = sum(not readers.isdisjoint(block.layers) for block in self.blocks)
        return blocks > 1 and common_form(self.graph, path) is None

    def learn(
        self, sub: Subnetwork, index: int, targets: Any, interrupted: Callable[[], bool]
    ) -> tuple[Variables, float] | None:
        """The block's variables as learned, and the share of changed codes; None if interrupted."""
        config, own = self.config, sub.select(self.graph, self.qvariables)
        frozen = frozenset(n for n, path in zip(sub.graph.leaf_paths, sub.leaves, strict=True) if path in self.seen)
        float_own = sub.select(self.graph, self.variables)
        parameters, bases = init_parameters(sub.graph, config, float_own, own, frozen)
        state = State(parameters, make_optimizer(config).init(parameters), jnp.zeros((), jnp.int32))
        cache = jax.tree.map(
            lambda a: a[: self.train], Cache(self.float_inputs, self.inputs, targets, self.float_logits)
        )
        rest = self.rest(index)
        rest_graph = None if rest is None else rest.graph
        rest_own = None if rest is None else rest.select(self.graph, self.variables)
        key = jax.random.fold_in(self.key, index)
        done = 0
        while done < config.steps:
            steps = min(self.chunk, config.steps - done)
            with products(config.precision):
                state, losses = advance(sub.graph, config, steps, rest_graph, rest_own, own, bases, cache, state, key)
            done += steps
            self.steps_done += steps
            if interrupted():
                return None
            if self.on_progress is not None and (done % REPORT_EVERY_STEPS < steps or done == config.steps):
                self.report(index, done, float(losses.reconstruction))
        learned = hard_variables(own, bases, state.parameters)
        return learned, changed_codes(own, learned)

    def rest(self, index: int) -> Subnetwork | None:
        """The network behind a block, where the prediction difference needs it."""
        if not self.config.prediction_weight or index + 1 == len(self.blocks):
            return None
        (behind,) = merge_blocks(self.blocks[index + 1 :], len(self.graph.layers))
        return subnetwork(self.graph, behind, self.batch_size)

    def report(self, index: int, step: int, loss: float) -> None:
        seconds = time.perf_counter() - self.started
        left = len(self.blocks) * self.config.steps - self.steps_done
        eta = seconds / self.steps_done * left
        name = self.blocks[index].name
        self.on_progress(BlockProgress(name, index, len(self.blocks), step, self.config.steps, loss, seconds, eta))

    def class_scores(self) -> jax.Array:
        """Of the float network, for all images."""
        (whole,) = merge_blocks(self.graph.blocks, len(self.graph.layers))
        sub = subnetwork(self.graph, whole, self.batch_size)
        outputs = self.outputs(sub, sub.select(self.graph, self.variables), self.float_inputs)
        return sub.graph.logits(outputs).astype(jnp.float32)

    @full_precision
    def outputs(self, sub: Subnetwork, own: Variables, inputs: jax.Array) -> Any:
        """The block's outputs on all images, in batches of one size."""
        size, count = self.batch_size, len(inputs)
        results = []
        for start in range(0, count, size):
            # The last batch reaches back; what it computes again is cut off.
            begin = min(start, count - size)
            result = _apply(sub.graph, own, inputs[begin : begin + size])
            results.append(jax.tree.map(lambda a, n=start - begin: a[n:], result))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

    def held_out_error(self, sub: Subnetwork, own: Variables, targets: Any) -> float:
        found = self.outputs(sub, own, self.inputs)
        return float(reconstruction_error(*jax.tree.map(lambda a: a[self.train :], (found, targets))))


@functools.partial(jax.jit, static_argnames="graph")
def _apply(graph: Graph, own: Variables, x: jax.Array) -> Any:
    return apply_quantized(graph, own, x)


def changed_codes(before: Variables, after: Variables) -> float:
    """Share of the weights whose code changed."""
    pairs = [(leaf, after[name]) for name, leaf in before.items() if isinstance(leaf, QTensor)]
    changed = sum(int(jnp.sum(a.qvalue != b.qvalue)) for a, b in pairs)
    return changed / max(sum(a.size for a, _ in pairs), 1)
