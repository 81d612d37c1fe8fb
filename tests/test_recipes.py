"""`quantize` from end to end on tiny networks: what it gives, reports, saves and refuses."""

import collections
import copy
import dataclasses
import functools
import html
import json
import os
import pickle
import re
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest
from flax import nnx

import dfq_jax
from dfq_jax.export import artifact
from dfq_jax.export.artifact import ArtifactError
from dfq_jax.graph import run as trace_run
from dfq_jax.graph.graph import trace
from dfq_jax.graph.tracing.structure import GraphError, GraphWarning
from dfq_jax.quantizers.collection import OPERANDS, QUANTIZATION, TENSORS
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.recipes import steps as recipe_steps
from dfq_jax.recipes.pipeline import quantize
from dfq_jax.recipes.quantized import load
from dfq_jax.recipes.recipe import RECIPES, Recipe, recipe_from
from dfq_jax.report.report import LayerReport, Report, report_from
from dfq_jax.stages import equalize, find_pairs
from dfq_jax.stages.batch_norm import BatchNormConfig, adapt_batch_norm
from dfq_jax.stages.budget import Budget
from dfq_jax.stages.comparison import compare, sqnr
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.finetuning import FinetuneConfig
from dfq_jax.stages.finetuning import loop as finetuning_loop
from dfq_jax.stages.range_search import RangeSearchConfig
from dfq_jax.stages.rounding import ReconstructionConfig, learned, squant
from dfq_jax.synthesis import SynthesisConfig, loop, synthesize

SHAPE = (2, 8, 8, 3)
SMALL = {"synthesis_steps": 5, "synthesis_num_images": 8, "synthesis_batch_size": 8}
# Without what the judges choose between; `test_every_recipe` runs recipes as they are.
FAST = RECIPES["fast"].replace(**SMALL, equalize=False, range_search=None, reconstruction=None, at_least_instant=False)


class Net(nn.Module):
    """A residual block between two layers."""

    as_dict: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        def unit(x, name):
            x = nn.Conv(6, (3, 3), use_bias=False, name=name)(x)
            return nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x)

        x = nn.relu(unit(x, "conv1"))
        x = nn.relu(x + unit(x, "conv2"))
        logits = nn.Dense(5, name="head")(x.mean((1, 2)))
        return {"features": x, "logits": logits} if self.as_dict else logits


class Chain(nn.Module):
    """Layers that can be equalized with one another."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("conv1", "conv2"):
            x = nn.Conv(6, (3, 3), use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.bn1(self.conv1(x))).mean((1, 2))))


def case_of(module, shape=SHAPE):
    return model_grid.linen_case("net", module, shape)


CASE = case_of(Net())
CHAIN = case_of(Chain())
NO_NORM = case_of(NoNorm())


def apply_fn(variables, x):
    return Net(as_dict=True).apply(variables, x)


def no_progress(progress):
    raise AssertionError(f"work has begun: {progress}")


def run(model=CASE.model, variables=CASE.variables, **arguments):
    return quantize(model, variables, **{"input_shape": SHAPE, "recipe": FAST, "bits": "w4a4", **arguments})


@functools.cache
def fast():
    """The Linen network by the recipe "fast"."""
    return run()


def inputs(count=4, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *SHAPE[1:])), jnp.float32)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- models ---


@pytest.mark.filterwarnings("ignore:the statistics of:dfq_jax.GraphWarning")
@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_models_of_every_kind(kind):
    if kind == "linen":
        q = fast()
        reference = CASE.model.apply(CASE.variables, inputs())
    elif kind == "nnx":
        model = NNXNet(nnx.Rngs(0))
        q = run(model, None)
        assert not model.bn1.use_running_average  # the caller's module keeps its mode
        model.eval()
        reference = model(inputs())
    else:
        q = run(apply_fn, CASE.variables)
        reference = apply_fn(CASE.variables, inputs())
        same(q.variables, fast().variables)  # the same network, so the same result
    found = q(inputs())
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, reference)
    logits, expected = q.graph.logits(found), q.graph.logits(reference)
    assert 1e-4 < np.abs(logits - expected).max() < 0.5 * np.abs(expected).max() + 0.2
    kernels = [q.graph.leaf(q.variables, layer.kernel) for layer in q.graph.layers]
    assert all(isinstance(k, QTensor) for k in kernels)
    assert [k.bits for k in kernels] == [8] + [4] * (len(kernels) - 2) + [8]
    for function in (q.apply, q.apply_integer):
        compiled = jax.jit(function)(q.variables, inputs())
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), compiled, found)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name):
    short = {"reconstruction_steps": 20} if RECIPES[name].reconstruction else {}
    q = run(recipe=RECIPES[name].replace(**SMALL | short))
    assert q.report.recipe == name
    assert q.images.shape == (8, *SHAPE[1:])
    assert np.isfinite(q(inputs())).all()
    before, after = CASE.variables, q.variables
    adapted = (after["batch_stats"]["bn_conv2"]["mean"] != before["batch_stats"]["bn_conv2"]["mean"]).any()
    instead = any("instant in its place: kept" in step for step in q.report.steps)
    assert adapted == (RECIPES[name].batch_norm is not None or instead)
    corrected = (after["params"]["head"]["bias"] != before["params"]["head"]["bias"]).any()
    # Reconstruction and fine-tuning learn biases; reconstruction keeps those of blocks that gain by it.
    recipe = RECIPES[name]
    (blocks,) = [s for s in q.report.steps if s.startswith("reconstruction")] or ("",)
    learned = recipe.finetune is not None or (recipe.reconstruction is not None and "head" not in blocks)
    assert "blocks kept" in blocks or recipe.reconstruction is None
    assert corrected == (recipe.bias_correction or learned or instead)


def test_fast_adapts_statistics_once():
    """Bias correction leaves alone what differential adaptation has set right."""
    without = run(recipe=FAST.replace(bias_correction=False))
    same(fast().variables["batch_stats"], without.variables["batch_stats"])


def test_eight_bits_are_nearly_exact():
    q = run(bits="w8a8")
    assert q.report.sqnr > 30
    np.testing.assert_allclose(q(q.images), CASE.model.apply(CASE.variables, q.images), atol=0.1)


def test_given_images():
    images = np.asarray(inputs(12))
    stages = []
    q = run(images=images, on_progress=no_progress, on_stage=stages.append)
    np.testing.assert_array_equal(q.images, images)
    assert q.report.images == "12 given"
    assert stages == ["trace", "images", "ranges", "weights", "rounding", "adapt", "compare"] == list(q.report.seconds)
    logits = CASE.model.apply(CASE.variables, images)
    agreement = 100 * (q(images).argmax(1) == logits.argmax(1)).mean()
    np.testing.assert_allclose(q.report.agreement, agreement, rtol=1e-6)
    error = np.square(np.asarray(q(images) - logits, np.float64)).sum()
    sqnr = 10 * np.log10(np.square(np.asarray(logits, np.float64)).sum() / error)
    np.testing.assert_allclose(q.report.sqnr, sqnr, rtol=1e-3)


def test_weights_only():
    q = run(bits="w4a16")
    assert q.variables[QUANTIZATION] == {TENSORS: {}, OPERANDS: {}}
    assert all(layer.activation_bits is None and layer.weight_bits in (4, 8) for layer in q.report.layers)
    assert "float activations" in q.report.convention
    # Weights of so many bits are hardly wrong; errors of two kinds may take each other away.
    unadapted = FAST.replace(batch_norm=None, bias_correction=False)
    assert run(recipe=unadapted, bits="w8a16").report.sqnr > run(recipe=unadapted, bits="w8a4").report.sqnr + 3


def test_networks_without_batch_norm():
    stages = []
    with pytest.raises(GraphError, match=r"no BatchNorm.*'w4a16'.*'noise'.*images="):
        run(NO_NORM.model, NO_NORM.variables, on_stage=stages.append)
    assert stages == ["trace", "images"]
    noise = RECIPES["noise"].replace(**SMALL)
    for arguments in ({"recipe": noise}, {"bits": "w4a16"}, {"images": inputs()}):
        q = run(NO_NORM.model, NO_NORM.variables, **arguments)
        assert np.isfinite(q(inputs())).all() and np.isfinite(q.report.sqnr)
        assert (q.report.agreement is None) == ("images" not in arguments)  # noise is of no class
        assert ("Gaussian noise" in q.report.compared_on) == ("images" not in arguments)


def test_edges():
    q = run(edge_bits=None, recipe=RECIPES["noise"].replace(**SMALL))
    assert {layer.weight_bits for layer in q.report.layers} == {4}
    assert {layer.activation_bits for layer in q.report.layers} == {4}
    assert [layer.activation_bits for layer in fast().report.layers] == [8, 4, 8]


@pytest.mark.parametrize("shortcuts", ["float", "quantized"])
def test_shortcuts(shortcuts):
    noise = RECIPES["noise"].replace(**SMALL)
    q = run(recipe=noise, convention=Convention(shortcuts=shortcuts))
    shared = [t.name for t in q.graph.tensors if t.shared]
    assert shared
    found = {kind: set(q.variables[QUANTIZATION][kind]) for kind in (TENSORS, OPERANDS)}
    assert found[OPERANDS] == (set(shared) if shortcuts == "float" else set())
    assert found[TENSORS] | found[OPERANDS] == {t.name for t in q.graph.tensors}
    assert f"{shortcuts} shortcuts" in q.report.convention
    assert all(layer.activation_bits for layer in q.report.layers)


def test_outputs_that_are_not_class_scores():
    def image_to_number(v, x):
        return (x @ v["kernel"]).mean()

    noise = RECIPES["noise"].replace(**SMALL)
    q = quantize(image_to_number, {"kernel": jnp.ones((7, 2))}, input_shape=(1, 7), recipe=noise, bits="w4a4")
    assert q.report.agreement is None and "agreement" not in str(q.report)
    assert q.report.sqnr is not None


def test_numpy_variables_of_any_width():
    noise = RECIPES["noise"].replace(**SMALL)
    expected = run(recipe=noise).variables
    for dtype in (np.float32, np.float64):
        variables = jax.tree.map(lambda leaf, d=dtype: np.asarray(leaf, d), CASE.variables)
        same(run(variables=variables, recipe=noise).variables, expected)


# --- determinism ---


def test_the_same_key_gives_the_same_network():
    for key in (0, np.int64(0), jax.random.key(0), jax.random.PRNGKey(0)):
        again = run(key=key)
        same(again.variables, fast().variables)
        same(again.images, fast().images)
        assert dataclasses.replace(again.report, seconds={}) == dataclasses.replace(fast().report, seconds={})
    other = run(key=1)
    assert (other.images != fast().images).any()
    assert other.report.key != fast().report.key


def test_arguments_are_left_alone():
    before = jax.tree.map(np.array, CASE.variables)
    run(images=inputs(8))
    jax.tree.map(np.testing.assert_array_equal, before, CASE.variables)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(CASE.variables))


def test_every_stage_has_a_key_of_its_own(monkeypatch):
    """All keys that are handed out, and those that batches and blocks fold from them, differ."""
    recipe = RECIPES["best"].replace(
        **SMALL | {"synthesis_num_images": 40}, reconstruction_steps=1, finetune=FinetuneConfig(steps=1), held_out=0.2
    )
    keys = []

    def recording(module, name, position):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            if not isinstance(args[position], jax.core.Tracer):  # where shapes alone are asked for nothing is drawn
                data = np.asarray(jax.random.key_data(args[position])).tolist()
                keys.append((module.__name__, name, tuple(data)))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    recording(loop, "_init", 3)  # of each batch, its first half
    recording(loop, "advance_batch", 7)  # and its second
    recording(learned, "draw", 0)  # of each block
    recording(finetuning_loop, "advance_student", 8)
    q = run(recipe=recipe)
    distinct = set(keys)
    batches, blocks = recipe.synthesis.num_batches, len(q.graph.blocks)
    assert len({key for *_, key in distinct}) == len(distinct) == 2 * batches + blocks + 1


def test_an_interrupted_call_resumes(tmp_path):
    recipe = FAST.replace(synthesis_steps=20, synthesis_chunk=5)
    path = tmp_path / "work.npz"

    def interrupt(progress):
        if (progress.batch, progress.step) == (1, 10):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        run(recipe=recipe, checkpoint=path, on_progress=interrupt)
    assert os.listdir(tmp_path) == ["work.npz"]
    resumed = run(recipe=recipe, checkpoint=path)
    assert os.listdir(tmp_path) == []
    same(resumed.variables, run(recipe=recipe).variables)


def test_an_interrupted_call_resumes_within_its_long_steps(tmp_path):
    recipe = FAST.replace(
        reconstruction=ReconstructionConfig(steps=2, batch_size=4), finetune=FinetuneConfig(steps=20, evaluations=1)
    )
    path, stages, reports = tmp_path / "work.npz", [], []

    def interrupt(progress):
        if (stages[-1], progress.batch) in (("reconstruction", 2), ("fine-tuning", 1)):
            signal.raise_signal(signal.SIGINT)

    calls = {"checkpoint": path, "on_stage": stages.append, "on_progress": interrupt}
    for step, files in (("reconstruction", 2), ("fine-tuning", 3)):
        with pytest.raises(KeyboardInterrupt, match=f"{step} was interrupted"):
            run(recipe=recipe, **calls)
        assert stages[-1] == step and len(os.listdir(tmp_path)) == files
    resumed = run(recipe=recipe, checkpoint=path, on_progress=reports.append)
    assert [(report.batch, report.step) for report in reports] == [(1, 20)]  # the rest of the last step
    assert os.listdir(tmp_path) == []
    same(resumed.variables, run(recipe=recipe).variables)


def test_finished_images_are_kept_until_all_is_done(tmp_path):
    path = tmp_path / "work.npz"

    class Killed(BaseException):
        pass

    def die(stage):
        if stage == "rounding":
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=path, on_stage=die)
    assert os.listdir(tmp_path) == ["work.npz"]
    resumed = run(checkpoint=path, on_progress=no_progress)  # no step of synthesis is done again
    assert os.listdir(tmp_path) == []
    same(resumed.images, fast().images)
    same(resumed.variables, fast().variables)
    path.write_bytes(b"mine")
    run(images=inputs(), checkpoint=path)
    assert path.read_bytes() == b"mine"  # nothing was synthesized, so the file is somebody else's


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import test_recipes

def die(stage):
    if stage == "adapt":
        os.kill(os.getpid(), signal.SIGKILL)

test_recipes.run(checkpoint={path!r}, on_stage=die)
"""


@pytest.mark.slow
def test_a_killed_call_resumes(tmp_path):
    path = tmp_path / "work.npz"
    code = KILLED.format(folder=os.path.dirname(__file__), path=str(path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    resumed = run(checkpoint=path, on_progress=no_progress)
    assert os.listdir(tmp_path) == []
    same(resumed.images, fast().images)
    same(resumed.variables, fast().variables)


# --- the report ---


def test_the_report_says_what_was_done():
    report = fast().report
    text = " ".join(str(report).split())
    for words in (
        "fast", "W4A4, first and last layer 8-bit, per-channel asymmetric weights", "8 synthesized in 5 steps",
        "regression BatchNorm adaptation, layer by layer", "bias correction", "conv1", "conv2", "head", "agreement",
        "output SQNR", "of float32",
    ):  # fmt: skip
        assert words in text, words
    assert [layer.name for layer in report.layers] == [layer.name for layer in fast().graph.layers]
    for layer in report.layers:
        assert layer.weight_sqnr > (40 if layer.weight_bits == 8 else 10)
        assert layer.low <= 0 < layer.high
    assert report.key == [0, 0]
    assert report.size["quantized"] < 0.6 * report.size["float"]
    assert recipe_from(report.settings) == FAST
    assert repr(report) == f"Report(recipe fast, 3 layers, {report.size['quantized']} bytes)"  # no arrays in it
    assert repr(fast()).startswith("Quantized(W4A4, recipe fast, Graph(3 layers, ")


def test_the_report_in_json():
    report = fast().report
    fields = json.loads(report.to_json())
    assert report_from(fields) == dataclasses.replace(report)
    assert recipe_from(fields["settings"]) == FAST


def test_a_report_of_exact_layers():
    """Weights without an error have an infinite SQNR, which JSON has not."""
    kernel = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    noise = RECIPES["noise"].replace(**SMALL)
    q = quantize(lambda v, x: x @ v["<k>"], {"<k>": kernel}, input_shape=(1, 3), recipe=noise, bits="w8a8")
    assert q.report.layers[0].weight_sqnr == np.inf
    assert json.loads(q.report.to_json())["layers"][0]["weight_sqnr"] is None
    assert "inf" in str(q.report)
    assert "&lt;k&gt;" in html.unescape(q.report._repr_html_())


def test_a_report_of_skipped_and_float_layers():
    layer = LayerReport(
        name="a", kind="conv", weight_bits=None, activation_bits=None, weight_sqnr=None, low=None, high=None
    )
    report = Report(
        recipe="none", settings={}, convention="-", key=[0], images="none", seconds={}, agreement=None, sqnr=None,
        layers=(layer,), skipped=(("b", "its kernel is computed"),), steps=(), size={"float": 4, "quantized": 4},
    )  # fmt: skip
    assert "not quantized: b: its kernel is computed" in str(report)
    assert report.rows() == [("a", "conv", "float", "float", "-", "-")]
    assert report_from(json.loads(report.to_json())) == report


# --- files ---


KINDS = {
    "linen": (Net(), CASE.variables),
    "dict": (Net(as_dict=True), CASE.variables),
    "nnx": (NNXNet(nnx.Rngs(0)), None),
    "function": (apply_fn, CASE.variables),
}


@pytest.mark.filterwarnings("ignore:the statistics of:dfq_jax.GraphWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_saved_networks_come_back_bit_for_bit(tmp_path, kind):
    model, variables = KINDS[kind]
    q = run(model, variables, recipe=RECIPES["noise"].replace(**SMALL))
    path = tmp_path / "net.safetensors"
    q.save(path, note="mine")
    assert os.listdir(tmp_path) == ["net.safetensors"]
    back = load(path, model, variables)
    same(back.variables, q.variables)
    same(back(inputs()), q(inputs()))
    same(jax.jit(back.apply_integer)(back.variables, inputs()), jax.jit(q.apply_integer)(q.variables, inputs()))
    assert back.report == q.report
    assert (back.recipe, back.convention, back.graph) == (q.recipe, q.convention, q.graph)
    assert back.images is None
    assert artifact.load(path)[1]["note"] == "mine"
    if kind in ("linen", "dict"):  # the structure alone will do
        same(load(path, model).variables, q.variables)
        same(load(path, model, jax.eval_shape(lambda: variables)).variables, q.variables)


@functools.cache
def other_models():
    wide = case_of(model_grid.VGG())
    return {"other layers": (wide.model, wide.variables), "no norm": (NO_NORM.model, NO_NORM.variables)}


def test_files_of_other_networks_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    fast().save(path)
    for model, variables in other_models().values():
        with pytest.raises(ArtifactError, match=r"net\.safetensors is of another network"):
            load(path, model, variables)
    with pytest.raises(ArtifactError, match=r"net\.safetensors: the model given cannot be what"):
        load(path, *KINDS["linen"][:1], model_grid.mlp().variables)
    with pytest.raises(TypeError, match="needs its variables"):
        load(path, apply_fn)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    fast().save(path)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:2000], data[:4], b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"net\.safetensors is truncated"):
            load(path, CASE.model, CASE.variables)
    path.write_bytes(data[:-50] + bytes(50))
    with pytest.raises(ArtifactError, match=r"net\.safetensors is damaged"):
        load(path, CASE.model, CASE.variables)
    artifact.save(path, fast().variables, header={"graph": "x"})
    with pytest.raises(ArtifactError, match=r"header lacks \['convention', 'input_shape', 'recipe', 'report'\]"):
        load(path, CASE.model, CASE.variables)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors", CASE.model, CASE.variables)


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        fast().save(tmp_path / "net.safetensors", thing=object())
    missing = tmp_path / "none" / "net.safetensors"
    with pytest.raises(FileNotFoundError) as raised:
        fast().save(missing)
    assert raised.value.filename == str(missing)  # and no temporary name
    assert os.listdir(tmp_path) == []


def test_files_of_newer_versions_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    fast().save(path)
    header = artifact.load(path)[1]
    assert header["versions"]["dfq_jax"] == dfq_jax.__version__
    own = {key: header[key] for key in ("graph", "input_shape", "recipe", "convention", "report")}
    for name, inside in (("recipe", ()), ("recipe", ("synthesis",)), ("convention", ()), ("report", ())):
        newer = json.loads(json.dumps(own))
        part = newer[name]
        for key in inside:
            part = part[key]
        part.update(surprise=1, another=2)
        artifact.save(path, fast().variables, header=newer)
        message = rf"net\.safetensors: its {name} cannot be read by dfq_jax {dfq_jax.__version__} .*" + (
            rf"\['another', 'surprise'\].*written by dfq_jax {dfq_jax.__version__}"
        )
        with pytest.raises(ArtifactError, match=message):
            load(path, CASE.model, CASE.variables)
    older = json.loads(json.dumps(own))  # a file from before these fields
    del older["report"]["warnings"], older["report"]["compared_on"]
    artifact.save(path, fast().variables, header=older)
    back = load(path, CASE.model, CASE.variables)
    assert back.report == fast().report and back.convention == fast().convention


# --- copies ---


def test_copies():
    copied = copy.deepcopy(fast())
    same(copied.variables, fast().variables)
    same(copied(inputs()), fast()(inputs()))
    assert copied.graph is fast().graph and copied.report == fast().report
    integer = fast().integer()
    same(copy.deepcopy(integer)(inputs()), integer(inputs()))


@pytest.mark.parametrize("kind", ["linen", "function"])
def test_pickles(kind):
    q = run(*KINDS[kind], recipe=RECIPES["noise"].replace(**SMALL))
    back = pickle.loads(pickle.dumps(q))
    assert (back.graph, back.report, back.recipe, back.convention) == (q.graph, q.report, q.recipe, q.convention)
    same(back.variables, q.variables)
    same(back(inputs()), q(inputs()))
    graph = trace(lambda v, x: apply_fn(v, x), CASE.variables, SHAPE)
    with pytest.raises(pickle.PicklingError, match=r"Quantized\.save"):
        pickle.dumps(graph)


# --- conventions ---


@pytest.mark.parametrize(("given", "expected"), [(None, "min_max"), ("lp", "lp"), ("mse", "mse")])
def test_weight_ranges_have_one_owner(given, expected):
    """The convention's, and the recipe's where it names none, whatever way the bits are given."""
    noise = RECIPES["noise"].replace(**SMALL)
    q = run(recipe=noise, convention=Convention(weight_range=given))
    assert q.convention.weight_range == expected and f"({expected} ranges)" in q.report.convention
    wanted = quantize_params(q.graph, CASE.variables, {}, Convention(activation_bits=None, weight_range=expected))
    kernel, same_kernel = (q.graph.leaf(v, "params/conv2/kernel") for v in (q.variables, wanted))
    same(kernel, same_kernel)
    if given is None:
        same(q.variables, run(recipe=noise, bits="w4a4").variables)


# --- reports that warn ---


def relational(variables, x):
    """A network most of whose work is in float: products of positions with positions."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return jnp.tanh(x @ x.swapaxes(1, 2)).mean(1) @ variables["head"]


def lost_norm(variables, x):
    """The root of a variance at work, in a form that is no BatchNorm's: the variance is clipped."""
    x = jnp.tanh(x @ variables["first"]) / jnp.sqrt(jnp.maximum(variables["var"], 1.0) + 1e-3)
    return jnp.tanh(x).mean((1, 2)) @ variables["head"]


@pytest.mark.parametrize(
    ("function", "words"),
    [(relational, "1 of 2 products, with 97 % of the"), (lost_norm, "1 of 1 BatchNorms were not recognized")],
)
def test_what_is_lost_is_said_at_the_head(function, words):
    rng = np.random.default_rng(0)
    variables = {"head": rng.normal(size=(64, 5))}
    if function is lost_norm:
        variables = {"first": rng.normal(size=(3, 6)), "var": rng.uniform(1, 2, 6), "head": np.ones((6, 5))}
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    with pytest.warns(GraphWarning, match=words):
        q = run(function, variables, recipe=RECIPES["noise"].replace(**SMALL))
    assert str(q.report).startswith("WARNING") and words in str(q.report).splitlines()[0]
    page = q.report._repr_html_().replace("\N{NO-BREAK SPACE}", " ")  # between a number and its unit
    assert words in page and words in json.loads(q.report.to_json())["warnings"][0]


def test_weights_that_overflow_are_refused():
    def product(variables, x):
        return jnp.tanh(x) @ variables["a"] @ variables["b"]

    noise = RECIPES["noise"].replace(**SMALL)
    for scale, refused in ((1e18, False), (1e25, True)):
        variables = {"a": jnp.full((7, 4), scale), "b": jnp.full((4, 3), scale)}
        variables = jax.tree.map(lambda leaf: leaf * jnp.linspace(0.5, 1, leaf.size).reshape(leaf.shape), variables)
        for recipe in (noise, noise.replace(estimator="lp", weight_range="lp"), RECIPES["instant"]):
            arguments = dict(input_shape=(1, 7), recipe=recipe, bits="w8a8")
            if refused:
                with pytest.raises(ValueError, match="NaN or infinite"):
                    quantize(product, variables, **arguments)
            else:
                assert quantize(product, variables, **arguments).report.sqnr > 30


@pytest.mark.parametrize("x", [[[1.0]], None])
def test_inputs_that_are_no_arrays(x):
    q = fast()
    for function in (q, lambda x: trace_run(q.graph, q.variables, x), lambda x: q.apply(q.variables, x)):
        with pytest.raises(TypeError, match="x: expected an array"):
            function(x)


# --- recipes ---


def test_replacing_fields():
    recipe = RECIPES["fast"].replace(synthesis_steps=7, batch_norm_order="all_at_once", batch_size=5, name="mine")
    assert recipe.synthesis == dataclasses.replace(RECIPES["fast"].synthesis, steps=7)
    assert recipe.batch_norm == dataclasses.replace(RECIPES["fast"].batch_norm, order="all_at_once")
    assert (recipe.batch_size, recipe.name, recipe.estimator) == (5, "mine", RECIPES["fast"].estimator)
    whole = RECIPES["fast"].replace(synthesis=SynthesisConfig(num_images=3), synthesis_steps=7)
    assert whole.synthesis == SynthesisConfig(num_images=3, steps=7)
    adapted = RECIPES["noise"].replace(batch_norm=BatchNormConfig(), batch_norm_method="absolute")
    assert adapted.batch_norm == BatchNormConfig(method="absolute")
    assert RECIPES["fast"].synthesis.steps != 7


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("fast", {"stepps": 3}, "stepps: recipe 'fast' has no such field; it has "),
        ("fast", {"synthesis_stepps": 3}, r"synthesis_stepps: no such field; synthesis has \["),
        ("fast", {"batch_norm_steps": 3}, r"batch_norm_steps: no such field; batch_norm has \["),
        ("noise", {"batch_norm_order": "all_at_once"}, "batch_norm_order: recipe 'noise' has no such field"),
        ("fast", {"synthesis_steps": 0}, "^steps: expected an integer of at least 1, found 0"),
        ("fast", {"estimator": "median"}, r"estimator: expected one of .*'lp'.*found 'median'"),
        ("fast", {"weight_range": "median"}, r"weight_range: expected one of .*found 'median'"),
        ("fast", {"source": "photos"}, r"source: expected one of .*found 'photos'"),
        ("fast", {"batch_size": 0}, "batch_size: expected an integer of at least 1, found 0"),
        ("fast", {"batch_norm_method": "both"}, "method: expected one of "),
    ],
)
def test_recipes_are_checked(name, fields, message):
    with pytest.raises(ValueError, match=message):
        RECIPES[name].replace(**fields)


# --- bad input ---


def changed(path, value):
    collection, layer, leaf = path.split("/")
    tree = jax.tree.map(lambda x: x, CASE.variables)
    tree[collection][layer][leaf] = jnp.full_like(tree[collection][layer][leaf], value)
    return tree


def training(variables, x):
    return Net().apply(variables, x, train=True, mutable=["batch_stats"])[0]


class Training(nn.Module):
    """Has no way to choose inference."""

    @nn.compact
    def __call__(self, x):
        return Net()(x, train=True)


TRAINING = case_of(Training())
KERNEL, VAR = "params/conv2/kernel", "batch_stats/bn_conv2/var"
BAD_INPUT = {
    "channels": ({"input_shape": (2, 8, 8, 4)}, GraphError, r"input of shape \(2, 8, 8, 4\).*do not fit: the input"),
    "rank": ({"input_shape": (8, 8, 3)}, GraphError, r"input of shape \(8, 8, 3\)"),
    "no batch": ({"input_shape": (3,)}, ValueError, "input_shape: expected a shape"),
    "negative": ({"input_shape": (1, -8, 8, 3)}, ValueError, "input_shape: expected a shape"),
    "number": ({"input_shape": 8}, ValueError, "input_shape: expected a shape"),
    "train": ({"model": training}, GraphError, "training mode"),
    "train module": ({"model": TRAINING.model, "variables": TRAINING.variables}, GraphError, "training mode"),
    "nan": ({"variables": changed(KERNEL, np.nan)}, ValueError, f"'{KERNEL}' holds NaN or infinite"),
    "inf": ({"variables": changed(KERNEL, -np.inf)}, ValueError, f"'{KERNEL}' holds NaN or infinite"),
    "negative variance": ({"variables": changed(VAR, -1.0)}, ValueError, f"'{VAR}' has a negative variance"),
    "no variables": ({"variables": None}, TypeError, "a Linen module needs its variables"),
    "other variables": ({"variables": NO_NORM.variables}, GraphError, "cannot be traced"),
    "class": ({"model": Net}, TypeError, "Net is a class; pass an instance"),
    "model": ({"model": "resnet"}, TypeError, "expected a Linen module, an NNX module or a function"),
    "1 bit": ({"bits": "w1a4"}, ValueError, "weight_bits: expected an integer from 2 to 8, found 1"),
    "9 bits": ({"bits": "w4a9"}, ValueError, "activation_bits: expected an integer from 2 to 8, found 9"),
    "bits": ({"bits": "4"}, ValueError, "bits: expected a name like 'w4a4' or 'w4a16', found '4'"),
    "number of bits": ({"bits": 8}, ValueError, "bits: expected a name like 'w4a4'"),
    "edge bits": ({"edge_bits": 16}, ValueError, "edge_bits: expected an integer from 2 to 8, found 16"),
    "convention": ({"convention": "w4a4"}, TypeError, "convention: expected a Convention"),
    "recipe": ({"recipe": "worst"}, ValueError, r"recipe: expected a Recipe or one of \['best', .*found 'worst'"),
    "no recipe": ({"recipe": ["fast"]}, ValueError, "recipe: expected a Recipe"),
    "key": ({"key": "0"}, TypeError, "key: expected a JAX key or an integer seed, found '0'"),
    "bool": ({"key": True}, TypeError, "key: expected"),
    "keys": ({"key": jax.random.split(jax.random.key(0), 3)}, TypeError, "key: expected"),
    "large seed": ({"key": 2**70}, ValueError, "key: expected a seed of at most 64 bits"),
    "words for images": ({"images": "none"}, TypeError, r"images: expected an array like \[N, 8, 8, 3\], found a str"),
    "ragged images": ({"images": [[1.0], [1.0, 2.0]]}, TypeError, "images: expected an array like .* found a list"),
    "no images": ({"images": np.zeros((0, 8, 8, 3), np.float32)}, ValueError, "images: found none"),
    "image channels": ({"images": np.zeros((4, 8, 8, 1), np.float32)}, ValueError, r"images: .*found \(4, 8, 8, 1\)"),
    "image height": (
        {"images": np.zeros((4, 9, 8, 3), np.float32)},
        ValueError,
        r"images: expected an array like \[N, 8, 8, 3\], as input_shape says, found \(4, 9, 8, 3\)\.$",
    ),
    "image width": ({"images": np.zeros((4, 8, 7, 3), np.float32)}, ValueError, r"images: .*found \(4, 8, 7, 3\)"),
    "nan images": ({"images": np.full((4, 8, 8, 3), np.nan, np.float32)}, ValueError, "images: found NaN"),
    "raw images": ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, ValueError, "images: expected preprocessed"),
    "checkpoint": ({"checkpoint": "none/work.npz"}, ValueError, "checkpoint: there is no folder 'none'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_any_work(name, tmp_path, monkeypatch):
    arguments, error, message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    stages = []
    arguments = {"checkpoint": "work.npz", **arguments}
    with pytest.raises(error, match=message):
        run(**arguments, on_stage=stages.append, on_progress=no_progress)
    assert set(stages) <= {"trace", "images"}
    assert os.listdir(tmp_path) == []


def test_a_dead_layer_quantizes(recwarn):
    """All of a layer's channels are dead in truth: kernel, mean and variance are zero, and nothing is wrong."""
    variables = changed(KERNEL, 0.0)
    variables["batch_stats"]["bn_conv2"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"]["bn_conv2"])
    wanted = CASE.model.apply(variables, inputs())
    for recipe in (FAST, "instant"):
        q = run(variables=variables, bits="w8a8", recipe=recipe)
        assert q.report.warnings == ()
        assert sqnr(wanted, q(inputs())) > 25
    assert not [w for w in recwarn if issubclass(w.category, GraphWarning)]


@pytest.mark.parametrize("var", [0.0, 1.0])
def test_statistics_that_were_never_updated_are_doubted(var):
    variables = changed(VAR, var)
    variables["batch_stats"]["bn_conv2"]["mean"] = jnp.zeros(6)
    with pytest.warns(GraphWarning, match=rf"statistics of 1 of 2 BatchNorms .*never updated \({VAR}: "):
        q = run(variables=variables, recipe="instant")
    assert "never updated" in q.report.warnings[0]


def test_quantized_variables_are_refused():
    with pytest.raises(ValueError, match=r"'params/conv1/kernel' is quantized already; pass the float variables"):
        run(variables=fast().variables)


def test_the_graph_of_a_quantized_network_is_that_of_the_float_one():
    graph = trace(*CASE.function(), SHAPE)
    assert fast().graph == graph
    assert isinstance(fast().recipe, Recipe)


# --- budgets ---


@pytest.mark.parametrize("recipe", [RECIPES["instant"], FAST.replace(synthesis_num_images=32, held_out=0.25)])
def test_a_budget_holds(recipe, tmp_path):
    uniform = run(recipe=recipe, bits="w4a8")
    settings = {"recipe": recipe, "bits": "w8a8"}
    result = run(budget=Budget(weight_bytes=uniform.report.size["quantized"]), **settings)
    assert result.report.size["quantized"] <= uniform.report.size["quantized"]
    assert {rule.pattern for rule in result.convention.rules} == {"conv1", "conv2", "head"}
    assert "budget" in result.report.seconds
    for layer in result.report.layers:
        assert layer.weight_bits == result.variables["params"][layer.name]["kernel"].bits
    result.save(tmp_path / "mixed.safetensors")
    again = load(tmp_path / "mixed.safetensors", CASE.model, CASE.variables)
    assert again.convention == result.convention
    np.testing.assert_array_equal(again(inputs()), result(inputs()))


def test_a_budget_is_one_before_any_work():
    with pytest.raises(TypeError, match="budget: expected a Budget or None, found 4"):
        run(budget=4, on_stage=lambda stage: pytest.fail(stage))


def test_a_budget_that_nothing_meets():
    with pytest.raises(ValueError, match="average_weight_bits: expected at least 2"):
        run(budget=Budget(average_weight_bits=1.5), on_stage=lambda stage: stage == "trace" or pytest.fail(stage))


# --- steps judged on held-out images ---


@functools.cache
def judged(batch_norm_method="differential"):
    case = CASE
    recipe = FAST.replace(
        held_out=0.5, rounding="nearest", batch_norm=BatchNormConfig(method=batch_norm_method), bias_correction=False
    )
    images = jax.random.normal(jax.random.key(3), (32, *case.input_shape[1:]))
    return case, recipe, images


def quantized_on(case, images, recipe, bits):
    return quantize(case.model, case.variables, input_shape=case.input_shape, recipe=recipe, bits=bits, images=images)


def verdict(step):
    """What a line of the report says: the verdict, and before and after by each judge."""
    number = r"([\d.e+-]+)"
    found = re.findall(rf"divergence\D*? {number} -> {number}", step)
    return re.search("kept|dropped", step)[0], np.array(found, float)


def test_step_that_helps_is_kept():
    case, recipe, images = judged()
    result = quantized_on(case, images, recipe, "w3a3")
    half, quarter, analytic = result.report.steps
    assert analytic.startswith("analytic correction of BatchNorms and biases in its place: ")
    assert half.startswith("half of differential BatchNorm") and quarter.startswith("a quarter of it: ")
    (kept, half), (kept_quarter, quarter) = map(verdict, (half, quarter))
    ((before, after),), ((halved, quartered),) = half, quarter
    assert kept == "kept" and after < before and halved == after
    assert (kept_quarter == "kept") == (quartered <= halved)
    graph, start = result.graph, quantized_on(case, images, recipe.replace(batch_norm=None), "w3a3")
    found = [
        compare(
            graph, case.variables, adapt_batch_norm(graph, case.variables, start.variables, images[:16], c), images[16:]
        )
        for c in (BatchNormConfig(prior_images=16), BatchNormConfig(prior_images=48))
    ]
    np.testing.assert_allclose([f.divergence for f in found], [halved, quartered], rtol=1e-3)


def test_step_that_harms_is_dropped():
    # Noise is far from what the network was trained on: its statistics in place of the stored ones ruin it.
    case, recipe, images = judged("absolute")
    images = 5 + 3 * images
    without = quantized_on(case, images, recipe.replace(batch_norm=None), "w4a4")
    result = quantized_on(case, images, recipe, "w4a4")
    assert all("dropped" in step for step in result.report.steps)
    for ours, theirs in zip(jax.tree.leaves(result.variables), jax.tree.leaves(without.variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_judge_is_asked_on_images_that_nothing_is_fitted_to():
    case, recipe, images = judged()
    recipe = recipe.replace(batch_norm=None)
    results = [
        quantized_on(case, images, recipe.replace(rounding=rounding), "w3a3") for rounding in ("nearest", "squant")
    ]
    (step,) = results[1].report.steps
    assert step.startswith("SQuant: ")
    kept, divergences = verdict(step)
    graph = results[0].graph
    rounded = squant(graph, case.variables, results[0].variables)
    found = [compare(graph, case.variables, q, images[16:]).divergence for q in (results[0].variables, rounded)]
    np.testing.assert_allclose(found, divergences[0], rtol=1e-3)
    assert (kept == "kept") == (divergences[0, 1] <= divergences[0, 0])


def test_images_to_judge_on_are_of_another_key_and_source():
    recipe = FAST.replace(synthesis_num_images=32, synthesis_batch_size=16, held_out=0.25, judge_source="fourier")
    result = run(recipe=recipe)
    graph, variables = result.graph, CASE.variables
    keys = jax.random.split(jax.random.key(0), 4)
    parts = ((24, "pyramid", keys[0]), (8, "fourier", keys[3]))
    expected = [
        synthesize(
            graph,
            variables,
            key,
            dataclasses.replace(recipe.synthesis, num_images=count, batch_size=min(16, count), source=source),
        ).images
        for count, source, key in parts
    ]
    np.testing.assert_allclose(result.images, np.concatenate(expected), atol=1e-5)
    assert "24 synthesized in 5 steps" in result.report.images
    assert result.report.images.endswith("and 8 of the source 'fourier' to judge on")


def test_ranges_are_judged():
    case, recipe, images = judged()
    recipe = recipe.replace(batch_norm=None, range_search=RangeSearchConfig(estimators=("max", "lp"), factors=()))
    result = quantized_on(case, images, recipe, "w4a3")
    *sets, tensors = result.report.steps
    names = [f"ranges by {source} {name}: " for source in ("analytic", "image") for name in ("max", "lp")]
    # Those that it begins with are not tried again.
    assert [any(step.startswith(name) for step in sets) for name in names] == [True, False, True, True]
    assert len(sets) == 3
    assert re.match(r"other ranges of \d+ tensors: ", tensors)
    # Each verdict follows from its figures, and the next line begins where the last one ended.
    known = None
    for kept, divergences in map(verdict, result.report.steps):
        if known is not None:
            np.testing.assert_array_equal(divergences[:, 0], known)
        assert (kept == "kept") == (divergences[:, 1].prod() <= divergences[:, 0].prod())
        known = divergences[:, 1] if kept == "kept" else divergences[:, 0]
    found = compare(result.graph, case.variables, result.variables, images[16:])
    np.testing.assert_allclose(found.divergence, known[0], rtol=1e-3)


def test_ranges_as_whole_sets_alone():
    case, recipe, images = judged()
    search = RangeSearchConfig(estimators=("max", "lp"), one_by_one=False)
    result = quantized_on(case, images, recipe.replace(batch_norm=None, range_search=search), "w4a3")
    assert len(result.report.steps) == 3
    assert all(step.startswith("ranges by ") for step in result.report.steps)


def test_blocks_are_judged_together():
    case, recipe, images = judged()
    recipe = recipe.replace(batch_norm=None, reconstruction=ReconstructionConfig(steps=20, batch_size=4))
    result = quantized_on(case, images, recipe, "w3a3")
    blocks, together = result.report.steps
    assert "blocks kept" in blocks and together.startswith("all of them: ")
    kept, ((before, after),) = verdict(together)
    assert (kept == "kept") == (after <= before)
    found = compare(result.graph, case.variables, result.variables, images[16:])
    np.testing.assert_allclose(found.divergence, min(before, after), rtol=1e-3)


def test_eight_bits_are_not_reconstructed():
    result = run(recipe=FAST.replace(reconstruction=ReconstructionConfig(steps=2)), bits="w8a8")
    assert any(step.startswith("reconstruction: left out, 8 bits") for step in result.report.steps)
    assert "reconstruction" in result.report.seconds


def with_an_outlier(images):
    """The first image, which is not held out, a thousand times as bright: ranges become as wide."""
    return jnp.concatenate([1000 * images[:1], images[1:]])


def test_no_worse_than_instant():
    case, recipe, images = judged()
    instant = quantized_on(case, None, RECIPES["instant"], "w4a4")
    ruined = recipe.replace(batch_norm=None, estimator="max", at_least_instant=True)
    result = quantized_on(case, with_an_outlier(images), ruined, "w4a4")
    assert result.report.steps[-1].startswith("the result of the recipe instant in its place: kept")
    jax.tree.map(np.testing.assert_array_equal, result.variables, instant.variables)


def test_what_instant_begins_with_is_computed_once(monkeypatch):
    calls = collections.Counter()
    for name in ("equalize", "analytic_summaries", "quantize_params"):

        def counted(*args, name=name, function=getattr(recipe_steps, name)):
            calls[name] += not isinstance(jax.tree.leaves(args[1])[0], jax.core.Tracer)  # for shapes it is traced, too
            return function(*args)

        monkeypatch.setattr(recipe_steps, name, counted)
    recipe = RECIPES["fast"].replace(**SMALL, reconstruction=None)
    shared = run(CHAIN.model, CHAIN.variables, recipe=recipe)
    assert calls == {"equalize": 1, "analytic_summaries": 2, "quantize_params": 2}
    assert any("instant in its place" in step for step in shared.report.steps)
    calls.clear()
    # Other first ranges share nothing.
    run(CHAIN.model, CHAIN.variables, recipe=recipe.replace(range_search=None, synthesis_num_images=32))
    assert calls == {"equalize": 2, "analytic_summaries": 2, "quantize_params": 4}


def test_a_result_that_falls_apart_is_told():
    case, recipe, images = judged()
    recipe = recipe.replace(batch_norm=None, held_out=0, estimator="max")
    with pytest.warns(GraphWarning, match="the result has fallen apart: only [0-9]+ % of its images keep the class"):
        broken = quantized_on(case, with_an_outlier(images), recipe, "w2a2")
    assert broken.report.table().startswith("WARNING") and "fallen apart" in broken.report.warnings[0]
    assert quantized_on(case, images, recipe, "w8a8").report.warnings == ()


def test_too_few_images_decide_nothing():
    case, recipe, images = judged()
    result = quantized_on(case, images[:8], recipe, "w4a4")
    assert result.report.steps == ("differential BatchNorm adaptation, layer by layer",)


@pytest.mark.parametrize("share", [-0.1, 1.0, "half"])
def test_held_out_share(share):
    with pytest.raises(ValueError, match="held_out"):
        FAST.replace(held_out=share)


# --- recipes beyond images and nearest rounding ---


def test_instant_takes_no_images():
    case = CHAIN
    first, second = (
        quantize(case.model, case.variables, input_shape=case.input_shape, recipe="instant", bits="w4a4", key=key)
        for key in (0, 1)
    )
    assert first.report.images.startswith("none")
    assert first.report.agreement is None and "BatchNorm" in first.report.compared_on
    equalization, *others = first.report.steps
    assert equalization.startswith("equalization: ")
    assert others == ["SQuant", "analytic correction of BatchNorms and biases"]
    for ours, theirs in zip(jax.tree.leaves(first.variables), jax.tree.leaves(second.variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # nothing is drawn from the key
    plain = quantize(
        case.model,
        case.variables,
        input_shape=case.input_shape,
        recipe=RECIPES["instant"].replace(rounding="nearest", batch_norm=None, bias_correction=False),
        bits="w4a4",
    )
    x = jnp.concatenate([case.images(seed) for seed in range(32)])
    wanted = first.graph.apply_fn(case.variables, x)
    assert sqnr(wanted, first(x)) > sqnr(wanted, plain(x))


def unbalanced():
    """A network, and variables of the same function with every other channel between layers a hundred times larger."""
    case = CHAIN
    graph = trace(*case.function(), case.input_shape)
    leaves = dict(zip(graph.leaf_paths, graph.leaves(case.variables), strict=True))
    for pair in find_pairs(graph)[0]:
        bn = graph.batch_norm(graph.layer(pair.first).batch_norm)
        factor = jnp.where(jnp.arange(leaves[bn.scale].size) % 2, 100.0, 1.0)
        leaves[bn.scale], leaves[bn.bias] = leaves[bn.scale] * factor, leaves[bn.bias] * factor
        for reader in map(graph.layer, pair.readers):
            leaves[reader.kernel] = leaves[reader.kernel] / factor[:, None]
    return case, graph, graph.replace(case.variables, leaves)


def test_instant_equalizes():
    case, graph, variables = unbalanced()
    x = case.images()
    wanted = graph.apply_fn(case.variables, x)
    np.testing.assert_allclose(graph.apply_fn(variables, x), wanted, rtol=0, atol=1e-4 * float(jnp.abs(wanted).max()))

    def decibels(variables, **fields):
        recipe = RECIPES["instant"].replace(**fields)
        return sqnr(
            wanted, quantize(case.model, variables, input_shape=case.input_shape, recipe=recipe, bits="w4a4")(x)
        )

    equalized = decibels(variables)
    assert decibels(variables, equalize=False) < equalized - 6
    assert abs(equalized - decibels(case.variables)) < 1


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_equalization_is_judged_where_there_are_images(held_out):
    case, graph, variables = unbalanced()
    recipe = FAST.replace(equalize=True, rounding="nearest", batch_norm=None, bias_correction=False, held_out=held_out)
    arguments = dict(
        input_shape=case.input_shape, recipe=recipe, bits="w4a4", images=np.tile(case.images(), (16, 1, 1, 1))
    )
    helped = quantize(case.model, variables, **arguments)
    (step,) = helped.report.steps
    assert step.startswith("equalization: kept, " + ("held-out divergence" if held_out else "divergence on noise"))
    again = quantize(case.model, equalize(graph, variables), **arguments | {"recipe": recipe.replace(equalize=False)})
    for ours, theirs in zip(jax.tree.leaves(helped.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert helped.report.layers == again.report.layers


def trained_statistics(variables, images):
    """The variables with the exact statistics of images, as training leaves them."""
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    apply = jax.jit(lambda v, x: Stretched().apply(v, x, train=True, mutable=["batch_stats"]))
    _, new = apply({**variables, "batch_stats": zeros}, images)
    return {**variables, "batch_stats": jax.tree.map(lambda leaf: 100 * leaf, new["batch_stats"])}


class Stretched(nn.Module):
    """Pairs to equalize: a wide layer before a grouped one, and that before the last."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name, groups in (("wide", 1), ("grouped", 4)):
            x = nn.Conv(12, (3, 3), feature_group_count=groups, use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@functools.cache
def stretched():
    """Compiled initialization and inference, images and variables."""
    x = jax.random.normal(jax.random.key(1), (64, *SHAPE[1:]))
    return jax.jit(Stretched().apply), x, jax.jit(Stretched().init)(jax.random.key(0), x)


@pytest.mark.parametrize("factor", [0.0, 1e-4, *(pytest.param(f, marks=pytest.mark.slow) for f in (1e-6, 1e-2, 1.0))])
def test_instant_on_nearly_dead_channels(factor):
    apply, x, start = stretched()
    kernel = start["params"]["wide"]["kernel"] * jnp.where(jnp.arange(12) < 3, factor, 1.0)
    params = {**start["params"], "wide": {"kernel": kernel}}
    variables = trained_statistics({**start, "params": params}, x)
    wanted = apply(variables, x)
    found = {}
    for equal in (True, False):
        recipe = RECIPES["instant"].replace(equalize=equal)
        q = quantize(Stretched(), variables, input_shape=SHAPE, recipe=recipe, bits="w8a8")
        found[equal] = sqnr(wanted, q(x))
    assert found[True] > found[False] - 2, found
    assert found[True] > 20, found


def test_images_take_the_place_of_batch_norm_parameters():
    """Ranges, corrections and the comparison are those of the images, however far from the parameters."""
    x = 3 * inputs(16)
    by_noise = run(recipe="instant", bits="w8a8")
    given = run(recipe="instant", bits="w8a8", images=x)
    assert given.report.images == "16 given" and given.report.compared_on == "these images"
    assert given.report.agreement is not None
    np.testing.assert_array_equal(given.images, x)
    plain = RECIPES["instant"].replace(equalize=False, batch_norm=None, bias_correction=False, estimator="max")
    measured = run(recipe=plain, bits="w8a8", images=x)
    (first,) = [layer for layer in measured.report.layers if layer.name == measured.graph.first_layer.name]
    assert (first.low, first.high) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)
    assert (
        given.variables["batch_stats"]["bn_conv2"]["var"] != by_noise.variables["batch_stats"]["bn_conv2"]["var"]
    ).any()


def test_instant_without_batch_norm_uses_noise():
    result = run(NO_NORM.model, NO_NORM.variables, recipe="instant", bits="w8a8")
    assert "noise" in result.report.images and not result.report.images.startswith("none")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: CASE, id="small"),
        *(pytest.param(b, marks=pytest.mark.slow) for b in (model_grid.cifar_resnet8, model_grid.mobilenet_v2)),
    ],
)
def test_best_learns_rounding(build, tmp_path):
    case = build()
    recipe = RECIPES["best"].replace(
        synthesis_num_images=32, synthesis_batch_size=32, synthesis_steps=2, reconstruction_steps=2, held_out=0.25
    )
    seen = []
    result = quantize(
        case.model,
        case.variables,
        input_shape=case.input_shape,
        recipe=recipe,
        bits="w3a3",
        on_progress=seen.append,
    )
    assert any("blocks kept" in step for step in result.report.steps)
    assert {p.num_batches for p in seen} == {2, len(result.graph.blocks)}  # of both sets of images, then blocks
    result.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", case.model, case.variables)
    assert again.recipe == recipe
    np.testing.assert_array_equal(again(case.images()), result(case.images()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounding": "up"}, "rounding"),
        ({"source": "analytic", "reconstruction": ReconstructionConfig()}, "reconstruction"),
        ({"reconstruction_steps": 3}, "reconstruction_steps"),
        ({"equalize": "weights"}, "equalize: expected True or False"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        FAST.replace(**fields)
