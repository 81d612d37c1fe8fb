"""Files are there whole or not at all, and errors name the file that was asked for."""

import errno
import os

import jax.numpy as jnp
import pytest

from dfq_jax.base.checkpoint import Checkpoint
from dfq_jax.base.files import write_atomically
from dfq_jax.export import artifact

WRITERS = {
    "bytes": lambda path: write_atomically(path, b"new"),
    "artifact": lambda path: artifact.save(path, {"w": jnp.ones(3)}, header={}),
    "checkpoint": lambda path: Checkpoint(path, "work").save({0: {"x": jnp.ones(3)}}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, writer, fails):
    path = tmp_path / "mine.bin"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left") as raised:
        WRITERS[writer](path)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert os.listdir(tmp_path) == ["mine.bin"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_in_its_place_is_named(tmp_path, writer):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises((OSError, ValueError)) as raised:
        WRITERS[writer](path)
    assert str(path) in str(raised.value) and ".tmp" not in str(raised.value)
    assert os.listdir(tmp_path) == ["folder"]


def test_other_errors_pass(tmp_path):
    with pytest.raises(TypeError, match="bytes"):
        write_atomically(tmp_path / "x", 3)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="cannot be written to"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        Checkpoint(tmp_path / "x", "work")


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 and no archive"])
def test_no_checkpoint(content, tmp_path):
    """A file of another kind is left alone, and nobody is told to unpickle it."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: '.*file' cannot be read .*or give another name\.$") as refusal:
        Checkpoint(tmp_path / "file", "work").load(lambda batch, facts: {})
    assert "load it unsafely" not in str(refusal.value)
    assert (tmp_path / "file").read_bytes() == content
