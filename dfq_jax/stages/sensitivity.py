"""What each layer costs: the divergence of a network's outputs with that layer alone quantized, or alone in float."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import LINE, Progress, aligned, check_field, hanging, known_fields
from dfq_jax.graph import Graph
from dfq_jax.quantizers import MAX_BITS, MIN_BITS
from dfq_jax.stages.convention import Convention, check_convention
from dfq_jax.stages.mixed import MixedNetwork
from dfq_jax.stages.parts import Widths
from dfq_jax.stages.rules import is_bits

PARTS = ("weights", "input", "both", "without")
WIDTHS = (2, 3, 4, 6, 8)
# So many images of 224 x 224 take minutes; of small ones there may be more.
LEAST_IMAGES, MOST_IMAGES, VALUES = 8, 32, 8 * 224 * 224 * 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivity:
    """Divergences from the float network, by layer and bits, as `Comparison.divergence` measures them.

    Layers that share a kernel are quantized in it together, and so are those that read one tensor in that.

    Attributes:
      layers: names, in the order they run; those that a rule of the convention leaves in float are left out.
      bits: the widths.
      weights: with a layer's weights alone quantized, `[layers, bits]`.
      input: with its input alone; zero where activations stay in float.
      both: with both.
      without: with all quantized but both.
      total: with all quantized, `[bits]`.
      measured_on: images or noise, in words.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    weights: Float[np.ndarray, "layers bits"]
    input: Float[np.ndarray, "layers bits"]
    both: Float[np.ndarray, "layers bits"]
    without: Float[np.ndarray, "layers bits"]
    total: Float[np.ndarray, " bits"]
    measured_on: str

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.bits))
        for name in (*PARTS, "total"):
            wanted = shape[1:] if name == "total" else shape
            check_field(name, getattr(self, name).shape, f"the shape {wanted}", wanted.__eq__)

    def table(self) -> str:
        """Plain text: a row for each layer, the largest divergences first."""
        order = np.argsort(-self.both[:, 0], kind="stable")
        totals = ", ".join(f"{b} bits {v:.3g}" for b, v in zip(self.bits, self.total, strict=True))
        lines = hanging("", f"divergence from the float network, on {self.measured_on}; all quantized to {totals}")
        for title, part in (("weights alone", self.weights), ("input alone", self.input)):
            rows = [[self.layers[i], *(f"{v:.2g}" for v in part[i])] for i in order]
            lines += ["", *aligned([[title, *(f"{b} bits" for b in self.bits)], *rows], width=LINE)]
        return "\n".join(lines)

    __str__ = table

    def to_json(self) -> str:
        """All of it as JSON."""
        fields = dataclasses.asdict(self)
        return json.dumps({n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in fields.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """What `to_json` gave.

        Raises:
          ValueError: the text is something else.
        """
        try:
            fields = known_fields(cls, json.loads(text))
            arrays = {name: np.asarray(fields[name], np.float64) for name in (*PARTS, "total")}
            return cls(**{**fields, **arrays, "layers": tuple(fields["layers"]), "bits": tuple(fields["bits"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"text: expected what Sensitivity.to_json gives ({error}).") from None


def enough_images(graph: Graph) -> int:
    """How many images to measure on: as many as take seconds to minutes."""
    return max(LEAST_IMAGES, min(MOST_IMAGES, VALUES // math.prod(graph.input.shape[1:])))


def sensitivity(
    graph: Graph,
    variables: Any,
    images: Float[Array, "n ..."] | None = None,
    *,
    bits: Sequence[int] = WIDTHS,
    convention: Convention = Convention(),
    estimator: str = "lp",
    on_progress: Callable[[Progress], None] | None = None,
) -> Sensitivity:
    """Measure what each layer costs at each width.

    One program serves all layers and widths (see `MixedNetwork`); codes are the nearest ones, and nothing is adapted.

    >>> found = sensitivity(graph, variables, images, bits=(2, 8))
    >>> found.layers, found.both.shape, bool((found.both[:, 0] > found.both[:, 1]).all())
    (('dense1', 'dense2'), (2, 2), True)

    Args:
      graph: from `trace`.
      variables: float variables.
      images: `[N, H, W, C]`, preprocessed; without, noise of the moments that BatchNorms promise. Time is in proportion
        to their number.
      bits: the widths, 2 to 8 each.
      convention: the kinds of quantizers; its bits mean nothing here, but that activations stay in float where they
        do in it.
      estimator: of activation ranges, a name in `ESTIMATORS`.
      on_progress: called after each layer, a width being a batch.

    Raises:
      TypeError: `convention` is something else.
      ValueError: no such bits, unusable images or variables, or outputs that are not finite.
      GraphError: there are no images, and the network has no BatchNorm.
    """
    check_convention(convention)
    bits = check_widths("bits", bits)
    network = MixedNetwork(graph, variables, images, bits, convention, estimator)
    names, began, total = tuple(network.weights), time.perf_counter(), list[float]()
    found: dict[str, dict[tuple[str, int], float]] = {part: {} for part in PARTS}
    for place, width in enumerate(bits):
        alone = _alone(network, width)
        whole = network.record({part: width for part in (*network.weights.values(), *network.inputs.values())})
        total += network.divergences([whole.widths], whole)
        for step, name in enumerate(names):
            one = alone[name]
            rest = {part: b for part, b in whole.widths.items() if part not in one["both"]}
            values = network.divergences(one.values()) + network.divergences([rest], whole)
            for part, value in zip(PARTS, values, strict=True):
                found[part][name, width] = value
            if on_progress is not None:
                on_progress(progress(place, len(bits), step, len(names), values[2], began, name))
    arrays = {part: np.array([[values[name, b] for b in bits] for name in names]) for part, values in found.items()}
    return Sensitivity(layers=names, bits=bits, **arrays, total=np.array(total), measured_on=network.seen_on)


def check_widths(name: str, bits: Sequence[int]) -> tuple[int, ...]:
    """Widths in order, each once.

    Raises:
      ValueError: there are none, or one is no integer from 2 to 8.
    """
    wanted = f"integers from {MIN_BITS} to {MAX_BITS}"
    check_field(name, bits, wanted, lambda v: len(v) > 0 and all(map(is_bits, v)))
    return tuple(sorted(set(bits)))


def _alone(network: MixedNetwork, width: int) -> dict[str, dict[str, Widths]]:
    """By layer, the networks with its weights, its input and both quantized."""
    found: dict[str, dict[str, Widths]] = {}
    for name, weights in network.weights.items():
        own = {weights: width}
        read = {network.inputs[name]: width} if name in network.inputs else {}
        found[name] = {"weights": own, "input": read, "both": own | read}
    return found


def progress(batch: int, num_batches: int, step: int, steps: int, loss: float, began: float, name: str) -> Progress:
    """Of one step of one batch, from 0, when all takes as long."""
    seconds, done = time.perf_counter() - began, batch * steps + step + 1
    eta = seconds / done * (num_batches * steps - done)
    return Progress(batch + 1, num_batches, step + 1, steps, loss, seconds, eta, done, name)
