"""A traced function as a flat list of operations.

`jax.make_jaxpr` nests: a ReLU hides in a `custom_jvp_call` that holds a `jit`, a block in a `remat`. Everything
that follows (finding layers, replacing their arithmetic) wants one flat list, so equations that merely call their
body are inlined here, whatever their primitive is called. Only custom derivatives of parameter-free functions (ReLU
and its relatives) stay whole, so that their gradients stay what their authors wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex

# Loops and branches: their bodies run a data-dependent or repeated number of times and cannot be inlined.
CONTROL_FLOW = frozenset({"scan", "while", "cond"})
PRODUCTS = {"conv_general_dilated": lax.conv_general_dilated, "dot_general": lax.dot_general}
LAYER_PRIMITIVES = frozenset(PRODUCTS)
# Arrays that the traced function closes over stay in the program up to this size; weights belong in `variables`.
MAX_CONSTANT_BYTES = 1 << 20


class ClosureError(ValueError):
    """The traced function closes over weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An operand known at trace time: a literal or a small closed-over array."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)


Operand = int | Constant


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
        return self.primitive.name

    @property
    def value_inputs(self) -> tuple[int, ...]:
        return tuple(i for i in self.inputs if isinstance(i, int))

    def __call__(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        """Apply the primitive to `args`, one for each operand.

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
    """The flat program: values `0..num_leaves-1` are the variables' leaves, value `num_leaves` is the input x."""

    num_leaves: int
    ops: tuple[Op, ...]
    outputs: tuple[Operand, ...]
    avals: Mapping[int, jax.ShapeDtypeStruct]

    @property
    def input(self) -> int:
        return self.num_leaves

    @functools.cached_property
    def output_values(self) -> frozenset[int]:
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

    def shape(self, operand: Operand) -> tuple[int, ...]:
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


def _call_body(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The body of an equation that merely calls it (jit, remat, custom derivatives), by shape and not by name."""
    bodies = list(sub_jaxprs(eqn.params))
    if eqn.primitive.name in CONTROL_FLOW or len(bodies) != 1:
        return None
    jaxpr, consts = bodies[0]
    if len(jaxpr.constvars) != len(consts):
        return None

    def signature(variables: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
        return [(v.aval.shape, v.aval.dtype) for v in variables]

    try:
        same_inputs = signature(jaxpr.invars) == signature(eqn.invars)
        same_outputs = signature(jaxpr.outvars) == signature(eqn.outvars)
    except AttributeError:  # tokens and references have no shape
        return None
    return (jaxpr, consts) if same_inputs and same_outputs else None


def flatten(
    function: Callable[[Sequence[Any], Any], Any],
    leaves: Sequence[jax.ShapeDtypeStruct],
    x: jax.ShapeDtypeStruct,
) -> tuple[Program, Any]:
    """Trace `function(leaves, x)` and flatten it; dead operations are dropped.

    Args:
      function: takes the list of leaves and the input.
      leaves: shape and dtype of every leaf.
      x: shape and dtype of the input.

    Returns:
      The program, and the tree structure of the function's result.

    Raises:
      ClosureError: the function closes over large arrays instead of taking them in `variables`.
    """
    # Without a setting, so that what the function leaves open shows: `Op` closes it when the program runs.
    with jax.default_matmul_precision(None):
        closed, out_shape = jax.make_jaxpr(function, return_shape=True)(list(leaves), x)
    builder = _Builder(len(leaves), [*leaves, x])
    outputs = builder.inline(closed.jaxpr, closed.consts, list(range(len(leaves) + 1)), "")
    ops = _live_ops(builder.ops, outputs)
    program = Program(
        num_leaves=len(leaves),
        ops=tuple(dataclasses.replace(op, index=i) for i, op in enumerate(ops)),
        outputs=tuple(outputs),
        avals=builder.avals,
    )
    return program, jax.tree.structure(out_shape)


def _live_ops(ops: Sequence[Op], outputs: Sequence[Operand]) -> list[Op]:
    needed = {o for o in outputs if isinstance(o, int)}
    live = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            live.append(op)
            needed.update(op.value_inputs)
    return live[::-1]


class _Builder:
    """Walks jaxprs and numbers values in the order they are computed."""

    def __init__(self, num_leaves: int, arguments: Sequence[jax.ShapeDtypeStruct]):
        self.ops: list[Op] = []
        self.avals = dict(enumerate(arguments))
        self.num_leaves = num_leaves
        self.parameter_only = set(range(num_leaves))
        self.platform_indices: set[Operand] = set()

    def inline(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Operand], scope: str) -> list[Operand]:
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Constant(_small_array(const))

        def read(atom: Any) -> Operand:
            return Constant(_small_array(atom.val)) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            stack = str(eqn.source_info.name_stack) if hasattr(eqn, "source_info") else ""
            inner = "/".join(part for part in (scope, stack) if part)
            body = self._portable_branch(eqn, inputs) or _call_body(eqn)
            if _casts_a_number(eqn, inputs):  # the padding value of jnp.pad: a constant again
                outputs = [Constant(np.asarray(inputs[0].value).astype(eqn.params["new_dtype"]))]
            elif body is not None and not self._keep_whole(eqn, inputs):
                outputs = self.inline(*body, inputs[-len(body[0].invars) :], inner)
            else:
                outputs = self._append(eqn, inputs, inner)
                if eqn.primitive.name == "platform_index" or not self.platform_indices.isdisjoint(inputs):
                    self.platform_indices.update(outputs)  # before JAX 0.8 it is clamped first
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _portable_branch(self, eqn: Any, inputs: Sequence[Operand]) -> tuple[Any, Sequence[Any]] | None:
        """What `lax.platform_dependent` computes on platforms that it does not name: the last branch of its `cond`."""
        if eqn.primitive.name != "cond" or inputs[0] not in self.platform_indices:
            return None
        branch = eqn.params["branches"][-1]
        return branch.jaxpr, branch.consts

    def _keep_whole(self, eqn: Any, inputs: Sequence[Operand]) -> bool:
        custom = eqn.primitive.name.startswith("custom_")
        has_parameters = any(isinstance(i, int) and i in self.parameter_only for i in inputs)
        return custom and not has_parameters and not any(holds_layers(j) for j, _ in sub_jaxprs(eqn.params))

    def _append(self, eqn: Any, inputs: Sequence[Operand], scope: str) -> list[int]:
        start = len(self.avals)
        outputs = list(range(start, start + len(eqn.outvars)))
        for number, var in zip(outputs, eqn.outvars, strict=True):
            self.avals[number] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        if all(not isinstance(i, int) or i in self.parameter_only for i in inputs):
            self.parameter_only.update(outputs)
        self.ops.append(Op(len(self.ops), eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), scope))
        return outputs


def _casts_a_number(eqn: Any, inputs: Sequence[Operand]) -> bool:
    """Whether an equation gives a constant number another type."""
    if eqn.primitive.name != "convert_element_type" or not isinstance(inputs[0], Constant):
        return False
    return inputs[0].shape == () and jax.dtypes.issubdtype(eqn.params["new_dtype"], np.number)


def _small_array(const: Any) -> Any:
    size = math.prod(np.shape(const)) * getattr(getattr(const, "dtype", None), "itemsize", 1)
    if size > MAX_CONSTANT_BYTES:
        raise ClosureError(
            f"apply_fn closes over an array of {size / 2**20:.1f} MiB (shape {np.shape(const)}). Pass weights in "
            "`variables` instead: captured arrays cannot be quantized and slow compilation down."
        )
    return const
