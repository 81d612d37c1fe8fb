"""Networks that must not be quantized as traced: training mode, and layers inside loops that are not unrolled."""

from __future__ import annotations

from dfq_jax.graph.tracing.axes import operand_axes, result_axes
from dfq_jax.graph.tracing.flattening import MAX_STEPS
from dfq_jax.graph.tracing.layout import LAYOUT, follow_axis
from dfq_jax.graph.tracing.program import LAYER_PRIMITIVES, Op, Program, holds_layers, sub_jaxprs
from dfq_jax.graph.tracing.structure import GraphError

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})
_UNKNOWN = {
    "while": "how often it runs is known at run time only, or more than can be unrolled. Where the number of steps is "
    "fixed, write lax.scan, a lax.fori_loop with Python integers as bounds, or a Python loop.",
    "cond": "which of them run is known at run time only. Choose by a Python value while tracing.",
}
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})


def refuse_nested_layers(program: Program) -> None:
    """Layers that are not in the flat program cannot be found.

    Raises:
      GraphError: a loop, a branch or an operation that cannot be opened holds a convolution or matrix product.
    """
    for op in program.ops:
        if not any(holds_layers(jaxpr) for jaxpr, _ in sub_jaxprs(op.params)):
            continue
        where = op.scope or "the network"
        if op.name in _UNKNOWN:
            raise GraphError(f"layers inside a `{op.name}` at {where}: {_UNKNOWN[op.name]}")
        if op.name == "scan":
            raise GraphError(
                f"layers inside a `scan` of {op.params['length']} steps at {where}: loops are unrolled up to "
                f"{MAX_STEPS} steps (nested ones together), since every step has operations and quantizers of its "
                "own. Trace the network on a shorter input, or quantize the part outside the loop."
            )
        raise GraphError(
            f"layers inside `{op.name}` at {where}, which cannot be opened. Remove that transformation for inference."
        )


def refuse_training_mode(program: Program) -> None:
    """BatchNorm in training mode divides by the root of a statistic over the batch.

    Raises:
      GraphError: the program does.
    """
    batch_axis: dict[int, int] = {program.input: 0}
    statistics: set[int] = set()  # values computed from reductions over the batch alone
    for op in program.ops:
        data = program.data_inputs(op)
        if not data:
            continue
        if statistics.issuperset(data):
            if op.name in _ROOTS:
                raise GraphError(
                    f"BatchNorm in training mode at {op.scope or 'an unnamed place'}: it normalizes by statistics "
                    "of the batch. Trace inference mode: pass train=False, use_running_average=True, or call "
                    "module.eval()."
                )
            statistics.update(op.outputs)
            continue
        source = next((v for v in data if v in batch_axis), None)
        if source is None:
            continue
        if op.name in _REDUCTIONS and batch_axis[source] in op.params["axes"]:
            if program.avals[op.outputs[0]].shape:  # one number for everything is no statistic of a channel
                statistics.update(op.outputs)
            continue
        moved = _batch_axis_after(op, source, batch_axis[source], program)
        if moved is not None:
            batch_axis.update(dict.fromkeys(op.outputs, moved))


def _batch_axis_after(op: Op, source: int, axis: int, program: Program) -> int | None:
    """The axis of an operation's result that runs over examples, given that of an operand; None if unknown."""
    shape = program.avals[source].shape
    if op.name in LAYOUT:
        return follow_axis(op, axis, shape)
    if op.name in _REDUCTIONS:
        return axis - sum(a < axis for a in op.params["axes"])
    result = program.avals[op.outputs[0]].shape
    if op.name in LAYER_PRIMITIVES:
        side = op.inputs.index(source)
        axes = operand_axes(op, side, len(shape))
        kept = dict(zip((*axes.batch, *axes.free), result_axes(op, side, axes, len(result)), strict=True))
        return kept.get(axis)
    return axis if len(result) == len(shape) else None
