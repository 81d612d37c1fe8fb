"""The command line, `dfq-jax`: `main` and how it fails; what the commands do is in `commands`.

Whatever is wrong with the input ends in one line on stderr and exit code 2. `--debug`, or the environment
variable DFQ_JAX_DEBUG=1, shows the traceback, too. Compiled programs are kept for the next process (`compilation`),
but for `--no-cache`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfq_jax.cli.compilation import keep_compiled
from dfq_jax.synthesis import SynthesisError

PROGRAM = "dfq-jax"
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
UNREAD = 1  # what rich ends with where its tables are no longer read
TYPED = "command"  # the parameter of commands that is no option: what was typed, for who wants to repeat it
# What a user can cause; anything else is a defect, and shows its traceback.
BAD_INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError, OverflowError, SynthesisError)
REQUIRED = ("tyro", "rich", "platformdirs", "filelock")  # JAX needs the last one to bound what it keeps
EPILOG = (
    "--version prints the version; --debug, anywhere, shows the traceback of an error; --no-cache, anywhere, neither "
    "reads nor keeps compiled programs in the user's cache folder."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      args: the arguments; None for those of the process.

    Returns:
      The exit code: 0, 2 for bad input, 130 when interrupted, 1 when what is printed is no longer read.
    """
    is_process = args is None
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args or os.environ.get("DFQ_JAX_DEBUG", "") not in ("", "0")
    keep = is_process and "--no-cache" not in args  # a caller's own process keeps its settings
    args = [arg for arg in args if arg not in ("--debug", "--no-cache")]
    if args[:1] == ["--version"]:
        print(f"{PROGRAM} {importlib.metadata.version('dfq_jax')}")
        return 0
    if missing := [name for name in REQUIRED if not _importable(name)]:
        return _fail(f"the command line needs {' and '.join(missing)}: pip install 'dfq_jax[cli]'")
    try:
        from dfq_jax.cli.commands import COMMANDS

        run = _parse(COMMANDS, args)
        if isinstance(run, int):
            return run
        if keep:
            keep_compiled()
        if TYPED in inspect.signature(run.func).parameters:
            run = functools.partial(run, **{TYPED: shlex.join([PROGRAM, *args])})
        run()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        if debug:
            traceback.print_exc()
        notes = getattr(interrupt, "__notes__", [])
        print(f"{PROGRAM}: {'; '.join(['interrupted', *notes])}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except BAD_INPUT_ERRORS as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error) or type(error).__name__)
    return 0


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules holds None for it
        return False


def _fail(message: str) -> int:
    """One line, whatever the message looks like."""
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


# --- parsing ---


def _parse(commands: Mapping[str, Callable[..., None]], args: list[str]) -> functools.partial[None] | int:
    """The command with its arguments bound, or an exit code where there is nothing left to run."""
    import tyro

    if not args:
        return _fail(f"expected a command: {', '.join(commands)}; see {PROGRAM} --help")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _bound(function) for name, function in commands.items()},
                prog=PROGRAM,
                description=f"Data-free quantization of Flax networks. {EPILOG}",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            return 0  # --help
        return _fail(_condense(messages.getvalue()) or "the arguments cannot be parsed")


def _bound(function: Callable[..., None]) -> Callable[..., Any]:
    """Parsing must not run the command: its errors and its progress are not the parser's."""
    from dfq_jax.cli.options import unbroken

    function.__doc__ = unbroken(function.__doc__)

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    signature = inspect.signature(function)
    asked = [parameter for parameter in signature.parameters.values() if parameter.name != TYPED]
    vars(bind)["__signature__"] = signature.replace(parameters=asked)
    return bind


def _condense(box: str) -> str:
    """What a framed message of tyro says, without its title, hints and frame."""
    title, *lines = [line.strip(" │|╭╮╰╯") for line in box.strip().splitlines()] or [""]
    said: list[str] = []
    for line in lines:
        rule = not line.strip("─-")
        if rule and said:
            break
        if not rule:
            said.append(line)
    return " ".join(said) or title.strip("─- ")
