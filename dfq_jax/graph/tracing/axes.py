"""The axes of convolutions and matrix products."""

from __future__ import annotations

from typing import NamedTuple

from dfq_jax.graph.tracing.program import Op


class Axes(NamedTuple):
    """The axes of one operand of a product, by what becomes of them.

    Attributes:
      batch: paired with axes of the other operand, and in the result: a matrix product for each index.
      free: in the result. Output channels of a convolution's kernel; images and positions of its input.
      summed: not in the result. Of a convolution's kernel the input channels of a group come first, then the window.
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    summed: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, those that the result has first, in the order in which it has them."""
        return (*self.batch, *self.free, *self.summed)


def operand_axes(op: Op, side: int, rank: int) -> Axes:
    """The axes of a product's left (0) or right (1) operand, which has `rank` axes."""
    numbers = op.params["dimension_numbers"]
    if op.name == "conv_general_dilated":
        if side == 1:
            channels, *summed = numbers.rhs_spec
            return Axes((), (channels,), tuple(summed))
        images, channels, *positions = numbers.lhs_spec
        return Axes((), (images, *positions), (channels,))
    summed, batch = (tuple(axes[side]) for axes in numbers)
    return Axes(batch, tuple(a for a in range(rank) if a not in (*summed, *batch)), summed)


def result_axes(op: Op, side: int, axes: Axes, rank: int) -> tuple[int, ...]:
    """Where a result of `rank` axes has the batch and free axes of an operand."""
    if op.name == "conv_general_dilated":
        images, channels, *positions = op.params["dimension_numbers"].out_spec
        return (channels,) if side == 1 else (images, *positions)
    # The batch axes come first, then the free ones of the left and of the right operand.
    first = rank - len(axes.free) if side == 1 else len(axes.batch)
    return (*range(len(axes.batch)), *range(first, first + len(axes.free)))
