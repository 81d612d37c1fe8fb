"""The settings of fine-tuning."""

from __future__ import annotations

import dataclasses

from dfq_jax.base import check_fields, check_precision

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "step", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a quantized network is fine-tuned. The rates are chosen for short budgets, of a few hundred steps.

    Attributes:
      steps: optimizer steps.
      batch_size: images in a step.
      optimizer: "adam", or "sgd" with Nesterov momentum 0.9.
      schedule: of all rates: "cosine" to zero, "step" (a tenth after each quarter of the steps), or "constant".
      weight_rate: learning rate of the weights, in units of the quantization step: Adam moves a weight by at most about
        so much in one step, and half a unit changes a code in the middle of its cell.
      scale_rate: that of weight scales, relative to the scale; 0 keeps them.
      step_rate: that of activation steps, relative to the step (LSQ); 0 keeps them.
      affine_rate: that of BatchNorm's scale and bias and of layers' biases, relative to their size; 0 keeps them.
      trust: where weights start within the cell of their code: 0 as near the float weight as can be, 1 at the code.
      temperature: of the class probabilities that are compared.
      divergence_weight: of the divergence of the student's class probabilities from the teacher's, times the squared
        temperature; without class scores, of the squared error of the outputs.
      feature_weight: of the relative squared error of features, averaged over the outputs of blocks.
      attention_weight: of the squared distance of channel attention, averaged over the outputs of blocks.
      label_weight: of cross-entropy on the images that are easy for the teacher.
      difficulty: an image is easy where the teacher's probability of its label is above 1 - difficulty.
      flip: mirror each image with probability one half at each step.
      crop: reflect-pad by so many pixels and crop at random at each step.
      held_out: share of the images kept for choosing the best of what was seen.
      evaluations: how often along the way the network is tried on them.
      chunk: steps in one compiled call, the last of them what is left; 0 for the measured default of the backend.
      precision: of float32 products while the network learns: "default" (fast on GPU and TPU), "high", "highest"; None
        for JAX's own setting.
    """

    steps: int = 500
    batch_size: int = 16
    optimizer: str = "adam"
    schedule: str = "cosine"
    weight_rate: float = 5e-3
    scale_rate: float = 0.0
    step_rate: float = 3e-3
    affine_rate: float = 1e-2
    trust: float = 0.5
    temperature: float = 4.0
    divergence_weight: float = 1.0
    feature_weight: float = 100.0
    attention_weight: float = 100.0
    label_weight: float = 0.0
    difficulty: float = 0.5
    flip: bool = True
    crop: int = 4
    held_out: float = 0.125
    evaluations: int = 10
    chunk: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        terms = ("divergence_weight", "feature_weight", "attention_weight", "label_weight")
        check_fields(self, "an integer of at least 1", "steps", "batch_size", "evaluations")
        check_fields(self, "an integer of at least 0", "crop", "chunk")
        check_fields(
            self, "a finite number of at least 0", "weight_rate", "scale_rate", "step_rate", "affine_rate", *terms
        )
        check_fields(self, "a number from 0 to 1", "trust", "difficulty")
        check_fields(self, "a positive number", "temperature")
        check_fields(self, "True or False", "flip")
        check_fields(self, "a number above 0 and below 1", "held_out")
        check_fields(self, OPTIMIZERS, "optimizer")
        check_fields(self, SCHEDULES, "schedule")
        if not any(getattr(self, name) for name in terms):
            raise ValueError(f"{', '.join(terms)}: all are 0; nothing would be learned.")
