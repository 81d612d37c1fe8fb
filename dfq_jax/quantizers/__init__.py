"""Quantized tensors, the quantizers of a network's activations, and the ranges of weights."""

from dfq_jax.quantizers.collection import (
    QUANTIZATION,
    ActivationQuantizers,
    QuantizedVariables,
    check_quantized,
    dequantized,
    is_quantized,
    quantization,
    with_collection,
    with_quantization,
    without_quantization,
)
from dfq_jax.quantizers.packing import pack, unpack
from dfq_jax.quantizers.qtensor import (
    MAX_BITS,
    MIN_BITS,
    QTensor,
    QuantizerParams,
    bounds,
    code_limits,
    dequantize,
    fake_quant,
    int8_codes,
    int8_zero,
    params_from_range,
    quantize,
    storage_bits,
)
from dfq_jax.quantizers.trees import flatten_with_paths, is_qtensor
from dfq_jax.quantizers.weights import WEIGHT_RANGES, quantize_kernel

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "QUANTIZATION",
    "WEIGHT_RANGES",
    "ActivationQuantizers",
    "QTensor",
    "QuantizedVariables",
    "QuantizerParams",
    "bounds",
    "check_quantized",
    "code_limits",
    "dequantize",
    "dequantized",
    "fake_quant",
    "flatten_with_paths",
    "int8_codes",
    "int8_zero",
    "is_qtensor",
    "is_quantized",
    "pack",
    "params_from_range",
    "quantization",
    "quantize",
    "quantize_kernel",
    "storage_bits",
    "unpack",
    "with_collection",
    "with_quantization",
    "without_quantization",
]
