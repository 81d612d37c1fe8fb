"""Data-free quantization of Flax networks: a trained network in, a quantized network out, no images needed.

    q = dfq_jax.quantize(model, variables, input_shape=(1, 224, 224, 3))
    outputs = q(x)

Each step is a pure function of pytrees and can be used alone:

    graph = trace(apply_fn, variables, (1, 224, 224, 3))
    images = synthesize(graph, variables, key).images
    ranges = estimate_ranges(graph, variables, images, convention)
    qvariables = quantize_params(graph, variables, ranges, convention)
    qvariables = gptq(graph, variables, qvariables, images)
    qvariables = adapt_batch_norm(graph, variables, qvariables, images)
    outputs = apply_quantized(graph, qvariables, x)
"""

from dfq_jax.base import Progress
from dfq_jax.export import ArtifactError
from dfq_jax.graph import (
    Graph,
    GraphError,
    GraphWarning,
    apply_quantized,
    as_function,
    compute_kernels,
    record_tensors,
    run,
    run_block,
    trace,
)
from dfq_jax.quantizers import QTensor, QuantizerParams, dequantize, fake_quant, params_from_range
from dfq_jax.recipes import RECIPES, ROUNDINGS, Quantized, Recipe, Target, load, progress_bar, quantize
from dfq_jax.report import Report, image_grid
from dfq_jax.stages import (
    ESTIMATORS,
    Allocation,
    BatchNormConfig,
    Budget,
    Convention,
    FinetuneConfig,
    Finetuning,
    GPTQConfig,
    LayerComparison,
    LayerRule,
    ReconstructionConfig,
    Sensitivity,
    absorb_high_bias,
    adapt_batch_norm,
    allocate,
    analytic_correction,
    analytic_summaries,
    batch_norm_moments,
    compare_layers,
    correct_bias,
    equalize,
    estimate_ranges,
    find_pairs,
    finetune,
    fold_batch_norm,
    gptq,
    gptq_from_noise,
    quantize_params,
    reconstruct,
    sensitivity,
    squant,
    stretch_channels,
    summarize,
)
from dfq_jax.synthesis import StatisticErrors, Synthesis, SynthesisConfig, SynthesisError, statistic_errors, synthesize

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "ROUNDINGS",
    "Allocation",
    "ArtifactError",
    "BatchNormConfig",
    "Budget",
    "Convention",
    "FinetuneConfig",
    "Finetuning",
    "GPTQConfig",
    "Graph",
    "GraphError",
    "GraphWarning",
    "LayerComparison",
    "LayerRule",
    "Progress",
    "QTensor",
    "Quantized",
    "QuantizerParams",
    "Recipe",
    "ReconstructionConfig",
    "Report",
    "Sensitivity",
    "StatisticErrors",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "Target",
    "absorb_high_bias",
    "adapt_batch_norm",
    "allocate",
    "analytic_correction",
    "analytic_summaries",
    "apply_quantized",
    "as_function",
    "batch_norm_moments",
    "compare_layers",
    "compute_kernels",
    "correct_bias",
    "dequantize",
    "equalize",
    "estimate_ranges",
    "fake_quant",
    "find_pairs",
    "finetune",
    "fold_batch_norm",
    "gptq",
    "gptq_from_noise",
    "image_grid",
    "load",
    "params_from_range",
    "progress_bar",
    "quantize",
    "quantize_params",
    "reconstruct",
    "record_tensors",
    "run",
    "run_block",
    "sensitivity",
    "squant",
    "statistic_errors",
    "stretch_channels",
    "summarize",
    "synthesize",
    "trace",
]
