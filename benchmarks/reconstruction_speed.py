"""Speed of block reconstruction, block by block: image-steps per second, one being the pass of one image in one step.

    python benchmarks/reconstruction_speed.py --model efficientnet_lite0 --steps 6
    python benchmarks/reconstruction_speed.py --model cifar_resnet20 --checkpoint resnet20-12fca82f.th --steps 40

A step's time is the median of all but the first, which compiles, and the last, which also judges what was learned; both
stand apart. The last line is over all blocks: images in a step by the sum of the blocks' seconds a step. Weights are
random where neither the zoo nor `--checkpoint` has any, images are noise; neither matters to speed. To compare two
versions of the library, run each with its folder in `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import jax
import jax.numpy as jnp

import dfq_jax
from dfq_jax import Convention, ReconstructionConfig, as_function, estimate_ranges, quantize_params, trace
from dfq_jax.base import Turn
from dfq_jax.stages.rounding.learned import _BlockLoop
from dfq_jax.zoo import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--checkpoint", help="weights; random if left out")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=ReconstructionConfig().batch_size)
    parser.add_argument("--steps", type=int, default=6, help="for each block, at least three compiled calls")
    parser.add_argument("--blocks", type=int, help="only so many of them, from the first on")
    arguments = parser.parse_args()

    model = load_model(arguments.model, arguments.checkpoint, None if arguments.checkpoint else jax.random.key(0))
    apply_fn, variables = as_function(model.module, model.variables)
    graph = trace(apply_fn, variables, model.input_shape)
    images = jax.random.normal(jax.random.key(1), (arguments.images, *model.input_shape[1:]))
    convention = Convention.parse(arguments.bits, edge_bits=8).with_default()
    ranges = estimate_ranges(graph, variables, images[:8], convention)
    qvariables = quantize_params(graph, variables, ranges, convention)
    config = ReconstructionConfig(steps=arguments.steps, batch_size=arguments.batch_size)
    loop = _BlockLoop(graph, variables, qvariables, images, jax.random.key(2), config)
    print(f"{arguments.model}, {convention.describe()}; {dfq_jax.__file__}, jax {jax.__version__}")
    print("ms a step, image-steps/s, seconds of the first call, of the last, peak memory so far in GB")
    total = 0.0
    for block in range(loop.plan.num_batches if arguments.blocks is None else arguments.blocks):
        first, step, last = timed_block(loop, block)
        total += step
        shape = "x".join(map(str, jnp.shape(loop.inputs)[1:]))
        name = loop.plan.names[block]
        print(
            f"{name} (to {shape}): {1000 * step:.1f}, {loop.batch_size / step:.1f}, {first:.1f}, {last:.2f}, "
            f"{peak():.2f}",
            flush=True,
        )
    print(f"all: {1000 * total:.1f} ms a step, {loop.batch_size / total:.2f} image-steps/s, peak {peak():.2f} GB")


def timed_block(loop: _BlockLoop, block: int) -> tuple[float, float, float]:
    """Seconds of the first compiled call with what goes before, of a step, and of the last call with what follows."""
    seconds, begun, chunk = [], time.perf_counter(), loop.plan.chunk
    work = loop.begin(block)
    for begin in range(0, loop.plan.steps, chunk):
        work = jax.block_until_ready(loop.advance(Turn(block, begin, begin + chunk), work)[0])
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return seconds[0], statistics.median(seconds[1:-1]) / chunk, seconds[-1]


def peak() -> float:
    """Of resident memory, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
