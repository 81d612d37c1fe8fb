"""Damaged files of every kind that is read: what is raised, how long it takes, how much memory.

    python benchmarks/fuzz_files.py [--mutations 1500] [--kinds npz msgpack]

A file of each kind is damaged in many ways (bytes changed, the end cut off, pieces deleted, copied and overwritten,
digits of headers changed; every second archive inside a member, with right checksums) and read. Whatever is wrong with
it must be an error of ours that names the file, within two seconds and three times the file's size in memory, files
below a megabyte counting as one. Memory is what Python and NumPy allocated or, on Linux, how far the resident memory
rose, whichever is more. The exit status is 1 if a file broke one of these rules.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import re
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dfq_jax import ArtifactError
from dfq_jax.export import artifact
from dfq_jax.quantizers import quantize_kernel
from dfq_jax.zoo.arrays import read_arrays

SECONDS, RATIO, FLOOR = 2.0, 3.0, 1 << 20
EDGE = 2000  # headers are within so many bytes from a file's beginning or end


def arrays() -> dict[str, np.ndarray]:
    """About two megabytes under a few names."""
    rng = np.random.default_rng(0)
    shapes = {"stem/kernel": (3, 3, 3, 64), "head/kernel": (512, 512), "head/bias": (512,)}
    shapes |= {f"block{n}/kernel": (3, 3, 64, 128) for n in range(3)} | {f"block{n}/scale": (64,) for n in range(3)}
    return {f"params/{name}": rng.random(shape, np.float32) for name, shape in shapes.items()}


def nested() -> dict:
    tree: dict = {"params": {}}
    for name, array in arrays().items():
        _, layer, leaf = name.split("/")
        tree["params"].setdefault(layer, {})[leaf] = array
    return tree


# --- a file of each kind ---


def torch_state(*, legacy: bool) -> bytes:
    """The pickle of a state dict, as torch writes it."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    parts = [b"\x80\x02ccollections\nOrderedDict\n)Rq\x00("]
    for index, (name, array) in enumerate(arrays().items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", b"(", text("storage"), b"ctorch\nFloatStorage\n"]
        parts += [text(str(index)), text("cpu"), b"J" + struct.pack("<i", array.size), b"N" if legacy else b"", b"tQ"]
        parts += [b"K\x00", integers(array.shape), integers(strides), b"\x89ccollections\nOrderedDict\n)RtR"]
    return b"".join([*parts, b"u."])


def torch_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("weights/data.pkl", torch_state(legacy=False))
        archive.writestr("weights/byteorder", "little")
        for index, array in enumerate(arrays().values()):
            archive.writestr(f"weights/data/{index}", array.tobytes())
    return stream.getvalue()


def torch_legacy() -> bytes:
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    keys = [str(index) for index in range(len(arrays()))]
    parts = [*(pickle.dumps(head, 2) for head in heads), torch_state(legacy=True), pickle.dumps(keys, 2)]
    return b"".join([*parts, *(struct.pack("<q", array.size) + array.tobytes() for array in arrays().values())])


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays())
    return stream.getvalue()


def saved() -> bytes:
    """Our own artifact, with codes of 8 and of 4 bits."""
    tree = nested()
    for layer, bits in (("stem", 8), ("head", 4), ("block0", 8)):
        kernel = jnp.asarray(tree["params"][layer]["kernel"])
        codes = quantize_kernel(kernel, bits=bits, symmetric=True, channel_axes=(), method="min_max")
        tree["params"][layer]["kernel"] = codes
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "a", tree, header={"recipe": "none"})
        return (Path(folder) / "a").read_bytes()


KINDS: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "artifact": (saved, artifact.load),
    "torch legacy": (torch_legacy, read_arrays),
    "torch zip": (torch_zip, read_arrays),
    "npz": (npz, read_arrays),
    "msgpack": (lambda: flax.serialization.msgpack_serialize(nested()), read_arrays),
    "safetensors": (lambda: safetensors.numpy.save(arrays()), read_arrays),
}


# --- damage ---


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three kinds of damage, half of it in the first and last bytes, where headers are."""
    data = bytearray(content)

    def place() -> int:
        near = int(rng.integers(EDGE)) % len(data)
        return (near, len(data) - 1 - near, *rng.integers(len(data), size=2).tolist())[rng.integers(4)]

    for _ in range(rng.integers(1, 4)):
        start, length = place(), int(2 ** rng.uniform(0, 12))
        match rng.choice(
            ["bytes", "cut", "delete", "insert", "overwrite", "digits"], p=[0.3, 0.05, 0.1, 0.1, 0.1, 0.35]
        ):
            case "bytes":
                for _ in range(rng.integers(1, 9)):
                    data[place()] = rng.choice([0x00, 0x01, 0x7F, 0x80, 0xFF, rng.integers(256)])
            case "cut":
                del data[start:]
            case "delete":
                del data[start : start + length]
            case "insert":
                to = place()
                data[to:to] = data[start : start + length]
            case "overwrite":
                to = place()
                data[to : to + length] = data[start : start + length]
            case "digits":
                edge = range(0, EDGE) if rng.integers(2) else range(max(len(data) - EDGE, 0), len(data))
                found = list(re.finditer(rb"\d+", data[edge.start : edge.stop]))
                if found:
                    first, last = (edge.start + at for at in found[rng.integers(len(found))].span())
                    data[first:last] = str(int(10 ** rng.uniform(0, 20))).encode()
        if not data:
            break
    return bytes(data)


def mutate_member(content: bytes, rng: np.random.Generator) -> bytes:
    """A zip archive with a damaged member and right checksums, so that what is behind them is reached."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        damaged = names[rng.integers(len(names)) if rng.integers(2) else 0]
        for name in names:
            raw = old.read(name)
            new.writestr(name, mutate(raw, rng) if name == damaged else raw)
    return stream.getvalue()


# --- what comes of it ---


@dataclass
class Outcome:
    """What reading some damaged files of a kind came to; `broken` says which broke a rule, and how."""

    kind: str
    mutations: int = 0
    read: int = 0
    refused: int = 0
    other: int = 0
    slowest: float = 0.0
    memory: float = 0.0
    broken: tuple[str, ...] = ()


def resident(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at its peak since the last reset (VmHWM); 0 elsewhere than on Linux."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) << 10 if found else 0
    return 0


def attempt(read: Callable[[Path], object], path: Path) -> tuple[str, float, int]:
    """Reads a file once: "read", "refused" or the wrong error; seconds; bytes of memory at the peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    tracemalloc.start()
    start = time.perf_counter()
    try:
        read(path)
        result = "read"
    except Exception as error:
        ours = type(error) in (ValueError, ArtifactError) and str(path) in str(error)
        result = "refused" if ours else f"{type(error).__name__}: {error}"[:200]
    seconds = time.perf_counter() - start
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, seconds, max(traced, resident("VmHWM") - before)


def fuzz(kind: str, mutations: int, folder: Path) -> Outcome:
    """Damages a file of a kind so many times, and reads it each time."""
    make, read = KINDS[kind]
    content, path, outcome = make(), folder / "file", Outcome(kind)
    path.write_bytes(content)
    read(path)  # what is compiled and imported then is not the damage's
    for seed in range(mutations + 1):  # the first is the file unharmed, which is measured and not counted
        damage = mutate_member if seed % 2 and zipfile.is_zipfile(io.BytesIO(content)) else mutate
        path.write_bytes(damage(content, np.random.default_rng(seed)) if seed else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, seconds, memory = attempt(read, path)
        ratio = memory / max(path.stat().st_size, FLOOR)
        outcome.mutations += seed > 0
        outcome.read += seed > 0 and result == "read"
        outcome.refused += result == "refused"
        outcome.other += result not in ("read", "refused")
        outcome.slowest, outcome.memory = max(outcome.slowest, seconds), max(outcome.memory, ratio)
        if result not in ("read", "refused") or seconds > SECONDS or ratio > RATIO or (seed == 0 and result != "read"):
            outcome.broken += (f"{kind}, seed {seed}: {result}, {seconds:.2f} s, {ratio:.2f} x the size",)
    return outcome


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1500, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    broken: list[str] = []
    print(f"{'kind':14}{'mutations':>10}{'read':>7}{'refused':>9}{'other errors':>14}{'slowest':>10}{'memory':>8}")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(kind, options.mutations, Path(folder))
        print(
            f"{kind:14}{found.mutations:10}{found.read:7}{found.refused:9}{found.other:14}"
            f"{found.slowest:8.2f} s{found.memory:7.2f}x",
            flush=True,
        )
        broken += found.broken
    print(*broken, sep="\n", end="\n" if broken else "")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
