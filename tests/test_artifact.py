"""Artifacts: exact round trips, whole or not at all, and every damaged or foreign file refused by name."""

import json
import os
import re
import stat

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dfq_jax.export import artifact, container
from dfq_jax.export.artifact import ArtifactError, load, restore, save
from dfq_jax.quantizers.qtensor import QTensor, params_from_range, quantize_tensor

rng = np.random.default_rng(0)
HEADER = {"model": "toy", "graph": "abc123", "recipe": {"bits": 4, "rates": [0.1, 1e-3]}, "key": None}


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def float_variables():
    return {
        "params": {
            "conv": {"kernel": array(3, 3, 3, 5), "bias": array(5)},
            "half": {"kernel": array(4, 3, dtype=jnp.bfloat16)},
            "blocks": [{"kernel": array(3, 7)}, {"kernel": array(7, 1)}],
            "a/b": {"~": array(2)},
        },
        "batch_stats": {"mean": array(5), "count": jnp.int32(3), "mask": jnp.array([True, False])},
    }


def quantize(w, bits, symmetric=True):
    axes = tuple(range(w.ndim - 1))
    lo, hi = w.min(axes, keepdims=True), w.max(axes, keepdims=True)
    return quantize_tensor(w, params_from_range(lo, hi, bits=bits, symmetric=symmetric))


def quantized(variables):
    """A copy with kernels quantized in several ways, and quantizers of activations."""
    variables = jax.tree.map(lambda a: a, variables)
    params = variables["params"]
    params["conv"]["kernel"] = quantize(params["conv"]["kernel"], 2)
    params["half"]["kernel"] = quantize(params["half"]["kernel"], 3, symmetric=False)
    params["blocks"][0]["kernel"] = quantize(params["blocks"][0]["kernel"], 4)
    params["blocks"][1]["kernel"] = quantize(params["blocks"][1]["kernel"], 8, symmetric=False)
    variables["quantization"] = {
        "conv/0": {"input": params_from_range(0.0, 6.0, bits=8)},
        "half": {"input": params_from_range(jnp.zeros(3), jnp.ones(3), bits=4, symmetric=True)},
        "step": jnp.float32(0.5),
    }
    return variables


@pytest.fixture(scope="module")
def variables():
    return quantized(float_variables())


@pytest.fixture
def path(tmp_path, variables):
    save(tmp_path / "net.safetensors", variables, header=HEADER)
    return tmp_path / "net.safetensors"


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- round trips ----------------------------------------------------------------------------------------


def test_restore_into_float_template(path, variables):
    out, header = restore(path, float_variables(), expect={"graph": "abc123"})
    assert_identical(out, variables)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(out))
    assert {key: header[key] for key in HEADER} == HEADER
    assert header["format"] == "dfq_jax" and header["format_version"] == 1
    assert header["versions"]["jax"] == jax.__version__ and re.fullmatch("[0-9a-f]{64}", header["sha256"])


def test_restore_into_abstract_and_quantized_templates(path, variables):
    assert_identical(restore(path, jax.eval_shape(float_variables))[0], variables)
    assert_identical(restore(path, variables)[0], variables)
    assert_identical(restore(path, jax.eval_shape(lambda: variables))[0], variables)


def test_restore_keeps_frozen_dict(path, variables):
    out, _ = restore(path, flax.core.freeze(float_variables()))
    assert isinstance(out, flax.core.FrozenDict)
    assert_identical(flax.core.unfreeze(out), variables)


def test_load_names_leaves_by_path(path, variables):
    flat, _ = load(path)
    assert {
        "params/conv/bias",
        "params/blocks/1/kernel",
        "params/a~1b/~0",
        "quantization/conv~10/input",
    } <= set(flat)
    assert_identical(flat["params/conv/kernel"], variables["params"]["conv"]["kernel"])
    assert isinstance(flat["params/half/kernel"], QTensor) and flat["params/half/kernel"].dtype == "bfloat16"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_round_trips_at_its_size(tmp_path, bits, symmetric):
    q = quantize(array(33, 31), bits, symmetric)
    save(tmp_path / "q", {"w": q}, header={})
    flat, _ = load(tmp_path / "q")
    assert_identical(flat["w"], q)
    stored = safetensors.numpy.load_file(tmp_path / "q")
    assert sum(a.nbytes for a in stored.values()) == q.nbytes_packed


def test_odd_leaves_round_trip(tmp_path):
    tree = {
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(np.nan),
        "half": jnp.array([1.5, -0.0, jnp.inf], jnp.bfloat16),
        "eight": jnp.arange(4, dtype=jnp.float8_e4m3fn),
        "bool": jnp.array(True),
        "complex": jnp.array([1 + 2j]),
        "wide": np.arange(3, dtype=np.float64) / 3,
        "strided": np.arange(12, dtype=np.int16).reshape(3, 4).T,
        "tuple": (jnp.uint8(1), {3: jnp.int32(2)}),
        "none": None,
    }
    save(tmp_path / "odd", tree, header={})
    assert_identical(restore(tmp_path / "odd", tree)[0], tree)
    big_endian = {"x": np.arange(3, dtype=">i4")}
    save(tmp_path / "odd", big_endian, header={})
    np.testing.assert_array_equal(load(tmp_path / "odd")[0]["x"], big_endian["x"])


def test_stacked_qtensors_round_trip(tmp_path):
    stacked = jax.vmap(lambda w: quantize(w, 4))(array(3, 5, 2))
    save(tmp_path / "s", {"w": stacked}, header={})
    assert_identical(restore(tmp_path / "s", {"w": jnp.zeros((3, 5, 2))})[0]["w"], stacked)


def test_same_contents_same_digest(tmp_path, path, variables):
    save(tmp_path / "again", variables, header=HEADER)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_restored_network_computes_the_same(path, variables):
    out, _ = restore(path, float_variables())
    kernels = [v["params"]["half"]["kernel"].dequantize() for v in (out, variables)]
    np.testing.assert_array_equal(*kernels)


# --- refusals -------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Apply `change` to the JSON header and write the file anew, digest made good."""
    stored = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="np") as file:
        meta = json.loads(file.metadata()["dfq_jax"])
    change(meta, stored)
    meta["sha256"] = container._digest(meta, stored)
    safetensors.numpy.save_file(stored, path, metadata={"dfq_jax": json.dumps(meta)})


def test_truncated_at_any_length(path, tmp_path):
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    cut = tmp_path / "cut"
    for length in [0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="truncated"):
            load(cut)


def test_extended(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        load(path)


def test_any_flipped_bit_is_noticed(tmp_path):
    small = tmp_path / "small"
    save(small, {"w": quantize(array(3, 2), 4), "b": array(2)}, header={"model": "toy"})
    data = small.read_bytes()
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        small.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            load(small)


def test_flipped_content_names_the_digest(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged: the sha256"):
        load(path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + b"\0" * 99])
def test_not_safetensors(path, content):
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load(path)


@pytest.mark.parametrize("header", [b"{]", b"{}x", b'{"a": 3}', b'{"a": {"data_offsets": ["x", "y"]}}'])
def test_unreadable_safetensors_header(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match=r"not a safetensors file: its header|truncated|damaged"):
        load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign(path, metadata):
    safetensors.numpy.save_file({"w": np.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ArtifactError, match=rf"another program.*{'format' if metadata else 'none'}"):
        load(path)


def test_newer_format(path):
    rewrite(path, lambda meta, _: meta.update(format_version=2, versions={"dfq_jax": "9.1"}))
    with pytest.raises(ArtifactError, match=r"format_version 2, newer than 1.*9\.1"):
        load(path)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "change",
    [
        lambda meta, _: meta.update(format="other"),
        lambda meta, _: meta.update(format_version="1"),
        lambda meta, _: meta.pop("nodes"),
        lambda meta, _: meta.update(tensors=[]),
        lambda meta, _: meta["nodes"]["params/conv/kernel"].update(type="Pickle"),
        lambda meta, _: meta["nodes"]["params/conv/kernel"].update(bits=99),
        lambda meta, _: meta["nodes"]["params/conv/kernel"].update(fields=["scale"]),
        lambda meta, _: meta["nodes"]["params/conv/kernel"].update(fields=["qvalue", "scale", "other"]),
        lambda meta, _: meta["nodes"]["params/conv/kernel"].update(dtype="float31"),
        lambda meta, _: meta["tensors"]["params/conv/bias"].update(shape=[6]),
        lambda meta, _: meta["tensors"]["params/conv/bias"].update(dtype="int32"),
        lambda meta, _: meta["tensors"]["params/conv/bias"].update(dtype="object"),
        lambda meta, _: meta["tensors"]["params/conv/bias"].pop("dtype"),
        lambda meta, _: meta["tensors"]["params/conv/kernel/qvalue"].update(bits=4),
        lambda meta, _: meta["tensors"]["params/conv/kernel/qvalue"].update(shape=["x"]),
    ],
)
def test_malformed_header(path, change):
    rewrite(path, change)
    with pytest.raises(ArtifactError, match="malformed header"):
        load(path)


@pytest.mark.parametrize("text,words", [("{", "not JSON"), ("[1]", "its format is not 'dfq_jax'")])
def test_malformed_json(path, text, words):
    safetensors.numpy.save_file({"w": np.zeros(3)}, path, metadata={"dfq_jax": text})
    with pytest.raises(ArtifactError, match=f"malformed header: {words}"):
        load(path)


def test_missing_and_unlisted_tensors(path):
    rewrite(path, lambda _, stored: stored.pop("params/conv/bias"))
    with pytest.raises(ArtifactError, match="lacks tensors: params/conv/bias"):
        load(path)
    rewrite(path, lambda meta, _: meta["tensors"].pop("params/conv/bias"))
    rewrite(path, lambda _, stored: stored.update(more=np.zeros(1)))
    with pytest.raises(ArtifactError, match="unlisted tensors: more"):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def changed(change):
    template = float_variables()
    change(template)
    return template


@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda t: t["params"]["conv"].update(kernel=array(3, 3, 3, 6)),
            r"params/conv/kernel is float32\[3, 3, 3, 5\]",
        ),
        (
            lambda t: t["params"]["half"].update(kernel=array(4, 3)),
            r"half/kernel is bfloat16.*expected float32\[4, 3\]",
        ),
        (lambda t: t["params"].update(extra={"bias": array(1)}), "it lacks: params/extra/bias"),
        (lambda t: t["params"]["conv"].pop("bias"), "it has also: params/conv/bias"),
        (
            lambda t: t["batch_stats"].update(count=jnp.float32(3)),
            r"count is int32\[\], expected float32\[\]",
        ),
        (
            lambda t: t["params"].update(blocks=[]),
            "it has also: params/blocks/0/kernel, params/blocks/1/kernel",
        ),
        (
            lambda t: t["params"]["blocks"].__setitem__(0, {"kernel": quantize(array(3, 7), 8)}),
            "signed 4-bit codes",
        ),
        (
            lambda t: t["params"]["conv"].update(bias=quantize(array(5), 8)),
            r"bias is float32\[5\], expected.*8-bit",
        ),
        (lambda t: t.update(quantization={}), "it has also: quantization/conv~10/input"),
    ],
)
def test_other_template(path, change, words):
    with pytest.raises(ArtifactError, match=rf"does not fit the template.*{words}"):
        restore(path, changed(change))


def test_other_graph(path):
    with pytest.raises(ArtifactError, match="another network: its 'graph' is 'abc123', expected 'def'"):
        restore(path, float_variables(), expect={"graph": "def"})
    with pytest.raises(ArtifactError, match="its 'digest' is nothing"):
        restore(path, float_variables(), expect={"digest": 1})
    restore(path, float_variables(), expect={"recipe": {"bits": 4, "rates": (0.1, 1e-3)}})


@pytest.mark.untyped
@pytest.mark.parametrize(
    "variables,header,error,words",
    [
        ({"w": "text"}, {}, TypeError, "'w'.*numeric array, found str"),
        ({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, {}, TypeError, "'w'.*ShapeDtypeStruct"),
        ({"k": jax.random.key(0)}, {}, TypeError, "'k'.*PRNG key.*key_data"),
        (
            {"q": QTensor(np.zeros(2, np.int32), np.ones(1), None, 4, True, "float32")},
            {},
            TypeError,
            "q/qvalue.*int32",
        ),
        ({"quantization": [array(1)]}, {}, TypeError, "nested dicts with str keys.*0"),
        ({"quantization": {"a": {0: array(1)}}}, {}, TypeError, "nested dicts with str keys"),
        ({"__metadata__": array(1)}, {}, ValueError, "__metadata__"),
        ({}, {"sha256": "x"}, ValueError, "reserved keys.*sha256"),
        ({}, {"x": array(1)}, TypeError, "header: expected JSON"),
        ({}, {"x": float("nan")}, TypeError, "header: expected JSON"),
        ({}, "x", TypeError, "header: expected a dict, found str"),
    ],
)
def test_save_refuses(tmp_path, variables, header, error, words):
    with pytest.raises(error, match=words):
        save(tmp_path / "x", variables, header=header)
    assert os.listdir(tmp_path) == []


def test_save_refuses_tracers(tmp_path):
    with pytest.raises(TypeError):
        jax.jit(lambda w: save(tmp_path / "x", {"w": w}, header={}))(array(2))
    assert os.listdir(tmp_path) == []


# --- atomicity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(path, monkeypatch, where, error):
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(artifact.os, where, fail)
    with pytest.raises(type(error)):
        save(path, {"w": array(2)}, header={})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "x", {"w": array(2)}, header={})
    assert os.listdir(tmp_path) == []


def test_target_is_a_directory(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError):
        save(tmp_path / "x", {"w": array(2)}, header={})
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            save(tmp_path / "x", {"w": array(2)}, header={})
        assert os.listdir(tmp_path) == []
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        save(tmp_path / "x", {"w": array(2)}, header={})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


# --- other checkpointers --------------------------------------------------------------------------------


def test_orbax_round_trip(tmp_path, variables):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", variables)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, variables)
        assert_identical(checkpointer.restore(tmp_path / "orbax", abstract), variables)
