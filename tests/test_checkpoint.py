"""Checkpoints of every format into a module's variables, and everything that must not load."""

import io
import json
import struct
import tracemalloc
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx

from dfq_jax import as_function, zoo
from dfq_jax.zoo import cifar_resnet
from dfq_jax.zoo.arrays import open_arrays, read_arrays, read_npz
from dfq_jax.zoo.checkpoint import flatten_names, load_checkpoint
from dfq_jax.zoo.layouts import LAYOUTS, Layout, Rule

STRUCT = jax.ShapeDtypeStruct
TEMPLATE = {
    "params": {
        "conv": {"kernel": STRUCT((3, 3, 2, 4), jnp.float32)},
        "blocks": {0: {"bias": STRUCT((4,), jnp.float32)}, 1: {"bias": STRUCT((4,), jnp.bfloat16)}},
    },
    "counts": {"steps": STRUCT((), jnp.int32)},
}
rng = np.random.default_rng(0)


def arrays():
    return {
        "params/conv/kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "params/blocks/0/bias": rng.normal(size=4).astype(np.float16),
        "params/blocks/1/bias": rng.normal(size=4),
        "counts/steps": np.array(7, np.int64),
    }


def write(path, content):
    """Writes in the format that the file's suffix says."""
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(content, path)
    else:
        tree = {}
        for name, array in content.items():
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".msgpack"])
def test_round_trip(tmp_path, suffix):
    content = arrays()
    found = load_checkpoint(write(tmp_path / f"weights{suffix}", content), TEMPLATE)
    assert jax.tree.structure(found) == jax.tree.structure(TEMPLATE)
    leaves = flatten_names(found)
    for name, wanted in flatten_names(TEMPLATE).items():
        leaf = leaves[name]
        assert isinstance(leaf, np.ndarray), name
        assert leaf.dtype == wanted.dtype and leaf.shape == wanted.shape, name
        np.testing.assert_array_equal(leaf, content[name].astype(wanted.dtype), name)


def test_format_is_recognized_by_content_not_by_name(tmp_path):
    source = write(tmp_path / "weights.safetensors", arrays())
    target = source.rename(tmp_path / "weights.npz")
    assert set(read_arrays(target)) == set(arrays())


def test_names_of_flatten():
    assert list(flatten_names({"a": {0: 1, "b": 2}, 3: 4})) == ["a/0", "a/b", "3"]
    with pytest.raises(ValueError, match=r"tree: two leaves have the name 'a/b'"):
        flatten_names({"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="tree: holds no arrays"):
        flatten_names({"a": {}})
    with pytest.raises(TypeError, match="tree: expected nested dictionaries, found list"):
        flatten_names([1])
    with pytest.raises(TypeError, match=r"key 1\.5"):
        flatten_names({1.5: 1})


# The table for torch's CIFAR ResNets


def akamaster(depth=8, **changes):
    """A state dict as of the public checkpoints, with small random values."""
    state = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = rng.normal(size=channels).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(3, np.int64)

    state["conv1.weight"] = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    norm("bn1", 16)
    channels = 16
    for stage, features in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            state[f"{name}.conv1.weight"] = rng.normal(size=(features, channels, 3, 3)).astype(np.float32)
            norm(f"{name}.bn1", features)
            state[f"{name}.conv2.weight"] = rng.normal(size=(features, features, 3, 3)).astype(np.float32)
            norm(f"{name}.bn2", features)
            channels = features
    state["linear.weight"] = rng.normal(size=(10, 64)).astype(np.float32)
    state["linear.bias"] = rng.normal(size=10).astype(np.float32)
    state.update(changes)
    return {name: array for name, array in state.items() if array is not None}


@pytest.fixture(scope="module")
def template():
    image = STRUCT((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(cifar_resnet.CifarResNet(depth=8).init, jax.random.key(0), image)


def test_akamaster_names_and_axes(tmp_path, template):
    state = akamaster()
    found = load_checkpoint(write(tmp_path / "w.safetensors", state), template)
    params, stats = found["params"], found["batch_stats"]
    assert jax.tree.structure(found) == jax.tree.structure(template)
    np.testing.assert_array_equal(
        params["layer2_0"]["conv1"]["kernel"][1, 2, 3, 4], state["layer2.0.conv1.weight"][4, 3, 1, 2]
    )
    np.testing.assert_array_equal(params["linear"]["kernel"], state["linear.weight"].T)
    np.testing.assert_array_equal(params["linear"]["bias"], state["linear.bias"])
    np.testing.assert_array_equal(params["layer3_0"]["bn2"]["scale"], state["layer3.0.bn2.weight"])
    np.testing.assert_array_equal(params["bn1"]["bias"], state["bn1.bias"])
    np.testing.assert_array_equal(stats["bn1"]["mean"], state["bn1.running_mean"])
    np.testing.assert_array_equal(stats["layer1_0"]["bn1"]["var"], state["layer1.0.bn1.running_var"])


def test_akamaster_against_torch(tmp_path, template):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    state = akamaster()
    for name in state:
        if name.endswith("running_var"):
            state[name] = np.abs(state[name]) + 0.5
        elif name.endswith("conv1.weight") or name.endswith("conv2.weight"):
            state[name] *= 0.1
    path = tmp_path / "w.pth"
    state = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)

    def norm(x, name):
        mean, var, scale, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, scale, bias, eps=1e-5)

    x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    y = torch.from_numpy(x.transpose(0, 3, 1, 2))
    y = functional.relu(norm(functional.conv2d(y, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        z = functional.conv2d(y, state[f"{name}.conv1.weight"], padding=1, stride=stride)
        z = functional.relu(norm(z, f"{name}.bn1"))
        z = norm(functional.conv2d(z, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2:
            new = z.shape[1] - y.shape[1]
            y = functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
        y = functional.relu(z + y)
    expected = functional.linear(y.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"]).numpy()

    found = cifar_resnet.CifarResNet(depth=8).apply(load_checkpoint(path, template), jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def problem(path, template, match, layout=None):
    with pytest.raises(ValueError, match=match) as caught:
        load_checkpoint(path, template, layout)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path, template):
    state = akamaster(
        **{
            "linear.bias": None,
            "layer1.0.bn1.weight": None,
            "layer1.0.shortcut.weight": np.zeros(3, np.float32),
            "layer9.0.bn1.weight": np.zeros(3, np.float32),
            "conv1.weight": np.zeros((16, 1, 3, 3), np.float32),
            "linear.weight": np.zeros(640, np.float32),
            "bn1.bias": np.zeros(16, np.int32),
        }
    )
    path = write(tmp_path / "w.npz", state)
    message = problem(path, template, "does not fit the model; nothing was loaded")
    lines = {line.strip().split(":")[0]: line for line in message.splitlines()}
    assert "params/layer1_0/bn1/scale" in lines["missing"] and "params/linear/bias" in lines["missing"]
    assert "conv1" not in lines["missing"]
    assert "layer1.0.shortcut.weight" in lines["unexpected"] and "layer9.0.bn1.weight" in lines["unexpected"]
    misfits = lines["not fitting"]
    assert "conv1.weight: shape (3, 3, 1, 16) (axes in Flax order), expected (3, 3, 3, 16)" in misfits
    assert "linear.weight: shape (640,), expected 2 axes for 'linear'" in misfits
    assert "bn1.bias: dtype int32, expected float32" in misfits


def test_a_deeper_networks_checkpoint(tmp_path, template):
    path = write(tmp_path / "w.npz", akamaster(14))
    assert "layer1.1.conv1.weight" in problem(path, template, "unexpected: ")


def test_transposed_square_kernel_needs_the_layout(tmp_path):
    # A layout of one's own; the built-in ones are examples of it.
    layout = Layout(
        name="mine",
        description="fully connected",
        signature=(r"fc\.weight",),
        rules=(Rule(pattern=r"fc\.weight", target="params/fc/kernel", transform="linear"),),
    )
    template = {"params": {"fc": {"kernel": STRUCT((2, 2), jnp.float32)}}}
    path = write(tmp_path / "w.npz", {"fc.weight": np.array([[1.0, 2.0], [3.0, 4.0]])})
    found = load_checkpoint(path, template, layout)
    np.testing.assert_array_equal(found["params"]["fc"]["kernel"], [[1, 3], [2, 4]])
    problem(path, template, r"in no known layout; it starts with fc\.weight.*akamaster.*flax")
    problem(path, template, r"unexpected: fc\.weight", "akamaster")
    with pytest.raises(ValueError, match="layout: unknown layout 'other'; known are: akamaster"):
        load_checkpoint(path, template, "other")


def test_two_names_for_one_place(tmp_path):
    layout = Layout(name="twice", description="", signature=(), rules=(Rule(pattern=r".*", target="params/a"),))
    path = write(tmp_path / "w.npz", {"x": np.zeros(2), "y": np.zeros(2)})
    problem(path, {"params": {"a": STRUCT((2,), jnp.float32)}}, "y: goes to params/a, as does x", layout)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"params/conv/kernel": np.zeros((3, 3, 4, 2))}, r"not fitting: .*kernel: shape \(3, 3, 4, 2\)"),
        ({"params/blocks/0/bias": np.zeros((4, 1))}, r"bias: shape \(4, 1\)"),
        ({"params/blocks/0/bias": np.zeros(4, complex)}, "dtype complex128, expected float32"),
        ({"params/blocks/0/bias": np.zeros(4, bool)}, "dtype bool, expected float32"),
        ({"counts/steps": np.zeros(())}, "dtype float64, expected int32"),
        ({"params/blocks/0/bias": np.array(["a", "b", "c", "d"])}, "dtype <U1, expected float32"),
        ({"others/mu": np.zeros(4)}, "unexpected: others/mu"),
    ],
)
def test_unfit_flax_files(tmp_path, changes, match):
    problem(write(tmp_path / "w.npz", arrays() | changes), TEMPLATE, match)


def test_nothing_wanted_is_found(tmp_path):
    path = write(tmp_path / "w.npz", {"params/other": np.zeros(2)})
    problem(path, TEMPLATE, r"missing: params/conv/kernel")


def test_bad_template(tmp_path):
    path = write(tmp_path / "w.npz", arrays())
    with pytest.raises(TypeError, match=r"model: 'params' is a float; expected a jax\.ShapeDtypeStruct"):
        load_checkpoint(path, {"params": 1.0})
    with pytest.raises(TypeError, match=r"model: expected a name of the zoo, .* found NoneType"):
        load_checkpoint(path, None)
    with pytest.raises(ValueError, match="model: holds no arrays"):
        load_checkpoint(path, {})


def test_bad_rules():
    with pytest.raises(ValueError, match=r"pattern: .* is no regular expression"):
        Rule(pattern="(", target=None)
    with pytest.raises(ValueError, match="transform: expected one of copy, conv, linear, conv_linear, found 'flip'"):
        Rule(pattern="a", target="b", transform="flip")
    with pytest.raises(ValueError, match="rules: layout 'x' has none"):
        Layout(name="x", description="", signature=(), rules=())
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names) and names[:2] == ["akamaster", "efficientnet_lite"] and names[-1] == "flax"


def test_arithmetic_of_rules():
    layout = Layout(
        name="counted",
        description="",
        signature=(),
        rules=(Rule(pattern=r"b(\d+)\.(\d+)", target=r"params/s{\1+1}/u{\2-10}"),),
    )
    assert layout.place("b9.12")[1] == "params/s10/u2"
    assert layout.place("b9.x") is None


# What a checkpoint is loaded for


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(2, (3, 3), use_bias=False)(x))
        return nn.BatchNorm(use_running_average=not train)(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(3, 2, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x)


def torch_names(conv, norm):
    rules = zoo.layouts.table.conv(r"c", conv) + zoo.layouts.table.norm(r"n", norm)
    return Layout(name="two", description="", signature=(), rules=rules)


@pytest.fixture
def two_layers(tmp_path):
    state = {"c.weight": rng.normal(size=(2, 3, 3, 3))}
    state |= {f"n.{part}": rng.uniform(1, 2, 2) for part in ("weight", "bias", "running_mean", "running_var")}
    return write(tmp_path / "two.npz", state)


def test_linen_and_nnx_modules(two_layers):
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    layout = torch_names("Conv_0", "BatchNorm_0")
    found = load_checkpoint(two_layers, Linen(), layout, input_shape=(1, 5, 5, 3))
    function, variables = as_function(Linen(), found)
    expected = function(variables, x)

    module = NNX(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    found = load_checkpoint(two_layers, module, torch_names("layers/0", "layers/1"))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(module, nnx.Param)), before)
    function, variables = as_function(module, found)
    np.testing.assert_allclose(function(variables, x), expected, rtol=1e-5, atol=1e-5)
    abstract = nnx.eval_shape(lambda: NNX(nnx.Rngs(0)))
    again = load_checkpoint(two_layers, abstract, torch_names("layers/0", "layers/1"))
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_names_and_entries_of_the_zoo(tmp_path):
    path = write(tmp_path / "w.safetensors", akamaster(20))
    entry = next(entry for entry in zoo.list_models() if entry.name == "cifar_resnet20")
    found = load_checkpoint(path, "cifar_resnet20")
    assert jax.tree.structure(found) == jax.tree.structure(entry.template())
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(path, entry), found)


def test_bad_models(two_layers):
    with pytest.raises(ValueError, match=r"input_shape: a Linen module's variables depend on it; give \(1, H, W, C\)"):
        load_checkpoint(two_layers, Linen())
    with pytest.raises(ValueError, match="input_shape: only a Linen module needs it"):
        load_checkpoint(two_layers, "cifar_resnet20", input_shape=(1, 32, 32, 3))
    with pytest.raises(ValueError, match="name: no model 'cifar_resnet21' in the zoo; did you mean"):
        load_checkpoint(two_layers, "cifar_resnet21")
    with pytest.raises(TypeError, match=r"model: expected .* a Linen or NNX module, .* found "):
        load_checkpoint(two_layers, Linen)


def test_another_programs_file_of_another_network(tmp_path):
    """What timm calls its RegNet, and what pytorchcv calls its MobileNet, for a ResNet of torchvision's."""
    timm = {"stem.conv.weight": (32, 3, 3, 3), "s1.b1.conv1.conv.weight": (48, 32, 1, 1), "head.fc.weight": (9, 48)}
    pytorchcv = {
        "features.init_block.conv.weight": (32, 3, 3, 3),
        "features.stage1.unit1.dw_conv.conv.weight": (32, 1, 3, 3),
    }
    for names in (timm, pytorchcv):
        path = write(tmp_path / "w.safetensors", {name: np.zeros(shape, np.float32) for name, shape in names.items()})
        message = problem(path, "resnet18", "nothing was loaded|in no known layout")
        assert next(reversed(names)) in message


# Memory and time


def test_arrays_are_read_one_at_a_time(tmp_path):
    """The peak of what NumPy and Python allocate is the result and a few arrays, not the file and its copies."""
    count, size = 40, 1 << 16
    content = {f"params/a{n}": rng.random(size, np.float32) for n in range(count)}
    model = {"params": {f"a{n}": STRUCT((size,), jnp.float32) for n in range(count)}}
    for suffix in (".npz", ".safetensors", ".msgpack", ".pth", ".legacy"):
        path = tmp_path / f"w{suffix}"
        if suffix in (".pth", ".legacy"):
            torch = pytest.importorskip("torch")
            tensors = {name: torch.from_numpy(array) for name, array in content.items()}
            torch.save(tensors, path, _use_new_zipfile_serialization=suffix == ".pth")
        else:
            write(path, content)
        tracemalloc.start()
        found = load_checkpoint(path, model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found["params"]["a7"], content["params/a7"])
        assert peak < 1.5 * count * 4 * size, (suffix, peak / (count * 4 * size))


def test_files_are_closed(tmp_path):
    path = write(tmp_path / "w.msgpack", {"params/a": np.zeros(3, np.float32)})
    with open_arrays(path) as readers:
        assert list(readers) == ["params/a"]
    with pytest.raises(ValueError, match="closed file"):
        readers["params/a"]()


def test_msgpack_of_arrays_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    content = {"params/a": rng.normal(size=(5, 20)), "params/b/c": np.arange(3)}
    path = write(tmp_path / "w.msgpack", content)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    found = read_arrays(path)
    assert list(found) == list(content)
    for name, array in content.items():
        np.testing.assert_array_equal(found[name], array)


# Bad files


def unreadable(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        read_arrays(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    unreadable(tmp_path / "none.npz", "path: cannot read .*No such file")
    unreadable(tmp_path, "it is a directory and no checkpoint")
    with pytest.raises(ValueError, match="path: cannot read"):
        read_npz(tmp_path / "none.npz")


@pytest.mark.parametrize("content", [b"", b"\x00", b"hello world", b"\x00HDF\r\n\x1a\n", b"PK\x05\x06"])
def test_unknown_formats(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    unreadable(tmp_path / "w", "none of the formats read here: safetensors, torch")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".msgpack"])
def test_truncated(tmp_path, suffix):
    source = write(tmp_path / f"w{suffix}", arrays())
    content = source.read_bytes()
    for end in range(1, len(content), len(content) // 40):
        (tmp_path / "cut").write_bytes(content[:end])
        unreadable(tmp_path / "cut", "path: ")


def test_torch_archive_among_zip_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02cos\nsystem\n.")
    unreadable(tmp_path / "w.pth", r"'os\.system'.*nothing was run")


def test_msgpack_of_other_things(tmp_path):
    path = tmp_path / "w.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize({"params": {"a": "text"}}))
    unreadable(path, "'params/a': it is no array")
    path.write_bytes(flax.serialization.msgpack_serialize({"params": {}}))
    unreadable(path, "it holds no arrays")
    path.write_bytes(b"\x81\xa1a" + b"\x81\xa1a" * 2000 + b"\x01")
    unreadable(path, "cannot be read as Flax msgpack")
    good = flax.serialization.msgpack_serialize({"a": np.zeros(3)})
    path.write_bytes(good + b"\x00")
    unreadable(path, "goes on for 1 bytes after its end")
    path.write_bytes(b"\x82" + 2 * good[1:])
    unreadable(path, "two leaves have the name 'a'")
    path.write_bytes(b"\x81\xc0" + good[3:])
    unreadable(path, "a key in '' is neither")
    path.write_bytes(b"\x81\xdd\x00\x10\x00\x00" + bytes(1 << 20) + good[1:])
    tracemalloc.start()
    unreadable(path, "a key in '' is neither")  # a list of a million numbers, which is not made
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    for bomb in (b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", b"\x81\xdb\xff\xff\xff\xff"):
        path.write_bytes(bomb + b"\xa1a")
        unreadable(path, "cannot be read as Flax msgpack")


def test_safetensors_with_an_absurd_header(tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    unreadable(path, "cannot be read as safetensors")


def npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def write_members(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def test_npz_layouts_of_memory(tmp_path):
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    members = {
        "c.npy": npy(array),
        "fortran.npy": npy(np.asfortranarray(array)),
        "version2.npy": npy(array, version=(2, 0)),
    }
    found = read_npz(write_members(tmp_path / "w.npz", members))
    assert list(found) == ["c", "fortran", "version2"]
    for value in found.values():
        np.testing.assert_array_equal(value, array)


def test_npz_refusals(tmp_path):
    path = tmp_path / "w.npz"
    good = npy(np.zeros(100))
    pickled = npy(np.array([{}, print]), allow_pickle=True)
    unreadable(write_members(path, {"a.npy": pickled}), "'a': it holds Python objects.*refused")
    absurd = good.replace(b"(100,)", b"(10000000000000,)").replace(b" " * 11 + b"\n", b"\n")
    unreadable(write_members(path, {"a.npy": absurd}), r"declares float64 \(10000000000000,\) but has")
    negative = good.replace(b"(100,)", b"(-10,)")
    unreadable(write_members(path, {"a.npy": negative}), r"declares float64 \(-10,\)")
    unreadable(write_members(path, {"a.npy": good[:-8]}), "but has 792 bytes")
    unreadable(write_members(path, {"a.npy": good[:20]}), "cannot be read as npz: 'a'")
    unreadable(write_members(path, {"a.txt": b"hello"}), "it is a zip archive of a.txt")
    unreadable(write_members(path, {"a.npy": good.replace(b"<f8", b"<x8")}), "cannot be read as npz: 'a'")
    unreadable(write_members(path, {"a.npy": good[:6] + b"\x09" + good[7:]}), r"npy format \(9, 0\)")
    unreadable(write_members(path, {"a.npy": bytes(80 << 20)}), "zip bomb")
