"""The command line, run in-process as its script runs it."""

import ast
import contextlib
import dataclasses
import html
import importlib.util
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import dfq_jax.cli
from dfq_jax import RECIPES, zoo
from dfq_jax.cli import commands, layers, models, output
from dfq_jax.cli.options import SynthesisOptions
from dfq_jax.export import artifact
from dfq_jax.recipes import progress
from dfq_jax.recipes.steps import STEPS

pytest.importorskip("tyro")
pytest.importorskip("rich")

SMALL = ("--images", "8", "--steps", "4", "--batch-size", "8")
NETS = """
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

SHAPE = (1, 8, 8, 1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (4, 8):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@functools.cache
def _variables(module):
    return jax.jit(module.init)(jax.random.key(0), jnp.zeros(SHAPE))


def linen():
    return Net(), _variables(Net()), SHAPE


def with_preprocessing():
    return Net(), _variables(Net()), SHAPE, lambda images: (images[:, ::2, ::2] / 255.0 - 0.5).astype("float32")


def curved():
    return Net(), _variables(Net()), SHAPE, lambda images: ((images / 255.0) ** 0.5).astype("float32")


def resized():
    from dfq_jax.zoo import Preprocessing

    return Net(), _variables(Net()), SHAPE, Preprocessing(mean=(0.0,), std=(1.0,), resize=10, crop=8)


def nnx_net():
    return NnxNet(nnx.Rngs(0)), None, SHAPE


def plain():
    module = Net()
    return (lambda variables, x: {"logits": module.apply(variables, x)}), _variables(module), SHAPE


def no_norm():
    return NoNorm(), _variables(NoNorm()), SHAPE


def train_mode():
    module = Net()
    function = lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])[0]
    return function, _variables(module), SHAPE


def _changed(name, value):
    variables = _variables(Net())
    return Net(), jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, value) if jax.tree_util.keystr(path).endswith(f"['{name}']") else leaf,
        variables,
    ), SHAPE


def not_a_number():
    return _changed("kernel", float("nan"))


def zero_kernels():
    return _changed("kernel", 0.0)


def negative_variance():
    return _changed("var", -1.0)


def wrong_shape():
    return Net(), _variables(Net()), (1, 8, 8, 3)


def no_shape():
    return Net(), _variables(Net()), "square"


def returns_two():
    return Net(), _variables(Net())


def fails():
    raise KeyError("the weights\\nare elsewhere")


NUMBER = 3
"""


@dataclasses.dataclass
class Run:
    code: int
    out: str
    err: str


def run(*args: object) -> Run:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = dfq_jax.cli.main([str(arg) for arg in args])
    return Run(code, out.getvalue(), err.getvalue())


def succeed(*args: object) -> Run:
    result = run(*args)
    assert result.code == 0, result.err
    return result


def images(count: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: a module of networks, labeled images, damaged files, and one quantized network."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "user_nets.py").write_text(NETS)
    (folder / "broken_nets.py").write_text("import no_such_package\n")
    labels = np.arange(50) % 3
    np.savez(folder / "data.npz", images=images(50), labels=labels)
    np.savez(folder / "large.npz", images=images(50, 16), labels=labels)
    np.savez(folder / "color.npz", images=images(50, channels=3), labels=labels)
    np.savez(folder / "classes.npz", images=images(50), labels=np.arange(50) % 7)
    (folder / "empty").mkdir()
    (folder / "noise.th").write_bytes(b"not a checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        files = ("--output", "linen.safetensors", "--json", "linen.json")
        succeed("quantize", "user_nets:linen", "--bits", "w4a4", *SMALL, "--evaluate", "npz:data.npz", *files)
    (folder / "truncated.safetensors").write_bytes((folder / "linen.safetensors").read_bytes()[:-100])
    header = {"recipe": {}}
    artifact.save(folder / "nameless.safetensors", {"a": np.zeros(1)}, header=header)
    yield folder
    sys.modules.pop("user_nets", None)


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("DFQ_JAX_DEBUG", raising=False)
    # How many lines of progress there are depends on the machine's speed; tests of progress have their own clock.
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", float("inf"))


@pytest.fixture
def files_before(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def new_files(folder: Path, before: set[Path]) -> set[str]:
    return {p.name for p in folder.rglob("*") if "__pycache__" not in p.parts and p not in before}


# --- what works ---


def test_version_and_help():
    assert succeed("--version").out == "dfq-jax 0.1.0\n"
    text = succeed("--help").out
    assert all(name in text for name in commands.COMMANDS)
    assert "--edge-bits" in succeed("quantize", "--help").out


def test_models_lists_the_zoo():
    text = succeed("models").out
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [entry.name for entry in zoo.list_models()]
    assert "fashion_resnet20" in text and "bundled" in text
    assert "25.6 M" in text and "4089 M" in text  # parameters and MACs of ResNet-50
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "ImageNet-1k" not in text and "ImageNet-1k" in succeed("models", "--verbose").out


@pytest.mark.parametrize("model", [entry.name for entry in zoo.list_models() if isinstance(entry.weights, str)])
def test_tables_fit_eighty_characters(model, tmp_path, monkeypatch):
    """All that commands print of the networks that come with the library."""
    monkeypatch.setenv("COLUMNS", "80")
    net, data = tmp_path / "net.safetensors", ("bundled", "--limit", 100)
    noise = ("quantize", model, "--recipe", "noise", "--images", 8, "--evaluate", *data)
    runs = [
        ("inspect", model),
        (*noise, "--bits", "w4a4", "--layers", "--output", net),
        (*noise, "--layer-bits", "head=w3a5"),
        ("evaluate", net, "--data", *data),
        ("sensitivity", model, "--noise", "--bits", 2, 4),
        ("inspect", net, "--images", 2),
    ]
    if importlib.util.find_spec("onnxruntime"):
        runs.append(("export", net, "--to", "onnx", "--output", tmp_path / "net.onnx", "--verify", *data))
    for args in runs:
        lines = succeed(*args).out.splitlines()
        assert lines and max(len(line.rstrip()) for line in lines) <= 80, args


def test_the_demo_fits_eighty_characters(monkeypatch):
    """Its recipes in words, with what takes a second in their place."""
    few = RECIPES["noise"].replace(synthesis_num_images=8)
    own, all_data = models.Model.quantize, models.Model.load_data

    def quantize(self, reporter, *, recipe, **settings):
        return dataclasses.replace(own(self, reporter, recipe=few, **settings), recipe=recipe)

    monkeypatch.setattr(models.Model, "quantize", quantize)
    monkeypatch.setattr(models.Model, "load_data", lambda self, spec: all_data(self, spec, limit=100))
    lines = succeed("demo").out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["recipe", "float", "noise", "paper", "fast"]
    assert max(map(len, lines)) <= 80 and any("learned rounding, regression BatchNorm" in line for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_shells(shell):
    script = succeed("--tyro-print-completion", shell).out
    assert all(name in script for name in (*commands.COMMANDS, "--save-images"))
    if shell == "fish":
        return  # its quotes are not Python's
    spec = ast.literal_eval(re.search(r"COMPLETION_SPEC = (.*)", script)[1])
    for command in spec["subcommands"].values():
        # What stands in a second line would be taken for a candidate; `command` is none to type.
        assert all("\n" not in option["description"] for option in command["options"])
        assert ["--command"] not in [option["flags"] for option in command["options"]]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash(tmp_path):
    script = tmp_path / "dfq-jax.bash"
    succeed("--tyro-write-completion", "bash", script)
    typed = 'source "$1"; COMP_WORDS=(dfq-jax quantize --re); COMP_CWORD=2; found=$(complete -p dfq-jax); '
    typed += 'found=${found#*-F }; ${found%% *}; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", typed, "bash", script], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["--recipe", "--report", "--resume"]


@pytest.mark.parametrize("words", [("models",), ("inspect", "fashion_resnet20")])
def test_readers_that_have_seen_enough(words):
    command = [sys.executable, "-m", "dfq_jax.cli", *words]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tempfile.gettempdir())
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == dfq_jax.cli.UNREAD


def test_models_builds_none_and_writes_json(tmp_path, monkeypatch):
    built = []
    entries = tuple(dataclasses.replace(entry, build=lambda **_: built.append(1)) for entry in zoo.list_models())
    monkeypatch.setattr("dfq_jax.zoo.registry._ENTRIES", entries)
    succeed("models", "--json", tmp_path / "models.json")
    assert not built
    found = json.loads((tmp_path / "models.json").read_text())["models"]
    assert [model["name"] for model in found] == [entry.name for entry in entries]
    by_name = {model["name"]: model for model in found}
    assert by_name["resnet50"] == {
        "name": "resnet50",
        "input": [224, 224, 3],
        "classes": 1000,
        "parameters": 25_557_032,
        "macs": 4_089_184_256,
        "float_top1": 76.13,
        "weights": "--checkpoint",
        "trained_on": "ImageNet-1k",
        "source": "torchvision's ResNet50_Weights.IMAGENET1K_V1",
    }


@pytest.mark.parametrize("model", ["fashion_resnet20", "fashion_mobilenet", "user_nets:plain"])
def test_inspect_prints_the_graph(model):
    result = succeed("inspect", model)
    assert result.out.startswith("layer")
    assert "Graph(" in result.out
    assert result.err == ""


def test_inspect_reads_a_checkpoint(folder):
    weights = Path(zoo.__file__).parent / "weights" / "fashion_resnet20.npz"
    expected = succeed("inspect", "fashion_resnet20").out
    assert succeed("inspect", "fashion_resnet20", "--checkpoint", weights).out == expected


def test_inspect_shows_errors_of_a_saved_network():
    result = succeed("inspect", "linen.safetensors", "--images", "8")
    assert "W4A4" in result.out and "weights" in result.out
    errors = result.out.split("error of each layer, on 8 images made from the float network:\n")[1].splitlines()
    assert errors[0].split() == ["layer", "SQNR", "dB", "own", "carried"] and len(errors) == 4
    assert all(float(line.split()[1]) > 0 for line in errors[1:])


def test_the_summary_first_and_layers_on_demand():
    args = (*QUANTIZE, "--recipe", "noise", "--images", 8)
    brief, whole = succeed(*args).out, succeed(*args, "--layers").out
    assert "Conv_1" not in brief and "Conv_1" in whole
    assert max(map(len, whole.splitlines())) <= 80


def test_pages_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    target, folder, net = tmp_path / "page.html", tmp_path / "images", tmp_path / "net.safetensors"
    args = ("quantize", "user_nets:linen", *SMALL, "--report", target, "--save-images", folder, "--output", net)
    succeed(*args)
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{i:04d}.png" for i in range(8)), "grid.png"]
    page = target.read_text()
    assert page.count('class="layer"') == 3 and "Error along the network" in page
    assert shlex.join(["dfq-jax", *map(str, args)]) in html.unescape(page)
    # The file holds all of it, and its model is not run.
    result = succeed("report", net)
    assert result.out == f"{tmp_path / 'net.html'}\n" and result.err == ""
    shown = re.compile(r">(exact|inf dB)<")
    assert shown.sub("", (tmp_path / "net.html").read_text()) == shown.sub("", page)
    # What has no details says so.
    succeed("report", "linen.safetensors", "--output", tmp_path / "brief.html")
    assert "no histograms and no pictures" in (tmp_path / "brief.html").read_text()


def test_a_page_of_figures_that_are_none(tmp_path):
    pytest.importorskip("matplotlib")
    header = artifact.load("linen.safetensors")[1]["report"]
    spread = {"counts": ["many"], "first": 0, "last": 1, "low": 0, "high": 1, "step": 0, "clipped": 0, "sqnr": None}
    layer = {"sqnr": 1, "own": 1, "carried": 1, "weights": spread, "scales": [1, 1], "inputs": None}
    layers = [{"name": found["name"], **layer} for found in header["layers"]]
    header["details"] = {"measured_on": "", "layers": layers, "pictures": [], "sensitivity": None}
    artifact.save(tmp_path / "odd.safetensors", {"a": np.zeros(1)}, header={"report": header})
    result = run("report", tmp_path / "odd.safetensors")
    assert result.code == 2 and "odd.safetensors: its report cannot be shown" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


def test_pages_of_preprocessing_that_cannot_be_undone(tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "page.html"
    succeed("quantize", "user_nets:curved", *SMALL, "--report", target)
    assert "data:image/png" in target.read_text()


def test_sensitivity_as_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    args = ("sensitivity", "user_nets:linen", "--bits", "2", "8", "--noise", "--report", tmp_path / "page.html")
    succeed(*args)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<td style=") == 3 * 3 * 2 and shlex.join(["dfq-jax", *map(str, args)]) in html.unescape(page)


@pytest.mark.parametrize("flag", ["--report", "--save-images"])
def test_pages_need_an_extra(flag, monkeypatch, tmp_path):
    for name in ("matplotlib", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(progress.Reporter, "on_progress", lambda *_: pytest.fail("it is said too late"))
    result = run(*QUANTIZE, *SMALL, flag, tmp_path / "page.html")
    assert result.code == 2 and "pip install 'dfq_jax[report]'" in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("noise", [False, True])
def test_sensitivity(tmp_path, noise):
    options = ["--noise"] if noise else ["--images", "8"]
    result = succeed("sensitivity", "user_nets:linen", "--bits", "2", "8", *options, "--json", tmp_path / "found.json")
    facts = json.loads((tmp_path / "found.json").read_text())
    assert facts["bits"] == [2, 8] and len(facts["layers"]) == 3 and facts["model"] == "user_nets:linen"
    assert facts["measured_on"] == ("8 images" if not noise else facts["measured_on"]) and all(
        len(facts[part]) == 3 for part in ("weights", "input", "both", "without")
    )
    assert all(name in result.out for name in facts["layers"])
    assert "weights alone  2 bits   8 bits" in result.out and max(map(len, result.out.splitlines())) <= 80


def check_json(facts: dict, *, n: int, bits: tuple[int, int]) -> None:
    for network in ("float", "quantized"):
        assert 0 <= facts[network]["top1"] <= 100
        assert 0 < facts[network]["margin"] < 50
    assert 0 <= facts["quantized"]["agreement"] <= 100
    assert facts["n"] == n
    assert {"trace", "images", "ranges", "weights", "evaluate_float", "evaluate_quantized", "total"} <= set(
        facts["seconds"]
    )
    assert (facts["convention"]["weight_bits"], facts["convention"]["activation_bits"]) == bits
    assert facts["convention"]["description"].startswith(f"W{bits[0]}A{bits[1]}, ")
    assert facts["recipe"]["synthesis"]["num_images"] == 8
    assert facts["recipe"]["synthesis"]["steps"] == 4
    assert {"python", "jax", "flax", "dfq_jax"} <= set(facts["versions"])
    assert facts["report"]["layers"]
    assert facts["key"] == facts["report"]["key"]


def test_json_and_artifact(folder):
    facts = json.loads((folder / "linen.json").read_text())
    check_json(facts, n=50, bits=(4, 4))
    assert facts["model"] == "user_nets:linen"
    header = artifact.load(folder / "linen.safetensors")[1]
    assert header["model"] == "user_nets:linen"
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("flags", [(), ("--integer",), ("--model", "user_nets:linen")])
def test_evaluate_repeats_what_quantize_measured(flags, tmp_path):
    expected = json.loads(Path("linen.json").read_text())
    result = succeed(
        "evaluate", "linen.safetensors", "--data", "npz:data.npz", *flags, "--json", tmp_path / "facts.json"
    )
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["quantized"]["top1"] == expected["quantized"]["top1"]
    assert facts["convention"] == expected["convention"]
    assert facts["recipe"] == expected["recipe"]
    assert facts["n"] == 50
    assert facts["integer"] == ("--integer" in flags)
    assert f"{facts['quantized']['top1']:.2f}" in result.out
    # A file that names code is followed, but not in silence.
    assert ("running user_nets:linen" in result.err) == ("--model" not in flags)


def test_folder_of_images_of_several_sizes(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for index in range(130):  # more than one batch
        pixels = images(1, 9 + index % 5)[0, :, : 9 + index % 3, 0]
        (tmp_path / str(index % 3)).mkdir(exist_ok=True)
        image_module.fromarray(pixels).save(tmp_path / str(index % 3) / f"{index}.png")
    flags = ("--model", "user_nets:resized", "--json", tmp_path / "facts.json")
    succeed("evaluate", "linen.safetensors", "--data", f"folder:{tmp_path}", *flags)
    assert json.loads((tmp_path / "facts.json").read_text())["n"] == 130
    refused = run("evaluate", "linen.safetensors", "--data", f"folder:{tmp_path}", "--model", "user_nets:linen")
    assert refused.code and "the model takes images of 8x8x1, image 0 of folder:" in refused.err


@pytest.mark.parametrize(
    ("model", "data", "recipe"),
    [
        ("nnx_net", "data", "paper"),
        ("plain", "data", "noise"),
        ("with_preprocessing", "large", "noise"),
        ("no_norm", "data", "noise"),
    ],
)
def test_models_of_the_users_own(model, data, recipe, tmp_path):
    target = tmp_path / "net.safetensors"
    result = succeed(
        "quantize", f"user_nets:{model}", "--recipe", recipe, *SMALL,
        "--evaluate", f"npz:{data}.npz", "--limit", 20, "--output", target,
    )  # fmt: skip
    assert "W8A8" in result.out
    top1 = result.out.splitlines()[-1].split()[1]
    again = succeed("evaluate", target, "--data", f"npz:{data}.npz", "--limit", 20)
    assert again.out.splitlines()[1].split()[1] == top1


def test_bundled_model(tmp_path):
    target, facts_file = tmp_path / "net.safetensors", tmp_path / "facts.json"
    result = succeed(
        "quantize", "fashion_resnet20", "--recipe", "noise", "--bits", "w4a4", "--edge-bits", "none",
        "--edge-input-bits", 8, "--second-input-bits", 6, "--layer-bits", "kind:dense=float",
        "--layer-bits", "stage0_block[01]/.*=w6a5", *SMALL,
        "--evaluate", "bundled", "--limit", 64, "--output", target, "--json", facts_file,
    )  # fmt: skip
    facts = json.loads(facts_file.read_text())
    check_json(facts, n=64, bits=(4, 4))
    assert facts["convention"]["edge_bits"] is None and facts["convention"]["edge_input_bits"] == 8
    assert facts["convention"]["second_input_bits"] == 6
    assert facts["convention"]["description"].endswith("but kind:dense=float; stage0_block[01]/.*=w6a5")
    bits = {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in facts["report"]["layers"]}
    assert set(bits.values()) == {(4, 8), (6, 5), (4, 4), (None, None)}
    assert facts["float"]["top1"] > 85
    assert result.out.splitlines()[-1].startswith("mixed W4.")
    assert f"{facts['quantized']['top1']:.2f}" in result.out
    again = succeed("evaluate", target, "--data", "bundled", "--limit", 64)
    assert f"{facts['quantized']['top1']:.2f}" in again.out
    assert again.err == ""


def test_without_evaluation_nothing_is_measured(tmp_path):
    target = tmp_path / "facts.json"
    result = succeed("quantize", "user_nets:linen", "--recipe", "noise", "--images", 8, "--json", target)
    facts = json.loads(target.read_text())
    assert facts["float"] is None and facts["quantized"] is None and facts["n"] is None
    assert "recipe          noise" in result.out


def test_lossless_layers_are_valid_json(tmp_path):
    # Zeros are quantized without error: their signal-to-noise ratio is infinite, which JSON cannot say.
    files = ("--output", tmp_path / "net.safetensors", "--json", tmp_path / "facts.json")
    succeed("quantize", "user_nets:zero_kernels", "--recipe", "noise", "--images", 8, *files)
    assert json.loads((tmp_path / "facts.json").read_text())["report"]["layers"][0]["weight_sqnr"] is None
    succeed("evaluate", tmp_path / "net.safetensors", "--data", "npz:data.npz")


def test_batch_is_no_larger_than_the_number_of_images():
    recipe = SynthesisOptions(num_images=8).within(RECIPES["fast"])
    assert recipe.synthesis.batch_size == 8
    recipe = SynthesisOptions(num_images=1000, steps=7, batch_size=50).within(RECIPES["fast"])
    assert (recipe.synthesis.num_images, recipe.synthesis.steps, recipe.synthesis.batch_size) == (1000, 7, 50)
    assert SynthesisOptions().within(RECIPES["fast"]) == RECIPES["fast"]


def test_options_that_are_fields_have_the_help_of_the_record():
    text = " ".join(succeed("quantize", "--help").out.replace("│", " ").split())
    for words in ("--edge-bits N|none bits of weights and input of the first", "--images N images in all."):
        assert words in text, words


@pytest.mark.slow
def test_demo(tmp_path):
    result = succeed("demo", "--json", tmp_path / "demo.json")
    facts = json.loads((tmp_path / "demo.json").read_text())
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["recipe", "float", "noise", "paper", "fast"]
    assert max(map(len, lines)) <= 80
    assert "W4A4, first and last layer 8-bit" in result.out
    assert facts["n"] == 10_000
    top1 = {row["name"]: row["quantized"]["top1"] for row in facts["recipes"]}
    assert top1["noise"] < top1["paper"] < top1["fast"] <= facts["float"]["top1"] + 0.5
    assert facts["float"]["top1"] - top1["fast"] < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fast", "paper"])
@pytest.mark.parametrize("model", ["fashion_resnet20", "fashion_mobilenet"])
def test_bundled_models_with_synthesis(model, recipe, tmp_path):
    target, limit = tmp_path / "net.safetensors", ("--limit", 64)
    # Absolute BatchNorm adaptation takes its statistics from the images alone: it needs more than a handful.
    images = ("--images", "32", "--steps", "20", "--batch-size", "32")
    flags = ("--recipe", recipe, "--bits", "w8a8", *images, "--evaluate", "bundled", *limit, "--output", target)
    result = succeed("quantize", model, *flags)
    top1 = result.out.splitlines()[-1].split()[1]
    assert float(top1) > 80
    assert top1 in succeed("evaluate", target, "--data", "bundled", *limit).out


# --- what is refused ---

QUANTIZE = ("quantize", "user_nets:linen")
ON_DATA = ("--evaluate", "npz:data.npz")
REFUSED = {
    "no command": ((), "expected a command: demo, inspect"),
    "unknown command": (("quantise",), "quantise"),
    "no model": (("inspect",), "MODEL"),
    "unknown option": ((*QUANTIZE, "--imges", "3"), "Unrecognized options: --imges"),
    "no value": ((*QUANTIZE, "--images"), "--images"),
    "no number": ((*QUANTIZE, "--images", "many"), "--images"),
    "unknown model": (("inspect", "fashion_resnet21"), "did you mean 'fashion_resnet20'?"),
    "no module": (("inspect", "absent.nets:linen"), "no module 'absent'"),
    "no submodule": (("inspect", "user_nets.sub:linen"), "user_nets.sub"),
    "no function": (("inspect", "user_nets:absent"), "module user_nets has no 'absent'"),
    "no name": (("inspect", "user_nets:"), "expected a zoo name or package.module:function"),
    "a value": (("inspect", "user_nets:NUMBER"), "not a function"),
    "broken module": (("inspect", "broken_nets:linen"), "No module named 'no_such_package'"),
    "failing function": (("inspect", "user_nets:fails"), "user_nets:fails() failed: KeyError"),
    "two results": (("inspect", "user_nets:returns_two"), "it returned 2 items"),
    "no shape": (("inspect", "user_nets:no_shape"), "input_shape must be like (1, 32, 32, 3)"),
    "wrong shape": (("inspect", "user_nets:wrong_shape"), "(1, 8, 8, 3)"),
    "train mode": (("quantize", "user_nets:train_mode"), "inference mode"),
    "no BatchNorm": (("quantize", "user_nets:no_norm"), "no BatchNorm"),
    "NaN": (("quantize", "user_nets:not_a_number", *SMALL), "NaN"),
    "negative variance": (("quantize", "user_nets:negative_variance", *SMALL), "negative variance"),
    "unknown recipe": (
        (*QUANTIZE, "--recipe", "slow"),
        "one of ['best', 'fast', 'finetune', 'instant', 'noise', 'paper']",
    ),
    "bits": ((*QUANTIZE, "--bits", "4"), "expected a name like 'w4a4'"),
    "too few bits": ((*QUANTIZE, "--bits", "w1a4"), "from 2 to 8, found 1"),
    "edge bits": ((*QUANTIZE, "--edge-bits", "9"), "from 2 to 8, found 9"),
    "no edge bits": ((*QUANTIZE, "--edge-bits", "some"), "--edge-bits"),
    "layer bits": ((*QUANTIZE, "--layer-bits", "Conv_0"), "expected words like 'head=float'"),
    "layer pattern": ((*QUANTIZE, "--layer-bits", "Conv_(=w8"), "pattern: expected a regular expression"),
    "page's folder": ((*QUANTIZE, "--report", "absent/page.html"), "there is no folder"),
    "images of noise": ((*QUANTIZE, "--recipe", "instant", "--save-images", "pictures"), "a recipe that makes images"),
    "images in a file": ((*QUANTIZE, "--save-images", "data.npz"), "is a file"),
    "images nowhere": ((*QUANTIZE, "--save-images", "absent/pictures"), "there is no folder"),
    "page of no network": (("report", "nameless.safetensors"), "the header lacks a report"),
    "page over the network": (("report", "linen.safetensors", "--output", "linen.safetensors"), "two different files"),
    "no such layer": (
        (*QUANTIZE, *SMALL, "--layer-bits", "Conv_2=w8"),
        "'Conv_2=w8' matches no layer; the closest are 'Conv_1'",
    ),
    "agreement": ((*QUANTIZE, "--min-agreement", "101"), "a percentage above 0 and up to 100, found 101"),
    "two targets": (
        (*QUANTIZE, "--min-agreement", "99", "--max-divergence", "0.1"),
        "expected an agreement or a divergence, found 99.0 and 0.1",
    ),
    "target and budget": ((*QUANTIZE, "--min-agreement", "99", "--average-bits", "4"), "expected None beside a budget"),
    "no images": ((*QUANTIZE, "--images", "0"), "num_images: expected an integer of at least 1, found 0"),
    "no steps": ((*QUANTIZE, "--steps", "-1"), "steps: expected an integer of at least 1, found -1"),
    "seed": ((*QUANTIZE, "--recipe", "noise", "--seed", "9" * 30), "found 9999"),
    "devices": ((*QUANTIZE, "--devices", "99"), "devices: expected a number from 1 to"),
    "devices in words": ((*QUANTIZE, "--devices", "some"), "--devices"),
    "checkpoint missing": (("quantize", "fashion_resnet20", "--checkpoint", "absent.th"), "absent.th"),
    "checkpoint foreign": (("quantize", "fashion_resnet20", "--checkpoint", "noise.th"), "none of the formats"),
    "checkpoint on the hub": (("quantize", "cifar_resnet20", "--checkpoint", "hf:a"), "'hf:a' is no reference to"),
    "checkpoint needed": (("quantize", "cifar_resnet20"), "comes without weights"),
    "checkpoint of function": ((*QUANTIZE, "--checkpoint", "noise.th"), "loads its own weights"),
    "data": ((*QUANTIZE, "--evaluate", "images"), "'images' names no data"),
    "data missing": ((*QUANTIZE, "--evaluate", "npz:absent.npz"), "absent.npz"),
    "data empty": ((*QUANTIZE, "--evaluate", "folder:empty"), "holds no images"),
    "data of other size": ((*QUANTIZE, "--evaluate", "npz:large.npz"), "8x8x1"),
    "data of other channels": ((*QUANTIZE, "--evaluate", "npz:color.npz"), "8x8x1"),
    "data of other classes": ((*QUANTIZE, "--evaluate", "npz:classes.npz"), "the label 6"),
    "preprocessed size": (
        ("quantize", "user_nets:with_preprocessing", "--evaluate", "npz:data.npz"),
        "preprocessed images are (4, 4, 1)",
    ),
    "limit": ((*QUANTIZE, *ON_DATA, "--limit", "0"), "limit"),
    "output folder": ((*QUANTIZE, "--output", "absent/net.safetensors"), "there is no folder"),
    "output is folder": ((*QUANTIZE, "--output", "empty"), "is a folder"),
    "json folder": ((*QUANTIZE, "--json", "absent/facts.json"), "there is no folder"),
    "json is output": ((*QUANTIZE, "--json", "x", "--output", "x"), "two different files"),
    "resume is other file": ((*QUANTIZE, *SMALL, "--resume", "data.npz"), "data.npz"),
    "other bits": (("sensitivity", "user_nets:linen", "--bits", "9"), "bits: expected integers from 2 to 8"),
    "images and noise": (("sensitivity", "user_nets:linen", "--noise", "--images", "8"), "images: expected none"),
    "noise without norms": (("sensitivity", "user_nets:no_norm", "--noise"), "no BatchNorm"),
    "a damaged network": (("inspect", "truncated.safetensors"), "truncated.safetensors"),
    "demo's json": (("demo", "--json", "absent/facts.json"), "there is no folder"),
    "artifact missing": (("evaluate", "absent.safetensors", "--data", "bundled"), "absent.safetensors"),
    "artifact truncated": (("evaluate", "truncated.safetensors", "--data", "npz:data.npz"), "truncated"),
    "artifact foreign": (("evaluate", "noise.th", "--data", "bundled"), "noise.th"),
    "artifact nameless": (("evaluate", "nameless.safetensors", "--data", "bundled"), "pass --model"),
    "artifact of other model": (
        ("evaluate", "linen.safetensors", "--data", "npz:data.npz", "--model", "user_nets:nnx_net"),
        "of another network",
    ),
    "no data": (("evaluate", "linen.safetensors"), "DATA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(case, folder, files_before):
    args, words = REFUSED[case]
    result = run(*args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("dfq-jax: error: ")
    assert words in result.err
    assert "Traceback" not in result.err
    assert not new_files(folder, files_before)


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_debug_shows_the_traceback(by, monkeypatch):
    if by == "environment":
        monkeypatch.setenv("DFQ_JAX_DEBUG", "1")
    result = run(*(["--debug"] if by == "flag" else []), "inspect", "user_nets:fails")
    assert result.code == 2
    assert "Traceback" in result.err and "KeyError" in result.err
    assert result.err.splitlines()[-1].startswith("dfq-jax: error: ")


def test_a_defect_is_not_hidden(monkeypatch):
    def defect(*_, **__):
        raise AssertionError("impossible")

    monkeypatch.setattr(layers, "resolve", defect)
    with pytest.raises(AssertionError, match="impossible"):
        run("inspect", "fashion_resnet20")


def test_failing_output_leaves_no_json(folder, files_before, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dfq_jax.Quantized, "save", full)
    result = run(*QUANTIZE, "--recipe", "noise", "--images", 8, "--output", "a.safetensors", "--json", "a.json")
    assert result.code == 2 and "No space left" in result.err
    assert not new_files(folder, files_before)


def test_json_is_whole_or_absent(tmp_path):
    with pytest.raises(ValueError):
        output.write_json(tmp_path / "facts.json", {"sqnr": float("inf")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [("tyro",), ("rich",), ("tyro", "rich")])
def test_missing_extra_is_named(missing, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    result = run("models")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert f"needs {' and '.join(missing)}: pip install 'dfq_jax[cli]'" in result.err
    assert succeed("--version").out


def test_script_without_the_extra():
    script = """import sys
sys.modules.update(tyro=None, rich=None)
from dfq_jax.cli import main
sys.exit(main(["demo"]))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "dfq_jax[cli]" in done.stderr


# --- interruption and progress ---


def test_interrupted_synthesis_goes_on(folder, files_before, monkeypatch, tmp_path):
    args = (*QUANTIZE, "--recipe", "paper", "--images", "8", "--steps", "30", "--batch-size", "8", "--json")
    succeed(*args, tmp_path / "expected.json")
    report = progress.Reporter.on_progress

    def interrupt(self, value):
        signal.raise_signal(signal.SIGINT)
        report(self, value)

    resume = tmp_path / "images.npz"
    with monkeypatch.context() as patch:
        patch.setattr(progress.Reporter, "on_progress", interrupt)
        result = run(*args, tmp_path / "found.json", "--resume", resume)
    assert result.code == 130
    assert result.err.count("\n") == 1
    assert result.err.startswith("dfq-jax: interrupted; the same command goes on from ")
    assert [path.name for path in tmp_path.iterdir() if path.name != "expected.json"] == ["images.npz"]
    succeed(*args, tmp_path / "found.json", "--resume", resume)
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("expected", "found"))
    assert found["report"]["images"] == expected["report"]["images"]
    assert found["report"]["layers"] == expected["report"]["layers"]
    assert not resume.exists()


@pytest.mark.parametrize("fails", ["evaluation", "output", "json"])
def test_images_are_kept_until_all_is_written(fails, tmp_path, monkeypatch):
    """What fails or is interrupted after the network is made is done again without making the images again."""
    resume, target, facts = (tmp_path / name for name in ("images.npz", "net.safetensors", "facts.json"))
    args = (*QUANTIZE, *SMALL, *ON_DATA, "--resume", resume, "--output", target, "--json", facts)

    def broken(*_, **__):
        raise KeyboardInterrupt if fails == "evaluation" else OSError(28, "No space left on device")

    where = {
        "evaluation": (commands, "_measure"),
        "output": (dfq_jax.Quantized, "save"),
        "json": (commands, "write_json"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[fails], broken)
        result = run(*args)
    assert result.code == (130 if fails == "evaluation" else 2)
    assert ("goes on from" in result.err) == (fails == "evaluation")
    assert resume.exists()
    with monkeypatch.context() as patch:
        patch.setattr(progress.Reporter, "on_progress", lambda *_: pytest.fail("images are made again"))
        succeed(*args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "net.safetensors"]


def test_a_resume_file_that_is_not_used_is_left_alone(tmp_path):
    resume = tmp_path / "mine.npz"
    resume.write_bytes(b"mine")
    succeed(*QUANTIZE, "--recipe", "noise", "--images", 8, "--resume", resume)
    assert resume.read_bytes() == b"mine"


def test_every_stage_has_a_title(clock, capsys):
    reporter = progress.Reporter(progress.Lines(every=0))
    for stage in ("trace", "images", *STEPS, "compare"):
        reporter.on_stage(stage)
    printed = capsys.readouterr().err.splitlines()
    assert {"equalizing weight ranges", "fine-tuning the network", "rounding weights"} <= set(printed)
    assert len(set(printed)) == len(printed) == len(STEPS) + 3


def test_interrupt_elsewhere(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "resolve", interrupted)
    result = run("inspect", "fashion_resnet20")
    assert (result.code, result.err) == (130, "dfq-jax: interrupted\n")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_few_seconds(clock, capsys):
    lines = progress.Lines(every=5)
    reporter = progress.Reporter(lines, "fast")
    reporter.on_stage("images")
    for second in range(1, 21):
        clock[0] = 1000.0 + second
        state = progress.base.Progress(2, 2, 5 * second, 100, 0.125, second, 80.0 - second, 100 + 5 * second)
        reporter.on_progress(state)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 4
    assert printed[-1] == "fast: making images: 100 %, loss 0.125, ETA 1 min 00 s"


def test_counted_stages_estimate_the_time_left(clock, capsys):
    reporter = progress.Reporter(progress.Lines(every=0))

    def work(on_progress):
        for done in (100, 200, 300):
            on_progress(done, 400)
            clock[0] += 2
        return "result"

    assert reporter.timed("evaluating", work)[0] == "result"
    assert capsys.readouterr().err.splitlines() == [
        "evaluating",
        "evaluating: 25 %, 100 of 400 images",
        "evaluating: 50 %, 200 of 400 images, ETA 4 s",
        "evaluating: 75 %, 300 of 400 images, ETA 2 s",
    ]


@pytest.mark.parametrize("columns", [80, 150])
def test_one_line_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    err = io.StringIO()
    with contextlib.redirect_stderr(err), progress.progress_bar() as bar:
        display = bar.display
        reporter = progress.Reporter(display, "fast")
        reporter.on_stage("trace")
        reporter.on_stage("images")
        reporter.on_progress(progress.base.Progress(1, 2, 50, 100, 0.125, 3.0, 90.0, 50))
        display._progress.refresh()
        reporter.on_stage("ranges")
        display._progress.refresh()
    text = err.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "fast: making images" in shown and "25%" in shown and "loss 0.125" in shown and "ETA 1 min 30 s" in shown
    assert all(len(line) <= columns for line in re.split("[\r\n]", shown))
    assert "\n" not in shown  # there was never more than one


def test_nothing_but_tables_on_stdout():
    result = succeed(*QUANTIZE, *SMALL, *ON_DATA)
    assert result.out.startswith("WARNING ") and "\nrecipe " in result.out  # its statistics are those of `init`
    assert result.out.splitlines()[-2].split()[0] == "float"
    assert result.err == ""


def test_same_seed_same_network(tmp_path):
    for name in ("one", "two"):
        succeed(*QUANTIZE, *SMALL, "--seed", 3, "--output", tmp_path / name)
    one, two = (artifact.load(tmp_path / name)[0] for name in ("one", "two"))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
