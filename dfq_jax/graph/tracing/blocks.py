"""Cutting a network at values that every path from input to output goes through."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence

from dfq_jax.graph.tracing.program import Program
from dfq_jax.graph.tracing.structure import Block, Layer


def find_blocks(program: Program, layers: Sequence[Layer], tensors: Collection[int]) -> tuple[Block, ...]:
    """Split the program into the smallest pieces that hold layers and are joined by a single value each.

    Args:
      program: the program.
      layers: its layers, in order.
      tensors: values that layers read. Where several values could be the joint between two pieces (the steps of a
        BatchNorm, its activation, pooling), it is the last before the next piece's first layer reads that is not
        reduced yet: pooling belongs to the piece behind it, since what is pooled away tells pieces apart.
    """
    cuts = [program.input]
    joints = _joints(program)
    layer_ops = [layer.op for layer in layers]
    for before, after in itertools.pairwise(layer_ops):
        between = [joints[i] for i in range(before, after) if i in joints]
        read = [place for place, value in enumerate(between) if value in tensors]
        between = between[: read[-1] + 1] if read else between
        if between:
            # Of equals `max` takes the first: the last one here.
            cuts.append(max(reversed(between), key=lambda value: math.prod(program.avals[value].shape)))
    blocks = []
    for begin, end in zip(cuts, [*cuts[1:], None], strict=True):
        first = -1 if begin == program.input else program.producer(begin).index
        last = len(program.ops) if end is None else program.producer(end).index
        names = tuple(layer.name for layer in layers if first < layer.op <= last)
        blocks.append(Block(name=names[0], layers=names, input=begin, output=-1 if end is None else end))
    return tuple(blocks)


def merge_blocks(blocks: Sequence[Block], min_layers: int) -> tuple[Block, ...]:
    """Join neighbors, from the input on, until each piece has at least so many layers (the last may have fewer)."""
    merged: list[Block] = []
    for block in blocks:
        if merged and len(merged[-1].layers) < min_layers:
            last = merged.pop()
            block = dataclasses.replace(last, layers=last.layers + block.layers, output=block.output)
        merged.append(block)
    return tuple(merged)


def _joints(program: Program) -> dict[int, int]:
    """The indices of operations after which a single value carries all that is known of x, and that value."""
    last_use = {v: op.index for op in program.ops for v in program.data_inputs(op)}
    last_use.update(dict.fromkeys(program.output_values, len(program.ops)))
    alive = {program.input}
    joints = {}
    for op in program.ops:
        if program.data_inputs(op):
            alive.update(op.outputs)
            alive = {v for v in alive if last_use.get(v, -1) > op.index}
        if len(alive) == 1:
            (joints[op.index],) = alive
    return joints
