"""Quantized tensors, the quantizers of a network's activations, and the ranges of weights."""

from dfq_jax.quantizers.collection import (
    OPERANDS,
    QUANTIZATION,
    TENSORS,
    QuantizedVariables,
    dequantized,
    is_quantized,
    quantization,
    with_quantization,
    without_quantization,
)
from dfq_jax.quantizers.qtensor import (
    MAX_BITS,
    MIN_BITS,
    QTensor,
    QuantizerParams,
    bounds,
    dequantize,
    fake_quant,
    pack,
    params_from_range,
    quantize,
    storage_bits,
    unpack,
)
from dfq_jax.quantizers.trees import flatten_with_paths, is_qtensor
from dfq_jax.quantizers.weights import WEIGHT_RANGES, quantize_kernel

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "OPERANDS",
    "QUANTIZATION",
    "TENSORS",
    "WEIGHT_RANGES",
    "QTensor",
    "QuantizedVariables",
    "QuantizerParams",
    "bounds",
    "dequantize",
    "dequantized",
    "fake_quant",
    "flatten_with_paths",
    "is_qtensor",
    "is_quantized",
    "pack",
    "params_from_range",
    "quantization",
    "quantize",
    "quantize_kernel",
    "storage_bits",
    "unpack",
    "with_quantization",
    "without_quantization",
]
