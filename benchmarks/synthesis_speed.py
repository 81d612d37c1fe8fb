"""Speed of image synthesis: dfq_jax against the same loss and optimizer in plain PyTorch, on the CPU.

    pip install dfq_jax torch
    python benchmarks/synthesis_speed.py --checkpoint resnet20-12fca82f.th [--mct]

The network is the CIFAR ResNet-20, the batch 64 images, the unit image-steps per second: one image-step is forward,
backward and Adam update of one image. The contestants take turns, round by round in one process, so that whatever
else the machine does hits all of them. PyTorch runs in the memory format and with the formula for the moments that
a trial before the first round finds fastest. `--mct` adds the data generation of Sony's model-compression-toolkit
(see benchmarks/README.md for its installation). Without `--checkpoint` the weights are random.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
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
import torch.nn.functional as F
from flax import traverse_util
from torch import Tensor, nn

from dfq_jax import as_function, synthesize, trace
from dfq_jax.graph import Graph
from dfq_jax.synthesis import SynthesisConfig, advance, init_batch
from dfq_jax.synthesis.objective import STD_EPSILON, Targets, evaluate
from dfq_jax.synthesis.source import make_optimizer
from dfq_jax.zoo import load_model

BATCH = 64
LEARNING_RATE = 0.1
CHUNK = 25
# The loss of all contestants: BatchNorm statistics and input statistics, each with weight 1.
CONFIG = SynthesisConfig(
    batch_size=BATCH,
    learning_rate=LEARNING_RATE,
    schedule="constant",
    input_weight=1.0,
    class_weight=0.0,
    response_weight=0.0,
)


class Contestant:
    """Something that takes optimizer steps.

    Args:
      name: for the table.
      run: takes so many steps and returns the seconds per step.
    """

    def __init__(self, name: str, run: Callable[[int], float]):
        self.name, self.run = name, run
        started = time.perf_counter()
        run(CHUNK)  # compiles, where there is something to compile
        self.first = time.perf_counter() - started
        self.speeds: list[float] = []

    def measure(self, steps: int) -> None:
        self.speeds.append(BATCH / self.run(steps))


# --- dfq_jax ---


def jax_contestant(graph: Graph, variables: Any, chunk: int) -> Contestant:
    """The library's own compiled step, `chunk` optimizer steps in a call."""
    optimizer = make_optimizer(CONFIG)
    state, targets = init_batch(graph, CONFIG, optimizer, jax.random.key(0))
    key = jax.random.key(1)

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps // chunk):
            state, _ = advance(graph, CONFIG, optimizer, chunk, variables, state, targets, key)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / steps

    return Contestant(f"dfq_jax, {chunk} step{'s' if chunk > 1 else ''} a call", run)


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
    config = SynthesisConfig(num_images=2 * BATCH, batch_size=BATCH, steps=4 * CHUNK, chunk=CHUNK, response_weight=0.1)
    counter = Compilations()
    marks = []  # compilations so far, after each chunk of the first run
    synthesize(graph, variables, jax.random.key(0), config, on_progress=lambda p: marks.append(len(counter.names)))
    first = collections.Counter(counter.names)
    synthesize(graph, variables, jax.random.key(1), config)
    library = ("init_batch", "advance", "response_targets")
    counts = [f"{name} {sum(n for f, n in first.items() if name in f)}" for name in library]
    during_second_batch = marks[-1] - marks[len(marks) // 2 - 1]
    second_key = len(counter.names) - first.total()
    return (
        f"Compilations in synthesizing two batches: {', '.join(counts)}. While the second batch ran: "
        f"{during_second_batch}. With a second key: {second_key}."
    )


# --- PyTorch ---


class Block(nn.Module):
    """Basic block with the shortcut without parameters (every second pixel, new channels zero)."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.stride, self.new = stride, features - inputs
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new:
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The network of `dfq_jax.zoo.cifar_resnet.resnet20`, with the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inputs = {}, 16
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(3):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks[f"layer{stage}_{block}"] = Block(inputs, features, stride)
                inputs = features
        self.blocks = nn.Sequential(collections.OrderedDict(blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def torch_network(variables: Any) -> ResNet20:
    """The network with the weights of the Flax variables."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(dict(variables)).items():
        array = np.asarray(value)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        prefix = "blocks." if path[0].startswith("layer") else ""
        state[prefix + ".".join((*path, names[leaf]))] = torch.from_numpy(array.copy())
    network = ResNet20()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return network.eval().requires_grad_(False)


def moments_of_offset(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean around the stored one, and variance, from the first two moments around the stored mean."""
    offset = x - mean[:, None, None]
    first = offset.mean((0, 2, 3))
    return first, (offset.square().mean((0, 2, 3)) - first.square()).clamp_min(0)


def moments_by_var_mean(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The same from PyTorch's own fused function."""
    var, own = torch.var_mean(x, (0, 2, 3), correction=0)
    return own - mean, var


class TorchLoss:
    """The loss of `dfq_jax.synthesis.objective` as in `CONFIG`, by hooks on the inputs of BatchNorm layers."""

    def __init__(self, network: ResNet20, moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        self.network, self.moments = network, moments
        self.terms: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._match)

    def _match(self, bn: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean_error, var = self.moments(inputs[0], bn.running_mean)
        std_error = (var + STD_EPSILON).sqrt() - (bn.running_var + STD_EPSILON).sqrt()
        self.terms.append((mean_error.square() + std_error.square()).mean())

    def __call__(self, images: Tensor) -> Tensor:
        self.terms.clear()
        self.network(images)
        std = (images.var((2, 3), correction=0) + STD_EPSILON).sqrt()
        on_input = (images.mean((2, 3)).square() + (std - 1).square()).sum(1).mean()
        return torch.stack(self.terms).sum() + on_input


def torch_stepper(variables: Any, memory_format: torch.memory_format, moments: Any) -> Callable[[int], float]:
    """Plain PyTorch: gradients for the images alone, the fused Adam."""
    loss = TorchLoss(torch_network(variables).to(memory_format=memory_format), moments)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=memory_format).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=LEARNING_RATE, fused=True)

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(images).backward()
            optimizer.step()
        return (time.perf_counter() - started) / steps

    return run


def torch_contestant(variables: Any, trial_rounds: int = 4) -> Contestant:
    """The fastest of two memory formats and two formulas for the moments."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    formulas = {"moments around the stored mean": moments_of_offset, "var_mean": moments_by_var_mean}
    steppers = {
        f"{layout}, {formula}": torch_stepper(variables, formats[layout], formulas[formula])
        for layout, formula in itertools.product(formats, formulas)
    }
    speeds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(trial_rounds + 1):
        for name, run in steppers.items():
            speed = BATCH / run(5)
            if round_:  # the first is warm-up
                speeds[name].append(speed)
    for name, values in speeds.items():
        print(f"PyTorch trial: {name}: {statistics.median(values):.0f} (best {max(values):.0f})")
    chosen = max(speeds, key=lambda name: max(speeds[name]))
    return Contestant(f"PyTorch ({chosen})", steppers[chosen])


def compare_losses(graph: Graph, variables: Any) -> None:
    """Both losses on the same images and weights."""
    images = np.random.default_rng(0).normal(size=(BATCH, 32, 32, 3)).astype(np.float32)
    targets = Targets(jnp.zeros(BATCH, jnp.int32), jnp.float32(-jnp.inf))

    def loss(x: jax.Array, variables: Any) -> jax.Array:
        return evaluate(graph, CONFIG, variables, x, targets).loss

    ours, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(images), variables)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
    theirs = TorchLoss(torch_network(variables), moments_of_offset)(x)
    theirs.backward()
    other = x.grad.permute(0, 2, 3, 1).numpy()
    difference = abs(float(ours) - theirs.item()) / theirs.item()
    gradient_difference = np.abs(np.asarray(gradient) - other).max() / np.abs(other).max()
    print(
        f"Loss on the same images: dfq_jax {float(ours):.6f}, PyTorch {theirs.item():.6f}, relative difference "
        f"{difference:.1e}; gradients differ by {gradient_difference:.1e} of the largest."
    )
    assert difference < 1e-4 and gradient_difference < 1e-3


# --- model-compression-toolkit ---


def mct_contestants(variables: Any) -> list[Contestant]:
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
                n_iter=steps + 1, optimizer=TimedAdam, data_gen_batch_size=BATCH, **settings
            )
            times.clear()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress bars
                mct.data_generation.pytorch_data_generation_experimental(network, BATCH, 32, config)
            return (times[-1] - times[0]) / steps

        return Contestant(f"MCT {mct.__version__}, {name}", run)

    network = torch_network(variables)
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
    parser.add_argument("--checkpoint", help="weights of the CIFAR ResNet-20 (.th, .safetensors, ...); default random")
    parser.add_argument("--mct", action="store_true", help="also run model-compression-toolkit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25, help=f"a contestant's steps in a round, a multiple of {CHUNK}")
    arguments = parser.parse_args()
    if arguments.steps < CHUNK or arguments.steps % CHUNK or arguments.rounds < 1:
        parser.error(f"--steps must be a multiple of {CHUNK}, --rounds at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # both use all
    torch.set_num_threads(cores)
    load = os.getloadavg()[0]
    print(f"{cores} cores, load {load:.1f} before the start; jax {jax.__version__}, torch {torch.__version__}")

    key = jax.random.key(0) if arguments.checkpoint is None else None
    model = load_model("cifar_resnet20", arguments.checkpoint, key)
    variables = model.variables if key is None else random_statistics(model.variables)
    apply_fn, variables = as_function(model.module, variables)
    graph = trace(apply_fn, variables, (BATCH, 32, 32, 3))

    compare_losses(graph, variables)
    print(count_compilations(graph, variables))
    reference = torch_contestant(variables)
    contestants = [jax_contestant(graph, variables, chunk) for chunk in (1, CHUNK)] + [reference]
    if arguments.mct:
        contestants += mct_contestants(variables)
    for _ in range(arguments.rounds):
        for contestant in contestants:
            contestant.run(CHUNK)  # warm caches and thread pools
            contestant.measure(arguments.steps)
    print_table(contestants, reference)


if __name__ == "__main__":
    main()
