"""Options of the test suite."""

import itertools
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

# Tests run a program once or twice: compiling it is what takes the time, and this makes it three times as fast. No test
# asks how fast programs are, or that two programs agree in more than what rounding leaves. Programs in one piece take a
# third of the maps (see below). An XLA that does not know a flag ends the process: only those known to have it get it.
OPTIMIZED = os.environ.get("DFQ_JAX_TESTS_OPTIMIZED", "") not in ("", "0")  # as users have them: slower to compile
FLAGS = {"--xla_cpu_use_fusion_emitters=false": (0, 11), "--xla_cpu_parallel_codegen_split_count=1": (0, 13)}
if not OPTIMIZED:
    flags = (flag for flag, unknown in FLAGS.items() if jax.__version_info__ < unknown)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
if not OPTIMIZED and jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of processes that tests start


# All functions of the package are checked against their signatures by `pytest --typecheck`. It is an option because
# these checks come before the library's own: tests of bad input (marked `untyped`) would see other errors.


def pytest_addoption(parser):
    parser.addoption("--typecheck", action="store_true", help="check the types of all functions, and array shapes")


def pytest_configure(config):
    if config.getoption("--typecheck"):
        from jaxtyping import install_import_hook

        install_import_hook("dfq_jax", "beartype.beartype")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--typecheck"):
        skip = pytest.mark.skip(reason="passes other types than the signatures say, on purpose")
        for item in items:
            if "untyped" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process: what they share is computed and compiled there once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """A module's `rng` starts anew for each test: what a test draws does not depend on which ran before it."""
    if isinstance(getattr(request.module, "rng", None), np.random.Generator):
        request.module.rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


def rounds_products():
    """Whether float32 products of default precision are rounded: on accelerators, and under `tests.tf32`."""
    return jax.default_backend() != "cpu" or "tests.tf32" in sys.modules


@pytest.fixture(autouse=True)
def full_precision(request):
    """Full precision where the backend's default is less, so that what fails is no tolerance made for float32."""
    if not rounds_products() or "default_precision" in request.keywords:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


# Compiled programs are mapped into memory piece by piece, and Linux allows a process 65,530 maps: beyond, it aborts.
MAPS, MANY_MAPS = pathlib.Path("/proc/self/maps"), 30_000
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Let go of compiled programs before there are too many for one process."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
