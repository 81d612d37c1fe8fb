"""Clipping ranges of activations, chosen by what they do to the network's outputs.

What a range does to a tensor's own values (`ranges`) is a poor guide where a few huge ones carry little, or many small
ones much. So, tensor by tensor from the input on, the ranges of different estimators are tried on the quantized
network, and narrower and wider ones: what brings the outputs closest to those of the float network stays (after LAPQ,
Nahshan et al., arXiv 1911.07190, which does so with data, by the loss).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.base import batches, check_field, check_fields, check_kind, full_precision, mesh_of, side_by_side
from dfq_jax.graph import Graph, check_images, subnetwork
from dfq_jax.quantizers import check_quantized, quantization
from dfq_jax.stages.analytic import analytic_summaries
from dfq_jax.stages.comparison import apply_float, apply_jitted, compare_outputs
from dfq_jax.stages.convention import Convention, Ranges, check_convention, with_ranges
from dfq_jax.stages.ranges import ESTIMATORS, apply_estimator, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSearchConfig:
    """How ranges are searched for.

    Attributes:
      estimators: of the sets of ranges to try, names in `ESTIMATORS`; see `candidate_ranges`.
      factors: narrower and wider ranges of each tensor to try, as factors on the one it has.
      least_gain: share of the divergence that another range of one tensor has to take away; less is noise.
      one_by_one: search tensor by tensor, too, and not among whole sets alone, as `quantize` does first.
      max_images: the first of the images, at most so many, are looked at: time is in proportion.
      batch_size: images in one pass; as many passes at once as a CPU has cores.
    """

    estimators: tuple[str, ...] = ("lp", "mse", "l1.5")
    factors: tuple[float, ...] = (0.8, 1.25)
    least_gain: float = 0.005
    one_by_one: bool = True
    max_images: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("estimators", "factors"):  # lists, as read from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        known = sorted(ESTIMATORS)
        check_field("estimators", self.estimators, f"some of {known}", lambda v: v and all(e in known for e in v))
        check_field("factors", self.factors, "positive numbers", lambda v: all(0 < f < float("inf") for f in v))
        check_field("least_gain", self.least_gain, "a share of at least 0 and below 1", lambda v: 0 <= v < 1)
        check_fields(self, "True or False", "one_by_one")
        check_fields(self, "an integer of at least 1", "max_images", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RangeSearch:
    """What was found.

    Attributes:
      before: divergence from the float network, with the ranges as they were.
      after: with those found.
      changed: tensors that got another range, and which: the name of a set, or a factor.
    """

    before: float
    after: float
    changed: dict[str, str]


def candidate_ranges(
    graph: Graph,
    variables: Any,
    images: Float[Array, "n ..."],
    convention: Convention,
    config: RangeSearchConfig = RangeSearchConfig(),
    *,
    batch_size: int = 64,
) -> dict[str, Ranges]:
    """Make the sets of ranges to search among: by each estimator, from BatchNorm parameters and from images.

    >>> candidates = candidate_ranges(graph, variables, images, convention)
    >>> list(candidates)[:2]
    ['analytic lp', 'analytic mse']

    Args:
      graph: from `trace`. Without BatchNorms there are ranges from images alone.
      variables: float variables.
      images: `[N, H, W, C]`, preprocessed.
      convention: gives the bits that an estimator optimizes for.
      config: which estimators.
      batch_size: images in one pass of the network.

    Returns:
      `{"analytic lp": {tensor name: (lo, hi)}, ..., "image lp": ...}`.

    Raises:
      TypeError: `convention` or `config` is something else.
      ValueError: no images, or images with NaN or infinity.
    """
    check_convention(convention)
    check_kind("config", config, RangeSearchConfig)
    known = {"analytic": analytic_summaries(graph, variables, convention)} if graph.batch_norms else {}
    known["image"] = summarize(graph, variables, images, batch_size=batch_size)
    return {
        f"{source} {name}": apply_estimator(graph, summaries, convention, ESTIMATORS[name])
        for source, summaries in known.items()
        for name in config.estimators
    }


@full_precision
def search_ranges(
    graph: Graph,
    variables: Any,
    qvariables: Any,
    images: Float[Array, "n ..."],
    candidates: Mapping[str, Ranges],
    config: RangeSearchConfig = RangeSearchConfig(),
) -> tuple[Any, RangeSearch]:
    """Choose the range of every tensor by the divergence of the quantized network's outputs from the float network's.

    It begins with the ranges that `qvariables` have; bits and weights stay as they are. Blocks of the network are
    compiled one by one, equal ones once, with ranges as arguments; of a tensor's candidates only what follows its
    block's input is run.

    >>> candidates = candidate_ranges(graph, variables, images, convention)
    >>> better, found = search_ranges(graph, variables, qvariables, images, candidates)
    >>> found.after <= found.before
    True

    Args:
      graph: from `trace`.
      variables: float variables.
      qvariables: from `quantize_params`.
      images: `[N, H, W, C]`, preprocessed.
      candidates: sets of ranges, by name; each has those of all tensors with a quantizer.
      config: what else is tried.

    Returns:
      `qvariables` with other activation quantizers, and what was found.

    Raises:
      TypeError: `config` is something else.
      ValueError: a candidate lacks a tensor, `qvariables` are not quantized, or unusable images.
    """
    check_kind("config", config, RangeSearchConfig)
    check_images(graph, images)
    check_quantized(qvariables)
    for name, ranges in candidates.items():
        if missing := sorted(set(quantization(qvariables).by_tensor) - set(ranges)):
            raise ValueError(f"candidates: {name!r} has no range for tensor {missing[0]!r}.")
    graph = graph.at((graph.input.shape[0], *images.shape[1:]))
    return _Search(graph, variables, images, config).run(qvariables, candidates)


class _Search:
    """The network in blocks: of candidates that differ from one block on, only what follows its input is run."""

    def __init__(self, graph: Graph, variables: Any, images: Any, config: RangeSearchConfig):
        self.graph, self.config = graph, config
        self.inputs = list(batches(jnp.asarray(images[: config.max_images]), config.batch_size))
        self.blocks = [subnetwork(graph, block, len(self.inputs[0])) for block in graph.blocks]
        self.reference = [apply_float(graph, variables, x) for x in self.inputs]

    def outputs(self, variables: Any, first: int, x: Any) -> Any:
        """Of the network, from the input of a block."""
        for block in self.blocks[first:]:
            x = apply_jitted(block.graph, block.select(self.graph, variables), x)
        return jax.block_until_ready(x)

    def divergences(self, networks: Mapping[str, Any], first: int, inputs: list[Any]) -> dict[str, float]:
        """Of quantized networks from the float one, from the inputs of a block, which they share."""
        work = [(qvariables, x) for qvariables in networks.values() for x in inputs]
        threads = None if mesh_of(inputs) is None else 1  # programs of several devices begin in one order
        outputs = iter(side_by_side(lambda item: self.outputs(item[0], first, item[1]), work, threads))
        pairs = {name: [(reference, next(outputs)) for reference in self.reference] for name in networks}
        return {name: compare_outputs(self.graph, pair).divergence for name, pair in pairs.items()}

    def run(self, qvariables: Any, candidates: Mapping[str, Ranges]) -> tuple[Any, RangeSearch]:
        """Find the best range of each tensor in turn."""
        self.outputs(qvariables, 0, self.inputs[0])  # compiled here: threads would do so once each
        before = least = self.divergences({"": qvariables}, 0, self.inputs)[""]
        changed, inputs = {}, self.inputs
        for place, block in enumerate(self.blocks):
            for _, tensor in block.tensors:
                networks = self.options(qvariables, tensor, candidates)
                divergences = self.divergences(networks, place, inputs)
                name = min(divergences, key=divergences.__getitem__, default=None)
                if name is not None and divergences[name] < (1 - self.config.least_gain) * least:
                    qvariables, least, changed[tensor] = networks[name], divergences[name], name
            if place + 1 < len(self.blocks):
                own = block.select(self.graph, qvariables)
                inputs = [apply_jitted(block.graph, own, x) for x in inputs]
        return qvariables, RangeSearch(before=before, after=least, changed=changed)

    def options(self, qvariables: Any, tensor: str, candidates: Mapping[str, Ranges]) -> dict[str, Any]:
        """The network with each other range of a tensor."""
        params = quantization(qvariables).by_tensor.get(tensor)
        if params is None:
            return {}
        ranges: dict[str, Any] = {name: ranges[tensor] for name, ranges in candidates.items()}
        ranges |= {f"{factor:g} times": (factor * params.lo, factor * params.hi) for factor in self.config.factors}
        return {name: with_ranges(qvariables, {tensor: range_}) for name, range_ in ranges.items()}
