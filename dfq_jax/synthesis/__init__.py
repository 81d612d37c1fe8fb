"""Images from the network itself.

What is asked of them (`objective`), where they come from (`source`: their pixels, or a `generator`), how they change
from step to step (`augment`), one step of the optimizer (`step`), the loop around it (`loop`), and a second pass for
one quantized network (`refine`).
"""

from dfq_jax.synthesis.config import DGH, GENIE, SynthesisConfig
from dfq_jax.synthesis.loop import Synthesis, SynthesisError, synthesize
from dfq_jax.synthesis.refine import RefineConfig, refine
from dfq_jax.synthesis.step import advance_batch, init_batch

__all__ = [
    "DGH",
    "GENIE",
    "RefineConfig",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "advance_batch",
    "init_batch",
    "refine",
    "synthesize",
]
