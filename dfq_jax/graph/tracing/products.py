"""Convolutions and matrix products with parameters: what can become a layer, and what cannot and why."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dfq_jax.graph.tracing.axes import operand_axes, result_axes
from dfq_jax.graph.tracing.layout import LAYOUT, Labels, move_labels
from dfq_jax.graph.tracing.program import LAYER_PRIMITIVES, Constant, Op, Program
from dfq_jax.graph.tracing.structure import Skipped
from dfq_jax.graph.tracing.views import count


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A convolution or matrix product of a value that depends on x with a rearranged leaf."""

    op: Op
    kernel_operand: int
    kernel: int  # leaf number
    kernel_chain: tuple[int, ...]
    channel_axes: tuple[int, ...]  # of the leaf
    result_axes: tuple[int, ...]  # of the result, the same channels

    @property
    def data(self) -> int:
        """The operand that is no kernel."""
        return self.op.inputs[1 - self.kernel_operand]

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.op.name == "conv_general_dilated"

    def describe(self) -> dict[str, Any]:
        """Fields of `Layer` that the operation's parameters give."""
        params = self.op.params
        if not self.is_conv:
            return {"kind": "dense", "groups": 1, "strides": (), "transposed": False}
        return {
            "kind": "conv",
            "groups": params["feature_group_count"],
            "strides": tuple(params["window_strides"]),
            "transposed": any(dilation > 1 for dilation in params["lhs_dilation"]),
        }


def count_macs(op: Op, program: Program) -> int:
    """Multiply-accumulates of a product for one example."""
    kernel = program.shape(op.inputs[1])
    result = program.avals[op.outputs[0]].shape
    each = math.prod(kernel[axis] for axis in operand_axes(op, 1, len(kernel)).summed)
    return math.prod(result) * each // program.avals[program.input].shape[0]


def find_products(program: Program, paths: Sequence[str]) -> tuple[list[Product], list[Skipped]]:
    """All products of the program, and those that stay in float."""
    products, skipped = [], []
    for op in program.ops:
        if op.name not in LAYER_PRIMITIVES or not program.data_inputs(op):
            continue
        found = _product(op, program, paths)
        if isinstance(found, str):
            name = op.scope or f"{op.name} {op.index}"
            skipped.append(Skipped(name, found, kind="product", macs=count_macs(op, program)))
        else:
            products.append(found)
    return _quantized_together(products, skipped, program, paths)


def _quantized_together(
    products: Sequence[Product], skipped: Sequence[Skipped], program: Program, paths: Sequence[str]
) -> tuple[list[Product], list[Skipped]]:
    """Slices of one leaf of the variables are stored as one: they become codes all or none."""
    products, skipped = list(products), list(skipped)
    first = 0
    for split in program.splits:
        slices = range(first, first + count(split))
        first = slices.stop
        own = [product for product in products if product.kernel in slices]
        others = set(slices) - {product.kernel for product in own}
        read = next((leaf for leaf in sorted(others) if program.readers(leaf)), None)
        if own and read is not None:
            products = [product for product in products if product not in own]
            reason = f"its kernel is stored in one leaf with {paths[read]}, which is no kernel and stays in float"
            skipped += [
                Skipped(paths[item.kernel], reason, kind="product", macs=count_macs(item.op, program)) for item in own
            ]
    return products, skipped


def _product(op: Op, program: Program, paths: Sequence[str]) -> Product | str:
    """The product, or the reason why the operation is none that can be quantized."""
    static = [i for i, operand in enumerate(op.inputs) if operand not in program.data_inputs(op)]
    if not static:
        return "both operands depend on the input (attention-like product)"
    (side,) = static
    operand = op.inputs[side]
    if isinstance(operand, Constant) or not program.leaves_behind[operand]:
        return "its kernel is a constant of the program, not a leaf of variables"
    if op.name == "conv_general_dilated" and (side == 0 or op.params["batch_group_count"] > 1):
        return "a convolution whose kernel is its left operand or batch-grouped"
    kernel = rearranged_leaf(operand, program)
    if kernel is None:
        leaves = ", ".join(sorted(paths[v] for v in program.leaves_behind[operand]))
        return (
            f"its kernel is computed from {leaves}, as in weight standardization; compute_kernels() makes it a leaf if "
            "one of these has its shape and nothing else reads that one"
        )
    path, dtype = paths[kernel.leaf], program.avals[kernel.leaf].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"its kernel {path} has type {dtype}, not a float type"
    axes = operand_axes(op, side, len(kernel.labels))
    channels = (*axes.batch, *axes.free)
    channel_axes = kernel.axes_in(channels)
    if set(channel_axes) & set(kernel.axes_in([a for a in range(len(kernel.labels)) if a not in channels])):
        return f"an axis of its kernel {path} is split into input and output channels"
    in_result = result_axes(op, side, axes, len(program.shape(op.outputs[0])))
    if not kernel.in_order(channels):
        return f"its kernel {path} is rearranged so that its output channels come in another order"
    return Product(op, side, kernel.leaf, kernel.chain, tuple(sorted(set(channel_axes))), in_result)


def computed_operands(program: Program) -> list[int]:
    """The kernels of products that are computed from leaves, and more than rearranged, in order."""
    found: dict[int, None] = {}
    for op in program.ops:
        if op.name in LAYER_PRIMITIVES and len(program.data_inputs(op)) == 1:
            for value in op.value_inputs:
                if program.leaves_behind.get(value) and rearranged_leaf(value, program) is None:
                    found[value] = None
    return list(found)


@dataclasses.dataclass(frozen=True)
class RearrangedLeaf:
    """A value that has the elements of a leaf in another layout."""

    leaf: int
    chain: tuple[int, ...]  # the operations between
    labels: Labels  # for each axis of the value, the axes of the leaf in it
    permuted: frozenset[int]  # axes of the leaf whose elements are in another order

    def axes_in(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of the leaf in the given axes of the value."""
        return tuple(label for axis in axes for label in self.labels[axis])

    def in_order(self, axes: Sequence[int]) -> bool:
        """Whether the given axes of the value, flattened, have the leaf's axes in the leaf's own order."""
        own = self.axes_in(axes)
        return list(own) == sorted(own) and self.permuted.isdisjoint(own)


def rearranged_leaf(value: int, program: Program, *, repeated: bool = False) -> RearrangedLeaf | None:
    """The leaf that a value is a rearrangement of; None if it is computed otherwise.

    Args:
      value: its number.
      program: the program.
      repeated: whether the value may have the leaf's elements several times, along axes of its own.
    """
    chain: list[Op] = []
    while value >= program.num_leaves:
        op = program.producer(value)
        if op.name not in LAYOUT or len(op.value_inputs) != 1:
            return None
        chain.insert(0, op)
        value = op.value_inputs[0]
    shape = program.avals[value].shape
    labels: Labels = tuple((axis,) for axis in range(len(shape)))
    permuted: set[int] = set()
    for op in chain:
        if op.name == "rev":
            permuted.update(label for axis in op.params["dimensions"] for label in labels[axis])
        if op.name == "transpose":  # parts of a split axis may change places, which labels do not show
            uses = Counter(label for axis in labels for label in axis)
            permuted.update(label for label, count in uses.items() if count > 1)
        labels = move_labels(op, labels, shape)
        new_shape = program.avals[op.outputs[0]].shape
        if math.prod(new_shape) != math.prod(shape) and not repeated:
            return None
        shape = new_shape
    return RearrangedLeaf(value, tuple(op.index for op in chain), labels, frozenset(permuted))
