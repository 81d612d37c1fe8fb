"""Better codes than the nearest ones, on grids that are fixed already.

Every rounding takes the float variables and the quantized ones of `quantize_params`, whose kernels have their scales,
zero points and bits, and returns quantized variables that differ in the codes alone:

    squant   from the weights alone: errors of a kernel's and a channel's weights cancel
    gptq     from images: errors of later weights make up for those of earlier ones

Both see a layer as a plain matrix product, whatever its kind and the layout of its kernel (`dfq_jax.matrix_form`).
"""

from dfq_jax.rounding.gptq import GPTQConfig, gptq
from dfq_jax.rounding.squant import squant, squant_codes

__all__ = ["GPTQConfig", "gptq", "squant", "squant_codes"]
