"""Images from the network itself.

What is asked of them (`objective`), where they come from (`source`: their pixels, a `pyramid`, waves (`fourier`) or a
`generator`), how they change from step to step (`augment`), one step of the optimizer (`step`), the loop around it
(`loop`), a second pass for one quantized network (`refine`), and how far any images are from the network's statistics
(`statistics`).
"""

from dfq_jax.synthesis.config import DGH, GENIE, SOURCES, SynthesisConfig
from dfq_jax.synthesis.loop import Synthesis, SynthesisError, synthesize, synthesize_sets
from dfq_jax.synthesis.refine import RefineConfig, refine
from dfq_jax.synthesis.statistics import StatisticErrors, statistic_errors
from dfq_jax.synthesis.step import advance_batch, batch_images, init_batch

__all__ = [
    "DGH",
    "GENIE",
    "SOURCES",
    "RefineConfig",
    "StatisticErrors",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "advance_batch",
    "batch_images",
    "init_batch",
    "refine",
    "statistic_errors",
    "synthesize",
    "synthesize_sets",
]
