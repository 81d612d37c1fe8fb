"""What a quantized network may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dfq_jax.base import check_field, check_fields
from dfq_jax.stages.sensitivity import check_widths

# Bits of weights and of activations that files and runtimes keep as what they are.
TARGETS = {"onnx": ((4, 8), (4, 8)), "tflite": ((4, 8), (8,)), "integer": ((2, 4, 8), (2, 3, 4, 5, 6, 7, 8))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a network may take; all that is given holds.

    Attributes:
      average_weight_bits: bits of a weight on average, over all quantized weights.
      weight_bytes: bytes of all variables as they are stored, float ones included, as `Report.size` counts them.
      bit_operations: of one example: multiply-accumulates times the bits of both operands. Bits of activations are
        chosen only where this is given; else they are the convention's. Float counts as 16.
      targets: what is to run the network, of `TARGETS`: only bits that it has are given.
      weight_bits: the bits that weights may have; None for all that the sensitivity has.
      activation_bits: the bits that activations may have.
    """

    average_weight_bits: float | None = None
    weight_bytes: int | None = None
    bit_operations: float | None = None
    targets: tuple[str, ...] = ()
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        limits = ("average_weight_bits", "weight_bytes", "bit_operations")
        check_fields(self, "a positive number", *(name for name in limits if getattr(self, name) is not None))
        if all(getattr(self, name) is None for name in limits):
            raise ValueError(f"budget: expected at least one of {limits}.")
        known = sorted(TARGETS)
        check_field(
            "targets", self.targets, f"some of {known}", lambda v: not isinstance(v, str) and set(v) <= {*known}
        )
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("weight_bits", "activation_bits"):
            if (bits := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_widths(name, bits))

    def widths(self, bits: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits of weights and of activations that may be given, among those known.

        Raises:
          ValueError: none is left.
        """
        found = []
        for i, name in enumerate(("weight_bits", "activation_bits")):
            allowed = [set(bits), *(set(TARGETS[target][i]) for target in self.targets)]
            allowed += [set(getattr(self, name))] if getattr(self, name) is not None else []
            if not (left := set.intersection(*allowed)):
                asked = f"{getattr(self, name) or 'any'} for targets {self.targets}"
                raise ValueError(f"{name}: expected some that are known, of {tuple(bits)}, found {asked}.")
            found.append(tuple(sorted(left)))
        return found[0], found[1]
