"""Compiled programs kept from one process of the command line to the next."""

import os
import subprocess
import sys

import pytest

import dfq_jax.cli

pytest.importorskip("platformdirs")
pytest.importorskip("filelock")

PROCESS = """
import jax, jax.numpy as jnp
from dfq_jax.cli.compilation import keep_compiled
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # this program is small
x = jnp.arange(64.0).reshape(8, 8)
print(float(jax.jit(lambda x: jnp.linalg.norm(jnp.sort(x @ x, axis=0)[::2]))(x)))
print(jax.config.jax_compilation_cache_dir, sum("cache_hits" in event for event in events))
"""


def run(folder, **environment):
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    kept.update(HOME=str(folder), XDG_CACHE_HOME=str(folder / ".cache"), **environment)
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 0, done.stderr
    result, where = done.stdout.splitlines()
    return float(result), *where.rsplit(" ", 1)


def test_second_process_reads_what_the_first_compiled(tmp_path):
    first, folder, hits = run(tmp_path)
    assert folder.startswith(str(tmp_path)) and os.listdir(folder) and hits == "0"
    again, _, hits = run(tmp_path)
    assert again == first and int(hits) > 0


def test_settings_of_the_user_hold(tmp_path):
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")[1] == "None"
    assert not list(tmp_path.iterdir())
    own = str(tmp_path / "own")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=own)[1] == own
    assert os.listdir(tmp_path) == ["own"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / ".cache").write_text("a file where the folder should be")
    (tmp_path / "Library").write_text("likewise")
    assert run(tmp_path)[1] == "None"


@pytest.mark.parametrize(
    ("given", "argv", "expected"),
    [
        (None, ["models"], 1),
        (None, ["models", "--no-cache"], 0),
        (["models"], ["models"], 0),  # called as a function: the caller's process keeps its settings
    ],
)
def test_only_a_process_of_its_own_keeps(monkeypatch, capsys, given, argv, expected):
    calls = []
    monkeypatch.setattr(dfq_jax.cli, "keep_compiled", lambda: calls.append(True))
    monkeypatch.setattr(sys, "argv", ["dfq-jax", *argv])
    assert dfq_jax.cli.main(given) == 0
    assert len(calls) == expected and "fashion_resnet20" in capsys.readouterr().out
