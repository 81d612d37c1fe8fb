"""Whole processes, as a user starts them: wall time, peak memory, and what is compiled.

    pip install 'dfq_jax[cli]'
    python benchmarks/start_to_end.py demo demo_again instant
    python benchmarks/start_to_end.py instant_efficientnet_lite0 instant_mobilenet_v2 --weights mobilenet_v2=FILE
    python benchmarks/start_to_end.py fast best --weights cifar_resnet20=resnet20-12fca82f.th --data npz:test.npz

Each run is a process of its own, with an empty folder for compiled programs unless it is the second run (`_again`) of
the case before, which finds what that one kept. Times are from the start of the interpreter to the end of the process.
`compilations` counts programs that XLA compiled (not those read from the folder), by JAX's own events.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of the command line; `instant` on networks of ImageNet's size at 8 bits, as nearly lossless as it gets.
CASES = {
    "help": ("--help",),
    "demo": ("demo",),
    "demo_again": ("demo",),
    "instant": ("quantize", "cifar_resnet20", "--recipe", "instant", "--bits", "w4a4"),
    "instant_again": ("quantize", "cifar_resnet20", "--recipe", "instant", "--bits", "w4a4"),
    "instant_efficientnet_lite0": ("quantize", "efficientnet_lite0", "--recipe", "instant", "--bits", "w8a8"),
    "instant_mobilenet_v2": ("quantize", "mobilenet_v2", "--recipe", "instant", "--bits", "w8a8"),
    "fast": ("quantize", "cifar_resnet20", "--recipe", "fast", "--bits", "w4a4"),
    "best": ("quantize", "cifar_resnet20", "--recipe", "best", "--bits", "w4a4"),
}
# Runs the command line as its script does, and counts.
PROCESS = """
import resource
import sys
import jax
counts = {"compilations": 0, "compiling": 0.0, "tracing": 0.0}
def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        counts["compilations"] += 1
        counts["compiling"] += seconds
    elif event.startswith("/jax/core/compile/"):
        counts["tracing"] += seconds
def retrieved(event, **_):
    if event == "/jax/compilation_cache/cache_hits":
        counts["compilations"] -= 1
jax.monitoring.register_event_duration_secs_listener(count)
jax.monitoring.register_event_listener(retrieved)
from dfq_jax.cli import main
code = main()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("\\n@counts", *counts.values(), peak / (2**20 if sys.platform == "darwin" else 2**10), file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="MODEL=FILE", help="for networks whose weights the zoo lacks"
    )
    parser.add_argument("--data", help="images to evaluate the CIFAR network on, as the command line takes them")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--bits", nargs="*", help="in place of the case's own; one run for each")
    args = parser.parse_args()
    weights = dict(entry.split("=", 1) for entry in args.weights)
    print(f"{os.process_cpu_count() if hasattr(os, 'process_cpu_count') else os.cpu_count()} cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} at the start")
    folder, root = "", tempfile.mkdtemp()
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for case in args.cases:
        command = list(CASES[case])
        if command[0] == "quantize" and command[1] in weights:
            command += ["--checkpoint", weights[command[1]]]
            command += ["--evaluate", args.data] if args.data else []
        for bits in args.bits or [None]:
            for seed in args.seeds if command[0] == "quantize" else [None]:
                settings = [] if seed is None else ["--seed", str(seed)]
                settings += [] if bits is None or command[0] != "quantize" else ["--bits", bits]
                if not case.endswith("_again"):
                    folder = tempfile.mkdtemp(dir=root)
                run(case, [*command, *settings], folder)


def run(case: str, command: list[str], folder: str) -> None:
    """One process, and a line about it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    kept["XDG_CACHE_HOME"] = kept["HOME"] = folder
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROCESS, *command], env=kept, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(done.stderr)
    compilations, compiling, tracing, peak = re.findall(r"@counts (\S+) (\S+) (\S+) (\S+)", done.stderr)[-1]
    print(f"\n$ dfq-jax {' '.join(Path(part).name if '/' in part else part for part in command)}")
    print(
        f"  {case}: {seconds:.1f} s, peak memory {float(peak):,.0f} MiB; {compilations} compilations of "
        f"{float(compiling):.1f} s, tracing and lowering {float(tracing):.1f} s"
    )
    lines = done.stdout.rstrip().splitlines()
    print("\n".join(f"  {line}" for line in lines), flush=True)


if __name__ == "__main__":
    main()
