"""The integer network as a serialized StableHLO program: `jax.export`, any batch size, CPU, CUDA and TPU.

Whoever has JAX runs the file, without this library and without the model's code:

    program = jax.export.deserialize(bytearray(open(path, "rb").read()))
    logits = program.call(x)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Float

from dfq_jax.base import check_field, may_transfer, require, write_atomically
from dfq_jax.export.exporter import Quantized, Runner, as_batch
from dfq_jax.graph import GraphError
from dfq_jax.runtime import Policy, apply_plan, compile_integer, default_policy

PLATFORMS = ("cpu", "cuda", "tpu")


def portable_policy() -> Policy:
    """What is right on every platform and slow on none: the CPU's choice, without int8 convolutions in groups.

    Sums in int32 that only a conversion to float32 reads are what XLA for CUDA turns into cuDNN's int8 convolution.
    """
    return dataclasses.replace(default_policy("cpu"), grouped=False, self_test=False, storage="memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableHLOExporter:
    """Exporter of serialized StableHLO.

    Attributes:
      platforms: that the program can run on.
      policy: which layers run as int8; see `portable_policy`.
    """

    platforms: tuple[str, ...] = PLATFORMS
    policy: Policy = dataclasses.field(default_factory=portable_policy)

    name = "stablehlo"
    extra = "stablehlo"

    def __post_init__(self) -> None:
        check_field("platforms", self.platforms, f"some of {PLATFORMS}", lambda v: v and set(v) <= set(PLATFORMS))
        check_field("policy", self.policy, "a Policy", lambda v: isinstance(v, Policy))

    def write(self, quantized: Quantized, path: str | os.PathLike[str]) -> None:
        """Write the network to a file, whole or not at all; see `Exporter.write`.

        The weights are in the program as int8, or packed where they have 2 to 4 bits.
        """
        require("flatbuffers", self.extra)
        write_atomically(path, self.export(quantized).serialize())

    @may_transfer
    def export(self, quantized: Quantized) -> jax.export.Exported:
        """The program `x [b, ...] -> logits [b, classes]`."""
        graph = quantized.graph
        plan, variables = compile_integer(graph, quantized.variables, self.policy)
        spec = self._spec(graph.input)

        def logits(x: jax.Array) -> Any:
            # A barrier, or else compilers unpack all weights while they compile.
            return graph.logits(apply_plan(plan, jax.lax.optimization_barrier(variables), x))

        try:
            return jax.export.export(jax.jit(logits), platforms=self.platforms)(spec)
        except GraphError as error:
            raise ValueError(f"StableHLO: the network does not take batches of any size: {error}") from error

    @staticmethod
    def _spec(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = jax.export.symbolic_shape(", ".join(("b", *map(str, x.shape[1:]))))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def open(self, path: str | os.PathLike[str]) -> Runner:
        """Load a written file; see `Exporter.open`."""
        require("flatbuffers", self.extra)
        data = Path(path).read_bytes()
        try:
            program = jax.export.deserialize(bytearray(data))
        except Exception as error:  # flatbuffers has errors of many types for what is no buffer
            raise ValueError(f"{os.fspath(path)}: not a program serialized by jax.export ({error}).") from error
        call = jax.jit(program.call)

        def logits(x: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n classes"]:
            (spec,) = program.in_avals
            return np.asarray(call(as_batch(x, spec.shape).astype(spec.dtype)))

        return logits


EXPORTER = StableHLOExporter()
