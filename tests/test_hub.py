"""References to the Hugging Face hub, against its functions replaced and a server on this machine."""

import http.server
import importlib.util
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dfq_jax.zoo import load_checkpoint
from dfq_jax.zoo.hub import Reference, local_file

MODEL = {"params": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}}
WEIGHTS = safetensors.numpy.save({"params/w": np.array([1, 2], np.float32)})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:timm/resnet18.tv_in1k", ("timm/resnet18.tv_in1k", None, None)),
        ("hf:a/b/model.safetensors", ("a/b", "model.safetensors", None)),
        ("hf:a/b/sub/w.pth@v1.0", ("a/b", "sub/w.pth", "v1.0")),
        ("hf:a/b@refs/pr/1", ("a/b", None, "refs/pr/1")),
    ],
)
def test_references(text, expected):
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:a",
        "hf:a/",
        "hf:/b",
        "hf:a/b@",
        "hf:a/b/",
        "hf:a b/c",
        "hf:a/../c",
        "hf:a/b/../c",
        "hf:a/b//c",
        "hf://a/b",
    ],
)
def test_malformed_references(text):
    with pytest.raises(ValueError, match="is no reference to the hub; expected hf:ORG/REPO") as caught:
        load_checkpoint(text, MODEL)
    assert repr(text) in str(caught.value)


def test_files_are_left_alone(tmp_path):
    assert local_file(tmp_path / "w") == tmp_path / "w"
    assert local_file("w.npz") == "w.npz"


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf:a/b needs huggingface_hub: pip install 'dfq_jax\[hf\]'"):
        load_checkpoint("hf:a/b", MODEL)


# The hub's functions replaced


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A module in place of huggingface_hub: one repository with the files in `names`, and a failure to raise."""
    state = types.SimpleNamespace(names=["README.md"], calls=[], failure=None, endpoint=None)
    (tmp_path / "weights").write_bytes(WEIGHTS)

    class HfApi:
        def __init__(self, endpoint=None):
            state.endpoint = endpoint

        def list_repo_files(self, repo, *, revision=None):
            if state.failure:
                raise state.failure
            return state.names

        def hf_hub_download(self, repo, file, *, revision=None):
            if state.failure:
                raise state.failure
            state.calls.append((repo, file, revision))
            return str(tmp_path / "weights")

    module = types.ModuleType("huggingface_hub")
    module.HfApi = HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return state


@pytest.mark.parametrize(
    ("reference", "names", "call"),
    [
        ("hf:a/b/c/d.bin@main", [], ("a/b", "c/d.bin", "main")),
        ("hf:a/b", ["config.json", "pytorch_model.bin", "model.safetensors"], ("a/b", "model.safetensors", None)),
        ("hf:a/b@v2", ["flax_model.msgpack", "tf_model.h5", "x.pth"], ("a/b", "flax_model.msgpack", "v2")),
        ("hf:a/b", ["README.md", "Net.PTH"], ("a/b", "Net.PTH", None)),
    ],
)
def test_which_file(hub, monkeypatch, reference, names, call):
    monkeypatch.setenv("HF_ENDPOINT", "http://here")
    hub.names = names
    np.testing.assert_array_equal(load_checkpoint(reference, MODEL)["params"]["w"], [1, 2])
    assert hub.calls == [call] and hub.endpoint == "http://here"


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["README.md", "tf_model.h5"], r"path: hf:a/b holds no file of weights \(\.safetensors, \.msgpack"),
        (
            ["a.safetensors", "b.safetensors", "c.pth"],
            r"holds several files of weights; name one: a\.safetensors, b\.saf",
        ),
        ([f"{n:02}.pt" for n in range(20)], "09.pt, ...$"),
    ],
)
def test_no_only_file(hub, names, match):
    hub.names = names
    with pytest.raises(ValueError, match=match):
        load_checkpoint("hf:a/b", MODEL)


@pytest.mark.parametrize(
    "failure", [ConnectionError("no\nroute"), ValueError("bad id"), RuntimeError(), OSError("full")]
)
@pytest.mark.parametrize("reference", ["hf:a/b", "hf:a/b/w.npz@v1"])
def test_failures_name_the_reference(hub, failure, reference):
    hub.failure = failure
    with pytest.raises(ValueError, match=f"path: cannot get {reference} from the hub .{type(failure).__name__}: "):
        load_checkpoint(reference, MODEL)


# A hub on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """Of the hub's protocol what listing and downloading one repository takes."""

    def do_GET(self):
        body = b""
        if self.path.startswith(("/api/models/org/net/revision/", "/api/models/org/net/tree/")) or (
            self.path == "/api/models/org/net"
        ):
            body = b'{"id": "org/net", "sha": "%s", "siblings": [{"rfilename": "w.safetensors"}]}' % COMMIT.encode()
            if "/tree/" in self.path:
                body = b'[{"type": "file", "path": "w.safetensors", "size": 1, "oid": "0"}]'
        elif self.path.startswith("/org/net/resolve/") and self.path.endswith("/w.safetensors"):
            body = WEIGHTS
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", COMMIT)
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound" if "/net/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_on_this_machine(server):
    for reference in ("hf:org/net", "hf:org/net/w.safetensors@v1"):
        np.testing.assert_array_equal(load_checkpoint(reference, MODEL)["params"]["w"], [1, 2])
    with pytest.raises(ValueError, match=r"cannot get hf:org/none from the hub .RepositoryNotFoundError"):
        load_checkpoint("hf:org/none", MODEL)
    with pytest.raises(ValueError, match=r"cannot get hf:org/net/x\.npz from the hub .*EntryNotFoundError"):
        load_checkpoint("hf:org/net/x.npz", MODEL)


def test_offline(server, monkeypatch):
    load_checkpoint("hf:org/net/w.safetensors", MODEL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_checkpoint("hf:org/net/w.safetensors", MODEL)  # from the cache
    for reference in ("hf:org/net", "hf:org/net/other.npz"):
        with pytest.raises(
            ValueError, match=f"cannot get {reference} from the hub .*a file that was downloaded before"
        ):
            load_checkpoint(reference, MODEL)
