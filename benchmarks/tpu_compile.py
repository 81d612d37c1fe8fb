"""What the TPU's compiler makes of the library's programs. It needs no TPU, and says nothing of how one runs them.

    pip install 'dfq_jax[tpu-compile]'
    python benchmarks/tpu_compile.py --networks cifar_resnet20 --chips 1 4
    python benchmarks/tpu_compile.py --networks resnet50 --programs float32 bfloat16 integer --generations v5e v6e

Each program is lowered from a CPU host for a topology of `jax.experimental.topologies`, with images sharded over its
chips and variables replicated, and compiled by libtpu in a process of its own, which may take minutes. For each:

compiled     seconds; or the compiler's words
a chip       floating-point operations (of a product three or six times over where float32 is computed by passes in
             bfloat16), bytes read and written, and memory: arguments, outputs that take the place of none, temporaries.
             What a loop does is counted once: for chunks of steps, that is a step
estimate     XLA's own: `optimal_seconds` of its cost analysis, which takes every operation to be limited by arithmetic
             or memory alone, and the sum of the cycles that the compiler chose its windows by; they may disagree
products     types of operands and results of convolutions and matrix products, in the optimized program
collectives  by kind and what they reduce by, with the bytes of their results; what else is odd: host calls, float64

The programs are inference in float32, in bfloat16, simulated (W8A8 in float) and integer (W8A8, residual sums in
float32; `shortcuts`: as codes; `bfloat16`: of a network in that; W4A8 with kernels packed or as int4); chunks of
synthesis by pixels, by a pyramid (the default) and by a generator with swing convolutions (GENIE); a chunk of learning
the block in the middle, W4A4, from images of which each chip has a share; and adapting BatchNorms by
regression, W4A4.

Random weights: what is compiled does not depend on them. `tpu_compile.txt` has the output.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# libtpu looks for a TPU and its metadata server unless it is told that there is none.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # which tests set
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else another process's lock file refuses this one
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
TOPOLOGIES = {
    generation: {1: f"{generation}:1x1", 4: f"{generation}:2x2", 8: f"{generation}:2x4"}
    for generation in ("v5e", "v6e")
} | {"cpu": dict.fromkeys((1, 4, 8), "")}  # the host's own compiler, which splits programs alike, and in seconds
BATCHES = {"cifar_resnet20": 256, "resnet50": 64, "mobilenet_v2": 64}
CACHED = 512  # images that a block is reconstructed on, so many a step
RECONSTRUCTION_BATCH = 32
COLLECTIVES = [
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]
HOST_OPERATIONS = ("infeed", "outfeed", "send", "recv")


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      function: of the arguments.
      arguments: shapes, types and shardings.
      donated: places of arguments that are.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def main() -> None:
    """Compile each program in a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", choices=TOPOLOGIES, default=["v5e"])
    parser.add_argument("--chips", nargs="+", type=int, choices=(1, 4, 8), default=[1])
    parser.add_argument("--networks", nargs="+", default=list(BATCHES), help="names in the zoo")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--batch", type=int, help="images, over all chips")
    parser.add_argument("--minutes", type=float, default=20.0, help="for one program")
    parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the optimized programs")
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)  # in the process of a program
    args = parser.parse_args()
    if args.here:
        generation, chips, network, program = args.here
        report(generation, int(chips), network, program, args.batch, args.hlo)
        return
    rows = [
        (generation, str(chips), network, program)
        for generation in args.generations
        for network in args.networks
        for chips in args.chips
        for program in args.programs
    ]
    for row in rows:
        generation, chips, network, program = row
        batch = args.batch or BATCHES.get(network, 64)
        print(f"{generation} x {chips}, {network}, {program}, {batch} images", flush=True)
        command = [sys.executable, __file__, "--here", *row, "--batch", str(batch)]
        if args.hlo:
            command += ["--hlo", str(args.hlo)]
        # libtpu ends a process whose flags it does not know.
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={chips}" if generation == "cpu" else ""}
        try:
            done = subprocess.run(
                command, timeout=60 * args.minutes, env=os.environ | ENVIRONMENT | flags, stderr=subprocess.PIPE
            )
        except subprocess.TimeoutExpired:
            print(f"  not compiled within {args.minutes:g} minutes", flush=True)
            continue
        if done.returncode:
            print(f"  failed: {' '.join(done.stderr.decode(errors='replace').split())[-600:]}", flush=True)


# --- in the process of a program ---


def report(generation: str, chips: int, network: str, program: str, batch: int, folder: pathlib.Path | None) -> None:
    """Compile one program, and print what it is."""
    import jax

    mesh = device_mesh(generation, chips)
    made = PROGRAMS[program](Network(network, batch, mesh, "bfloat16" if "bfloat16" in program else "float32"))
    began = time.perf_counter()
    try:
        compiled = jax.jit(made.function, donate_argnums=made.donated).lower(*made.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"  refused: {' '.join(str(error).split())[:600]}", flush=True)
        return
    text = compiled.as_text()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{generation}x{chips}-{network}-{program}.hlo").write_text(text)
    print("\n".join(f"  {line}" for line in description(compiled, text, time.perf_counter() - began)), flush=True)


def device_mesh(generation: str, chips: int) -> Any:
    """The chips in a row."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    if generation == "cpu":
        devices = jax.devices()
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation][chips]).devices
    return jax.sharding.Mesh(np.array(devices), ("batch",))


def description(compiled: Any, text: str, seconds: float) -> list[str]:
    """Lines about a compiled program."""
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    estimate = [f"{1e3 * costs['optimal_seconds']:.3f} ms"] if costs.get("optimal_seconds", 0) > 0 else []
    estimate += [f"{1e-6 * cycles:.2f} million cycles"] if cycles else []
    return [
        f"compiled in {seconds:.0f} s; a chip: {1e-9 * costs.get('flops', 0):.2f} GFLOP, "
        f"{2**-20 * costs.get('bytes accessed', 0):.1f} MiB moved, memory {2**-20 * total:.1f} MiB "
        f"(arguments {2**-20 * arguments:.1f}, temporaries {2**-20 * temporaries:.1f})",
        f"estimate: {', '.join(estimate) or 'none'}",
        f"products: {counted(products(text))}",
        f"collectives: {counted(collectives(text))}",
        *(f"odd: {what}" for what in oddities(text)),
    ]


def counted(found: collections.Counter[str]) -> str:
    """In one line, the most frequent first."""
    return "; ".join(f"{what}: {count}" for what, count in found.most_common()) or "none"


def products(text: str) -> collections.Counter[str]:
    """How many convolutions and matrix products there are of each types of operands and result."""
    types = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[", text, re.MULTILINE))
    found: collections.Counter[str] = collections.Counter()
    for result, operands in re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(([^)]*)\)", text):
        names = [operand.split()[-1].lstrip("%") for operand in re.split(r", (?=\S*%|\w+\[)", operands)]
        found[f"{' x '.join(types.get(name, '?') for name in names)} -> {result}"] += 1
    return found


def collectives(text: str) -> collections.Counter[str]:
    """How many collectives there are of each kind, by what they reduce and how large they are."""
    roots = {}
    for name, body in re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        root = re.search(r"ROOT [^=]*= \S+ ([\w-]+)\(", body)
        roots[name] = root[1] if root else "?"
    found: collections.Counter[str] = collections.Counter()
    for types, kind, rest in re.findall(rf"= (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", text):
        reduced = re.search(r"to_apply=%?([\w.-]+)", rest)
        by = f" ({roots.get(reduced[1], '?')})" if reduced else ""
        found[f"{kind}{by} of {shapes(types)}"] += 1
    return found


def shapes(types: str, most: int = 3) -> str:
    """Shapes of a result, without their layouts."""
    found = re.findall(r"\w+\[[\d,]*\]", types)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def oddities(text: str) -> list[str]:
    """What no program of the library should hold."""
    found = [
        f"{count} values of {kind}" for kind in ("f64", "c128") if (count := len(re.findall(rf"= {kind}\[", text)))
    ]
    targets = set(re.findall(r'custom_call_target="([^"]*)"', text))
    found += [f"calls {target}" for target in sorted(targets) if "callback" in target.lower()]
    found += [f"{count} {op}" for op in HOST_OPERATIONS if (count := len(re.findall(rf" {op}(?:-start)?\(", text)))]
    return found


class Network:
    """A network of the zoo with random weights, and what its programs take, as shapes with shardings."""

    def __init__(self, name: str, batch: int, mesh: Any, dtype: Any):
        import jax
        import numpy as np

        from dfq_jax import as_function, trace
        from dfq_jax.zoo.entry import abstract_model
        from dfq_jax.zoo.registry import find_model

        self.batch = batch
        sharding = functools.partial(jax.sharding.NamedSharding, mesh)
        self.by_batch = sharding(jax.sharding.PartitionSpec("batch"))
        self.everywhere = sharding(jax.sharding.PartitionSpec())
        entry, rng = find_model(name), np.random.default_rng(0)
        module, template, _ = abstract_model(entry)

        def draw(leaf: Any) -> Any:
            low = -1.0 if len(leaf.shape) > 1 else 0.5  # variances and scales are positive
            return rng.uniform(low, 1.5, leaf.shape).astype(np.float32)

        self.apply_fn, variables = as_function(module, jax.tree.map(draw, template))
        self.variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        images = jax.ShapeDtypeStruct((batch, *entry.input_shape[1:]), dtype)
        self.graph = trace(self.apply_fn, self.variables, images)
        self.images = self.sharded(images)

    def sharded(self, tree: Any) -> Any:
        """Over their first axis."""
        return _placed(tree, self.by_batch)

    def replicated(self, tree: Any) -> Any:
        """The same everywhere."""
        return _placed(tree, self.everywhere)

    def quantized(self, bits: str, **fields: Any) -> Any:
        """Rounded to nearest, with ranges of any values."""
        from dfq_jax import Convention, quantize_params

        convention = Convention.parse(bits, weight_range="min_max", **fields)
        ranges = {tensor.name: (-1.0, 6.0) for tensor in self.graph.tensors}
        return quantize_params(self.graph, self.variables, ranges, convention)


def _placed(tree: Any, sharding: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def placed(leaf: Any) -> Any:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree)


def floating(network: Network) -> Program:
    """The network itself."""
    return Program(network.apply_fn, (network.replicated(network.variables), network.images))


def simulated(network: Network) -> Program:
    """W8A8 in float."""
    from dfq_jax import apply_quantized

    return Program(
        functools.partial(apply_quantized, network.graph),
        (network.replicated(network.quantized("w8a8")), network.images),
    )


def integer(network: Network, bits: str = "w8a8", *, policy: Any = None, **fields: Any) -> Program:
    """Codes from layer to layer; by the policy for TPUs, with some fields of another value."""
    import dataclasses

    from dfq_jax.runtime import apply_plan, compile_integer, default_policy

    policy = dataclasses.replace(default_policy("tpu"), self_test=False, **(policy or {}))
    plan, variables = compile_integer(network.graph, network.quantized(bits, **fields), policy)
    for layer in plan.layers:
        if layer.decision.runs != "int8":
            print(f"  {layer.name} runs as {layer.decision.runs}: {layer.decision.reason}")
    return Program(functools.partial(apply_plan, plan), (network.replicated(variables), network.images))


def synthesis(network: Network, config: Any) -> Program:
    """A chunk of optimizer steps."""
    import jax

    from dfq_jax.synthesis import advance_batch, init_batch
    from dfq_jax.synthesis.source import image_optimizer

    optimizer = image_optimizer(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    static = (network.graph, config, optimizer)
    state, targets = jax.eval_shape(functools.partial(init_batch, *static), key)

    def placed(path: Any, leaf: Any) -> Any:
        # Latents, images and their moments are of each image; the generator's weights are of all.
        own = leaf.shape[:1] == (network.batch,) and "generator" not in jax.tree_util.keystr(path)
        return (network.sharded if own else network.replicated)(leaf)

    state = jax.tree_util.tree_map_with_path(placed, state)
    targets = jax.tree_util.tree_map_with_path(placed, targets)
    variables, steps, key = map(network.replicated, (network.variables, 50, key))
    return Program(functools.partial(advance_batch, *static), (steps, variables, state, targets, key), (2,))


def pixels(network: Network) -> Program:
    """A chunk of synthesis by pixels."""
    from dfq_jax import SynthesisConfig

    return synthesis(network, SynthesisConfig(source="pixels", batch_size=network.batch))


def pyramid(network: Network) -> Program:
    """A chunk of synthesis by default settings."""
    from dfq_jax import SynthesisConfig

    return synthesis(network, SynthesisConfig(batch_size=network.batch))


def generator(network: Network) -> Program:
    """A chunk of synthesis by GENIE's settings, a generator and swing convolutions."""
    import dataclasses

    from dfq_jax.synthesis import GENIE

    return synthesis(network, dataclasses.replace(GENIE, batch_size=network.batch))


def reconstruction(network: Network) -> Program:
    """A chunk of learning a block in the middle, W4A4; chips share minibatches and what they are drawn from."""
    import jax

    from dfq_jax import ReconstructionConfig, apply_quantized
    from dfq_jax.graph import subnetwork
    from dfq_jax.stages.rounding.block import Cache, advance_block, draw, init_block

    config = ReconstructionConfig(batch_size=RECONSTRUCTION_BATCH)
    graph, blocks = network.graph, network.graph.blocks
    sub = subnetwork(graph, blocks[len(blocks) // 2], config.batch_size)
    own, float_own = (sub.select(graph, v) for v in (network.quantized("w4a4"), network.variables))
    inputs = jax.ShapeDtypeStruct((CACHED, *sub.graph.input.shape[1:]), sub.graph.input.dtype)
    targets = jax.eval_shape(functools.partial(apply_quantized, sub.graph), float_own, inputs)
    state, bases = jax.eval_shape(lambda a, b: init_block(sub.graph, config, a, b, frozenset()), float_own, own)
    key = jax.eval_shape(lambda: jax.random.key(0))
    draws = jax.eval_shape(lambda key: draw(key, config, 1, len(sub.layers)), key)
    mesh = network.everywhere.mesh

    def advance(steps: Any, own: Any, bases: Any, cache: Any, count: Any, state: Any, draws: Any) -> Any:
        return advance_block(sub.graph, config, steps, None, None, own, bases, cache, count, state, draws, mesh)

    steps, own, bases, count, state, draws = map(network.replicated, (50, own, bases, CACHED, state, draws))
    cache = network.sharded(Cache(inputs, inputs, targets))
    return Program(advance, (steps, own, bases, cache, count, state, draws), (5,))


def adaptation(network: Network) -> Program:
    """New BatchNorm statistics by regression, W4A4."""
    from dfq_jax import BatchNormConfig, adapt_batch_norm

    def adapt(variables: Any, qvariables: Any, images: Any) -> Any:
        return adapt_batch_norm(network.graph, variables, qvariables, images, BatchNormConfig(method="regression"))

    variables, qvariables = map(network.replicated, (network.variables, network.quantized("w4a4")))
    return Program(adapt, (variables, qvariables, network.images))


SYMMETRIC = {"symmetric_weights": True, "edge_bits": None}
PROGRAMS: dict[str, Callable[[Network], Program]] = {
    "float32": floating,
    "bfloat16": floating,
    "simulated": simulated,
    "integer": integer,
    "integer_shortcuts": functools.partial(integer, shortcuts="quantized"),
    "integer_bfloat16": integer,
    "packed": functools.partial(integer, bits="w4a8", policy={"storage": "memory", "int4": False}, **SYMMETRIC),
    "int4": functools.partial(integer, bits="w4a8", **SYMMETRIC),
    "pixels": pixels,
    "pyramid": pyramid,
    "generator": generator,
    "reconstruction": reconstruction,
    "adaptation": adaptation,
}


if __name__ == "__main__":
    main()
