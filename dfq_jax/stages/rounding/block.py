"""Learning the quantization of one block: what is optimized, the loss, and the compiled steps.

The quantized block is to give what the float block gives (BRECQ, arXiv 2102.05426), while it sees, element by element
at random, quantized or float values (QDrop, arXiv 2203.05740).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dfq_jax.base import (
    NO_YNN,
    RUN_ONCE,
    State,
    cpu_jit,
    descend,
    drawn,
    init_state,
    largest_divisor,
    mean_of_parts,
    repeat,
)
from dfq_jax.graph import Graph, loop_friendly, quantized_rules, run
from dfq_jax.quantizers import QTensor, QuantizerParams, fake_quant, is_qtensor, quantization
from dfq_jax.stages.comparison import kl_divergence
from dfq_jax.stages.learning import learned_batch_norm, learned_product, moved, with_scaled_steps
from dfq_jax.stages.rounding.config import ReconstructionConfig
from dfq_jax.stages.rounding.soft import SoftKernel, base_codes, harden, init_soft, soft_weight, undecided

# Of one value of a block, over some images: what a part of a minibatch has at most, but one image at least.
PART_BYTES = 5 * 2**20

Variables = dict[str, Any]  # of a block: leaves by name, and the collection "quantization"


class BlockParameters(NamedTuple):
    """What is optimized."""

    kernels: dict[str, SoftKernel]  # by leaf
    steps: dict[str, Float[Array, ""]]  # by tensor: log of the factor on its quantizer's step
    biases: dict[str, Float[Array, "..."]]  # by leaf: what is added, in units of the leaf's own size


class Cache(NamedTuple):
    """The block's inputs in the float and in the quantized network, and its float outputs, for all images.

    With the term of prediction difference, class scores of the whole float network too.
    """

    float_inputs: Float[Array, "n ..."]
    inputs: Float[Array, "n ..."]
    targets: Any
    logits: Float[Array, "n k"] | None = None


class Draws(NamedTuple):
    """Random numbers of all steps, of one, or of a part of its minibatch.

    They are made at once: in a step they would take a third of the time to compile it.
    """

    images: UInt32[Array, "*steps size"]  # which ones are drawn
    seeds: UInt32[Array, "*steps n"]  # of the masks of the block's input and of each layer's


class BlockLosses(NamedTuple):
    """Terms of the loss, unweighted."""

    reconstruction: Float[Array, ""]
    undecided: Float[Array, ""]


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnames=("config", "parts", "layers"))
def draw(key: Key[Array, ""], config: ReconstructionConfig, parts: int, layers: int) -> Draws:
    """The random numbers of a block's steps; the key is consumed."""
    size = config.batch_size // parts
    bits = jax.random.bits(key, (config.steps, parts, size + 1 + layers), jnp.uint32)
    return Draws(bits[..., :size], bits[..., size:])


@functools.partial(cpu_jit, options=RUN_ONCE, static_argnames=("graph", "config", "frozen"))
def init_block(
    graph: Graph, config: ReconstructionConfig, float_own: Variables, own: Variables, frozen: frozenset[str]
) -> tuple[State, dict[str, jax.Array]]:
    """The state that starts at the quantization given, and the fixed base codes of the kernels."""
    kernels, bases, biases = {}, {}, {}
    for layer in graph.layers:
        kernel = own[layer.kernel]
        if isinstance(kernel, QTensor) and layer.kernel not in frozen:
            kernels[layer.kernel] = init_soft(float_own[layer.kernel], kernel, config.trust)
            bases[layer.kernel] = base_codes(float_own[layer.kernel], kernel)
        bias = layer.bias if layer.batch_norm is None else graph.batch_norm(layer.batch_norm).bias
        if config.bias_rate and bias is not None and bias not in frozen:
            biases[bias] = jnp.zeros_like(own[bias], jnp.float32)
    steps = {name: jnp.zeros(()) for name in quantization(own).by_tensor}
    return init_state(block_optimizer(config), BlockParameters(kernels, steps, biases)), bases


def soft_kernels(own: Variables, bases: dict[str, jax.Array], parameters: BlockParameters) -> dict[str, jax.Array]:
    """The block's soft kernels, as arrays."""
    return {
        name: soft_weight(soft, bases[name], own[name]).astype(own[name].dtype)
        for name, soft in parameters.kernels.items()
    }


@functools.partial(cpu_jit, options=RUN_ONCE)
def hard_block(own: Variables, bases: dict[str, jax.Array], parameters: BlockParameters) -> Variables:
    """The block's quantized variables as learned."""
    kernels = {name: harden(soft, bases[name], own[name]) for name, soft in parameters.kernels.items()}
    return _learned(own, kernels, parameters)


class Verdict(NamedTuple):
    """On what a block learned, by images held out."""

    before: Float[Array, ""]  # its error as it was given
    after: Float[Array, ""]  # as learned
    flipped: Int[Array, ""]  # weights whose code changed


@functools.partial(cpu_jit, options=RUN_ONCE)
def choose_block(
    own: Variables, learned: Variables, before: Float[Array, ""], after: Float[Array, ""]
) -> tuple[Variables, Verdict]:
    """The block as learned if its error is lower so, else as it was given; the host need not know which."""
    chosen = jax.tree.map(functools.partial(jnp.where, after < before), learned, own)
    pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_qtensor) for tree in (own, learned)), strict=True)
    flipped = (jnp.sum(a.qvalue != b.qvalue) for a, b in pairs if is_qtensor(a))
    return chosen, Verdict(before, after, sum(flipped, start=jnp.zeros((), int)))


def _learned(own: Variables, kernels: dict[str, Any], parameters: BlockParameters) -> Variables:
    biases = {name: moved(own[name], change) for name, change in parameters.biases.items()}
    return with_scaled_steps({**own, **kernels, **biases}, parameters.steps)


def apply_soft(
    graph: Graph,
    variables: Variables,
    x: Float[Array, "n ..."],
    seeds: UInt32[Array, " layers"],
    drop: float,
    soft: frozenset[str],
) -> Any:
    """Run a block with soft kernels, each activation quantized with probability 1 - `drop`; each layer has its seed.

    `soft` are the kernels that are soft; others are float, or quantized and fixed.
    """
    place = {layer.name: i for i, layer in enumerate(graph.layers)}

    def dropped(layer: str, value: jax.Array, params: QuantizerParams) -> jax.Array:
        return mix(seeds[place[layer]], value, fake_quant(value, params), drop)

    rules = quantized_rules(
        variables, product=learned_product, in_float=loop_friendly, fake_quantize=dropped, soft=soft
    )
    return run(graph, variables, x, layer=rules.layer, tensor=rules.tensor, batch_norm=learned_batch_norm)


def mix(seed: UInt32[Array, ""], first: jax.Array, second: jax.Array, share: float) -> jax.Array:
    """Each element from `first` with probability `share`, else from `second`."""
    return second if share == 0 else jnp.where(random_mask(seed, first.shape, share), first, second)


def random_mask(seed: UInt32[Array, ""], shape: tuple[int, ...], share: float) -> Bool[Array, "..."]:
    """True with probability `share`, to 2^-24, differently for each seed.

    With the seed the place of each element is hashed (by the last steps of MurmurHash3). So masks are made where they
    are used, in the backward pass again, and never stored: on CPU random bits of `jax.random` for each element cost as
    much as the products.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(s) for axis, s in enumerate(strides))
    mixed = sum(places, start=jnp.zeros((), jnp.uint32)) ^ seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).astype(jnp.int32) < round(share * 2**24)


@jax.jit
def reconstruction_error(found: Any, expected: Any) -> Float[Array, ""]:
    """Squared error summed over channels (the last axis), averaged over examples and positions."""

    def error(a: jax.Array, b: jax.Array) -> jax.Array:
        difference = a.astype(jnp.float32) - b.astype(jnp.float32)
        return jnp.square(difference).sum() / (difference.size // difference.shape[-1])

    return sum(jax.tree.leaves(jax.tree.map(error, found, expected)), start=jnp.zeros(()))


def parts_on_cpu(graph: Graph, batch_size: int) -> int:
    """In how many parts a minibatch of a block is best worked on: so many that its largest value stays in the cache."""
    values = (value for place, value in graph.program.avals.items() if place >= graph.program.num_leaves)
    largest = max(math.prod(value.shape) * value.dtype.itemsize for value in values)
    fitting = max(PART_BYTES * batch_size // largest, 1)
    return batch_size // largest_divisor(min(fitting, batch_size), batch_size)


@functools.cache
def block_optimizer(config: ReconstructionConfig) -> optax.GradientTransformation:
    """Adam with a rate for each kind of parameter; cached, since compilation is keyed on it."""

    def descent(rate: float, *, decay: bool = True) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(optax.cosine_decay_schedule(rate, config.steps) if decay else rate)

    rates = {
        "rounding": descent(config.rounding_rate, decay=False),
        "scale": descent(config.scale_rate),
        "step": descent(config.step_rate),
        "bias": descent(config.bias_rate),
    }

    def labels(parameters: BlockParameters) -> BlockParameters:
        return BlockParameters(
            kernels={name: SoftKernel("rounding", "scale") for name in parameters.kernels},
            steps=dict.fromkeys(parameters.steps, "step"),
            biases=dict.fromkeys(parameters.biases, "bias"),
        )

    return optax.chain(optax.scale_by_adam(), optax.multi_transform(rates, labels))


def rounding_pressure(config: ReconstructionConfig, step: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
    """Weight of the regularizer (0 in the warm-up) and its exponent at a step."""
    begin = round(config.warm_up * config.steps)
    progress = jnp.clip((step - begin) / max(config.steps - begin, 1), 0.0, 1.0)
    start, end = config.beta
    return jnp.where(step < begin, 0.0, config.regularizer), start + (end - start) * progress


@functools.partial(
    cpu_jit,
    options=NO_YNN,
    static_argnames=("graph", "config", "rest_graph", "mesh"),
    donate_argnames="state",
)
def advance_block(
    graph: Graph,
    config: ReconstructionConfig,
    steps: int | Int[Array, ""],
    rest_graph: Graph | None,
    rest: Variables | None,
    own: Variables,
    bases: dict[str, jax.Array],
    cache: Cache,
    count: int | Int[Array, ""],
    state: State,
    draws: Draws,
    mesh: Mesh | None = None,
) -> tuple[State, BlockLosses]:
    """Optimize a block for `steps` steps.

    Args:
      graph: of the block alone (`subnetwork`), static, as are all settings: equal blocks compile once.
      config: rates, and weights of the terms.
      steps: how many; an argument: one program serves any number.
      rest_graph: the network behind the block, for the prediction difference; static. None where the block's output
        holds the class scores, or the difference is not asked for.
      rest: its float variables.
      own: the block's quantized variables at the start.
      bases: base codes of its kernels.
      cache: what the minibatches are drawn from.
      count: of images in the cache that are, the first.
      state: donated.
      draws: of all steps, each in parts that are worked on one after the other.
      mesh: of the devices that share the images of a part; static.

    Returns:
      The new state, and the losses of the last step.
    """
    optimizer = block_optimizer(config)

    def error(learned: BlockParameters, part: Draws) -> tuple[jax.Array, jax.Array]:
        """What the outputs of some images are off, by all terms and by the first."""
        batch = drawn(cache, part.images % jnp.asarray(count, jnp.uint32), mesh)
        x = mix(part.seeds[0], batch.float_inputs, batch.inputs, config.drop)
        variables, soft = _learned(own, learned.kernels, learned), frozenset(learned.kernels)
        found = apply_soft(graph, variables, x, part.seeds[1:], config.drop, soft)
        reconstruction = reconstruction_error(found, batch.targets)
        if not config.prediction_weight:
            return reconstruction, reconstruction
        last = graph if rest_graph is None else rest_graph
        outputs = found if rest_graph is None else run(rest_graph, rest, found, layer=loop_friendly)
        difference = kl_divergence(batch.logits, last.logits(outputs).astype(jnp.float32), config.temperature)
        return reconstruction + config.prediction_weight * difference, reconstruction

    def step(state: State) -> tuple[State, BlockLosses]:
        own_draws = jax.tree.map(lambda a: a[state.step], draws)
        weight, beta = rounding_pressure(config, state.step)

        def loss(parameters: BlockParameters) -> tuple[jax.Array, BlockLosses]:
            learned = parameters._replace(kernels=soft_kernels(own, bases, parameters))
            total, reconstruction = mean_of_parts(error, learned, own_draws)
            regularizer = sum((undecided(soft, beta) for soft in parameters.kernels.values()), start=jnp.zeros(()))
            return total + weight * regularizer, BlockLosses(reconstruction, regularizer)

        return descend(optimizer, loss, state)

    return repeat(step, state, steps)
