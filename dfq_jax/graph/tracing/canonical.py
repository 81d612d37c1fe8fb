"""One form for a network, whether it is written for a batch or for one example and vmapped.

`jax.vmap` puts reshapes, squeezes and transpositions between a convolution, its bias, its BatchNorm and its activation,
though elements stay where they are. Here layouts of values that depend on x wait until somebody needs them: what one
of them does and the next undoes disappears, those behind a layer move behind the elementwise operations that follow
it, and a transposed matrix product becomes the product of its operands in the other order. The result computes the
same, and looks as if it had been written for batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax import lax

from dfq_jax.graph.tracing.axes import operand_axes
from dfq_jax.graph.tracing.elementwise import POINTWISE
from dfq_jax.graph.tracing.layout import matching_axes
from dfq_jax.graph.tracing.program import LAYER_PRIMITIVES, Constant, Op, Operand, Program, Shape, live_ops


def keeps_elements(op: Op, program: Program) -> bool:
    """Whether an operation gives the elements of its operand another shape or order of axes, and does nothing else."""
    if len(op.value_inputs) != 1 or op.name not in ("broadcast_in_dim", "reshape", "squeeze", "transpose"):
        return False
    if op.name == "reshape" and op.params["dimensions"] is not None:
        return False
    before, after = (program.avals[value].shape for value in (op.value_inputs[0], op.outputs[0]))
    return math.prod(before) == math.prod(after)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A reshape or a transposition."""

    permutation: Shape | None  # None: a reshape
    shape: Shape  # of the result
    op: Op | None = dataclasses.field(compare=False)  # the operation of the program; None if it was made here

    def undo(self, shape: Shape, before: Shape) -> Shape | None:
        """The shape before this step of a value that broadcasts against its result; None if there is none.

        Args:
          shape: of that value.
          before: the shape that this step is applied to.
        """
        if self.permutation is not None:
            return tuple(shape[axis] for axis in _inverse(self.permutation))
        result = [1] * len(before)
        for old, new in matching_axes(before, self.shape):
            if all(shape[axis] == self.shape[axis] for axis in new):
                for axis in old:
                    result[axis] = before[axis]
            elif any(shape[axis] != 1 for axis in new):
                return None
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class _View:
    """A value that is another one in a layout that nobody has asked for yet."""

    value: int
    steps: tuple[_Step, ...] = ()


def canonical(program: Program) -> Program:
    """The program in its canonical form; values that both have keep their numbers."""
    return _Canonical(program).result()


class _Canonical:
    """Walks the operations once; `views` has each value that depends on x."""

    def __init__(self, program: Program):
        self.program = program
        self.avals = dict(program.avals)
        self.ops: list[Op] = []
        self.views: dict[int, _View] = {program.input: _View(program.input)}
        self.made: dict[_View, int] = {}
        self.products: dict[int, Op] = {}  # matrix products with parameters, by result
        self.behind_layers: set[int] = set()  # results of layers, and what is computed from them elementwise

    def result(self) -> Program:
        for op in self.program.ops:
            if not self.program.data_inputs(op):
                self.ops.append(op)
            elif keeps_elements(op, self.program):
                self._rearrange(op)
            elif not self._pull(op):
                self._append(op)
        outputs = tuple(self._read(operand) for operand in self.program.outputs)
        ops = live_ops(self.ops, outputs)
        return Program(
            num_leaves=self.program.num_leaves,
            ops=tuple(dataclasses.replace(op, index=i) for i, op in enumerate(ops)),
            outputs=outputs,
            avals=self.avals,
            splits=self.program.splits,
        )

    # --- operations as they are ---

    def _append(self, op: Op) -> None:
        op = dataclasses.replace(op, inputs=tuple(self._read(operand) for operand in op.inputs))
        self.ops.append(op)
        self.views.update({value: _View(value) for value in op.outputs})
        if op.name in LAYER_PRIMITIVES and self._multiplies_parameters(op):
            self.behind_layers.update(op.outputs)
            if op.name == "dot_general":
                self.products[op.outputs[0]] = op
        elif op.name in POINTWISE and self.behind_layers.issuperset(self._data(op)):
            self.behind_layers.update(op.outputs)

    def _data(self, op: Op) -> list[int]:
        return [value for value in op.value_inputs if value not in self.program.parameter_only]

    def _multiplies_parameters(self, op: Op) -> bool:
        parameters = [value for value in op.value_inputs if value in self.program.parameter_only]
        return len(parameters) == 1 and bool(self.program.leaves_behind[parameters[0]])

    def _read(self, operand: Operand) -> Operand:
        """The operand in the layout that the program gives it."""
        if isinstance(operand, Constant) or operand in self.program.parameter_only:
            return operand
        return self._make(self.views[operand], operand)

    def _make(self, view: _View, number: int) -> int:
        """The value that a view shows, made under this number if it is not there yet."""
        if not view.steps:
            return view.value
        if view not in self.made:
            *rest, step = view.steps
            source = view.value
            if rest:
                source = self._make(_View(source, tuple(rest)), self._new_value(rest[-1].shape, number))
            self.made[view] = self._apply(step, source, number)
        return self.made[view]

    def _new_value(self, shape: Shape, like: int) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(shape, self.avals[like].dtype)
        return number

    def _apply(self, step: _Step, value: int, result: int) -> int:
        if step.op is not None:
            self.ops.append(dataclasses.replace(step.op, inputs=(value,), outputs=(result,)))
        elif step.permutation is None:
            self._emit(lambda x: lax.reshape(x, step.shape), (value,), result)
        else:
            self._emit(lambda x: lax.transpose(x, step.permutation), (value,), result)
        return result

    def _emit(self, function: Callable[..., jax.Array], inputs: Sequence[Operand], result: int, scope: str = "") -> Op:
        """Append the one operation that a function makes of its operands."""
        with jax.default_matmul_precision(None):  # left open where the program leaves it open
            (eqn,) = jax.make_jaxpr(function)(*(self.avals[value] for value in inputs)).jaxpr.eqns
        self.ops.append(Op(len(self.ops), eqn.primitive, eqn.params, tuple(inputs), (result,), scope))
        return self.ops[-1]

    # --- layouts ---

    def _rearrange(self, op: Op) -> None:
        (source,), (out,) = op.value_inputs, op.outputs
        view = self.views[source]
        if not view.steps and self._transpose_product(op, view.value):
            return
        permutation = tuple(op.params["permutation"]) if op.name == "transpose" else None
        step = _Step(permutation, self.avals[out].shape, op)
        self.views[out] = _View(view.value, _joined(self.avals[view.value].shape, view.steps, step))

    def _transpose_product(self, op: Op, value: int) -> bool:
        """Whether the operation transposes a matrix product as the other order of its operands does; if so, do that."""
        product = self.products.get(value)
        if product is None or op.name != "transpose" or self.program.readers(value) != 1:
            return False
        contract, batch = product.params["dimension_numbers"]
        ranks = (len(self.avals[operand].shape) for operand in product.inputs)
        left, right = (len(operand_axes(product, side, rank).free) for side, rank in enumerate(ranks))
        first = len(batch[0])
        swapped = (*range(first), *range(first + left, first + left + right), *range(first, first + left))
        if tuple(op.params["permutation"]) != swapped:
            return False
        precision = product.params["precision"]
        function = functools.partial(
            lax.dot_general,
            dimension_numbers=(contract[::-1], batch[::-1]),
            precision=precision[::-1] if isinstance(precision, tuple) else precision,
            preferred_element_type=product.params["preferred_element_type"],
        )
        (out,) = op.outputs
        self.products[out] = self._emit(function, product.inputs[::-1], out, product.scope)
        self.views[out] = _View(out)
        self.behind_layers.add(out)
        return True

    # --- elementwise operations before layouts ---

    def _pull(self, op: Op) -> bool:
        """Whether an operation can run before the layout of its operands; if so, do that."""
        views = [self.views[value] for value in self._data(op)]
        steps, shape = views[0].steps, self.avals[views[0].value].shape
        if op.name not in POINTWISE or not steps or not self.behind_layers.issuperset(v.value for v in views):
            return False
        if any(view.steps != steps or self.avals[view.value].shape != shape for view in views):
            return False
        before = [shape, *(step.shape for step in steps[:-1])]
        parameters = {
            operand: self._shapes_before(operand, steps, before)
            for operand in op.inputs
            if isinstance(operand, Constant) or operand not in self.views
        }
        if None in parameters.values():
            return False
        inputs = tuple(
            self._undo(operand, steps, parameters[operand]) if operand in parameters else self.views[operand].value
            for operand in op.inputs
        )
        (out,) = op.outputs
        value = self._new_value(shape, out)
        self.ops.append(dataclasses.replace(op, inputs=inputs, outputs=(value,)))
        self.behind_layers.add(value)
        self.views[out] = _View(value, steps)
        return True

    def _shapes_before(self, operand: Operand, steps: Sequence[_Step], before: Sequence[Shape]) -> list[Shape] | None:
        """The shapes of a parameter before each step, the last step first; None if one cannot be undone."""
        shape = self.program.shape(operand)
        found: list[Shape] = []
        if not shape:  # a number, which is the same in all layouts
            return found
        if isinstance(operand, Constant):
            return None
        for step, earlier in zip(reversed(steps), reversed(before), strict=True):
            shape = step.undo(shape, earlier)
            if shape is None:
                return None
            found.append(shape)
        return found

    def _undo(self, operand: Operand, steps: Sequence[_Step], shapes: Sequence[Shape]) -> Operand:
        """A parameter before the steps, in these shapes."""
        value = operand
        for step, shape in zip(steps[::-1], shapes, strict=False):
            inverse = None if step.permutation is None else _inverse(step.permutation)
            if inverse is not None or self.avals[value].shape != shape:
                value = self._apply(_Step(inverse, shape, None), value, self._new_value(shape, value))
        return value


def _inverse(permutation: Shape) -> Shape:
    return tuple(permutation.index(axis) for axis in range(len(permutation)))


def _joined(start: Shape, steps: tuple[_Step, ...], step: _Step) -> tuple[_Step, ...]:
    """Steps and one more: neighbors of a kind are one, and what changes nothing is left out."""
    if steps and (steps[-1].permutation is None) == (step.permutation is None):
        last, steps = steps[-1], steps[:-1]
        if step.permutation is None:
            return _joined(start, steps, _Step(None, step.shape, None))
        return _joined(start, steps, _Step(tuple(last.permutation[a] for a in step.permutation), step.shape, None))
    before = steps[-1].shape if steps else start
    nothing = step.shape == before if step.permutation is None else step.permutation == tuple(range(len(before)))
    return steps if nothing else (*steps, step)
