"""The settings of image synthesis."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dfq_jax.base import check_field, check_fields, check_precision, is_non_negative

SOURCES = ("pixels", "pyramid", "fourier", "generator")
STATISTICS = ("batch", "image", "set")
OPTIMIZERS = ("adam", "radam", "sgd")
SCHEDULES = ("cosine", "constant", "exponential", "plateau")
NORMALIZATIONS = ("none", "layer", "channel")
WEIGHTINGS = ("uniform", "first", "deep", "shallow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How images are made.

    Attributes:
      num_images: images in all.
      batch_size: images optimized together; statistics are taken over them.
      source: what is optimized: "pixels"; "pyramid", values at every resolution, or "fourier", amplitudes of waves,
        which add up to images (both "pixels" for inputs without spatial axes); or latents and a small "generator" of
        each batch (GENIE-D).
      spectrum_exponent: amplitudes of pyramid and waves fall with frequency to this power (in natural images about 1).
      steps: optimizer steps for each batch.
      optimizer: "adam", "radam" or "sgd" (momentum 0.9); `synthesize` also takes any optax transformation instead.
      learning_rate: of the pixels, in units of the preprocessed image (standard deviation about 1); of levels and
        waves, in units of their deviation at the start; or of the latents.
      b2: decay of the second moment in Adam and RAdam, a step.
      schedule: of the learning rate: "cosine" to zero, "constant", "exponential" (to 5 %), or "plateau" (a tenth
        whenever the loss has not improved for 100 steps, down to 1e-4).
      generator_learning_rate: of the generator's weights; 5 % less after every 100 steps.
      statistics: what is matched: "batch" statistics, those of each "image" (ZeroQ), or of the whole "set" (DGH),
        whose batches take turns after each chunk.
      mean_weight, std_weight: of the two BatchNorm terms.
      normalization: of the squared errors in the BatchNorm terms: "none"; by the average of the "layer"'s stored
        variances; or by each "channel"'s own, of at least a tenth of that average.
      layer_weighting: "uniform"; "first" (first BatchNorm tenfold); "deep" or "shallow" (from 0.2 to 1 with depth, or
        the reverse).
      input_weight: of the term that keeps each image at mean 0 and standard deviation 1.
      class_weight: of cross-entropy to balanced random labels.
      class_focus: exponent gamma of the factor (1 - p)^gamma on each image's cross-entropy, p the probability of its
        label: above 0 images that are hard to classify count for more (HAST).
      distance_weight: of the marginal distance of each image to its class in the batch (IntraQ), in the features that
        the last layer reads; it needs several images of a class in a batch.
      distance_range: the cosine distances between which the marginal distance leaves images alone.
      response_weight: of the AAC response term.
      response_start: share of the steps after which the response term begins.
      response_quantile: the response level is this quantile of the margins that the BN-matched images show at that
        point, each for the class it looks most like.
      total_variation_weight: of total variation.
      swing: shift the input of each strided convolution at random at each step (GENIE's swing convolution), against
        checkerboard patterns.
      extra_pixels: make images so many pixels larger than the network's input and cut a random window at each step
        (DGH); finished images are cut from the center.
      smoothing: standard deviation in pixels of a 3x3 Gaussian that blurs images at each step and at the end (DGH:
        1.25); 0 for none.
      pixel_range: lowest and highest possible value of each channel in preprocessed units, ((low, ...), (high, ...)),
        to clip images to; None where it is not known.
      flip: mirror each image with probability one half at each step.
      jitter: shift images (cyclically) by up to so many pixels at each step.
      crop: reflect-pad by so many pixels and crop at random at each step.
      low_pass: cut-off of a Gaussian low-pass filter on finished images, in cycles per image (SynQ, D0); 0 for none.
        About a fifth of the image's size is a sensible start: SynQ shows 8 for 32 pixels and 40 for 224. Images of
        size s hold up to s / 2 cycles along an axis, so half the size and more changes little.
      patience: stop a batch when its loss has not improved by `min_improvement` (relative) in so many steps; 0 never.
      min_improvement: see `patience`.
      chunk: optimizer steps in one compiled call; 0 for the measured default of the backend.
      precision: of float32 products while images are made: "default" (fast on GPU and TPU), "high" or "highest"; None
        for JAX's own setting.
    """

    num_images: int = 128
    batch_size: int = 64
    source: str = "pyramid"
    spectrum_exponent: float = 1.5
    steps: int = 60
    optimizer: str = "adam"
    learning_rate: float = 0.3
    b2: float = 0.9
    schedule: str = "cosine"
    generator_learning_rate: float = 0.01
    statistics: str = "batch"
    mean_weight: float = 1.0
    std_weight: float = 1.0
    normalization: str = "none"
    layer_weighting: str = "uniform"
    input_weight: float = 0.1
    class_weight: float = 0.0
    class_focus: float = 0.0
    distance_weight: float = 0.0
    distance_range: tuple[float, float] | list[float] = (0.05, 0.8)
    response_weight: float = 0.0
    response_start: float = 0.5
    response_quantile: float = 0.9
    total_variation_weight: float = 0.0
    swing: bool = False
    extra_pixels: int = 0
    smoothing: float = 0.0
    pixel_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    flip: bool = False
    jitter: int = 0
    crop: int = 0
    low_pass: float = 0.0
    patience: int = 0
    min_improvement: float = 1e-3
    chunk: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_fields(self, "an integer of at least 1", "num_images", "batch_size", "steps")
        check_fields(self, "an integer of at least 0", "extra_pixels", "jitter", "crop", "patience", "chunk")
        weights = (name for name in vars(self) if name.endswith("_weight"))
        others = ("spectrum_exponent", "class_focus", "smoothing", "low_pass", "min_improvement")
        check_fields(self, "a finite number of at least 0", *weights, *others)
        check_fields(self, "a positive number", "learning_rate", "generator_learning_rate")
        check_fields(self, "a number above 0 and below 1", "b2")
        check_fields(self, "True or False", "flip", "swing")
        # Lists, as read from a file, become tuples: a config is hashable.
        object.__setattr__(self, "distance_range", _tuples(self.distance_range))
        object.__setattr__(self, "pixel_range", _tuples(self.pixel_range))
        check_field("distance_range", self.distance_range, "two numbers, 0 <= low <= high <= 2", _distances)
        check_field("pixel_range", self.pixel_range, "((low, ...), (high, ...)), low < high in each channel", _limits)
        check_fields(self, "a number from 0 to 1", "response_start", "response_quantile")
        check_fields(self, SOURCES, "source")
        check_fields(self, OPTIMIZERS, "optimizer")
        check_fields(self, SCHEDULES, "schedule")
        check_fields(self, STATISTICS, "statistics")
        check_fields(self, NORMALIZATIONS, "normalization")
        check_fields(self, WEIGHTINGS, "layer_weighting")

    @property
    def uses_classes(self) -> bool:
        """Whether a term of the loss asks for classes."""
        return self.class_weight > 0 or self.distance_weight > 0 or self.response_weight > 0

    @property
    def num_batches(self) -> int:
        """How many batches make all images."""
        return math.ceil(self.num_images / self.batch_size)

    def layer_weights(self, layers: int) -> list[float]:
        """The weight of each BatchNorm's term, in order of execution."""
        if self.layer_weighting == "first":
            return [10.0] + [1.0] * (layers - 1)
        ramp = [0.2 + 0.8 * i / max(layers - 1, 1) for i in range(layers)]
        return {"uniform": [1.0] * layers, "deep": ramp, "shallow": ramp[::-1]}[self.layer_weighting]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _distances(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and all(map(is_non_negative, value)) and value[0] <= value[1] <= 2
    )


def _limits(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(v, tuple) and v for v in value):
        return False
    low, high = value
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (*low, *high))
    return len(low) == len(high) and numbers and all(a < b for a, b in zip(low, high, strict=True))


# GENIE-D with swing convolution (arXiv 2212.04780), and the data generation of Sony's model-compression-toolkit, with
# the settings that their publications use; both fit any network and take other numbers of images and steps.
GENIE = SynthesisConfig(
    num_images=1024,
    batch_size=128,
    source="generator",
    steps=4000,
    learning_rate=0.1,
    b2=0.999,
    schedule="plateau",
    input_weight=1.0,
    swing=True,
)
DGH = SynthesisConfig(
    num_images=1024,
    batch_size=32,
    source="pixels",
    steps=500,
    learning_rate=0.3,
    b2=0.999,
    statistics="set",
    input_weight=0.0,
    flip=True,
    extra_pixels=32,
    smoothing=1.25,
)
