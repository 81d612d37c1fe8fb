"""The settings of block reconstruction."""

from __future__ import annotations

import dataclasses

from dfq_jax.base import check_field, check_fields, check_precision, is_non_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How blocks are reconstructed.

    The defaults are for short budgets: at an equal number of images seen, many steps on few images, with a large
    rounding rate, gave the lowest error on synthetic images held out (ResNet-20, W2A4), and half of the steps at twice
    the rates gave the same.

    Attributes:
      steps: optimizer steps for each block.
      batch_size: images in a step.
      drop: probability that an element of the block's input and of its quantized activations stays in float (QDrop).
      rounding_rate: Adam's learning rate of the rounding variables, constant.
      scale_rate: that of weight scales, relative to the scale, cosine to zero.
      step_rate: that of activation steps, relative to the step, cosine to zero.
      bias_rate: that of the biases behind layers (of the BatchNorm, where there is one), relative to their size,
        cosine to zero; 0 keeps them.
      regularizer: weight of the term that drives weights to codes.
      beta: its exponent, at first and in the end.
      warm_up: share of the steps before it begins.
      prediction_weight: of the prediction difference (PD-Quant, arXiv 2212.07048): the divergence of the class
        probabilities that the float rest of the network makes of the block's output, times the squared temperature; 0
        for none. It costs the rest of the network in each step, and equal blocks no longer share their compilation.
      temperature: of those probabilities.
      trust: where rounding starts: 0 from the float weight between its two codes, 1 from the code that it has.
      min_layers: neighboring blocks are joined until each has so many layers.
      flip: learn from the images' mirror images, too: twice the memory of a block's inputs and outputs, no more time.
      held_out: share of the images kept for deciding whether what was learned is better.
      chunk: steps in one compiled call, the last of them what is left; 0 for the measured default of the backend.
      precision: of float32 products while a block learns: "default" (fast on GPU and TPU), "high" or "highest"; None
        for JAX's own setting.
    """

    steps: int = 1000
    batch_size: int = 8
    drop: float = 0.5
    rounding_rate: float = 0.1
    scale_rate: float = 2e-3
    step_rate: float = 2e-3
    bias_rate: float = 2e-2
    regularizer: float = 0.03
    beta: tuple[float, float] = (20.0, 2.0)
    warm_up: float = 0.2
    prediction_weight: float = 0.0
    temperature: float = 4.0
    trust: float = 0.0
    min_layers: int = 1
    flip: bool = True
    held_out: float = 0.125
    chunk: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if isinstance(self.beta, list):  # as JSON has it
            object.__setattr__(self, "beta", tuple(self.beta))
        check_fields(self, "an integer of at least 1", "steps", "batch_size", "min_layers")
        check_fields(self, "an integer of at least 0", "chunk")
        rates = (name for name in vars(self) if name.endswith("_rate"))
        check_fields(self, "a finite number of at least 0", *rates, "regularizer", "prediction_weight")
        check_fields(self, "a positive number", "temperature")
        check_fields(self, "a number from 0 to 1", "drop", "warm_up", "trust")
        check_fields(self, "a number above 0 and below 1", "held_out")
        check_fields(self, "True or False", "flip")
        check_field(
            "beta",
            self.beta,
            "two positive numbers",
            lambda v: type(v) is tuple and len(v) == 2 and all(is_non_negative(b) and b > 0 for b in v),
        )
