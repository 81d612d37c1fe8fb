"""A quantized network as one value that runs, saves and loads."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base import is_writer, may_transfer, mesh_of, package_version
from dfq_jax.export import artifact
from dfq_jax.graph import (
    Graph,
    GraphError,
    apply_quantized,
    as_function,
    compute_kernels,
    computed_kernels,
    on_device,
    trace,
    variable_shapes,
)
from dfq_jax.quantizers import dequantized, quantization, with_quantization
from dfq_jax.recipes.recipe import Recipe, recipe_from
from dfq_jax.report import Report, report_from
from dfq_jax.runtime import IntegerNetwork, Policy, compile_integer, measure_policy
from dfq_jax.stages import (
    FLOAT_BITS,
    Convention,
    LayerComparison,
    apply_jitted,
    compare_layers,
    convention_from,
    equalize,
    stretch_channels,
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Quantized:
    """A quantized network.

    Attributes:
      variables: the variables with `QTensor` kernels, adapted BatchNorm statistics and the collection "quantization".
      graph: the traced network.
      report: what was done.
      recipe, convention: how.
      images: the images it was made with, `[N, H, W, C]`; Gaussian noise where BatchNorm parameters took their place.

    `copy.deepcopy` copies it; `pickle` does where the traced function can be pickled (a function of a module), and
    traces it again on the other side. `save` and `load` always work.
    """

    variables: Any
    graph: Graph
    report: Report
    recipe: Recipe
    convention: Convention
    images: Any

    def __repr__(self) -> str:
        return f"Quantized({self.name}, recipe {self.recipe.name}, {self.graph!r})"

    @property
    def name(self) -> str:
        """Its bits in short: "W4A8" or, with other ones for some layers, "mixed W4.2A8" as they are on average.

        The average is over weights, and over multiply-accumulates for what is read; float counts as 16.
        """
        if not self.convention.rules:
            return self.convention.name.upper()
        layers = [*zip(self.graph.layers, self.report.layers, strict=True)]
        weights = [(found.weight_bits, math.prod(layer.kernel_shape)) for layer, found in layers]
        reads = [(found.activation_bits, layer.macs) for layer, found in layers]
        means = (sum((bits or FLOAT_BITS) * n for bits, n in of) / sum(n for _, n in of) for of in (weights, reads))
        return "mixed W{:.3g}A{:.3g}".format(*means)

    @property
    def apply(self) -> Callable[[Any, jax.Array], Any]:
        """`(variables, x) -> outputs`: the same contract as the float network, ready for `jax.jit`."""
        return functools.partial(apply_quantized, self.graph)

    @property
    def apply_integer(self) -> Callable[[Any, jax.Array], Any]:
        """As `apply`, with int8 products."""
        return functools.partial(apply_quantized, self.graph, integer=True)

    def __call__(self, x: Float[Array, "n ..."]) -> Any:
        """The outputs of the quantized network, simulated in float."""
        return apply_jitted(self.graph, self.variables, x)

    def integer(self, policy: Policy | None = None) -> IntegerNetwork:
        """The network compiled to int8 codes from layer to layer.

        Args:
          policy: what runs as int8: by default what is known to be right and fast on JAX's backend, the sums of each
            int8 kernel put to the test here; or one that `measure_policy` found by the clock.

        Returns:
          A function of x, and `apply` and `variables` for `jax.jit`.
        """
        plan, variables = compile_integer(self.graph, self.variables, policy)
        return IntegerNetwork(plan=plan, variables=variables)

    def measure_policy(
        self, shape: tuple[int, ...] | None = None, policy: Policy | None = None, *, rounds: int = 7
    ) -> Policy:
        """A policy for `integer` that is no slower than the float network on this machine; takes a minute or so.

        Args:
          shape: of the input to be served, `[N, H, W, C]`; by default that of `quantize`.
          policy: the policy to begin with.
          rounds: measurements of each kernel.
        """
        graph = self.graph if shape is None else self.graph.at(shape)
        return measure_policy(graph, self.variables, policy, rounds=rounds)

    def kernels(self, policy: Policy | None = None) -> str:
        """A table of what each layer runs as under a policy, the measured speed, and why a layer stays in float."""
        return self.integer(policy).kernels()

    def compare_layers(self, variables: Any, images: Float[Array, "n ..."], *, batch_size: int = 16) -> LayerComparison:
        """The error of each layer, as `dfq_jax.compare_layers`, beside the float network as it was quantized.

        Recipes may have equalized its weight ranges or stretched its channels first, which changes no output but the
        layers' own ones.

        >>> quantized = dfq_jax.quantize(apply_fn, variables, input_shape=(1, 6), recipe="instant", bits="w8a8")
        >>> [error.name for error in quantized.compare_layers(variables, images).layers]
        ['dense1', 'dense2']

        Args:
          variables: float ones, as given to `quantize`; of a network with kernels that are computed from parameters,
            those of `compute_kernels`.
          images: `[N, H, W, C]`, preprocessed.
          batch_size: images in one pass of the networks.

        Raises:
          ValueError: unusable images, or variables of another network.
        """
        codes = self.graph.leaves_by_path(dequantized(self.variables))

        def error(tree: Any) -> float:
            leaves = self.graph.leaves_by_path(tree)
            pairs = [(np.asarray(leaves[path]), np.asarray(codes[path])) for path in self.graph.kernels]
            return sum(float(np.square(a - b).sum() / max(np.square(a).sum(), 1e-30)) for a, b in pairs)

        forms = (variables, equalize(self.graph, variables))
        forms = (*forms, *(stretch_channels(self.graph, form, self.convention) for form in forms))
        return compare_layers(self.graph, min(forms, key=error), self.variables, images, batch_size=batch_size)

    @may_transfer
    def save(self, path: str | Path, **header: Any) -> None:
        """Write one safetensors file that `dfq_jax.load` reads; `header` adds facts of your own.

        Of several processes that share the network's devices the first one writes; in the others nothing is done.
        """
        if not is_writer(mesh_of(self.variables)):
            return
        facts = {
            **header,
            "graph": self.graph.digest,
            "computed_kernels": list(computed_kernels(self.graph)),
            "input_shape": list(self.graph.input.shape),
            "recipe": dataclasses.asdict(self.recipe),
            "convention": dataclasses.asdict(self.convention),
            "report": self.report.to_dict(),
        }
        artifact.save(path, self.variables, header=facts)


@may_transfer
def load(path: str | Path, model: Any, variables: Any = None) -> Quantized:
    """Read a quantized network back.

    >>> quantized = dfq_jax.quantize(apply_fn, variables, input_shape=(1, 6), recipe="instant", bits="w8a8")
    >>> quantized.save("net.safetensors")
    >>> bool((load("net.safetensors", apply_fn, variables)(images) == quantized(images)).all())
    True

    Args:
      path: a file written by `Quantized.save`.
      model: the same model it was made from.
      variables: a tree of the model's structure: its float variables, or `jax.eval_shape` of them. Needed for
        functions, and for an Equinox module with a state.

    Returns:
      The quantized network (without the images it was made with).

    Raises:
      ArtifactError: the file is damaged, foreign, of another model, or of a version of this library that knows more
        than this one; the message says what differs.
    """
    _, header = artifact.load(path)
    missing = {"graph", "input_shape", "recipe", "convention", "report"} - set(header)
    if missing:
        raise artifact.ArtifactError(f"{path}: the header lacks {sorted(missing)}; was it written by Quantized.save?")
    recipe = _record(path, header, "recipe", recipe_from)
    convention = _record(path, header, "convention", convention_from)
    report = _record(path, header, "report", report_from)
    shape = tuple(header["input_shape"])
    if variables is None:
        variables = variable_shapes(model, shape)
    apply_fn, variables = as_function(model, variables)
    variables = on_device(variables)
    try:
        graph = trace(apply_fn, variables, shape)
        if header.get("computed_kernels"):
            graph, variables = compute_kernels(graph, variables)
    except GraphError as error:
        raise artifact.ArtifactError(
            f"{path}: the model given cannot be what the file was made from: {error}"
        ) from error
    restored, _ = artifact.restore(path, variables, expect={"graph": graph.digest})
    # A file has leaves only: empty parts of the collection are added again, so that trees have one structure.
    return Quantized(
        variables=with_quantization(restored, quantization(restored)),
        graph=graph,
        report=report,
        recipe=recipe,
        convention=convention,
        images=None,
    )


def load_report(path: str | Path) -> tuple[Report, str | None]:
    """The report in a file, and the name of the model that the file says it was made from; no model is needed.

    Raises:
      ArtifactError: as `load`.
    """
    _, header = artifact.load(path)
    if "report" not in header:
        raise artifact.ArtifactError(f"{path}: the header lacks a report; was it written by Quantized.save?")
    return _record(path, header, "report", report_from), header.get("model")


def _record(path: str | Path, header: Mapping[str, Any], name: str, build: Callable[[Any], Any]) -> Any:
    """One of the records in a header."""
    try:
        return build(header[name])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        writer = header["versions"].get("dfq_jax", "unknown")
        raise artifact.ArtifactError(
            f"{path}: its {name} cannot be read by dfq_jax {package_version('dfq_jax')} ({error}). The file "
            f"was written by dfq_jax {writer}; install that version or a later one."
        ) from error
