"""What the first GPU or TPU that JAX finds makes of the library, in a few minutes; on a CPU the same, smaller.

    pip install dfq_jax 'jax[cuda13]'
    python benchmarks/accelerator.py --minutes 8
    python benchmarks/accelerator.py --parts device agree recipe:cifar_resnet20:fast

The most useful is printed first, each part in a process of its own, so that a time is that of a fresh process and one
part's failure does not end the others; what does not fit into the minutes is named at the end. Networks have random
weights and BatchNorm statistics that fit them: times do not depend on them, accuracies are other benchmarks'.

device     what was found; products of large matrices, as the measure of what the device can do
agree      images, codes and outputs on the accelerator beside those of the same program on the CPU
recipe     `quantize` by a recipe: the first call of a process, and the same on other weights, compiled by then
synthesis  image-steps per second, beside those of a training step of the network (its BatchNorms in inference mode)
latency    one call in float32, bfloat16 and int8 at several batch sizes
grouped    depthwise convolutions in int8 against float32
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PARTS = (
    "device",
    "agree:cifar_resnet20",
    "recipe:cifar_resnet20:instant",
    "recipe:cifar_resnet20:fast",
    "recipe:cifar_resnet20:best",
    "recipe:mobilenet_v2:instant",
    "synthesis:cifar_resnet20:256",
    "synthesis:mobilenet_v2:32",
    "latency:mobilenet_v2",
    "latency:resnet50",
    "grouped",
    "recipe:resnet18:fast",
    "synthesis:resnet50:32",
    "recipe:mobilenet_v2:fast",
    "recipe:resnet18:best",
    "recipe:resnet50:fast",
)
SMALL = ("device", "agree:fashion_mobilenet", "recipe:fashion_mobilenet:instant", "synthesis:fashion_mobilenet:8")
REPEATS = 5


def main() -> None:
    """Run each part in a process, within the time there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="in place of all; names with their settings")
    parser.add_argument("--small", action="store_true", help="what a CPU does in a minute")
    parser.add_argument("--here", metavar="PART", help=argparse.SUPPRESS)  # in the process of the part
    args = parser.parse_args()
    if args.here:
        name, *settings = args.here.split(":")
        RUN[name](*settings)
        return
    began, left_out = time.perf_counter(), []
    for part in args.parts or (SMALL if args.small else PARTS):
        left = 60 * args.minutes - (time.perf_counter() - began)
        if left < 5:
            left_out.append(part)
            continue
        print(f"\n{part}", flush=True)
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, __file__, "--here", part]
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                command, timeout=left, env=environment, stderr=subprocess.PIPE, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            left_out.append(f"{part} (begun)")
            continue
        if done.returncode:
            print(f"  failed: {' '.join(done.stderr.split())[-1500:]}")
        print(f"  process: {time.perf_counter() - begun:.1f} s", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all" + (f"; left out: {', '.join(left_out)}" if left_out else ""))


# --- in the process of a part ---


def device() -> None:
    """What was found."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()[0]
    print(f"  {found.device_kind} ({found.platform}), jax {jax.__version__}, {os.cpu_count()} host cores")
    size = 8192 if found.platform != "cpu" else 512
    for dtype, precision in (("bfloat16", None), ("float32", "default"), ("float32", "highest")):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        seconds = timed(lambda x=x, product=product: product(x, x))
        print(f"  {dtype} {precision or ''}: {2e-12 * size**3 / seconds:.1f} TFLOP/s of products of {size} x {size}")


def agree(name: str) -> None:
    """The same program on the CPU and on the accelerator."""
    import jax
    import numpy as np

    import dfq_jax

    served, results = _served(name), []
    config = dfq_jax.SynthesisConfig(num_images=16, batch_size=16, steps=20, precision="highest")
    for where in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(where):
            variables = jax.device_put(served.variables, where)
            images = dfq_jax.synthesize(served.graph, variables, jax.random.key(0), config).images
            network = dfq_jax.quantize(
                served.module, variables, input_shape=served.graph.input.shape, recipe="instant", bits="w4a4"
            )
            x = jax.device_put(np.asarray(results[0][0] if results else images), where)
            results.append([np.asarray(v) for v in (images, network(x), network.integer()(x))])
            codes = [q.qvalue for q in jax.tree.leaves(network.variables, is_leaf=_is_quantized) if _is_quantized(q)]
            results[-1].append(np.concatenate([np.asarray(c).ravel() for c in codes]))
    (images, simulated, integer, codes), (images2, simulated2, integer2, codes2) = results
    print(f"  images after 20 steps: largest difference {np.abs(images - images2).max():.2e}")
    print(f"  codes: {int((codes != codes2).sum())} of {codes.size} differ")
    for what, a, b in (("simulated", simulated, simulated2), ("integer", integer, integer2)):
        agreement = (a.argmax(-1) == b.argmax(-1)).mean()
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        print(f"  {what} outputs on the CPU's images: relative difference {error:.2e}, same class {agreement:.2%}")


def recipe(name: str, recipe: str) -> None:
    """Compilation and run of one call, apart."""
    import jax

    import dfq_jax

    served, compiled = _served(name), []

    @jax.monitoring.register_event_duration_secs_listener
    def count(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    for call, factor in (("first", 1.0), ("again, on other weights", 1.01)):
        variables = jax.tree.map(lambda a, f=factor: a * f, served.variables)
        compiled.clear()
        began = time.perf_counter()
        shape = served.graph.input.shape
        network = dfq_jax.quantize(served.module, variables, input_shape=shape, recipe=recipe, bits="w4a4", key=0)
        jax.block_until_ready(network.variables)
        seconds = time.perf_counter() - began
        stages = ", ".join(f"{stage} {s:.1f}" for stage, s in network.report.seconds.items() if s >= 0.05)
        print(
            f"  {call}: {seconds:.1f} s, {len(compiled)} compilations of {sum(compiled):.1f} s ({stages})", flush=True
        )
    print(f"  peak memory of the device: {_peak_memory()}")


def synthesis(name: str, batch: str) -> None:
    """Against the training step, which does about the same arithmetic."""
    import jax
    import jax.numpy as jnp
    import optax

    from dfq_jax.synthesis import SynthesisConfig, advance_batch, init_batch
    from dfq_jax.synthesis.source import image_optimizer

    served, size, steps = _served(name), int(batch), 20
    config = SynthesisConfig(batch_size=size, num_images=size, steps=steps)
    graph = served.graph.at((size, *served.graph.input.shape[1:]), jnp.float32)
    optimizer = image_optimizer(config)
    state, targets = jax.jit(init_batch, static_argnums=(0, 1, 2))(graph, config, optimizer, jax.random.key(0))
    held = [state]

    def advance() -> Any:
        held[0], losses = advance_batch(
            graph, config, optimizer, steps, served.variables, held[0], targets, jax.random.key(1)
        )
        return losses

    speed = size * steps / timed(advance)
    x, labels = jax.random.normal(jax.random.key(2), graph.input.shape), jnp.zeros(size, jnp.int32)

    @jax.jit
    def train(variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            logits = graph.logits(graph.apply_fn(variables, x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.tree.map(lambda v, g: v - 1e-3 * g, variables, jax.grad(loss)(variables))

    training = size / timed(lambda: train(served.variables))
    print(f"  batch {size}: {speed:,.0f} image-steps/s; training {training:,.0f} ({speed / training:.0%} of that)")
    print(f"  peak memory of the device: {_peak_memory()}")


def latency(name: str) -> None:
    """Milliseconds of a call."""
    import jax
    import jax.numpy as jnp

    import dfq_jax

    served = _served(name)
    network = dfq_jax.quantize(
        served.module, served.variables, input_shape=served.graph.input.shape, recipe="instant", bits="w8a8"
    )
    integer = network.integer()
    runs = [layer.decision.runs for layer in integer.plan.layers]
    print(f"  int8: {runs.count('int8')} of {len(runs)} layers")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, served.variables)
    floating = jax.jit(served.graph.apply_fn)
    for size in (1, 32, 256):
        x = jax.random.normal(jax.random.key(0), (size, *served.graph.input.shape[1:]))
        turns: dict[str, Callable[[], Any]] = {
            "float32": functools.partial(floating, served.variables, x),
            "bfloat16": functools.partial(floating, half, x.astype(jnp.bfloat16)),
            "int8": functools.partial(integer, x),
        }
        print(f"  batch {size}: " + ", ".join(f"{what} {1e3 * timed(turn):.2f} ms" for what, turn in turns.items()))


def grouped() -> None:
    """Depthwise convolutions: one group a channel."""
    import jax
    import jax.numpy as jnp

    for shape in ((32, 56, 56, 144), (32, 14, 14, 576)):
        line = []
        for dtype, result in ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.int8, jnp.int32)):
            x, kernel = jnp.ones(shape, dtype), jnp.ones((3, 3, 1, shape[-1]), dtype)
            product = jax.jit(
                functools.partial(
                    jax.lax.conv_general_dilated,
                    window_strides=(1, 1),
                    padding="SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    feature_group_count=shape[-1],
                    preferred_element_type=result,
                )
            )
            try:
                line.append(f"{jnp.dtype(dtype).name} {1e3 * timed(lambda p=product, x=x, k=kernel: p(x, k)):.3f} ms")
            except jax.errors.JaxRuntimeError as error:
                line.append(f"{jnp.dtype(dtype).name} refused ({str(error).splitlines()[0][:80]})")
        print(f"  3 x 3 on {shape}: {', '.join(line)}")


RUN: dict[str, Callable[..., None]] = {
    part.__name__: part for part in (device, agree, recipe, synthesis, latency, grouped)
}


def timed(call: Callable[[], Any]) -> float:
    """The least time of a few calls, in seconds, after one that compiles."""
    import jax

    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return min(found)


def _served(name: str) -> Any:
    from served import serve

    return serve(name)


def _is_quantized(leaf: Any) -> bool:
    from dfq_jax import QTensor

    return isinstance(leaf, QTensor)


def _peak_memory() -> str:
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return "not told by this backend" if peak is None else f"{peak / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
