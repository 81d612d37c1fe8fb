"""What a traced network consists of: layers, BatchNorms, tensors and blocks, as records without arrays.

Fields that are places in the program (value numbers and indices of operations) differ between input shapes and are
left out of comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dfq_jax.graph.tracing.batch_norm_pattern import Roles


class GraphError(ValueError):
    """The network cannot be traced or used this way; the message says why and what to try."""


class GraphWarning(UserWarning):
    """The network can be used this way, but hardly as it was meant; the message says why and what to try."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or a matrix product whose one operand is a leaf of the variables."""

    name: str
    kind: str  # "conv" or "dense"
    kernel: str  # path of the kernel leaf
    bias: str | None
    kernel_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]  # output-channel axes of the kernel leaf
    groups: int
    strides: tuple[int, ...]
    transposed: bool
    tensor: str  # name of the quantized tensor it reads
    batch_norm: str | None  # the one that directly follows, over its channels; nothing else reads the layer's result
    activation: str  # after the BatchNorm if there is one: "relu", "relu6", ..., "none"
    consumers: tuple[str, ...]  # layers that read its result, "add" for a residual sum, "output"
    macs: int  # multiply-accumulates for one example
    op: int = dataclasses.field(compare=False)
    kernel_index: int = dataclasses.field(compare=False)
    bias_index: int | None = dataclasses.field(compare=False)
    kernel_operand: int = dataclasses.field(compare=False)  # 0 or 1: which operand of the primitive
    kernel_chain: tuple[int, ...] = dataclasses.field(compare=False)  # layout ops from the leaf to the operand
    input_chain: tuple[int, ...] = dataclasses.field(compare=False)  # layout ops from the tensor to the operand
    output: int = dataclasses.field(compare=False)  # the result, bias included
    end: int = dataclasses.field(compare=False)  # the result past its BatchNorm and activation

    @property
    def depthwise(self) -> bool:
        """Whether each channel is a group of its own."""
        return self.groups > 1 and self.groups == math.prod(self.kernel_shape[a] for a in self.channel_axes)

    def check_scale(self, shape: tuple[int, ...]) -> None:
        """Refuse a scale (or zero point) that is no vector over the output channels.

        Args:
          shape: of the scale, in the rank of the kernel leaf.

        Raises:
          GraphError: it varies along an axis that the layer sums over.
        """
        summed = [a for a, size in enumerate(shape) if size != 1 and a not in self.channel_axes]
        if summed or len(shape) != len(self.kernel_shape):
            raise GraphError(
                f"kernel {self.kernel!r}: layer {self.name!r} has output channels along axes {self.channel_axes} of "
                f"{self.kernel_shape}, so it takes no scale of shape {tuple(shape)}. Quantize the float network again: "
                "quantize_params gives each kernel a scale that is right for all layers that read it."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """An inference-mode BatchNorm: y = (x - mean) scale / sqrt(var + epsilon) + bias."""

    name: str
    mean: str
    var: str
    scale: str | None
    bias: str | None
    epsilon: float
    channels: int
    layer: str | None  # the layer whose channels it normalizes as the only reader; that layer's `batch_norm` is this
    activation: str
    channel_axis: int = dataclasses.field(compare=False)
    indices: Roles = dataclasses.field(compare=False)  # leaf numbers
    input: int = dataclasses.field(compare=False)
    output: int = dataclasses.field(compare=False)
    chain: tuple[int, ...] = dataclasses.field(compare=False)  # its operations; nothing else reads their results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that layers read, quantized once for all its readers; named after its first layer."""

    name: str
    layers: tuple[str, ...]
    activation: str  # what produced it: "relu", ..., "none", "input"
    batch_norm: str | None  # the BatchNorm it comes straight from, through `activation`
    shared: bool  # whether something else (a residual sum) reads it too
    value: int = dataclasses.field(compare=False)
    shape: tuple[Any, ...] = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A piece between two values that every path from input to output goes through."""

    name: str
    layers: tuple[str, ...]
    input: int = dataclasses.field(compare=False)
    output: int = dataclasses.field(compare=False)  # -1 for the network's outputs


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An operation or a parameter that stays in float, and why."""

    name: str
    reason: str
    # "product", "norm" (what looks like a BatchNorm but was not found to be one), or "parameter".
    kind: str = dataclasses.field(default="parameter", compare=False)
    macs: int = dataclasses.field(default=0, compare=False)  # multiply-accumulates of a product, for one example
