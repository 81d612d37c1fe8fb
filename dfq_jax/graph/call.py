"""One execution of a layer, as rules see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from dfq_jax.graph.form import LayerForm
from dfq_jax.graph.tracing.structure import Layer
from dfq_jax.quantizers import QTensor


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer and its operands, handed to a rule.

    Attributes:
      form: of the layer.
      source: the tensor that the layer reads, before padding, transposition and casts, as the rule for tensors left it.
      operand: that of the product, as the program computes it.
      kernel: the leaf, an array or a `QTensor`.
    """

    form: LayerForm
    source: Any
    operand: jax.Array
    kernel: Any

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.form.layer

    def default(self) -> jax.Array:
        """What the layer computes in the program."""
        kernel = self.kernel.dequantize() if isinstance(self.kernel, QTensor) else self.kernel
        return self.form.product(self.operand, self.form.rearrange_kernel(kernel, cast=True))

    def verbatim(self) -> jax.Array:
        """The same by the program's own primitive, for who traces the layer and is to find it."""
        return self.form.primitive(self.operand, self.form.rearrange_kernel(self.kernel, cast=True))

    def reading(self, source: jax.Array) -> LayerCall:
        """The call on another value of the tensor."""
        operand = self.form.rearrange(source).astype(self.operand.dtype)
        return dataclasses.replace(self, source=source, operand=operand)
