"""Images from the network itself.

What is asked of them (`objective`), where they come from (`source`: their pixels, or a `generator`), how they change
from step to step (`augment`), one step of the optimizer (`step`), the loop around it (`loop`), and a second pass for
one quantized network (`refine`).
"""

from dfq_jax.synthesis.checkpoint import remove_checkpoint
from dfq_jax.synthesis.config import DGH, GENIE, SynthesisConfig
from dfq_jax.synthesis.loop import Progress, Synthesis, SynthesisError, largest_divisor, synthesize
from dfq_jax.synthesis.refine import RefineConfig, refine
from dfq_jax.synthesis.step import advance, init_batch

__all__ = [
    "DGH",
    "GENIE",
    "Progress",
    "RefineConfig",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "advance",
    "init_batch",
    "largest_divisor",
    "refine",
    "remove_checkpoint",
    "synthesize",
]
