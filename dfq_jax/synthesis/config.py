"""The settings of image synthesis."""

from __future__ import annotations

import dataclasses
import math

STATISTICS = ("batch", "image", "set")
OPTIMIZERS = ("adam", "radam", "sgd")
SCHEDULES = ("cosine", "constant", "exponential")
WEIGHTINGS = ("uniform", "first", "deep", "shallow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How images are made.

    Attributes:
      num_images: images in all.
      batch_size: images optimized together; statistics are taken over them.
      steps: optimizer steps for each batch.
      optimizer: "adam", "radam" or "sgd" (momentum 0.9); `synthesize` also takes any optax transformation instead.
      learning_rate: of the pixels, in units of the preprocessed image (standard deviation about 1).
      schedule: of the learning rate: "cosine" to zero, "constant", or "exponential" (to 5 %).
      statistics: what is matched: "batch" statistics, those of each "image" (ZeroQ), or of the whole "set" (DGH),
        whose batches take turns after each chunk.
      mean_weight, std_weight: of the two BatchNorm terms.
      layer_weighting: "uniform"; "first" (first BatchNorm tenfold); "deep" or "shallow" (from 0.2 to 1 with depth, or
        the reverse).
      input_weight: of the term that keeps each image at mean 0 and standard deviation 1.
      class_weight: of cross-entropy to balanced random labels.
      response_weight: of the AAC response term.
      response_start: share of the steps after which the response term begins.
      response_quantile: the response level is this quantile of the margins that the BN-matched images show at that
        point, each for the class it looks most like.
      total_variation_weight: of total variation.
      flip: mirror each batch at random at each step.
      jitter: shift images (cyclically) by up to so many pixels at each step.
      crop: reflect-pad by so many pixels and crop at random at each step.
      low_pass: cut-off of a Gaussian low-pass filter on finished images, in cycles per image (SynQ, D0); 0 for none.
      patience: stop a batch when its loss has not improved by `min_improvement` (relative) in so many steps; 0 never.
      min_improvement: see `patience`.
      chunk: optimizer steps in one compiled call; 0 for the measured default of the backend.
    """

    num_images: int = 128
    batch_size: int = 64
    steps: int = 300
    optimizer: str = "adam"
    learning_rate: float = 0.3
    schedule: str = "cosine"
    statistics: str = "batch"
    mean_weight: float = 1.0
    std_weight: float = 1.0
    layer_weighting: str = "uniform"
    input_weight: float = 0.1
    class_weight: float = 0.0
    response_weight: float = 0.0
    response_start: float = 0.5
    response_quantile: float = 0.9
    total_variation_weight: float = 0.0
    flip: bool = False
    jitter: int = 0
    crop: int = 0
    low_pass: float = 0.0
    patience: int = 0
    min_improvement: float = 1e-3
    chunk: int = 0

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "steps"):
            _check(name, getattr(self, name), "an integer of at least 1", lambda v: type(v) is int and v >= 1)
        for name in ("jitter", "crop", "patience", "chunk"):
            _check(name, getattr(self, name), "an integer of at least 0", lambda v: type(v) is int and v >= 0)
        for name in (
            "mean_weight",
            "std_weight",
            "input_weight",
            "class_weight",
            "response_weight",
            "total_variation_weight",
            "low_pass",
            "min_improvement",
        ):
            _check(name, getattr(self, name), "a finite number of at least 0", _non_negative)
        _check("learning_rate", self.learning_rate, "a positive number", lambda v: _non_negative(v) and v > 0)
        for name in ("response_start", "response_quantile"):
            _check(name, getattr(self, name), "a number from 0 to 1", lambda v: _non_negative(v) and v <= 1)
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("statistics", STATISTICS),
            ("layer_weighting", WEIGHTINGS),
        ):
            _check(name, getattr(self, name), f"one of {choices}", lambda v, c=choices: v in c)

    @property
    def uses_classes(self) -> bool:
        return self.class_weight > 0 or self.response_weight > 0

    @property
    def num_batches(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def layer_weights(self, layers: int) -> list[float]:
        """The weight of each BatchNorm's term, in order of execution."""
        if self.layer_weighting == "first":
            return [10.0] + [1.0] * (layers - 1)
        ramp = [0.2 + 0.8 * i / max(layers - 1, 1) for i in range(layers)]
        return {"uniform": [1.0] * layers, "deep": ramp, "shallow": ramp[::-1]}[self.layer_weighting]


def _non_negative(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check(name: str, value: object, wanted: str, ok: object) -> None:
    if not ok(value):
        raise ValueError(f"{name}: expected {wanted}, found {value!r}.")
