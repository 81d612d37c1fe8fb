"""Flax's names as programs that train write them, to the names of a module's variables.

A file of a training run holds more than the variables, and its names come in several forms: `params/Conv_0/kernel`,
`params.Conv_0.kernel`, `['params']['Conv_0']['kernel']`, `state/params/Conv_0/kernel`, `Conv_0/kernel` where only the
parameters were saved, and `.../kernel/value` from an NNX state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

# The arrays of a file: name to a function that reads the array.
Readers = dict[str, Callable[[], np.ndarray]]
# Entries of a training state that a network in inference does not read, wherever the network's own variables lie.
TRAINING_ONLY = frozenset((
    "apply_fn", "best_metric", "dropout_key", "dropout_rng", "dynamic_scale", "ema", "ema_params", "ema_state",
    "epoch", "global_step", "iteration", "key", "loss_scale", "metrics", "opt", "opt_state", "opt_states",
    "optimizer", "optimizer_state", "params_ema", "rng", "rng_key", "rngs", "scheduler", "step", "tx",
))  # fmt: skip
_SEPARATORS = re.compile(r"[/.\[\]'\"]+")
Parts = tuple[str, ...]
# What stands before a variable's name in a file, and how many of the name's first parts are left out there.
Form = tuple[Parts, int]


def flax_names(readers: Readers, wanted: Iterable[str]) -> Readers:
    """The readers under the names of the module's variables, what belongs to training alone left out.

    Args:
      readers: name in the file to a function that reads the array.
      wanted: names of the module's variables, joined with '/'.

    Returns:
      Readers; a name that is none of the module's keeps its form. Where most names are none of the module's, the
      file is of another program, and all of them do.
    """
    targets = {_parts(name): name for name in wanted}
    files = {name: _parts(name) for name in readers}
    if not any(parts[-1:] == ("value",) for parts in targets):
        files = {name: parts[:-1] if parts[-1:] == ("value",) else parts for name, parts in files.items()}
    collections = {parts[0] for parts in targets} if any(parts[:1] == ("params",) for parts in targets) else set()
    places = {
        name: _places(parts, targets, collections) for name, parts in files.items() if not _training(parts, targets)
    }
    forms = _common_forms(places.values(), collections)
    renamed = {}
    for name, found in places.items():
        target = next((target for form, target in found if forms[_group(target, collections)] == form), None)
        renamed[name] = name if target is None else targets[target]
    matched = sum(name in targets.values() for name in renamed.values())
    if 2 * matched <= len(renamed) or len(set(renamed.values())) < len(renamed):
        return readers
    return {new: readers[name] for name, new in renamed.items()}


def _parts(name: str) -> Parts:
    return tuple(part for part in _SEPARATORS.split(name) if part)


def _training(parts: Parts, targets: Mapping[Parts, str]) -> bool:
    """Whether a name is of an entry that belongs to training: at the top, or one below it (`state/opt_state`)."""
    if parts in targets or ("params", *parts) in targets:  # a layer of that name, the `key` of an attention
        return False
    top = parts[:1] if parts[:1] in (("params",), ("batch_stats",)) else parts[:2]
    return bool(TRAINING_ONLY.intersection(top)) or "rngs" in parts


def _places(parts: Parts, targets: Mapping[Parts, str], collections: Iterable[str]) -> list[tuple[Form, Parts]]:
    """Each way to read a name: a form, and the variable it gives."""
    found: list[tuple[Form, Parts]] = []
    for start in range(len(parts)):
        end = parts[start:]
        if end in targets:
            found.append(((parts[:start], 0), end))
        found += [((parts[:start], 1), (c, *end)) for c in sorted(collections) if (c, *end) in targets]
    return found


def _group(target: Parts, collections: Iterable[str]) -> str:
    """Variables whose names have one form: those of a collection; in NNX, which has none, those of one role."""
    return target[0] if collections else target[-1]


def _common_forms(places: Iterable[list[tuple[Form, Parts]]], collections: Iterable[str]) -> dict[str, Form]:
    counts: dict[str, Counter[Form]] = {}
    for found in places:
        for form, target in found:
            counts.setdefault(_group(target, collections), Counter())[form] += 1
    # A wrapper's weights may come twice, of which the first level is meant.
    return {
        group: max(forms, key=lambda form: (forms[form], -len(form[0]), -form[1])) for group, forms in counts.items()
    }
