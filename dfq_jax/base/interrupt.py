"""Ctrl-C that waits for the step in progress."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only sets a flag, read by the yielded function; the second one raises.

    An interrupt in the middle of a compiled step would lose its donated buffers. Outside the main thread, where Python
    delivers no signals, the flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen = False

    def handle(signum: int, frame: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
