"""BatchNorm recognized by what it computes.

Whatever class a BatchNorm is and however its formula is written, in inference mode it is a per-channel affine map of
some tensor t by factors that depend on parameters only:

    y = a t + b,   a = scale / sqrt(var + epsilon),   b = bias - mean a.

So each value of the program carries, while it can, its affine form relative to the tensor that the chain of
operations started from. Random numbers stand for the leaves: a chain is a BatchNorm when leaves can be given their
roles so that both equations hold at every sample.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.tracing.elementwise import CASTS, NotElementwise, evaluate, is_elementwise, scalar
from dfq_jax.graph.tracing.layout import LAYOUT, move_labels, one_label
from dfq_jax.graph.tracing.program import Constant, Op, Operand, Program, Shape

_SAMPLES = 6
_TOLERANCE = 1e-9  # of float64 arithmetic on numbers around 1


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which leaf plays which part in a BatchNorm; `scale` and `bias` may be absent."""

    mean: int
    var: int
    scale: int | None
    bias: int | None
    epsilon: float


@dataclasses.dataclass(frozen=True)
class ChannelValue:
    """A parameter-only value, one number per channel: its samples, the leaves in it, the axis it runs along."""

    samples: np.ndarray
    leaves: frozenset[int]
    axis: int | None  # None: the same for all channels


@dataclasses.dataclass(frozen=True)
class Affine:
    """value = factor * base + offset, with the operations of `chain` between."""

    base: int
    chain: tuple[int, ...] = ()
    factor: ChannelValue = ChannelValue(np.ones(_SAMPLES), frozenset(), None)
    offset: ChannelValue = ChannelValue(np.zeros(_SAMPLES), frozenset(), None)

    @property
    def axis(self) -> int | None:
        """The axis of channels; None where both are scalars."""
        return self.factor.axis if self.factor.axis is not None else self.offset.axis


class ChannelAlgebra:
    """Affine forms over the parameters of one program."""

    def __init__(self, program: Program):
        self._program = program
        samples = np.random.default_rng(0).uniform(0.5, 2.0, (program.num_leaves, _SAMPLES))
        self._values: dict[int, ChannelValue] = {}
        for leaf in range(program.num_leaves):
            shape = program.avals[leaf].shape
            wide = [0] if len(shape) == 1 else [i for i, size in enumerate(shape) if size > 1]
            if len(wide) <= 1:
                axis = wide[0] if wide else None
                self._values[leaf] = ChannelValue(samples[leaf], frozenset({leaf}), axis)
        for op in program.ops:
            if len(op.outputs) == 1 and op.outputs[0] in program.parameter_only:
                value = self._computed(op)
                if value is not None:
                    self._values[op.outputs[0]] = value

    def value(self, operand: Operand) -> ChannelValue | None:
        """An operand as one number per channel, None if it is no such thing."""
        if not isinstance(operand, Constant):
            return self._values.get(operand)
        try:
            return ChannelValue(np.full(_SAMPLES, scalar(operand.value)), frozenset(), None)
        except NotElementwise:
            return None

    def extend(self, op: Op, form: Affine) -> Affine | None:
        """The affine form of an operation's result from that of its one operand that depends on x.

        None where the result is not affine per channel in that operand.
        """
        data = self._program.data_inputs(op)
        if len(data) != 1 or len(op.outputs) != 1:
            return None
        chain = (*form.chain, op.index)
        if op.name in CASTS:
            floating = jnp.issubdtype(self._program.avals[op.outputs[0]].dtype, jnp.floating)
            return dataclasses.replace(form, chain=chain) if floating else None
        if op.name == "neg":
            factor = dataclasses.replace(form.factor, samples=-form.factor.samples)
            offset = dataclasses.replace(form.offset, samples=-form.offset.samples)
            return Affine(form.base, chain, factor, offset)
        if op.name not in ("add", "add_any", "sub", "mul", "div") or len(op.inputs) != 2:
            return None
        left = op.inputs[0] == data[0]
        other = self.value(op.inputs[1 if left else 0])
        if other is None or (op.name == "div" and not left):
            return None
        factor, offset = form.factor, form.offset
        if op.name in ("mul", "div"):
            factor = _combine(op, [factor, other])
            offset = _combine(op, [offset, other])
        else:
            offset = _combine(op, [offset, other] if left else [other, offset])
            if op.name == "sub" and not left:
                factor = dataclasses.replace(factor, samples=-factor.samples)
        if factor is None or offset is None:
            return None
        if None not in (factor.axis, offset.axis) and factor.axis != offset.axis:
            return None
        return Affine(form.base, chain, factor, offset)

    def match(self, form: Affine) -> Roles | None:
        """The roles of the leaves if the affine form is a BatchNorm, else None."""
        for var in form.factor.leaves:
            others = form.factor.leaves - {var}
            if len(others) > 1:
                return None
            scale = next(iter(others), None)
            with np.errstate(all="ignore"):
                root = self._samples(scale, 1.0) / form.factor.samples
                epsilon = root**2 - self._samples(var, 0.0)
            if np.all(root > 0) and np.ptp(epsilon) < _TOLERANCE and epsilon[0] > -_TOLERANCE:
                return self._match_offset(form, var, scale, max(float(np.median(epsilon)), 0.0))
        return None

    def _match_offset(self, form: Affine, var: int, scale: int | None, epsilon: float) -> Roles | None:
        rest = form.offset.leaves - form.factor.leaves
        for mean in sorted(rest):
            others = rest - {mean}
            if len(others) > 1:
                return None
            bias = next(iter(others), None)
            expected = self._samples(bias, 0.0) - self._samples(mean, 0.0) * form.factor.samples
            if np.allclose(form.offset.samples, expected, rtol=0, atol=_TOLERANCE):
                roles = Roles(mean, var, scale, bias, _as_written(epsilon, self._epsilon_type(var)))
                return roles if self._same_size(roles) else None
        return None

    def _epsilon_type(self, var: int) -> jnp.dtype:
        """The type in which epsilon is added to the variance."""
        program = self._program
        sums = (op.outputs[0] for op in program.ops if op.name in ("add", "add_any"))
        own = [value for value in sums if program.leaves_behind.get(value) == {var}]
        types = [program.avals[value].dtype for value in own]
        return min(types, key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype(jnp.float32))

    def _same_size(self, roles: Roles) -> bool:
        leaves = [leaf for leaf in (roles.mean, roles.var, roles.scale, roles.bias) if leaf is not None]
        return len({math.prod(self._program.avals[leaf].shape) for leaf in leaves}) == 1

    def _samples(self, leaf: int | None, default: float) -> np.ndarray:
        return np.full(_SAMPLES, default) if leaf is None else self._values[leaf].samples

    def _computed(self, op: Op) -> ChannelValue | None:
        operands = [self.value(i) for i in op.inputs]
        if not all(operands):
            return None
        if op.name in LAYOUT - {"rev"} and operands[0].axis is not None:
            return _moved(op, operands[0], self._program.avals[op.value_inputs[0]].shape)
        return _combine(op, operands)


def computed_statistics(program: Program) -> list[int]:
    """Statistics that are computed from a leaf of their shape and from single numbers, in order.

    Such are moving averages that start at zero, divided by `1 - decay ** steps`: where leaves hold the quotients, the
    BatchNorm is one of leaves alone.
    """

    def parts(value: int) -> tuple[frozenset[int], frozenset[int]]:
        leaves = program.leaves_behind.get(value, frozenset())
        single = frozenset(leaf for leaf in leaves if math.prod(program.avals[leaf].shape) == 1)
        return leaves - single, single

    roots = [parts(op.outputs[0]) for op in program.ops if op.name in ("sqrt", "rsqrt", "pow")]
    numbers = frozenset().union(*(single for arrays, single in roots if len(arrays) == 1))
    found = []
    for op in program.ops:
        arrays, single = parts(op.outputs[0])
        if len(arrays) != 1 or not single or not single <= numbers or not is_elementwise(op):
            continue
        (leaf,) = arrays
        # The first such value, not what is computed from it.
        mixes = not any(all(parts(value)) for value in op.value_inputs)
        if mixes and program.avals[op.outputs[0]].shape == program.avals[leaf].shape:
            found.append(op.outputs[0])
    return found


def _as_written(epsilon: float, dtype: jnp.dtype) -> float:
    """Epsilon as its author wrote it: the program has it as rounded to the type."""
    epsilon = float(f"{round(epsilon, 13):.7g}")  # as in float32
    if jnp.finfo(dtype).bits >= 32:
        return epsilon
    candidates = (float(f"{epsilon:.{digits}e}") for digits in range(7))
    return next((c for c in candidates if np.asarray(c, dtype) == np.asarray(epsilon, dtype)), epsilon)


def _combine(op: Op, operands: list[ChannelValue]) -> ChannelValue | None:
    """An elementwise operation on channel values; None if it is another, or they run along different axes."""
    axes = {operand.axis for operand in operands} - {None}
    if len(axes) > 1:
        return None
    try:
        samples = evaluate(op.name, op.params, [operand.samples for operand in operands], channelwise=True)
    except (NotElementwise, TypeError, ValueError):
        return None
    leaves = frozenset().union(*(operand.leaves for operand in operands))
    return ChannelValue(np.broadcast_to(samples, (_SAMPLES,)), leaves, next(iter(axes), None))


def _moved(op: Op, operand: ChannelValue, shape: Shape) -> ChannelValue | None:
    """A channel value after a layout operation; None if that splits its channels."""
    labels = move_labels(op, one_label(len(shape), operand.axis), shape)
    axes = [i for i, label in enumerate(labels) if label]
    if len(axes) > 1:
        return None
    # Where there is one channel, a reshape forgets its axis.
    return dataclasses.replace(operand, axis=axes[0] if axes else None)
