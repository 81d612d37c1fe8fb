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

from dfq_jax.adapters import as_function
from dfq_jax.analytic import analytic_correction, analytic_summaries, gptq_from_noise
from dfq_jax.artifact import ArtifactError
from dfq_jax.batch_norm import BatchNormConfig, adapt_batch_norm, batch_norm_moments, correct_bias
from dfq_jax.computed import compute_kernels
from dfq_jax.convention import Convention, quantize_params
from dfq_jax.equalization import absorb_high_bias, equalize, find_pairs
from dfq_jax.execute import apply_quantized, record_tensors, run, run_block
from dfq_jax.finetuning import FinetuneConfig, Finetuning, finetune
from dfq_jax.folding import fold_batch_norm
from dfq_jax.graph import Graph, GraphError, GraphWarning, trace
from dfq_jax.pipeline import quantize
from dfq_jax.qtensor import QTensor, QuantizerParams, dequantize, fake_quant, params_from_range
from dfq_jax.quantized import Quantized, load
from dfq_jax.ranges import ESTIMATORS, estimate_ranges, summarize
from dfq_jax.recipes import RECIPES, Recipe
from dfq_jax.report import Report
from dfq_jax.rounding import GPTQConfig, ReconstructionConfig, gptq, reconstruct, squant
from dfq_jax.synthesis import Progress, Synthesis, SynthesisConfig, SynthesisError, synthesize

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "ArtifactError",
    "BatchNormConfig",
    "Convention",
    "FinetuneConfig",
    "Finetuning",
    "GPTQConfig",
    "Graph",
    "GraphError",
    "GraphWarning",
    "Progress",
    "QTensor",
    "Quantized",
    "QuantizerParams",
    "Recipe",
    "ReconstructionConfig",
    "Report",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "absorb_high_bias",
    "adapt_batch_norm",
    "analytic_correction",
    "analytic_summaries",
    "apply_quantized",
    "as_function",
    "batch_norm_moments",
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
    "load",
    "params_from_range",
    "quantize",
    "quantize_params",
    "reconstruct",
    "record_tensors",
    "run",
    "run_block",
    "squant",
    "summarize",
    "synthesize",
    "trace",
]
