"""A plugin for pytest: float32 products of default precision as an NVIDIA GPU computes them, `pytest -p tests.tf32`.

Operands are rounded to TF32, that is to 10 bits of mantissa, unless a product asks for the highest precision. It
reaches into JAX's tables of lowerings, since nothing public changes how a primitive is compiled.
"""

import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

MANTISSA_BITS = 10


def round_default_products(primitive):
    """Lower a primitive of default precision to the same one of rounded operands, on CPU."""
    entry = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]
    original = getattr(entry, "rule", entry)

    def lowering(ctx, lhs, rhs, **params):
        precision = params.get("precision")
        precisions = precision if isinstance(precision, tuple) else (precision,)
        exact = all(p == lax.Precision.HIGHEST for p in precisions)
        if exact or any(aval.dtype != jnp.float32 for aval in ctx.avals_in):
            return original(ctx, lhs, rhs, **params)

        def rounded(*operands):
            operands = (lax.reduce_precision(v, exponent_bits=8, mantissa_bits=MANTISSA_BITS) for v in operands)
            return primitive.bind(*operands, **{**params, "precision": (lax.Precision.HIGHEST,) * 2})

        return mlir.lower_fun(rounded, multiple_results=False)(ctx, lhs, rhs)

    mlir.register_lowering(primitive, lowering, platform="cpu")


round_default_products(lax.dot_general_p)
round_default_products(lax.conv_general_dilated_p)
