"""The options that several commands have, and those that are fields of the library's records."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tyro.conf import UseAppendAction, arg

from dfq_jax.recipes import Recipe, Target
from dfq_jax.stages import Budget, Convention, LayerRule
from dfq_jax.synthesis import SynthesisConfig


def unbroken(doc: str | None) -> str:
    """A docstring with the help of each argument in one line: completion takes line breaks for further candidates."""
    return re.sub(r"\n {4,}", " ", inspect.cleandoc(doc or ""))


MODEL_HELP = "A name from `dfq-jax models`, or package.module:function (the current folder is importable)."
DATA_HELP = "Labeled images: bundled, npz:FILE, folder:DIR or tfds:NAME/SPLIT."
LAYER_BITS_HELP = (
    "Other bits of some layers, as often as needed, where the first for a layer counts: a regular expression of their "
    "names (see `dfq-jax inspect`) or a kind (conv, depthwise, dense), and bits: 'blocks_0/.*=w8a8', head=float, "
    "kind:depthwise=w8."
)
SAVED_HELP = "What `dfq-jax quantize --output` saved."
ModelName = Annotated[str, arg(metavar="MODEL", help=MODEL_HELP)]
Saved = Annotated[Path, arg(metavar="FILE", help=SAVED_HELP)]
Data = Annotated[str, arg(metavar="DATA", help=DATA_HELP)]
OptionalModel = Annotated[str | None, arg(metavar="MODEL")]
OptionalData = Annotated[str | None, arg(metavar="DATA")]
Weights = Annotated[str | None, arg(metavar="FILE|hf:ORG/REPO")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
OptionalFolder = Annotated[Path | None, arg(metavar="FOLDER")]
Page = Annotated[Path | None, arg(metavar="FILE.html")]
Count = Annotated[int | None, arg(metavar="N")]
LayerBits = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="LAYERS=BITS", help=LAYER_BITS_HELP)]
Devices = Annotated[int | Literal["all"] | None, arg(metavar="N|all")]
Bits = Annotated[int | Literal["none"], arg(metavar="N|none")]


def mesh_of_devices(count: int | Literal["all"] | None) -> Mesh | None:
    """A mesh of so many of this machine's devices.

    Raises:
      ValueError: there are not as many.
    """
    if count is None:
        return None
    found = jax.local_devices()
    wanted = len(found) if count == "all" else count
    if not 1 <= wanted <= len(found):
        raise ValueError(f"devices: expected a number from 1 to {len(found)}, which this machine has, found {count}")
    return Mesh(np.array(found[:wanted]), ("images",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConventionOptions:
    """Fields of a convention; the help of each is the record's."""

    __doc__ = unbroken(Convention.__doc__).replace("None for", "none for", 1)

    edge_bits: Bits = Convention.edge_bits
    edge_input_bits: Count = None
    second_input_bits: Count = None
    layer_bits: LayerBits = ()

    def of(self, bits: str) -> Convention:
        """The convention of a name such as "w4a4"."""
        fields = {name: None if value == "none" else value for name, value in vars(self).items()}
        rules = tuple(map(LayerRule.parse, fields.pop("layer_bits")))
        return Convention.parse(bits, rules=rules, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What the network may take: bits are chosen layer by layer within it.

    Attributes:
      average_bits: bits of a weight on average.
      weight_bytes: bytes of all variables as they are stored.
    """

    average_bits: Annotated[float | None, arg(metavar="BITS")] = None
    weight_bytes: Count = None

    def budget(self) -> Budget | None:
        """The budget, if there is one."""
        if self.average_bits is None and self.weight_bytes is None:
            return None
        return Budget(average_weight_bits=self.average_bits, weight_bytes=self.weight_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """How good the network has to be: bits of weights are chosen layer by layer for the smallest that is.

    Attributes:
      min_agreement: least percent of images, made from the float network, that keep their class.
      max_divergence: most divergence of the outputs from the float network's on them, in its place.
    """

    min_agreement: Annotated[float | None, arg(metavar="PERCENT")] = None
    max_divergence: Annotated[float | None, arg(metavar="NATS")] = None

    def target(self) -> Target | None:
        """The target, if there is one."""
        if self.min_agreement is None and self.max_divergence is None:
            return None
        return Target(agreement=self.min_agreement, divergence=self.max_divergence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """Fields of the settings of synthesis, in place of the recipe's; the help of each is the record's."""

    __doc__ = unbroken(SynthesisConfig.__doc__).replace(".", ", where it is not as the recipe says.", 1)

    num_images: Annotated[Count, arg(name="images")] = None
    steps: Count = None
    batch_size: Count = None

    def within(self, recipe: Recipe) -> Recipe:
        """The recipe with what was asked for."""
        given = {f"synthesis_{name}": value for name, value in vars(self).items() if value is not None}
        if self.num_images is not None:
            # Images beyond those asked for would be made only to be thrown away.
            given.setdefault("synthesis_batch_size", min(self.num_images, recipe.synthesis.batch_size))
        return recipe.replace(**given)
