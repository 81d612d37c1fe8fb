"""What commands leave behind: tables on stdout and JSON files."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfq_jax.base import environment, write_atomically
from dfq_jax.data import Accuracy
from dfq_jax.recipes import Quantized
from dfq_jax.stages import Convention

# Rich breaks lines at 80 characters where it knows no terminal; files and pipes have no such limit.
FILE_WIDTH = 500


def check_targets(*targets: Path | None) -> None:
    """Refuse files that could not be written, before the work that is to end in them.

    Raises:
      ValueError: a folder is missing or not writable, a target is a folder, or two are the same.
    """
    given = [target for target in targets if target is not None]
    for target in given:
        if target.is_dir():
            raise ValueError(f"{str(target)!r} is a folder; give the name of a file")
        folder = target.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r} to write {target.name!r} to")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"the folder {str(folder)!r} is not writable")
    if len({target.resolve() for target in given}) < len(given):
        raise ValueError(f"{str(given[0])!r} is given for two different files")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout, the columns named in `right` aligned so."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(name, justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def accuracy_facts(accuracy: Accuracy) -> dict[str, float]:
    """Percentages for JSON: top-1 and top-5 with half widths of their 95 % intervals, and agreement, where measured."""
    facts = {
        "top1": accuracy.top1,
        "margin": accuracy.margin,
        "top5": accuracy.top5,
        "top5_margin": accuracy.top5_margin,
        "agreement": accuracy.agreement,
    }
    return {name: round(value, 4) for name, value in facts.items() if value is not None}


def with_margin(accuracy: Accuracy) -> str:
    """Top-1 with its 95 % interval."""
    return f"{accuracy.top1:.2f} +/- {accuracy.margin:.2f}"


def top5_with_margin(accuracy: Accuracy) -> str:
    """Top-5 with its 95 % interval; empty where there are too few classes."""
    return "" if accuracy.top5 is None else f"{accuracy.top5:.2f} +/- {accuracy.top5_margin:.2f}"


def convention_facts(convention: Convention) -> dict[str, Any]:
    """All of a convention for JSON, and its sentence."""
    return {**dataclasses.asdict(convention), "description": convention.describe()}


def network_facts(quantized: Quantized, seconds: Mapping[str, float], began: float) -> dict[str, Any]:
    """How a network was quantized, for JSON; `began` by `time.perf_counter`."""
    return {
        "seconds": {**seconds, "total": round(time.perf_counter() - began, 3)},
        "convention": convention_facts(quantized.convention),
        "recipe": dataclasses.asdict(quantized.recipe),
        "key": quantized.report.key,
        "versions": environment(),
        "report": quantized.report.to_dict(),
    }
