"""Compiled programs kept from one process to the next: half of a short command's time is compilation.

They lie in the folder that the system has for caches, and JAX itself finds, writes and removes them (its *persistent
compilation cache*). What the user has set for it (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=0`) holds.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 2**29  # those not used for longest make room for new ones
MIN_SECONDS = 0.05  # what is compiled faster than it is read is not kept


def keep_compiled() -> None:
    """Have this process read and keep compiled programs; does nothing where the folder cannot be written."""
    import jax
    import platformdirs

    config: Any = jax.config  # whose names are not in its type
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = Path(platformdirs.user_cache_dir("dfq_jax", appauthor=False)) / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_compilation_cache_max_size", MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
