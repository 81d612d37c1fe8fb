"""What docs/guides/command_line.md shows of each command is what the command prints, but for numbers."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from dfq_jax.cli import main
from dfq_jax.cli.commands import COMMANDS

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "command_line.md").read_text()
SHOWN = {
    command.split()[1]: (shlex.split(command)[1:], printed)
    for command, printed in re.findall(r"```bash\n(dfq-jax [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
}


def words(text):
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?|-?\binf\b", "#", text).split()


def test_every_command_is_shown_in_eighty_characters():
    assert set(SHOWN) == set(COMMANDS) - {"demo"}  # which takes minutes: tests/test_cli.py runs it
    assert max(len(line) for _, printed in SHOWN.values() for line in printed.splitlines()) <= 80


def test_models(capsys):
    assert main(SHOWN["models"][0]) == 0
    assert words(capsys.readouterr().out) == words(SHOWN["models"][1])


@pytest.mark.slow
def test_commands_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("onnxruntime")
    for name, (arguments, printed) in SHOWN.items():
        assert main(arguments) == 0
        found = words(capsys.readouterr().out)
        # Layers are in the order of their numbers in the table of sensitivity.
        assert sorted(found) == sorted(words(printed)), name
