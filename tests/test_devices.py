"""One call on several devices, and in several processes: what one device gives.

Run as a script, this module does the work on the devices that it finds and prints what it found as JSON; the tests run
it with eight simulated ones, or as two processes with four each.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from random_networks import random_network

import dfq_jax
from dfq_jax.base import (
    agreed,
    by_image,
    check_mesh,
    fingerprint,
    in_pieces,
    mesh_of,
    noting_lost_processes,
    on_all,
    sharded,
)
from dfq_jax.base import devices as base_devices
from dfq_jax.data import Dataset, accuracy, predict
from dfq_jax.recipes import RECIPES
from dfq_jax.stages import RangeSearchConfig
from dfq_jax.stages.rounding.learned import _BlockLoop
from dfq_jax.synthesis.loop import image_axes
from dfq_jax.synthesis.source import image_optimizer
from dfq_jax.zoo import load_model

# Momentum, not Adam: its first steps are the signs of gradients, of which rounding decides the small ones.
SMALL = {
    "synthesis_num_images": 48,
    "synthesis_batch_size": 16,
    "synthesis_steps": 4,
    "synthesis_optimizer": "sgd",
    "synthesis_learning_rate": 0.1,
}
LEARNING = {"reconstruction_steps": 20, "finetune_steps": 20}
# A network of many layers: other recipes compile for a quarter of an hour, and where blocks are learned one after the
# other, in float32, what rounding leaves grows to percents of its codes (`in_float64` below).
FEW = ("paper", "instant")
EVERYTHING = dfq_jax.Recipe(
    name="everything",
    range_search=RangeSearchConfig(max_images=16, batch_size=16, one_by_one=False),
    rounding="gptq",
    reconstruction=dfq_jax.ReconstructionConfig(steps=4),
    bias_correction=True,
    batch_norm=dfq_jax.BatchNormConfig(method="regression"),
    finetune=dfq_jax.FinetuneConfig(steps=4),
    held_out=0.5,
).replace(**SMALL)


def small(name: str) -> dfq_jax.Recipe:
    """A recipe with few images and steps."""
    recipe = RECIPES[name].replace(**SMALL)
    given = {field: n for field, n in LEARNING.items() if getattr(recipe, field.partition("_")[0]) is not None}
    return recipe.replace(**given)


def vectors() -> tuple[Any, Any, tuple[int, ...]]:
    """A small network of vectors, which compiles fast."""
    rng = np.random.default_rng(0)

    def apply_fn(variables: Any, x: jax.Array) -> jax.Array:
        for layer in variables[:-1]:
            x = x @ layer["kernel"] - layer["mean"]
            x = jax.nn.relu(x * jax.lax.rsqrt(layer["var"] + 1e-5) * layer["scale"] + layer["bias"])
        return x @ variables[-1]["kernel"] + variables[-1]["bias"]

    sizes, layers = (6, 8, 8, 4), []
    for inner, outer in itertools.pairwise(sizes):
        layer = {"kernel": rng.normal(size=(inner, outer)) / np.sqrt(inner), "bias": rng.normal(size=outer)}
        layers.append(layer | {"mean": 0.2 * rng.normal(size=outer), "var": rng.uniform(0.5, 2, outer)})
        layers[-1]["scale"] = rng.uniform(0.5, 1.5, outer)
    layers[-1] = {name: layers[-1][name] for name in ("kernel", "bias")}
    return apply_fn, jax.tree.map(np.float32, layers), (2, 6)


def network(name: str) -> tuple[Any, Any, tuple[int, ...]]:
    """A network, its variables and its input's shape."""
    if name == "vectors":
        return vectors()
    if name.startswith("random"):
        found = random_network(int(name.split()[1]))
        return found.apply_fn, found.variables, found.input_shape
    model = load_model(name)
    return model.module, model.variables, model.input_shape


def differences(found: Any, expected: Any) -> dict[str, float]:
    """Share of integers that differ, and largest difference of floats in units of their array's largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = [tuple(map(np.asarray, p)) for p in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    integers = [(a, b) for a, b in pairs if np.issubdtype(a.dtype, np.integer)]
    floats = [(np.float64(a), np.float64(b)) for a, b in pairs if not np.issubdtype(a.dtype, np.integer)]
    return {
        "codes": float(sum((a != b).sum() for a, b in integers) / sum(a.size for a, _ in integers)),
        "floats": float(max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3) for a, b in floats)),
    }


def both(name: str, recipe: dfq_jax.Recipe, mesh: Mesh, **settings: Any) -> dict[str, Any]:
    """One device against all of them."""
    model, variables, shape = network(name)
    settings = {"input_shape": shape, "recipe": recipe, "bits": "w4a4", **settings}
    one = dfq_jax.quantize(model, variables, **settings)
    many = dfq_jax.quantize(model, variables, mesh=mesh, **settings)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(many.variables))
    assert len(mesh_of(many.variables).devices.flat) == mesh.size
    verdicts = [[step.partition(",")[0] for step in found.report.steps] for found in (one, many)]
    return {
        **differences(many.variables, one.variables),
        "images": differences((many.images, 0), (one.images, 0))["floats"],
        "image_devices": len({str(shard.index) for shard in many.images.addressable_shards}),
        "decisions": verdicts[0] == verdicts[1],
        "divergence": abs(many.report.sqnr - one.report.sqnr),
    }


# --- arguments ---


def test_a_mesh_is_taken_apart_into_prime_factors():
    mesh = check_mesh(Mesh(np.array(jax.devices()[:1]), ("batch",)))
    assert mesh.size == 1 and set(mesh.axis_types) == {AxisType.Auto}
    assert check_mesh(None) is None


@pytest.mark.untyped
@pytest.mark.parametrize("value", [4, "batch", AbstractMesh((2,), ("batch",))])
def test_what_is_no_mesh_is_refused(value):
    model, variables, shape = vectors()
    with pytest.raises(TypeError, match=r"^mesh: expected a jax.sharding.Mesh or None, found"):
        dfq_jax.quantize(model, variables, input_shape=shape, recipe="instant", mesh=value)


@pytest.mark.untyped
def test_a_sharding_is_refused_with_a_hint():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("batch",)), PartitionSpec("batch"))
    with pytest.raises(TypeError, match=r"pass its mesh\.$"):
        check_mesh(sharding)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no jax.set_mesh")
def test_a_mesh_set_around_the_call_is_refused():
    explicit = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"^mesh: .* explicit axes .*; call outside of it\.$"):
        check_mesh(explicit)
    assert check_mesh(explicit).axis_types == (AxisType.Auto,)  # its devices are all that is asked of it


def test_devices_of_the_command_line():
    options = pytest.importorskip("dfq_jax.cli.options")
    assert options.mesh_of_devices(None) is None
    assert options.mesh_of_devices("all").size == jax.local_device_count() == options.mesh_of_devices(1).size


@pytest.mark.parametrize(("count", "devices"), [(24, 12), (12, 12), (6, 6), (4, 4), (9, 3), (10, 2), (7, 1)])
def test_images_are_shared_by_as_many_devices_as_divide_them(count, devices):
    mesh = AbstractMesh((2, 2, 3), ("a", "b", "c"))
    sharding = by_image(mesh, (count, 5))
    assert sharding.shard_shape((count, 5)) == (count // devices, 5)
    assert by_image(mesh, (5, count), 1).shard_shape((5, count)) == (5, count // devices)
    assert by_image(mesh, (count, 5), -1).shard_shape((count, 5)) == (count, 5)


def test_one_device_needs_nothing():
    x = jnp.ones(3)
    assert mesh_of(x, {"w": x}) is None and sharded(x, None) is x and on_all(x, None) is x
    assert agreed((True, False), None) == (True, False)


@pytest.mark.parametrize("source", ["pixels", "pyramid", "fourier", "generator"])
def test_axes_of_images(source):
    config = dfq_jax.SynthesisConfig(num_images=3, batch_size=3, source=source)
    graph = random_network(8)
    graph = dfq_jax.trace(graph.apply_fn, graph.variables, graph.input_shape)
    state, targets = image_axes(graph, config, image_optimizer(config))
    assert targets.labels == 0 and targets.response_level == -1 and state.step == -1
    axes = {"latent": 0, "generator": -1}
    if source == "generator":
        assert {name: set(jax.tree.leaves(part)) for name, part in state.parameters.items()} == {
            name: {axis} for name, axis in axes.items()
        }
    else:
        assert set(jax.tree.leaves(state.parameters)) == {0}
    assert set(jax.tree.leaves(state.optimizer)) <= {0, -1}


# --- eight devices ---


def small_work(mesh: Mesh) -> dict[str, Any]:
    """What a fast test asks of eight devices."""
    found: dict[str, Any] = {"devices": mesh.size}
    found["everything"] = both("vectors", EVERYTHING, mesh)
    model, variables, shape = vectors()
    graph, everywhere = dfq_jax.trace(model, variables, shape), on_all(variables, check_mesh(mesh))
    # Eight batches fill the devices: each makes whole ones, as one device does. Three batches of 10 are shared by two.
    for name, count, size in (("side by side", 128, 16), ("awkward", 30, 10)):
        config = small("paper").replace(synthesis_num_images=count, synthesis_batch_size=size).synthesis
        one, many = (dfq_jax.synthesize(graph, v, jax.random.key(0), config) for v in (variables, everywhere))
        found[name] = differences((many.images, many.losses, many.labels), (one.images, one.losses, one.labels))
        found[name]["image_devices"] = len({str(shard.index) for shard in many.images.addressable_shards})
    x = np.random.default_rng(1).normal(size=(21, 6)).astype(np.float32)
    spread = in_pieces(model, everywhere, x)
    found["pieces"] = float(np.abs(spread(x) - in_pieces(model, variables, x)(x)).max())
    # 21 images: three are added, so that each device has as many, and change nothing.
    convention, learning = dfq_jax.Convention.parse("w3a4"), dfq_jax.ReconstructionConfig(steps=10)
    key = jax.random.key(0)
    start = dfq_jax.quantize_params(
        graph, variables, dfq_jax.estimate_ranges(graph, variables, x, convention), convention
    )
    one, many = (
        dfq_jax.reconstruct(graph, on_all(variables, m), on_all(start, m), sharded(jnp.asarray(x), m), key, learning)
        for m in (None, check_mesh(mesh))
    )
    errors = [[(block.before, block.after) for block in info.blocks] for _, info in (one, many)]
    found["uneven"] = differences(many[0], one[0]) | {"errors": float(np.abs(np.diff(errors, axis=0)).max())}
    given = graph, everywhere, on_all(start, check_mesh(mesh)), sharded(jnp.asarray(x), check_mesh(mesh)), key, learning
    cache = jax.tree.leaves(_BlockLoop(*given).enter(0).cache)
    found["images of a device"] = [leaf.sharding.shard_shape(leaf.shape)[0] for leaf in cache]
    return found


def recipes_of(name: str) -> tuple[str, ...]:
    """The recipes that a network is tested with."""
    return FEW if name == "fashion_mobilenet" else tuple(RECIPES)


def every_recipe(mesh: Mesh, name: str) -> dict[str, Any]:
    """All recipes on one network, and what they do not do."""
    found = {recipe: both(name, small(recipe), mesh) for recipe in recipes_of(name)}
    if name == "random 8":
        single = EVERYTHING.replace(equalize=True, range_search_one_by_one=True, reconstruction=None, finetune=None)
        found["one by one"] = both(name, single, mesh, details=True)
        found["of the set"] = both(name, small("paper").replace(synthesis_statistics="set"), mesh)
        found["budget"] = both(name, small("instant"), mesh, budget=dfq_jax.Budget(average_weight_bits=5))
        prediction = small("fast").replace(synthesis_flip=True, reconstruction_prediction_weight=1.0)
        found["prediction"] = both(name, prediction, mesh)
    return found


def in_float64(mesh: Mesh, name: str) -> dict[str, Any]:
    """`fast` with all that is float32 by name in float64: eight devices, and variables changed by what float32 rounds.

    Where learning follows gradients, a value at the border of two codes falls to either side by the last digit, and
    all blocks behind see other inputs. So rounding of float32 shows, that of float64 does not, and a defect would.
    """
    jax.config.update("jax_enable_x64", True)
    for namespace in (jnp, np):
        namespace.float32 = namespace.float64  # type: ignore[misc]
    model, variables, shape = network(name)
    apply_fn, variables = dfq_jax.as_function(model, variables)
    signs = np.random.default_rng(0)

    def cast(leaf: Any) -> Any:
        return np.float64(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def changed(leaf: Any) -> Any:
        return leaf * (1 + 1e-7 * signs.choice([-1, 1], leaf.shape)) if leaf.dtype == np.float64 else leaf

    variables = jax.tree.map(cast, variables)
    settings: Any = {"input_shape": shape, "recipe": small("fast"), "bits": "w4a4"}
    one = dfq_jax.quantize(apply_fn, variables, **settings)
    many = dfq_jax.quantize(apply_fn, variables, mesh=mesh, **settings)
    other = dfq_jax.quantize(apply_fn, jax.tree.map(changed, variables), **settings)
    return {
        "types": sorted({str(leaf.dtype) for leaf in jax.tree.leaves((one.variables, one.images))}),
        "decisions": one.report.steps == many.report.steps,
        "eight devices": differences(many.variables, one.variables),
        "changed by 1e-7": differences(other.variables, one.variables),
    }


# Two threads for each device, one that starts programs and one that runs them: with fewer, as on a machine of few
# cores, all may be taken by programs that wait for each other.
SIMULATED = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16"}


def on_eight_devices(*arguments: str, flags: str = "") -> tuple[dict[str, Any], str]:
    """What this module prints as a script, and what is on its stderr."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {flags}"
    # Programs are compiled, not taken from a cache: XLA writes down what it compiles.
    environment = {**os.environ, **SIMULATED, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


# The programs whose calls are the work; `advance_batch` of one device has none of these.
STEPS = ("advance_batch", "advance_block", "advance_student", "adapt", "summaries", "moments", "apply_jitted")
# What else blocks are made of: images are looked up and put where they belong, never all of them gathered.
PLACING = {"_batch_outputs": {"all-reduce"}, "_with_batch": {"all-gather"}}
COLLECTIVE = re.compile(
    r"\b(all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|all-reduce)\("
)


def test_eight_devices_give_what_one_gives(tmp_path):
    programs = (*STEPS, *PLACING)
    dumped = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*({'|'.join(programs)}).*"
    found, said = on_eight_devices("small", flags=dumped)
    assert found["devices"] == 8 and found["pieces"] < 1e-5
    assert found["side by side"]["floats"] == 0  # bit for bit
    for name, images in (("everything", 8), ("side by side", 8), ("awkward", 2)):
        assert found[name]["codes"] == 0 and found[name]["floats"] < 1e-3, (name, found[name])
        assert found[name]["image_devices"] == images
    assert found["everything"]["decisions"] and found["everything"]["images"] < 1e-3
    assert "rematerialization" not in said  # nothing is copied to all devices in the middle of a program
    assert found["images of a device"] == [3, 3, 3]
    assert found["uneven"]["codes"] == 0 and found["uneven"]["floats"] < 1e-3 and found["uneven"]["errors"] < 1e-4
    collectives = {step: set[str]() for step in programs}
    for path in tmp_path.glob("*after_optimizations.txt"):
        (step,) = (step for step in programs if step in path.name)
        collectives[step] |= set(COLLECTIVE.findall(path.read_text()))
    sums = {step: {"all-reduce"} for step in STEPS} | {"apply_jitted": set()} | PLACING
    if jax.__version_info__ >= (0, 10):  # older partitioners gather outputs, too
        assert collectives == sums  # of statistics, gradients and the images of a minibatch, and nothing else


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random 8", "random 20", "fashion_mobilenet"])  # the last two: depthwise
def test_every_recipe_on_eight_devices(name):
    found, _ = on_eight_devices("recipes", name)
    assert set(found) >= set(recipes_of(name))
    for recipe, seen in found.items():
        assert seen["codes"] < 1e-3 and seen["floats"] < 1e-2, (recipe, seen)
        assert seen["image_devices"] == 8, recipe


@pytest.mark.slow
def test_devices_differ_by_rounding_alone():
    found, _ = on_eight_devices("in_float64", "fashion_mobilenet")
    assert found["types"] == ["float64", "int8", "uint8"] and found["decisions"]
    assert found["eight devices"]["codes"] == 0 and found["eight devices"]["floats"] < 1e-9
    assert found["changed by 1e-7"]["codes"] > 1e-3  # what float32 rounds is no less


# --- several processes ---


LABELS = np.random.default_rng(2).integers(0, 3, 31)


def process(rank: int, port: str, folder: str, dies: str = "") -> dict[str, Any]:
    """One of two processes that share a call; it may die as blocks are reconstructed."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = inspect.signature(jax.distributed.initialize).parameters  # JAX 0.6.0 has a fixed time
    health = {name: 10 for name in ("heartbeat_timeout_seconds",) if name in known}
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, **health)
    dfq_jax.base.loop.CHECKPOINT_EVERY_SECONDS = 0.0
    model, variables, shape = vectors()
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    stages: list[str] = []

    def on_progress(progress: Any) -> None:
        stages.append(progress.name or "images")
        if dies == str(rank) and progress.name:
            os._exit(9)

    settings = {"input_shape": shape, "recipe": EVERYTHING, "bits": "w4a4", "mesh": mesh, "on_progress": on_progress}
    quantized = dfq_jax.quantize(model, variables, checkpoint=f"{folder}/work{rank}", **settings)
    quantized.save(f"{folder}/network{rank}.safetensors")
    data = Dataset(name="vectors", size=len(LABELS), read=lambda i: (np.full((1, 1, 1), i, np.uint8), LABELS[i]))
    accuracies = []
    for part in (data, data.part(rank, 2)):
        classes = predict(lambda _, x: jax.nn.one_hot(x[:, 0, 0, 0].astype(int) % 3, 3), None, part.batches(np.float32))
        accuracies.append(accuracy(*classes, over_processes=part is not data))
    with pytest.raises(ValueError, match=r"^variables: found others in other processes"):
        dfq_jax.quantize(model, jax.tree.map(lambda a: a + rank, variables), **settings)
    return {
        "digest": fingerprint(quantized.variables),
        "images": fingerprint(quantized.images),
        "own_images": sum(shard.data.shape[0] for shard in quantized.images.addressable_shards),
        "stages": stages,
        "accuracies": [dataclasses.asdict(found) for found in accuracies],
    }


class Done(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str
    at: float  # in seconds of `time.perf_counter`


def two_processes(folder: Any, *arguments: str) -> list[Done]:
    """Run this module as two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, **SIMULATED, "XLA_FLAGS": flags}

    def run(rank: int) -> Done:
        command = [sys.executable, __file__, "process", str(rank), port, str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        return Done(done.returncode, done.stdout, done.stderr, time.perf_counter())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


def test_a_lost_process_is_named(monkeypatch):
    monkeypatch.setattr(base_devices, "spans_processes", lambda mesh: mesh is not None)
    for mesh, notes in ((None, []), ("mesh", ["mesh: a process that shares it may have ended"])):
        with pytest.raises(jax.errors.JaxRuntimeError) as raised, noting_lost_processes(mesh):
            raise jax.errors.JaxRuntimeError("connection closed")
        assert [note.partition(",")[0] for note in getattr(raised.value, "__notes__", [])] == notes


@pytest.mark.slow
def test_two_processes_share_a_call(tmp_path):
    done = two_processes(tmp_path)
    assert [d.code for d in done] == [0, 0], done[0].err[-2000:] + done[1].err[-2000:]
    first, second = (json.loads(d.out.splitlines()[-1]) for d in done)
    assert first == second and first["own_images"] == 24
    assert first["accuracies"][0] == first["accuracies"][1] and first["accuracies"][1]["n"] == 31
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["network0.safetensors"]
    assert not list(tmp_path.glob("work*"))  # no checkpoint is left
    model, variables, shape = vectors()
    one = dfq_jax.quantize(model, variables, input_shape=shape, recipe=EVERYTHING, bits="w4a4")
    loaded = dfq_jax.load(tmp_path / "network0.safetensors", model, variables)
    found = differences(loaded.variables, one.variables)
    assert found["codes"] == 0 and found["floats"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_other_and_both_resume(tmp_path, rank):
    done = two_processes(tmp_path, rank)
    died, other = done[int(rank)], done[1 - int(rank)]
    assert died.code == 9 and other.code not in (0, 9)
    assert other.at - died.at < 60
    assert "mesh: a process that shares it may have ended" in other.err or "another task died" in other.err
    assert [path.name for path in tmp_path.glob("work*")] != []
    resumed = two_processes(tmp_path)
    whole = two_processes(tmp_path)
    reports = [json.loads(d.out.splitlines()[-1]) for d in (*resumed, *whole)]
    assert len({r["digest"] for r in reports}) == len({r["images"] for r in reports}) == 1
    first = [report["stages"][0] for report in reports]
    assert first == ["0", "0", "images", "images"]  # what was finished is not made again


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "process":
        print(json.dumps(process(int(rest[0]), *rest[1:])))
    else:
        devices = Mesh(np.array(jax.devices()), ("batch",))
        tasks = {"small": small_work, "recipes": every_recipe, "in_float64": in_float64}
        print(json.dumps(tasks[task](devices, *rest)))
