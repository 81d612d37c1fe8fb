"""The torch reader: files assembled by hand, files written by torch where it is installed, and bad files."""

import contextlib
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.zoo import read_torch

MAGIC = 0x1950A86A20F9469CFC6C


# An assembler for pickles: enough to describe tensors, and to write what no library would.


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value):
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(full):
    module, _, attribute = full.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def tuple_(*items):
    return b"(" + b"".join(items) + b"t"


def call(full, *arguments):
    return name(full) + tuple_(*arguments) + b"R"


def dictionary(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key="0", numel=6, kind="torch.FloatStorage", legacy=False):
    view = [b"N"] if legacy else []
    return tuple_(text("storage"), name(kind), text(key), text("cpu"), integer(numel), *view) + b"Q"


def tensor(size=(2, 3), stride=(3, 1), offset=0, of=None, function="torch._utils._rebuild_tensor_v2"):
    arguments = [
        of or storage(),
        integer(offset),
        tuple_(*map(integer, size)),
        tuple_(*map(integer, stride)),
    ]
    if function.endswith("v2"):
        arguments += [b"\x89", call("collections.OrderedDict")]
    return call(function, *arguments)


def program(body):
    return b"\x80\x02" + body + b"."


VALUES = np.arange(6, dtype=np.float32)


def write_zip(path, body, storages=None, root="archive/", extra=None, compression=zipfile.ZIP_STORED):
    members = {"data.pkl": program(body)}
    members |= {f"data/{key}": raw for key, raw in (storages or {"0": VALUES.tobytes()}).items()}
    members |= extra or {}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, raw in members.items():
            archive.writestr(root + member, raw)
    return path


def write_legacy(path, body, storages=None, magic=MAGIC, protocol=1001, system=None, keys=None):
    """`storages`: key to number of elements and bytes."""
    storages = {"0": (6, VALUES.tobytes())} if storages is None else storages
    raw = pickle.dumps(magic, 2) + pickle.dumps(protocol, 2)
    raw += pickle.dumps({"little_endian": True} if system is None else system, 2)
    raw += program(body)
    raw += pickle.dumps(list(storages) if keys is None else keys, 2)
    for count, content in storages.values():
        raw += struct.pack("<q", count) + content
    path.write_bytes(raw)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def test_hand_made_zip(path):
    found = read_torch(write_zip(path, dictionary(weight=tensor())))
    assert list(found) == ["weight"]
    np.testing.assert_array_equal(found["weight"], VALUES.reshape(2, 3))


def test_hand_made_legacy(path):
    body = dictionary(weight=tensor(of=storage(legacy=True), function="torch._utils._rebuild_tensor"))
    np.testing.assert_array_equal(read_torch(write_legacy(path, body))["weight"], VALUES.reshape(2, 3))


def test_big_endian_zip(path):
    raw = {"0": VALUES.astype(">f4").tobytes()}
    found = read_torch(write_zip(path, dictionary(w=tensor()), raw, extra={"byteorder": b"big"}))
    np.testing.assert_array_equal(found["w"], VALUES.reshape(2, 3))
    half = VALUES.astype(jnp.bfloat16).view(np.uint16).astype(">u2").tobytes()
    body = dictionary(w=tensor(of=storage(kind="torch.BFloat16Storage")))
    found = read_torch(write_zip(path, body, {"0": half}, extra={"byteorder": b"big"}))
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"].astype(np.float32), VALUES.reshape(2, 3))


def test_compressed_archive_and_no_folder(path):
    write_zip(path, dictionary(w=tensor()), root="", compression=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(read_torch(path)["w"], VALUES.reshape(2, 3))


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict"])
def test_nested_state_and_prefix(path, key):
    inner = b"}(" + text("module.w") + tensor() + b"u"
    found = read_torch(write_zip(path, dictionary(epoch=integer(3), optimizer=b"]", **{key: inner})))
    assert list(found) == ["w"]


def test_prefix_stays_unless_all_names_have_it(path):
    body = b"}(" + text("module.w") + tensor() + text("b") + tensor() + b"u"
    assert list(read_torch(write_zip(path, body))) == ["module.w", "b"]


def test_scalars_among_tensors_are_passed_over(path):
    rate = pickle.dumps(0.1, 2)[2:-1]
    body = dictionary(w=tensor(), epoch=integer(3), name=text("r20"), best=b"\x88", rate=rate)
    assert list(read_torch(write_zip(path, body))) == ["w"]


def test_python_2_strings_and_ordered_dict(path):
    pairs = b"](](" + b"U\x01w" + tensor() + b"ee"
    found = read_torch(write_zip(path, name("collections.OrderedDict") + tuple_(pairs) + b"R"))
    assert list(found) == ["w"]


def test_strides_offsets_and_empty_shapes(path):
    body = dictionary(
        transposed=tensor((3, 2), (1, 3)),
        shifted=tensor((2,), (2,), 1),
        scalar=tensor((), (), 5),
        empty=tensor((0, 3), (3, 1), 6),
        expanded=tensor((2, 6), (0, 1)),
    )
    found = read_torch(write_zip(path, body))
    np.testing.assert_array_equal(found["transposed"], VALUES.reshape(2, 3).T)
    np.testing.assert_array_equal(found["shifted"], [1, 3])
    np.testing.assert_array_equal(found["expanded"], np.stack([VALUES, VALUES]))
    assert found["scalar"].shape == () and found["scalar"] == 5
    assert found["empty"].shape == (0, 3)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in found.values())
    found["transposed"][:] = -1  # copies of their own
    np.testing.assert_array_equal(found["shifted"], [1, 3])


# Files by torch


def torch_state(torch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    state = OrderedDict(
        base=base,
        part=base[1:3, ::2],  # shares the storage, with an offset and strides
        turned=base.t(),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.ones(3)),
        last=base.new_ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    )
    numbers = torch.tensor([0, 1, 100, 3])
    floats = ("float16", "bfloat16", "float64", "complex64")
    for dtype in (*floats, "int64", "int32", "int16", "int8", "uint8", "bool"):
        state[dtype] = numbers.to(getattr(torch, dtype))
    return state


def assert_like_torch(found, expected, torch):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert str(found[key].dtype) == str(value.dtype).removeprefix("torch."), key
        assert found[key].shape == tuple(value.shape), key
        value = value.detach()
        if value.dtype == torch.bfloat16:
            np.testing.assert_array_equal(found[key].astype(np.float32), value.float().numpy(), key)
        else:
            np.testing.assert_array_equal(found[key], value.numpy(), key)


@pytest.mark.parametrize("use_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_parity_with_torch(path, use_zip, protocol):
    torch = pytest.importorskip("torch")
    state = torch_state(torch)
    prefixed = {f"module.{key}": value for key, value in state.items()}
    content = {"epoch": 3, "best": 91.5, "state_dict": prefixed}
    torch.save(content, path, _use_new_zipfile_serialization=use_zip, pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=False)["state_dict"]
    loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    assert_like_torch(read_torch(path), loaded, torch)
    assert_like_torch(read_torch(path), state, torch)


@pytest.mark.parametrize("use_zip", [True, False], ids=["zip", "legacy"])
def test_parity_with_a_module_and_its_optimizer(path, use_zip):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {"optimizer": optimizer.state_dict(), "model": module.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=use_zip)
    assert_like_torch(read_torch(path), module.state_dict(), torch)


def test_whole_pickled_module_is_refused(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*nothing was run"):
        read_torch(path)


def test_torchscript_is_refused(path):
    write_zip(path, dictionary(w=tensor()), extra={"constants.pkl": program(b")")})
    with pytest.raises(ValueError, match="TorchScript"):
        read_torch(path)


def test_public_checkpoint_like_torch(shared_checkpoint):
    torch = pytest.importorskip("torch")
    expected = torch.load(shared_checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    expected = {key.removeprefix("module."): value for key, value in expected.items()}
    assert_like_torch(read_torch(shared_checkpoint), expected, torch)


@pytest.fixture
def shared_checkpoint():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    data = os.environ.get("DFQ_JAX_DATA") or os.path.join(root, "..", "shared", "data")
    file = os.path.join(data, "cifar10", "resnet20-12fca82f.th")
    if not os.path.exists(file):
        pytest.skip("no CIFAR checkpoint: set DFQ_JAX_DATA to a folder with cifar10/resnet20-12fca82f.th")
    return file


# Refusals


def refused(path, match):
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        read_torch(path)
    assert time.process_time() - start < 5  # seconds of CPU: the machine may be busy
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.pth", "cannot read .*No such file")
    refused(tmp_path, "cannot read")


@pytest.mark.parametrize("content", [b"", b"\x80", b"GIF89a....", b"\x80\x02K\x07.", b"\x93NUMPY"])
def test_wrong_magic(path, content):
    path.write_bytes(content)
    refused(path, "wrong magic|truncated or damaged")


def test_truncation_anywhere(tmp_path):
    source = tmp_path / "source.pth"
    target = tmp_path / "cut.pth"
    write_zip(source, dictionary(w=tensor()))
    content = source.read_bytes()
    for end in range(0, len(content), 7):
        target.write_bytes(content[:end])
        refused(target, "cut.pth")
    write_legacy(source, dictionary(w=tensor(of=storage(legacy=True))))
    content = source.read_bytes()
    for end in range(len(content)):
        target.write_bytes(content[:end])
        refused(target, "cut.pth")


def test_flipped_bytes_never_do_worse_than_a_value_error(tmp_path):
    rng = np.random.default_rng(0)
    for write in (write_zip, write_legacy):
        body = dictionary(w=tensor(of=storage(legacy=write is write_legacy)), v=tensor((3,), (2,)))
        content = write(tmp_path / "source.pth", body).read_bytes()
        for _ in range(300):
            broken = bytearray(content)
            for position in rng.integers(0, len(content), rng.integers(1, 4)):
                broken[position] = rng.integers(256)
            (tmp_path / "broken.pth").write_bytes(broken)
            with contextlib.suppress(ValueError):
                read_torch(tmp_path / "broken.pth")


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_malicious_pickles_are_not_run(path, tmp_path, container, protocol):
    witness = tmp_path / "witness"
    attacks = {
        "system": Evil(os.system, f"touch {witness}"),
        "eval": Evil(eval, f"open({str(witness)!r}, 'w')"),
        "open": Evil(open, str(witness), "w"),
    }
    for word, attack in attacks.items():
        body = pickle.dumps({"state_dict": attack}, protocol)[2:-1]
        (write_zip if container == "zip" else write_legacy)(path, body)
        refused(path, f"{word}.*refused, nothing was run")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (name("torch.hub.load"), r"'torch\.hub\.load'.*refused"),
        (name("torch._utils._rebuild_device_tensor_from_numpy"), "_rebuild_device_tensor_from_numpy"),
        (name("numpy.core.multiarray.scalar"), r"numpy\.core\.multiarray\.scalar"),
        (name("torch.QInt8Storage"), "QInt8Storage"),
        (b"\x8c\x02os\x8c\x06system\x93", r"os\.system"),
        (b"K\x01K\x02\x93", "requires str"),
        (name("torch.FloatStorage") + b")R", "is not callable"),
        (text("x") + b")R", "'str' object is not callable"),
        (name("torch._utils._rebuild_tensor_v2") + b")R", "missing 4 required positional arguments"),
        (name("collections.OrderedDict") + b")\x81", "opcode NEWOBJ"),
        (b"(" + text("cmd") + b"ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"I42\n", "opcode INT"),
        (dictionary(w=tensor()) + b"}b", "sets attributes of a dict"),
        (b"]K\x01b", "sets attributes of a list"),
        (b"}" + tuple_(b"K\x01") + b"K\x01s", "key a tuple"),
        (b"K\x01K\x02K\x03s", "truncated or damaged.*'int'"),
        (b"K\x01K\x02a", "truncated or damaged.*'int'"),
        (b"h\x07", "truncated or damaged.*index 7"),
        (b"a", "truncated or damaged"),
        (b"t", "truncated or damaged"),
        (b"K\x01K\x01", "holds 1, not a state dict"),
        (b"(", "truncated or damaged"),
        (tuple_(text("module"), text("x")) + b"Q", "refers to 'module', 'x' outside of it"),
        (b"K\x01Q", "refers to 1 outside"),
        (
            tuple_(text("storage"), text("F"), text("0"), text("cpu"), integer(1)) + b"Q",
            "refers to 'storage', 'F', '0', 'cpu', 1 outside of it, which is no storage of a known type",
        ),
        (dictionary(w=tensor(of=storage(numel=-1))), "number of elements"),
        (dictionary(w=tensor(of=storage(key="9"))), "lacks storage '9'"),
        (dictionary(w=tensor(of=storage(key="../../data.pkl"))), "lacks storage"),
        (dictionary(w=tensor(), v=tensor(of=storage(numel=7))), "described twice"),
        (dictionary(w=tensor(of=storage(numel=7))), "has 24 bytes"),
        (dictionary(w=tensor((2, 4))), "'w' reaches beyond"),
        (dictionary(w=tensor(offset=1)), "'w' reaches beyond"),
        (dictionary(w=tensor((0,), (1,), 7)), "'w' reaches beyond"),
        (dictionary(w=tensor(stride=(-3, 1))), "negative"),
        (dictionary(w=tensor((-2, 3))), "negative"),
        (dictionary(w=tensor(offset=-1)), "negative"),
        (dictionary(w=tensor((1 << 50, 3))), "absurd"),
        (dictionary(w=tensor((2, 3), (1,))), "2 sizes and 1 strides"),
        (dictionary(w=tensor((1,) * 40, (1,) * 40)), "does not know"),
        (dictionary(w=tensor((1 << 35, 1), (0, 1))), "its tensors take"),
        (dictionary(w=tensor(), v=b"]"), "'v' holds a list"),
        (dictionary(w=tensor(), v=b"}"), "'v' holds a dict"),
        (b"}(K\x01" + tensor() + b"u", "a tensor has the key 1"),
        (b"K\x07", "holds 7, not a state dict"),
        (tensor(), "holds a tensor, not a state dict"),
        (b"}", "found no tensors"),
        (dictionary(weights=dictionary(w=tensor())), "keys: 'weights'"),
        # What would change objects of ours: attributes of a function, the state of a dtype.
        (name("torch.device") + b"N}" + text("__defaults__") + b")s\x86b", "sets attributes of a function"),
        (name("torch.FloatStorage") + b")b", "sets attributes of a float32dtype"),
        (dictionary(w=tensor(size=(1 << 20, 6), stride=(0, 1))), "its tensors take"),
        (b"}" + integer((1 << 61) - 1) + b"Ns", "a dictionary has the key 2305843009213693951"),
    ],
)
def test_refused_pickles(path, body, match):
    refused(write_zip(path, body), match)


def test_memory_and_time_bombs(path):
    # A memo index for which the C unpickler allocates gigabytes is only a key here.
    write_zip(path, dictionary(w=tensor()) + b"r" + struct.pack("<I", 0xFFFFFFF0))
    assert list(read_torch(path)) == ["w"]
    # Tuples of tuples: 2**60 leaves when hashed or printed.
    nested = b")" + b"q\x00h\x00\x86" * 60
    refused(write_zip(path, b"}" + nested + b"K\x01s"), "key a tuple")
    refused(write_zip(path, dictionary(w=tensor(), v=nested)), "'v' holds a tuple")
    refused(write_zip(path, b"}" + b")" + b"\x85" * 300_000 + b"K\x01s"), "key a tuple")
    refused(write_zip(path, b"\x8e" + struct.pack("<Q", 1 << 60)), "opcode|truncated")
    refused(write_zip(path, b"\x8d" + struct.pack("<Q", 1 << 60)), "truncated")
    refused(write_zip(path, b"\x8b" + struct.pack("<i", (1 << 31) - 1)), "truncated")


def test_too_many_opcodes(path, monkeypatch):
    monkeypatch.setattr("dfq_jax.zoo.torch_pickle._MAX_OPCODES", 1000)
    refused(write_zip(path, b"}" * 1000 + dictionary(w=tensor())), "more than 1000 opcodes")


def test_limits_of_sizes(path, monkeypatch):
    write_zip(path, dictionary(w=tensor()))
    monkeypatch.setattr("dfq_jax.zoo.torch_reader._MAX_PICKLE_BYTES", 10)
    refused(path, "pickle is larger")
    monkeypatch.setattr("dfq_jax.zoo.torch_reader.MAX_BYTES", 100)
    refused(path, "bytes are more than")


def test_zip_bombs(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program(dictionary(w=tensor(of=storage(numel=1 << 23)))))
        archive.writestr("archive/data/0", bytes(4 << 23))
    refused(path, "zip bomb")

    # Sizes that are lies: the central directory declares 4 GiB of content, then of compressed bytes.
    write_zip(path, dictionary(w=tensor()))
    content = path.read_bytes()
    for field in (24, 20):
        path.write_bytes(with_size(content, field, 0xFFFFFFF0))
        refused(path, "zip bomb")


def with_size(content, field, value):
    """An archive with another size in the central directory's last record."""
    at = content.rindex(b"PK\x01\x02") + field
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


def test_members_never_unpack_to_more_than_they_declare(path):
    storages = {"0": bytes(64 << 20)}
    write_zip(path, dictionary(w=tensor()), storages, compression=zipfile.ZIP_DEFLATED)
    path.write_bytes(with_size(path.read_bytes(), 24, 24))
    tracemalloc.start()
    refused(path, "'archive/data/0' is damaged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_other_compressions_are_refused(path):
    # A few bytes of theirs unpack to megabytes before anybody could stop it.
    write_zip(path, dictionary(w=tensor()), compression=zipfile.ZIP_BZIP2)
    refused(path, "another method than deflate")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    refused(path, "one data.pkl, this zip archive 0")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", "x")
        archive.writestr("b/data.pkl", "x")
    refused(path, "one data.pkl, this zip archive 2")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", "x")
        archive.writestr("a/data.pkl", "y")
    refused(path, "more than once")
    refused(write_zip(path, dictionary(w=tensor()), extra={"byteorder": b"middle"}), "byte order")

    write_zip(path, dictionary(w=tensor()))
    content = path.read_bytes()
    position = content.index(VALUES.tobytes())
    path.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
    refused(path, "'archive/data/0' is damaged.*CRC")


def test_odd_legacy_files(path):
    body = dictionary(w=tensor(of=storage(legacy=True)))
    refused(write_legacy(path, body, magic=MAGIC + 1), "wrong magic")
    refused(write_legacy(path, body, protocol=1002), "protocol version 1002")
    refused(write_legacy(path, body, system={"little_endian": False}), "little-endian")
    refused(write_legacy(path, body, system=[]), "little-endian")
    refused(write_legacy(path, body, keys=7), "list of storages")
    refused(write_legacy(path, body, keys=["0", "0"]), "list of storages is not one of different names")
    refused(write_legacy(path, body, keys=["0", "1"]), "'1' is listed or used")
    refused(write_legacy(path, body, keys=[]), "'0' is listed or used")
    refused(write_legacy(path, body, {"0": (5, VALUES.tobytes())}), "has 5 elements where 6")
    refused(write_legacy(path, body, {"0": (6, VALUES.tobytes()[:-1])}), "truncated")
    kind = name("torch.FloatStorage")
    view = tuple_(text("storage"), kind, text("0"), text("cpu"), integer(6), b")") + b"Q"
    refused(write_legacy(path, dictionary(w=tensor(of=view))), "refers to 'storage', .*, a tuple outside of it")


def test_tar_format_is_refused(path):
    import tarfile

    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("pickle")
        archive.addfile(info, io.BytesIO(b""))
    refused(path, "wrong magic")
