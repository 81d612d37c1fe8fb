"""The methods, one a file: pure functions of a graph, variables and images that give ranges or better variables."""

from dfq_jax.stages import ahead
from dfq_jax.stages.allocation import Allocation, allocate, allocator
from dfq_jax.stages.analytic import analytic_comparison, analytic_correction, analytic_summaries, gptq_from_noise
from dfq_jax.stages.batch_norm import BatchNormConfig, adapt_batch_norm, batch_norm_moments
from dfq_jax.stages.bias_correction import correct_bias
from dfq_jax.stages.budget import TARGETS, Budget
from dfq_jax.stages.comparison import Comparison, apply_float, apply_jitted, compare, comparer, sqnr
from dfq_jax.stages.convention import Convention, Ranges, convention_from, quantize_params, with_ranges
from dfq_jax.stages.equalization import absorb_high_bias, equalize
from dfq_jax.stages.finetuning import FinetuneConfig, Finetuning, finetune
from dfq_jax.stages.folding import fold_batch_norm
from dfq_jax.stages.layer_comparison import LayerComparison, LayerError, compare_layers
from dfq_jax.stages.limits import Choices, choices_within
from dfq_jax.stages.pairs import find_pairs
from dfq_jax.stages.range_search import RangeSearch, RangeSearchConfig, candidate_ranges, search_ranges
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator, estimate_ranges, summarize
from dfq_jax.stages.rounding import GPTQConfig, ReconstructionConfig, gptq, reconstruct, squant
from dfq_jax.stages.rules import FLOAT_BITS, LayerRule, kind_of
from dfq_jax.stages.sensitivity import Sensitivity, check_widths, enough_images, sensitivity
from dfq_jax.stages.stretching import find_stretchable, stretch_channels

__all__ = [
    "ESTIMATORS",
    "FLOAT_BITS",
    "TARGETS",
    "Allocation",
    "BatchNormConfig",
    "Budget",
    "Choices",
    "Comparison",
    "Convention",
    "FinetuneConfig",
    "Finetuning",
    "GPTQConfig",
    "LayerComparison",
    "LayerError",
    "LayerRule",
    "RangeSearch",
    "RangeSearchConfig",
    "Ranges",
    "ReconstructionConfig",
    "Sensitivity",
    "absorb_high_bias",
    "adapt_batch_norm",
    "ahead",
    "allocate",
    "allocator",
    "analytic_comparison",
    "analytic_correction",
    "analytic_summaries",
    "apply_estimator",
    "apply_float",
    "apply_jitted",
    "batch_norm_moments",
    "candidate_ranges",
    "check_widths",
    "choices_within",
    "compare",
    "compare_layers",
    "comparer",
    "convention_from",
    "correct_bias",
    "enough_images",
    "equalize",
    "estimate_ranges",
    "find_pairs",
    "find_stretchable",
    "finetune",
    "fold_batch_norm",
    "gptq",
    "gptq_from_noise",
    "kind_of",
    "quantize_params",
    "reconstruct",
    "search_ranges",
    "sensitivity",
    "sqnr",
    "squant",
    "stretch_channels",
    "summarize",
    "with_ranges",
]
