"""Elementwise pieces of a program: which activation follows a value, and which values are made from which."""

from __future__ import annotations

import functools
import heapq
from typing import Any

import numpy as np

from dfq_jax.graph.tracing.activations import GRID, classify
from dfq_jax.graph.tracing.batch_norm_pattern import ChannelAlgebra
from dfq_jax.graph.tracing.elementwise import CASTS, NotElementwise, evaluate, is_elementwise
from dfq_jax.graph.tracing.program import Op, Operand, Program, Shape


class Activations:
    """The activation functions in one program."""

    def __init__(self, program: Program, algebra: ChannelAlgebra):
        self._program = program
        self._algebra = algebra
        self._after: dict[int, tuple[str, int]] = {}

    def after(self, value: int) -> tuple[str, int]:
        """The activation applied to a value, and its result; ("none", value) if there is none.

        It is the last named function of the value through which everything computed from the value goes. The
        operations that read the value, and their readers, are run on sample points in program order; a result is a
        candidate when every earlier value of this region has been read for the last time.
        """
        if value not in self._after:
            self._after[value] = self._find(value)
        return self._after[value]

    def _find(self, start: int) -> tuple[str, int]:
        program = self._program
        samples: dict[int, np.ndarray] = {start: GRID}
        unread = {start: program.readers(start)}
        queue = [op.index for op in program.consumers(start)]
        best = ("none", start)
        while queue:
            op = program.ops[heapq.heappop(queue)]
            result = self._apply(op, samples, program.avals[start].shape)
            if result is None:
                break  # something else reads the region: later results are not all that becomes of the value
            for operand in set(op.value_inputs) & samples.keys():
                unread[operand] -= 1
            (out,) = op.outputs
            samples[out] = result
            unread[out] = program.readers(out)
            if op.name not in CASTS and sum(unread.values()) == unread[out]:
                name = classify(result)
                best = best if name is None else (name, out)
            for reader in program.consumers(out):
                if reader.index not in queue:
                    heapq.heappush(queue, reader.index)
        return best

    def _apply(self, op: Op, samples: dict[int, np.ndarray], shape: Shape) -> np.ndarray | None:
        """The result of an operation on sample points, None unless it is an elementwise function of the region."""
        if len(op.outputs) != 1 or self._program.avals[op.outputs[0]].shape != shape:
            return None
        args = [samples[i] if i in samples else self._constant(i) for i in op.inputs]
        if any(arg is None for arg in args):
            return None
        try:
            return evaluate(op.name, op.params, args)
        except (NotElementwise, TypeError, ValueError):
            return None

    def _constant(self, operand: Operand) -> Any:
        value = self._algebra.value(operand)
        return None if value is None or value.leaves else value.samples[0]

    @functools.cached_property
    def results(self) -> dict[int, tuple[str, int]]:
        """For each value that an activation computes: its name, and the value it is applied to."""
        made_from = origins(self._program, with_parameters=False)
        results: dict[int, tuple[str, int]] = {}
        for value, origin in made_from.items():
            if value == origin:
                name, end = self.after(value)
                if name != "none":
                    results.setdefault(end, (name, value))
        return results


def origins(program: Program, *, with_parameters: bool) -> dict[int, int]:
    """For each value that depends on x, the value that it is an elementwise function of; itself if there is none.

    Args:
      program: the program.
      with_parameters: whether the function may have parameters, as in a PReLU.
    """
    table = {program.input: program.input}
    for op in program.ops:
        sources = {table[v] for v in program.data_inputs(op)}
        if not sources:
            continue
        parameters = any(v in program.parameter_only and program.leaves_behind[v] for v in op.value_inputs)
        elementwise = len(sources) == 1 and (with_parameters or not parameters) and is_elementwise(op)
        for out in op.outputs:
            table[out] = sources.copy().pop() if elementwise else out
    return table
