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
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from dfq_jax.base import (
    CALL_SECONDS,
    Loop,
    Plan,
    Progress,
    State,
    Turn,
    check_kind,
    compiles_ahead,
    compiling_ahead,
    drawn,
    fetched,
    full_precision,
    mesh_of,
    on_all,
    platform_of,
    products,
    sharded,
)
from dfq_jax.graph import Graph, Subnetwork, apply_quantized, merge_blocks, subnetwork
from dfq_jax.quantizers import is_qtensor
from dfq_jax.stages.learning import check_learning, held_out_count
from dfq_jax.stages.rounding.block import (
    Cache,
    Draws,
    Variables,
    Verdict,
    advance_block,
    choose_block,
    draw,
    hard_block,
    init_block,
    parts_on_cpu,
    reconstruction_error,
)
from dfq_jax.stages.rounding.codes import common_form
from dfq_jax.stages.rounding.config import ReconstructionConfig

# Optimizer steps in one compiled call, until the first ones are timed; one on CPU.
ACCELERATOR_CHUNK = 100


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


@compiling_ahead()
def reconstruct(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    key: Key[Array, ""],
    config: ReconstructionConfig = ReconstructionConfig(),
    *,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> tuple[Any, Reconstruction]:
    """Learn rounding, scales, activation steps and biases of a quantized network, block by block.

    >>> config = dfq_jax.ReconstructionConfig(steps=1, batch_size=8)
    >>> better, done = reconstruct(graph, variables, qvariables, images, jax.random.key(0), config)
    >>> done.completed
    True

    Args:
      graph: from `trace`.
      variables: the float variables.
      qvariables: the quantized variables to start from, of any rounding; bits and zero points stay as they are.
      images: `[N, H, W, C]`, preprocessed.
      key: a JAX key; consumed.
      config: steps, rates, and so on.
      on_progress: called every few steps; a block counts as a batch, and has a name.
      checkpoint: a file to save unfinished work to and to resume it from; removed at the end. Resuming gives the same
        network, bit for bit, as an uninterrupted run on the same machine.
      keep_checkpoint: leave the file there at the end: the same call returns the finished blocks without learning.

    Returns:
      Quantized variables of the same structure, and what happened. Ctrl-C keeps the blocks finished so far.

    Raises:
      TypeError: `config` is something else.
      GraphError: the variables are not those of the graph.
      ValueError: `qvariables` are not quantized, there are too few or unusable images, or a checkpoint of other work.
      OSError: the checkpoint cannot be written.
    """
    loop = _loop(graph, variables, qvariables, images, key, config)
    completed = loop.run(
        on_progress=on_progress, checkpoint=checkpoint, keep_checkpoint=keep_checkpoint, precision=config.precision
    )
    return loop.qvariables, Reconstruction(tuple(loop.results), completed, time.perf_counter() - loop.started)


def compile_reconstruction(
    graph: Graph, variables: Any, qvariables: Any, images: Float[Array, "n ..."], config: ReconstructionConfig
) -> None:
    """Compile ahead what learns the blocks; for `qvariables`, shapes are enough."""
    _loop(graph, variables, qvariables, images, jax.random.key(0), config).compile_ahead()


def _loop(graph: Graph, variables: Any, qvariables: Any, images: Any, key: Any, config: Any) -> _BlockLoop:
    """The loop of `reconstruct` with these arguments, checked."""
    check_kind("config", config, ReconstructionConfig)
    check_learning(graph, variables, qvariables, images)
    if config.prediction_weight and graph.num_classes < 2:
        raise ValueError("prediction_weight: the network has no class scores to compare; set it to 0.")
    return _BlockLoop(graph, variables, qvariables, jnp.asarray(images), key, config)


class _Block(NamedTuple):
    """The block that is worked on."""

    index: int
    sub: Subnetwork
    own: Variables  # quantized, as it was given
    cache: Cache
    start: State
    bases: dict[str, jax.Array]
    rest: tuple[Graph, Variables] | tuple[None, None]
    draws: Draws
    started: float


class _BlockLoop(Loop):
    """The loop of one call of `reconstruct`: its work on a block is a state, and in the end the block's variables."""

    def __init__(
        self, graph: Graph, variables: Any, qvariables: Any, images: jax.Array, key: Any, config: ReconstructionConfig
    ):
        self.train = len(images) - held_out_count(config.held_out, len(images))
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
        # Several devices share what minibatches are drawn from, as they share each minibatch.
        mesh = mesh_of(images, variables)
        self.num_images = len(images)
        # As many for each device: those that fill up are drawn for nothing, and cut off.
        lacking = 0 if mesh is None else -len(images) % mesh.size
        padded = jnp.concatenate([images, *[images[-1:]] * lacking]) if lacking else images
        self.images = self.float_inputs = self.inputs = sharded(padded, mesh)
        self.num_drawn = on_all(jnp.int32(self.train), mesh)
        self.block: _Block | None = None
        self.results: list[BlockResult] = []
        self.judged: dict[int, tuple[Verdict, float]] = {}  # verdicts to be read, and when work on the block began
        self.on_cpu = platform_of(images, qvariables) == "cpu"
        chunk = config.chunk or (1 if self.on_cpu else ACCELERATOR_CHUNK)
        plan = Plan(
            num_batches=len(self.blocks),
            steps=config.steps,
            chunk=chunk,
            seconds=0.0 if config.chunk or self.on_cpu else CALL_SECONDS,
            report_every=50,
            names=tuple(block.name for block in self.blocks),
        )
        super().__init__(plan, key, mesh)

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        images = fetched(self.images)[: self.num_images]
        return ("reconstruction", self.graph.digest, self.config), (self.variables, self.qvariables, images)

    # --- one block ---

    def begin(self, batch: int) -> State:
        if not self.work:  # nothing was learned before
            self.compile_ahead()
        return self.enter(batch).start

    def advance(self, turn: Turn, work: State) -> tuple[State | Variables, jax.Array]:
        block = self.enter(turn.batch)
        static = block.sub.graph, self.config, self.length(turn)
        given = *block.rest, block.own, block.bases, block.cache, self.num_drawn
        state, losses = advance_block(*static, *given, work, block.draws, self.mesh)
        finished = turn.end == self.config.steps
        return self.finish(block, state) if finished else state, losses.reconstruction

    def compile_ahead(self) -> None:
        """Compile the steps of all blocks, those of the first one first; to know shapes is enough."""
        if not compiles_ahead(self.images):
            return
        inputs, logits = jax.eval_shape(lambda: self.images), self.float_logits
        trees = self.variables, self.qvariables
        with products(self.config.precision):
            for index in range(len(self.blocks)):
                sub = self.sub(index)
                float_own, own = (sub.select(self.graph, tree) for tree in trees)
                outputs = jax.eval_shape(functools.partial(apply_quantized, sub.graph), float_own, sub.graph.input)
                targets = jax.tree.map(
                    lambda a: jax.ShapeDtypeStruct((len(self.images), *a.shape[1:]), a.dtype), outputs
                )
                state, bases = jax.eval_shape(functools.partial(self.start, index), *trees)
                given = *self.rest(index), own, bases, Cache(inputs, inputs, targets, logits), self.num_drawn
                draws = jax.eval_shape(functools.partial(self.draws, index))
                steps = jax.ShapeDtypeStruct((), jnp.int32)
                advance_block.compile_ahead(sub.graph, self.config, steps, *given, state, draws, self.mesh)
                inputs = targets

    def enter(self, index: int) -> _Block:
        """The block with all that its steps need, made once."""
        if self.block is None or self.block.index != index:
            started, sub = time.perf_counter(), self.sub(index)
            targets = self.outputs(sub, sub.select(self.graph, self.variables), self.float_inputs)
            cache = Cache(self.float_inputs, self.inputs, targets, self.float_logits)
            own = sub.select(self.graph, self.qvariables)
            state, bases = self.start(index, self.variables, self.qvariables)
            draws = on_all(self.draws(index), self.mesh)
            self.block = _Block(index, sub, own, cache, state, bases, self.rest(index), draws, started)
        return self.block

    def draws(self, index: int) -> Draws:
        sub, key = self.sub(index), jax.random.fold_in(self.key, index)
        parts = parts_on_cpu(sub.graph, self.batch_size) if self.on_cpu else 1
        return draw(key, self.config, parts, len(sub.layers))

    def start(self, index: int, variables: Any, qvariables: Any) -> tuple[State, dict[str, jax.Array]]:
        sub = self.sub(index)
        own, float_own = (sub.select(self.graph, v) for v in (qvariables, variables))
        # Leaves of earlier blocks: already learned, and other blocks rely on them. Kernels that other blocks read as
        # other matrices: what one block learns about them is noise to the others.
        seen = {path for path in self.graph.kernels if self.divides(path)}
        seen.update(path for earlier in range(index) for path in self.sub(earlier).leaves)
        frozen = frozenset(n for n, path in zip(sub.graph.leaf_paths, sub.leaves, strict=True) if path in seen)
        return init_block(sub.graph, self.config, float_own, own, frozen)

    def divides(self, path: str) -> bool:
        """Whether several blocks read a kernel, as different matrices."""
        readers = {layer.name for layer in self.graph.kernels[path]}
        blocks = sum(not readers.isdisjoint(block.layers) for block in self.blocks)
        return blocks > 1 and common_form(self.graph, path) is None

    def finish(self, block: _Block, state: State) -> Variables:
        """Judge what was learned, and go on to the next block; the host reads the verdict when that is on its way."""
        learned = hard_block(block.own, block.bases, state.parameters)
        targets = jax.tree.map(lambda a: a[self.train : self.num_images], block.cache.targets)
        found = (self.outputs(block.sub, own, self.inputs, self.train) for own in (block.own, learned))
        own, verdict = choose_block(block.own, learned, *(reconstruction_error(outputs, targets) for outputs in found))
        self.judged[block.index] = verdict, block.started
        self.leave(block, own)
        return own

    def check(self, turn: Turn, loss: float) -> None:
        if turn.end < self.config.steps:
            return
        verdict, started = self.judged.pop(turn.batch)
        before, after, flipped = map(float, verdict)
        kernels = filter(is_qtensor, jax.tree.leaves(self.work[turn.batch], is_leaf=is_qtensor))
        share = flipped / max(sum(kernel.qvalue.size for kernel in kernels), 1)
        self.add_result(turn.batch, before, after, after < before, share, time.perf_counter() - started)

    def add_result(self, index: int, *result: Any) -> None:
        self.results.append(BlockResult(self.blocks[index].name, self.blocks[index].layers, *result))

    def leave(self, block: _Block, own: Variables) -> None:
        """Take the variables that a block ends with, and make the inputs of the next one."""
        self.qvariables = block.sub.insert(self.graph, self.qvariables, own)
        if block.index + 1 < len(self.blocks):
            self.inputs = self.outputs(block.sub, own, self.inputs)
            self.float_inputs = block.cache.targets
        self.block = None  # and the memory of its inputs and outputs

    def sub(self, index: int) -> Subnetwork:
        return subnetwork(self.graph, self.blocks[index], self.batch_size)

    def rest(self, index: int) -> tuple[Graph, Variables] | tuple[None, None]:
        """The network behind a block, where the prediction difference needs it, and its float variables."""
        if not self.config.prediction_weight or index + 1 == len(self.blocks):
            return None, None
        (behind,) = merge_blocks(self.blocks[index + 1 :], len(self.graph.layers))
        sub = subnetwork(self.graph, behind, self.batch_size)
        return sub.graph, sub.select(self.graph, self.variables)

    @functools.cached_property
    def float_logits(self) -> jax.Array | None:
        """Of all images, where the prediction difference needs them."""
        if not self.config.prediction_weight:
            return None
        (whole,) = merge_blocks(self.graph.blocks, len(self.graph.layers))
        sub = subnetwork(self.graph, whole, self.batch_size)
        outputs = self.outputs(sub, sub.select(self.graph, self.variables), self.images)
        return sub.graph.logits(outputs).astype(jnp.float32)

    @full_precision
    def outputs(self, sub: Subnetwork, own: Variables, inputs: jax.Array, first: int = 0) -> Any:
        """A block's outputs on all images from the first one on, in batches of one size."""
        size, end = self.batch_size, self.num_images
        room = max(end - first, size)  # the last batch reaches back, and what it computes twice is overwritten
        begins = [end - size, *range(first, end - size + 1, size)]
        results = None
        for begin in begins if (end - first) % size else begins[1:]:
            batch = _batch_outputs(sub.graph, own, inputs, np.int32(begin), size, self.mesh)
            if results is None:
                results = _room_for(batch, room if first else len(inputs), self.mesh)
            results = _with_batch(results, batch, np.int32(begin - (end - room)), self.mesh)
        return jax.tree.map(lambda a: a[first - end :], results) if first and room > end - first else results

    # --- checkpoints ---

    def facts(self) -> dict[str, Any]:
        return {"results": [dataclasses.astuple(result)[2:] for result in self.results]}

    def resume(self, facts: dict[str, Any]) -> None:
        for index, result in enumerate(facts["results"]):
            self.leave(self.enter(index), self.work[index])
            self.add_result(index, *result)

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        if batch < len(facts["results"]):
            return self.sub(batch).select(self.graph, self.qvariables)
        return jax.eval_shape(functools.partial(self.start, batch), self.variables, self.qvariables)[0]


@functools.partial(jax.jit, static_argnames=("graph", "size", "mesh"))
def _batch_outputs(
    graph: Graph, own: Variables, inputs: jax.Array, begin: Int[Array, ""], size: int, mesh: Mesh | None
) -> Any:
    """Of a block, on `size` of the images."""
    if mesh is None:
        return apply_quantized(graph, own, jax.lax.dynamic_slice_in_dim(inputs, begin, size))
    return apply_quantized(graph, own, drawn(inputs, begin + jnp.arange(size), mesh))


@functools.partial(jax.jit, static_argnames=("images", "mesh"))
def _room_for(batch: Any, images: int, mesh: Mesh | None) -> Any:
    """Zeros in place of the results of so many images."""
    return jax.tree.map(lambda a: sharded(jnp.zeros((images, *a.shape[1:]), a.dtype), mesh), batch)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="results")
def _with_batch(results: Any, batch: Any, begin: Int[Array, ""], mesh: Mesh | None) -> Any:
    """The results with those of a batch in their place."""
    if mesh is None:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, 0), results, batch)

    def placed(results: jax.Array, batch: jax.Array) -> jax.Array:
        places = on_all(begin + jnp.arange(len(batch)), mesh)
        return sharded(results.at[places].set(on_all(batch, mesh)), mesh)

    return jax.tree.map(placed, results, batch)
