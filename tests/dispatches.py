"""Counts of the programs that JAX starts and of the arrays that the host reads, by JAX's profiler."""

import gzip
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax


class Dispatches(Counter):
    """How often each compiled function was called within the block, and how often an array was read.

    with Dispatches() as started:
        float(jax.jit(f)(x))
    assert started == {"f": 1, Dispatches.READS: 1}

    Reads are those by `float`, `jax.device_get` and the like: `np.asarray` of what lies on one CPU copies nothing.
    """

    READS = "reads"
    _READ = "np.asarray(jax.Array)"

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        options = {}
        if hasattr(jax.profiler, "ProfileOptions"):
            options["profiler_options"] = jax.profiler.ProfileOptions()
            options["profiler_options"].python_tracer_level = 0  # each function of Python would be an event
            options["profiler_options"].host_tracer_level = 1  # and each operation of a program
        jax.profiler.start_trace(self._folder.name, **options)
        return self

    def __exit__(self, *_):
        jax.profiler.stop_trace()
        with self._folder:
            (path,) = Path(self._folder.name).rglob("*.trace.json.gz")
            trace = gzip.decompress(path.read_bytes()).decode()
        self[self.READS] = trace.count(f'"name":"{self._READ}"')
        calls = Counter(re.findall(r'"name":"PjitFunction\(([^)]*)\)"', trace))
        self.update({name: count // 2 for name, count in calls.items()})  # each call is two events, one in the other
