"""Images from the network itself: what is asked of them (`objective`), where they come from (`source`: their pixels, or
a `generator`), how they change from step to step (`augment`), one step of the optimizer (`step`) and the loop around it
(`loop`)."""

from dfq_jax.synthesis.config import DGH, GENIE, SynthesisConfig
from dfq_jax.synthesis.loop import Progress, Synthesis, SynthesisError, synthesize
from dfq_jax.synthesis.step import advance, init_batch

__all__ = [
    "DGH",
    "GENIE",
    "Progress",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "advance",
    "init_batch",
    "synthesize",
]
