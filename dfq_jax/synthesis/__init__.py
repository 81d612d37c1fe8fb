"""Images from the network itself: what is asked of them (`objective`), how they change from step to step (`augment`),
and the optimizer of their pixels (`pixels`)."""

from dfq_jax.synthesis.config import SynthesisConfig
from dfq_jax.synthesis.pixels import Progress, Synthesis, SynthesisError, advance, init_batch, synthesize

__all__ = ["Progress", "Synthesis", "SynthesisConfig", "SynthesisError", "advance", "init_batch", "synthesize"]
