"""Better codes than the nearest ones.

Every rounding takes the float variables and the quantized ones of `quantize_params`, whose kernels have their scales,
zero points and bits, and returns quantized variables:

    squant        from the weights alone: errors of a kernel's and a channel's weights cancel
    gptq          from images: errors of later weights make up for those of earlier ones
    reconstruct   learned from images, block by block: each weight goes up or down as the block's result asks for;
                  scales, biases and activation steps are learned along with it

The first two see a layer as a plain matrix product, whatever its kind and the layout of its kernel
(`graph.form(layer).kernel`), and change the codes alone.
"""

from dfq_jax.stages.rounding.config import ReconstructionConfig
from dfq_jax.stages.rounding.gptq import GPTQConfig, gptq
from dfq_jax.stages.rounding.learned import compile_reconstruction, reconstruct
from dfq_jax.stages.rounding.squant import squant, squant_codes

__all__ = [
    "GPTQConfig",
    "ReconstructionConfig",
    "compile_reconstruction",
    "gptq",
    "reconstruct",
    "squant",
    "squant_codes",
]
