"""Seconds and memory of loading a checkpoint of about 100 MB into ResNet-50, for each format of file.

    python benchmarks/checkpoint_loading.py

Memory is how far the resident memory of a fresh process rises at its peak, as a multiple of the file's size; the arrays
that are loaded are part of it. It is read from /proc, so on Linux only. The weights are random, under the names that
torchvision gives them or, for msgpack, Flax.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import safetensors.numpy

from dfq_jax import zoo
from dfq_jax.zoo.registry import find_model

MODEL = "resnet50"
FORMATS = ("safetensors", "torch zip", "torch legacy", "npz", "msgpack")


def variables() -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), find_model(MODEL).template())


def torchvision_names(tree: dict) -> dict[str, np.ndarray]:
    """The arrays as torchvision names and arranges them: each of the layout's names is tried on the zoo's own table."""
    layout = next(layout for layout in zoo.LAYOUTS if layout.name == "torchvision_resnet")
    modules = ["conv1", "bn1", "fc"]
    for stage, count in enumerate((3, 4, 6, 3), start=1):
        for block in range(count):
            parts = [f"{kind}{number}" for number in (1, 2, 3) for kind in ("conv", "bn")]
            parts += ["downsample.0", "downsample.1"] * (block == 0)
            modules += [f"layer{stage}.{block}.{part}" for part in parts]
    state = {}
    for module in modules:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            rule, target = layout.place(f"{module}.{leaf}") or (None, None)
            array = tree
            for key in (target or "none").split("/"):
                array = array.get(key, {}) if isinstance(array, dict) else {}
            if isinstance(array, np.ndarray):
                turned = {"conv": (3, 2, 0, 1), "linear": (1, 0)}.get(rule.transform)
                state[f"{module}.{leaf}"] = np.ascontiguousarray(array.transpose(turned) if turned else array)
    return state


def write(kind: str, path: Path, tree: dict) -> None:
    if kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
        return
    state = torchvision_names(tree)
    if kind == "safetensors":
        safetensors.numpy.save_file(state, path)
    elif kind == "npz":
        np.savez(path, **state)
    else:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch zip")


def peak_memory() -> int:
    """The largest resident memory of this process, in bytes; `getrusage` would include its parent's."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(path: str) -> None:
    """In a process of its own: prints seconds and the growth of its peak memory in bytes."""
    template = find_model(MODEL).template()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from the imports
    before = peak_memory()
    began = time.perf_counter()
    loaded = zoo.load_checkpoint(path, template)
    seconds = time.perf_counter() - began
    grown = peak_memory() - before
    assert len(jax.tree.leaves(loaded)) == len(jax.tree.leaves(template))
    print(json.dumps([seconds, grown]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    path = parser.parse_args().measure
    if path:
        measure(path)
        return
    print(f"{'format':14}{'MB':>8}{'seconds':>10}{'memory / file':>16}")
    with tempfile.TemporaryDirectory() as folder:
        tree = variables()
        for kind in FORMATS:
            file = Path(folder) / "weights"
            try:
                write(kind, file, tree)
            except ImportError:
                print(f"{kind:14}  (writing it needs torch)")
                continue
            command = [sys.executable, __file__, "--measure", str(file)]
            seconds, grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            size = file.stat().st_size
            print(f"{kind:14}{size / 1e6:8.1f}{seconds:10.2f}{grown / size:16.2f}", flush=True)


if __name__ == "__main__":
    main()
