"""Arguments of a module besides its input: which of them choose inference, and what to say about the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# Switches by which modules of the field choose inference mode, with the value that chooses it. Each name says by itself
# what True means; `mode`, `phase` and the like take values that differ from program to program, and are left alone.
INFERENCE_ARGUMENTS = {
    "train": False,
    "training": False,
    "is_train": False,
    "is_training": False,
    "train_mode": False,
    "training_mode": False,
    "enable_dropout": False,
    "use_batch_stats": False,
    "update_stats": False,
    "update_batch_stats": False,
    "deterministic": True,
    "use_running_average": True,
    "use_running_stats": True,
    "inference": True,
    "inference_mode": True,
    "is_inference": True,
    "eval": True,
    "is_eval": True,
    "eval_mode": True,
    "evaluate": True,
    "test": True,
    "testing": True,
    "is_test": True,
    "is_testing": True,
    "test_mode": True,
}
_MODES = ("mode", "phase", "split", "stage")

InferenceCall = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def inference_arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """The arguments of `function` that put it into inference mode: switches, with a bool or nothing as default."""
    found = inspect.signature(function).parameters
    return {
        name: value for name, value in INFERENCE_ARGUMENTS.items() if name in found and _is_switch(found[name].default)
    }


def inference_call(
    method: Callable[..., Any], leading: int, who: str, example: str, *, inference: bool = True
) -> InferenceCall:
    """How to call a module on an input in inference mode.

    Args:
      method: what is called.
      leading: how many arguments stand before the input and are given by the caller.
      who: the name of `method` in messages.
      example: a function to pass instead, with `{}` where further arguments stand.
      inference: False for training mode, in which some programs make their variables.

    Returns:
      A function of the input that gives the arguments behind the leading ones: by position where possible, as remat
      and jit mark static ones by number.

    Raises:
      TypeError: `method` takes no input, or has required arguments that inference gives no value to.
    """
    filled = {name: value == inference for name, value in inference_arguments(method).items()}
    signature = inspect.signature(method)
    given = list(signature.parameters.values())[leading:]
    positional = [p for p in given if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    if not positional:
        raise TypeError(f"model: {who} takes no input; pass a function instead: {example.format('')}.")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        p.name
        for p in given
        if p is not positional[0] and p.default is p.empty and p.name not in filled and p.kind not in variadic
    ]
    if required:
        raise TypeError(explain_required(who, required, example))

    def call(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind(*[None] * leading, x, **filled)
        return bound.args[leading:], bound.kwargs

    return call


def explain_required(who: str, names: list[str], example: str) -> str:
    """What to say about required arguments."""
    plural = "s" if len(names) > 1 else ""
    text = (
        f"model: {who} needs the argument{plural} {', '.join(map(repr, names))} besides its input, and only your "
        f"program knows the value. Bind it in a function and pass that: "
        f"{example.format(', ' + ', '.join(f'{name}=...' for name in names))}."
    )
    return f"{text} {explain_switches()}" if any(name in _MODES for name in names) else text


def explain_switches() -> str:
    """The table of switches, for messages."""
    switches = ", ".join(f"{name}={value}" for name, value in INFERENCE_ARGUMENTS.items())
    return f"What is filled in by itself: {switches}."


def _is_switch(default: Any) -> bool:
    return default is inspect.Parameter.empty or default is None or isinstance(default, bool)
