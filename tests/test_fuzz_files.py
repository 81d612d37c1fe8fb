"""Some of the damaged files of `benchmarks/fuzz_files.py`: only errors of ours, and no more memory than allowed."""

import pathlib
import runpy

import pytest

FUZZ = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "benchmarks" / "fuzz_files.py"))


@pytest.mark.parametrize("kind", FUZZ["KINDS"])
def test_damaged_files(kind, tmp_path):
    found = FUZZ["fuzz"](kind, 120, tmp_path)
    assert found.mutations == 120 and found.read + found.refused == 120, found.broken
    assert found.read < 60
    assert found.memory <= FUZZ["RATIO"], found.broken


def test_what_breaks_a_rule_is_said(tmp_path):
    def careless(path):
        if path.read_bytes() != content:
            raise KeyError("x")

    content = FUZZ["KINDS"]["npz"][0]()
    FUZZ["KINDS"]["careless"] = (lambda: content, careless)
    try:
        found = FUZZ["fuzz"]("careless", 4, tmp_path)
    finally:
        del FUZZ["KINDS"]["careless"]
    assert (found.read, found.refused, found.other) == (0, 0, 4)
    assert "careless, seed 1: KeyError: 'x'" in found.broken[0]
