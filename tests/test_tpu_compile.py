"""What `benchmarks/tpu_compile.py` reads from compiled programs, and a small network compiled for TPUs."""

import importlib.util
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "tpu_compile.py"
BENCHMARK = runpy.run_path(str(SCRIPT))

# As a compiler for TPUs writes it, shortened.
PROGRAM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

ENTRY %main (x: s8[16,32,32,32], w: s8[3,3,32,64], v: f32[64,10]) -> f32[16,10] {
  %x = s8[16,32,32,32]{3,2,1,0:T(32,128)(4,1)} parameter(0)
  %w = s8[3,3,32,64]{3,2,1,0:T(32,128)(4,1)} parameter(1)
  %v = f32[64,10]{1,0:T(8,128)} parameter(2)
  %convolution.2 = s32[16,32,32,64]{3,0,2,1:T(8,128)} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}
  %y = f32[16,64]{1,0} custom-call(%convolution.2), custom_call_target="xla_python_callback"
  %z = f64[16,64]{1,0} convert(%y)
  %all-reduce-start = (f32[64]{0}, f32[]{:T(128)}) all-reduce-start(%y, %y), channel_id=1, to_apply=%sum
  %gathered = f32[64,64]{1,0} all-gather(%y), dimensions={0}
  ROOT %dot.1 = f32[16,10]{1,0} dot(f32[16,64]{1,0} %y, f32[64,10]{1,0} %v), lhs_contracting_dims={1}
}
"""


def test_what_is_read_from_a_program():
    assert BENCHMARK["products"](PROGRAM) == {"s8 x s8 -> s32": 1, "f32 x f32 -> f32": 1}
    assert BENCHMARK["collectives"](PROGRAM) == {"all-reduce (add) of f32[64], f32[]": 1, "all-gather of f32[64,64]": 1}
    assert BENCHMARK["oddities"](PROGRAM) == ["1 values of f64", "calls xla_python_callback"]


def compiled(*arguments):
    """What the benchmark prints, by program."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    found, program = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            what, _, said = line.strip().partition(": ")
            found[program][what] = said
        else:
            program = line.split(", ")[2]
            found[program] = {}
    return found


def memory(found):
    """MiB a chip."""
    (said,) = (line for line in found.values() if "memory" in line)
    return float(re.search(r"memory ([\d.]+) MiB", said)[1])


SMALL = ("--networks", "fashion_resnet20", "--batch", "64")


@pytest.mark.slow
def test_a_small_network_over_devices():
    """By the host's own compiler, which splits programs as that for TPUs does."""
    programs = ("bfloat16", "integer", "pixels", "reconstruction")
    one, four = (
        compiled(*SMALL, "--generations", "cpu", "--chips", chips, "--programs", *programs) for chips in ("1", "4")
    )
    for program in programs:
        assert one[program]["collectives"] == "none" and "odd" not in {**one[program], **four[program]}
        assert memory(four[program]) < memory(one[program])
        found = re.findall(r"([a-z-]+) \((\w+)\) of", four[program]["collectives"])
        assert set(found) == ({("all-reduce", "add")} if program in ("pixels", "reconstruction") else set())


@pytest.mark.slow
def test_a_small_network_for_tpus():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    found = compiled(*SMALL, "--generations", "v5e", "--chips", "4", "--programs", "bfloat16", "integer", "int4")
    kinds = {program: set(re.findall(r"(\S+ x \S+) ->", lines["products"])) for program, lines in found.items()}
    assert kinds == {"bfloat16": {"bf16 x bf16"}, "integer": {"s8 x s8"}, "int4": {"s8 x s4"}}
    assert all(lines["collectives"] == "none" and "odd" not in lines for lines in found.values())
