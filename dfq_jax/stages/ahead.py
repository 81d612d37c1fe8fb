"""Compiling what a stage will run, by the name of its function, while the caller does something else.

Each takes the arguments of that function; for quantized variables shapes are enough. See `base.compiling_ahead`.
"""

from dfq_jax.stages.analytic import compile_analytic_comparison as analytic_comparison
from dfq_jax.stages.analytic import compile_analytic_correction as analytic_correction
from dfq_jax.stages.batch_norm import compile_adaptation as adapt_batch_norm
from dfq_jax.stages.bias_correction import compile_bias_correction as correct_bias
from dfq_jax.stages.comparison import compile_comparison as compare
from dfq_jax.stages.rounding import compile_reconstruction as reconstruct

__all__ = ["adapt_batch_norm", "analytic_comparison", "analytic_correction", "compare", "correct_bias", "reconstruct"]
