"""The table of operations: what each primitive of JAX becomes in ONNX.

An emitter takes a `Call` and gives the result as a `Value` (a list of them for several results). To add an operation,
write one in the module of its kind, under `@emits` with the primitive's name, or under `@emits_as` where primitives
differ in the ONNX operator alone. Convolutions and matrix products are in `products`.
"""

from dfq_jax.export.onnx.operations import elementwise, indexing  # noqa: F401 (they enter the table)
from dfq_jax.export.onnx.operations.layout import spread
from dfq_jax.export.onnx.operations.reductions import reduction
from dfq_jax.export.onnx.operations.table import EMITTERS, Call, Unsupported
from dfq_jax.export.onnx.operations.windows import average_pool

__all__ = ["EMITTERS", "Call", "Unsupported", "average_pool", "reduction", "spread"]
