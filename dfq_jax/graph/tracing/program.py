"""A traced function as a flat list of operations.

`jax.make_jaxpr` nests: a ReLU hides in a `custom_jvp_call` that holds a `jit`, a block in a `remat`. Everything
that follows (finding layers, replacing their arithmetic) wants one flat list; `flattening` makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex

from dfq_jax.graph.tracing.views import Split

# Loops and branches: their bodies run a data-dependent or repeated number of times and are not merely called.
CONTROL_FLOW = frozenset({"scan", "while", "cond"})
PRODUCTS = {"conv_general_dilated": lax.conv_general_dilated, "dot_general": lax.dot_general}
LAYER_PRIMITIVES = frozenset(PRODUCTS)


class ClosureError(ValueError):
    """The traced function closes over weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An operand known at trace time: a literal or a small closed-over array."""

    value: Any

    @property
    def shape(self) -> Shape:
        """The shape of the array."""
        return np.shape(self.value)

    @property
    def dtype(self) -> Any:
        """The type of its elements. JAX 0.6 has literals that are numbers of Python."""
        return jax.dtypes.result_type(self.value)


Operand = int | Constant
Shape = tuple[Any, ...]  # of ints; the batch of a program that is exported for all sizes is a symbol


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One primitive application. `inputs` are value numbers or constants, `outputs` value numbers."""

    index: int
    primitive: jex.Primitive
    params: Mapping[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    scope: str

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.primitive.name

    @property
    def value_inputs(self) -> tuple[int, ...]:
        """The operands that are no constants."""
        return tuple(i for i in self.inputs if isinstance(i, int))

    def __call__(self, *args: Any) -> tuple[jax.Array, ...]:
        """Apply the primitive to `args`, arrays of JAX or NumPy, one for each operand.

        A product that the traced function left at JAX's default precision takes the setting in force here.
        """
        if self.name in PRODUCTS and self.params["precision"] is None:
            return (PRODUCTS[self.name](*args, **self.params),)
        bound = self.primitive.get_bind_params(dict(self.params))
        # Before JAX 0.10 the functions of a custom derivative came apart from its parameters.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        result = self.primitive.bind(*functions, *args, **params)
        return tuple(result) if self.primitive.multiple_results else (result,)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The flat program: values `0..num_leaves-1` are the variables' leaves, value `num_leaves` is the input x.

    A leaf of the variables that is read slice by slice (layers stacked for a scan) counts once for each slice: `splits`
    says for each leaf of the variables, in order, how it is taken apart, None for one that is read whole.
    """

    num_leaves: int
    ops: tuple[Op, ...]
    outputs: tuple[Operand, ...]
    avals: Mapping[int, jax.ShapeDtypeStruct]
    splits: tuple[Split | None, ...]

    @property
    def input(self) -> int:
        """The value that is the network's input."""
        return self.num_leaves

    @functools.cached_property
    def output_values(self) -> frozenset[int]:
        """The values that the program returns."""
        return frozenset(o for o in self.outputs if not isinstance(o, Constant))

    @functools.cached_property
    def _producers(self) -> dict[int, Op]:
        return {out: op for op in self.ops for out in op.outputs}

    @functools.cached_property
    def _consumers(self) -> dict[int, list[Op]]:
        table: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in dict.fromkeys(op.value_inputs):
                table.setdefault(value, []).append(op)
        return table

    def producer(self, value: int) -> Op | None:
        """The operation that computes a value, None for leaves and the input."""
        return self._producers.get(value)

    def consumers(self, value: int) -> Sequence[Op]:
        """The operations that read a value, in order."""
        return self._consumers.get(value, ())

    @functools.cached_property
    def parameter_only(self) -> frozenset[int]:
        """Values that do not depend on x: the leaves, what is computed from them alone, and constants."""
        known = set(range(self.num_leaves))
        for op in self.ops:
            if known.issuperset(op.value_inputs):
                known.update(op.outputs)
        return frozenset(known)

    @functools.cached_property
    def leaves_behind(self) -> Mapping[int, frozenset[int]]:
        """For each value that does not depend on x, the leaves it is computed from."""
        table = {leaf: frozenset({leaf}) for leaf in range(self.num_leaves)}
        for op in self.ops:
            if self.parameter_only.issuperset(op.outputs):
                leaves = frozenset().union(*(table[v] for v in op.value_inputs))
                table.update(dict.fromkeys(op.outputs, leaves))
        return table

    @functools.cached_property
    def served(self) -> Mapping[int, frozenset[int]]:
        """For each leaf, the operations on x that it serves, by itself or as part of what is computed from leaves."""
        table: dict[int, set[int]] = {leaf: set() for leaf in range(self.num_leaves)}
        for op in self.ops:
            if self.data_inputs(op):
                for value in self.parameter_only.intersection(op.value_inputs):
                    for leaf in self.leaves_behind[value]:
                        table[leaf].add(op.index)
        for value in self.parameter_only & self.output_values:
            for leaf in self.leaves_behind[value]:
                table[leaf].add(-1)  # an output of the program
        return {leaf: frozenset(ops) for leaf, ops in table.items()}

    def between(self, begin: int, ends: Collection[int]) -> tuple[Op, ...]:
        """The operations that compute the values `ends` when the value `begin` is given, in order."""
        needed = set(ends)
        found = []
        for op in reversed(self.ops):
            if needed.intersection(op.outputs) and begin not in op.outputs:
                found.append(op)
                needed.update(op.value_inputs)
        return tuple(found[::-1])

    def shape(self, operand: Operand) -> Shape:
        """The shape of a value or a constant."""
        return operand.shape if isinstance(operand, Constant) else self.avals[operand].shape

    def readers(self, value: int) -> int:
        """How many operations read a value; being an output of the program counts as one more."""
        return len(self.consumers(value)) + (value in self.output_values)

    def data_inputs(self, op: Op) -> tuple[int, ...]:
        """The operands of an operation that depend on x."""
        return tuple(v for v in op.value_inputs if v not in self.parameter_only)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for programs that compute the same; comparable within one process only."""
        digest = hashlib.sha256()

        def add(*parts: Any) -> None:
            digest.update(_ADDRESS.sub("", repr(parts)).encode())

        def add_operand(operand: Operand) -> None:
            if isinstance(operand, Constant):
                add(operand.shape, str(getattr(operand.value, "dtype", type(operand.value))))
                digest.update(constant_bytes(operand.value))
            else:
                add(operand)

        for op in self.ops:
            add(op.name, sorted(op.params.items()), op.outputs)
            for operand in op.inputs:
                add_operand(operand)
        for output in self.outputs:
            add_operand(output)
        return digest.hexdigest()


_ADDRESS = re.compile("0x[0-9a-f]+")  # in the printed form of a function


def constant_bytes(constant: Any) -> bytes:
    """What tells constants of one shape and type apart."""
    if jax.dtypes.issubdtype(getattr(constant, "dtype", None), jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant).tobytes()


def sub_jaxprs(params: Mapping[str, Any]) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The (jaxpr, constants) pairs held in an equation's parameters, open or closed, alone or in tuples."""
    for param in params.values():
        for item in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr, item.consts
            elif isinstance(item, jex.Jaxpr):
                yield item, ()


def holds_layers(jaxpr: Any) -> bool:
    """Whether a convolution or matrix product is anywhere inside."""
    return any(
        eqn.primitive.name in LAYER_PRIMITIVES or any(holds_layers(j) for j, _ in sub_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def live_ops(ops: Sequence[Op], outputs: Sequence[Operand]) -> list[Op]:
    """The operations that the outputs are computed by."""
    needed = {o for o in outputs if isinstance(o, int)}
    live = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            live.append(op)
            needed.update(op.value_inputs)
    return live[::-1]
