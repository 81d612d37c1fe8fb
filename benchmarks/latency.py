"""Milliseconds of one call on this CPU: float, simulated and int8 in XLA, ONNX Runtime and LiteRT.

    python benchmarks/latency.py resnet18 mobilenet_v2 efficientnet_lite0 --batches 1 32

Contestants take turns round by round, so that what else the machine does slows neighbours alike. Printed are medians
over rounds, and the ratios to XLA's and ONNX Runtime's float network within a round (above 1: faster). XLA float32 is
`jax.jit(apply_fn)`: what a user's own code takes. Evaluation is what this library takes for the float and the simulated
network, computed as `dfq_jax.data.predict` computes them; integer is `Quantized.integer` under the default policy of
the CPU and under the one that `measure_policy` found. ONNX Runtime and LiteRT get as many threads as there are cores;
LiteRT runs in a process of its own, whose start is not counted. Weights may be random: they do not change the time.
`benchmarks/latency.txt` has the output.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from served import Served, noise, serve

from dfq_jax import RECIPES, Quantized, quantize
from dfq_jax.base import in_pieces
from dfq_jax.export.onnx import export_onnx, open_onnx
from dfq_jax.export.tflite import TFLiteExporter
from dfq_jax.graph import apply_quantized, run

REFERENCES = "XLA float32", "ONNX Runtime float32"
MIN_TURN = 0.2  # seconds: calls are repeated until a turn takes so long

Turn = Callable[[], float]  # seconds of one call, from a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names in the zoo")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-tflite", action="store_true")
    arguments = parser.parse_args()

    print(f"{processor()}, {os.cpu_count()} cores, jax {jax.__version__}, load {os.getloadavg()[0]:.1f} at the start")
    for name in arguments.models:
        served = serve(name)
        recipe = RECIPES["noise"].replace(synthesis_num_images=4)
        net = quantize(
            served.module, served.variables, input_shape=served.graph.input.shape, recipe=recipe, bits="w8a8"
        )
        for batch in arguments.batches:
            with tempfile.TemporaryDirectory() as folder:
                turns = _xla(served, net, batch) | _onnxruntime(served, net, batch, Path(folder))
                if not arguments.no_tflite:
                    turns |= _litert(served, net, batch, Path(folder))
                _print(name, batch, play(turns, arguments.rounds))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {f for line in lines if line.startswith("flags") for f in line.split()}
    found = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags]
    return (
        f"{names[0] if names else platform.processor() or 'unknown processor'} ({', '.join(found) or 'no flags read'})"
    )


# --- contestants ---


def in_process(function: Callable[[], Any]) -> Turn:
    jax.block_until_ready(function())

    def turn() -> float:
        began, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - began < MIN_TURN:
            jax.block_until_ready(function())
            calls += 1
        return (time.perf_counter() - began) / calls

    return turn


def _input(served: Served, batch: int) -> np.ndarray:
    return noise(0, (batch, *served.graph.input.shape[1:]))


def _xla(served: Served, net: Quantized, batch: int) -> dict[str, Turn]:
    x = jax.numpy.asarray(_input(served, batch))
    floating = jax.jit(served.graph.apply_fn)
    policy = net.measure_policy(x.shape, rounds=5)
    default, measured = net.integer(), net.integer(policy)
    runs = [layer.decision.runs for layer in measured.plan.layers]
    print(f"{served.name}, batch {batch}: {runs.count('int8')} of {len(runs)} layers in int8 under the measured policy")
    simulated = in_pieces(apply_quantized, net.variables, x, static=(net.graph,))
    evaluated = in_pieces(run, served.variables, x, static=(served.graph,))
    return {
        REFERENCES[0]: in_process(lambda: floating(served.variables, x)),
        "evaluation, float": in_process(lambda: evaluated(x)),
        "evaluation, simulated": in_process(lambda: simulated(x)),
        "XLA integer": in_process(lambda: default(x)),
        "XLA integer, measured": in_process(lambda: measured(x)),
    }


def _onnxruntime(served: Served, net: Quantized, batch: int, folder: Path) -> dict[str, Turn]:
    x, turns = _input(served, batch), {}
    for name, network in (("float32", (served.graph, served.variables)), ("int8", net)):
        path = folder / f"{name}.onnx"
        export_onnx(network, path)
        run = open_onnx(path)
        turns[f"ONNX Runtime {name}"] = in_process(lambda run=run: run(x))
    return turns


def _litert(served: Served, net: Quantized, batch: int, folder: Path) -> dict[str, Turn]:
    exporter, x, turns = TFLiteExporter(), _input(served, batch), {}
    threads, calls = os.cpu_count() or 1, 4 if batch == 1 else 2
    exporter.write(net, folder / "int8.tflite")
    models = {
        "float32": exporter.float_model(served.graph, served.variables, x)[0],
        "int8": (folder / "int8.tflite").read_bytes(),
    }
    for name, model in models.items():

        def turn(model: bytes = model) -> float:
            # The first call of a process pays for memory.
            _, seconds = exporter.timed(model, np.concatenate([x] * (calls + 1)), batch=batch, threads=threads)
            return float(np.median(seconds[1:]))

        turns[f"LiteRT {name}"] = turn
    return turns


# --- rounds ---


def play(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return seconds


def _print(name: str, batch: int, seconds: dict[str, list[float]]) -> None:
    print(f"{name}, batch {batch}, {len(seconds[REFERENCES[0]])} rounds; ratios to {' and '.join(REFERENCES)}")
    for contestant, own in seconds.items():
        columns = [f"{contestant:<24}{1000 * statistics.median(own):9.1f} ms"]
        for reference in REFERENCES:
            ratios = [a / b for a, b in zip(seconds[reference], own, strict=True)]
            columns.append(f"{statistics.median(ratios):5.2f} x   ({min(ratios):.2f} to {max(ratios):.2f})")
        print("  " + "   ".join(columns), flush=True)


if __name__ == "__main__":
    main()
