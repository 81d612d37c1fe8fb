"""What a network computes, found in its jaxpr.

`trace` turns `apply_fn(variables, x)` into a `Graph`: every convolution and matrix product with the exact path of its
kernel, the BatchNorm and the activation around it, the tensors to quantize, and the blocks between values that every
path goes through. Nothing depends on a module class or a naming habit, so Linen, NNX, Keras and plain functions give
the same graph.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dfq_jax.base import LINE, aligned, hanging
from dfq_jax.graph.adapters import is_module
from dfq_jax.graph.form import LayerForm
from dfq_jax.graph.tracing.analysis import Structure, analyze
from dfq_jax.graph.tracing.canonical import canonical
from dfq_jax.graph.tracing.failures import check_outputs, explain_trace_failure
from dfq_jax.graph.tracing.flattening import flatten
from dfq_jax.graph.tracing.naming import slice_paths
from dfq_jax.graph.tracing.program import Constant, Program
from dfq_jax.graph.tracing.structure import BatchNorm, Block, GraphError, Layer, Skipped, Tensor
from dfq_jax.graph.variables import VariableTree
from dfq_jax.quantizers import flatten_with_paths, is_qtensor, without_quantization


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Graph(VariableTree):
    """A traced network. Static: it holds no arrays of weights, and is hashable and comparable by what it computes.

    Attributes:
      layers: in the order they run.
      batch_norms: in the order they run.
      tensors: what layers read.
      blocks: consecutive pieces that together are the network.
      skipped: what stays in float, and why.
      input: shape and type of x.
      program: the operations.
      output_treedef: structure of the outputs.
      logits_index: which leaf of the outputs is the class scores.
      digest: of the structure; the same for all input shapes and versions of JAX.
      apply_fn: the traced function.
    """

    layers: tuple[Layer, ...]
    batch_norms: tuple[BatchNorm, ...]
    tensors: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]
    input: jax.ShapeDtypeStruct
    program: Program
    output_treedef: Any
    logits_index: int
    digest: str
    apply_fn: Callable[[Any, jax.Array], Any]
    _traced: Callable[[jax.ShapeDtypeStruct], Graph]  # the same function at another input, cached

    def __hash__(self) -> int:
        return hash((self.digest, self.input.shape))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self is other or self._identity == other._identity

    def __copy__(self) -> Graph:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self  # static, like a function

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.apply_fn)
        except Exception as error:  # whatever the function holds may raise anything
            raise pickle.PicklingError(
                f"the graph of {self.apply_fn!r} cannot be pickled, since that function cannot ({error}). Pass a "
                "function of a module, or use Quantized.save and dfq_jax.load, which take the model again."
            ) from error
        return trace, (self.apply_fn, jax.tree.unflatten(self.treedef, self.variable_shapes), self.input)

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        # The digest alone leaves out what is between layers, such as the kind of pooling.
        return (
            self.digest,
            self.program.fingerprint,
            self.input,
            self.variable_shapes,
            self.treedef,
            self.output_treedef,
        )

    # --- lookups ---

    def form(self, layer: Layer) -> LayerForm:
        """What a layer does with whatever values it meets."""
        return self._forms[layer.name]

    @functools.cached_property
    def _forms(self) -> dict[str, LayerForm]:
        return {layer.name: LayerForm.of(layer, self.program) for layer in self.layers}

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return self._named[Layer, name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self._named[Tensor, name]

    def batch_norm(self, name: str) -> BatchNorm:
        """The BatchNorm of this name."""
        return self._named[BatchNorm, name]

    @functools.cached_property
    def _named(self) -> dict[tuple[type, str], Any]:
        items: list[Any] = [*self.layers, *self.tensors, *self.batch_norms]
        return {(type(item), item.name): item for item in items}

    @functools.cached_property
    def kernels(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that read each kernel, in the order they run, by the kernel's path."""
        readers: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            readers[layer.kernel] = (*readers.get(layer.kernel, ()), layer)
        return readers

    @property
    def unrecognized_batch_norms(self) -> tuple[Skipped, ...]:
        """What is in `skipped` and may be a BatchNorm: each channel is scaled by the root of a parameter."""
        return tuple(item for item in self.skipped if item.kind == "norm")

    def require_batch_norms(self, otherwise: str) -> None:
        """Refuse a network without BatchNorms, and say whether it has none or none was recognized.

        Args:
          otherwise: what that means and what to do, the rest of the sentence.

        Raises:
          GraphError: no BatchNorm was found.
        """
        if self.batch_norms:
            return
        if not self.unrecognized_batch_norms:
            raise GraphError(f"the network has no BatchNorm, {otherwise}")
        lost = "; ".join(f"{item.name}: {item.reason}" for item in self.unrecognized_batch_norms[:3])
        raise GraphError(f"no BatchNorm was recognized in the network ({lost}), {otherwise}")

    @property
    def num_classes(self) -> int:
        """Width of the class scores; 0 where the outputs hold none of shape `[N, classes]`."""
        output = self.program.outputs[self.logits_index]
        shape: Any = self.program.avals[output].shape if isinstance(output, int) else ()
        return shape[-1] if len(shape) == 2 else 0

    @property
    def first_layer(self) -> Layer:
        """The layer that runs first."""
        return self.layers[0]

    @property
    def last_layer(self) -> Layer:
        """The layer that runs last."""
        return self.layers[-1]

    def logits(self, outputs: Any) -> jax.Array:
        """The class scores `[N, classes]` among the outputs (a network may return a dict or a tuple)."""
        return jax.tree.leaves(outputs)[self.logits_index]

    # --- other input shapes ---

    def at(self, shape: Sequence[Any], dtype: Any = None) -> Graph:
        """The same network traced for another batch or image size; cached.

        Raises:
          GraphError: the network does not take such an input, or has other layers there.
        """
        spec = jax.ShapeDtypeStruct(tuple(shape), dtype or self.input.dtype)
        if len(spec.shape) != len(self.input.shape):
            raise GraphError(
                f"x: expected an array like [N, {', '.join(map(str, self.input.shape[1:]))}], found shape {spec.shape}."
            )
        graph = self._traced(spec)
        if graph.digest != self.digest:
            raise GraphError(f"x: at shape {spec.shape} the network has other layers than at {self.input.shape}.")
        return graph

    def at_input(self, x: Any) -> Graph:
        """The same network traced for the shape and type of an array.

        Raises:
          GraphError: as `at`.
          TypeError: `x` is no array.
        """
        check_array(x)
        return self.at(x.shape, x.dtype)

    # --- printing ---

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.layers)} layers, {len(self.batch_norms)} BatchNorms, {len(self.tensors)} tensors, "
            f"{len(self.blocks)} blocks, input {self.input.shape}, digest {self.digest[:12]})"
        )

    def table(self) -> str:
        """In lines of 80 characters: the layers, BatchNorms of other tensors, and what is not quantized and why."""
        rows: list[tuple[str, ...]] = [("layer", "kind", "kernel", "then", "feeds")]
        for layer in self.layers:
            kind = layer.kind + (f"/{layer.groups}" if layer.groups > 1 else "") + ("^T" if layer.transposed else "")
            then = ["BN"] * (layer.batch_norm is not None) + [layer.activation] * (layer.activation != "none")
            feeds = ", ".join(layer.consumers) + (f"; reads with {layer.tensor}" if layer.tensor != layer.name else "")
            rows.append((layer.name, kind, "x".join(map(str, layer.kernel_shape)), " ".join(then) or "-", feeds))
        lines = aligned(rows, ruled=True, width=LINE)
        lines += hanging("", repr(self))
        for bn in self.batch_norms:
            if bn.layer is None:
                text = f"{bn.name} ({bn.channels} channels, then {bn.activation})"
                lines += hanging("BatchNorm apart from layers: ", text)
        for item in self.skipped:
            lines += hanging("not quantized: ", f"{item.name}: {item.reason}")
        return "\n".join(lines)

    __str__ = table


def check_array(x: Any) -> None:
    """Refuse an input that is no array.

    Raises:
      TypeError: it has no shape and type, as a list of numbers has none.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"x: expected an array, found a {type(x).__name__}; pass jnp.asarray(x).")


# --- tracing ---


def trace(
    apply_fn: Callable[[Any, jax.Array], Any],
    variables: Any,
    spec: jax.ShapeDtypeStruct | Sequence[int],
) -> Graph:
    """Find what `apply_fn(variables, x)` computes.

    >>> [(layer.name, layer.batch_norm, layer.activation) for layer in trace(apply_fn, variables, (1, 6)).layers]
    [('dense1', 'bn1', 'relu'), ('dense2', None, 'none')]

    Args:
      apply_fn: the network in inference mode, a pure function of its variables and a batch.
      variables: any pytree of arrays (or `jax.ShapeDtypeStruct`).
      spec: shape of x, `[N, H, W, C]` (float32), or a `jax.ShapeDtypeStruct`.

    Returns:
      The graph. Tracing runs no arithmetic on the weights.

    Raises:
      GraphError: BatchNorm in training mode, layers inside a loop that cannot be unrolled, weights closed over, a
        network without layers (kernels that it computes from parameters count, see `compute_kernels`), or an input
        shape the network does not take; the message says what to do.
      TypeError: `apply_fn` is no function, `variables` holds something that is not an array, or `spec` is no shape.
    """
    if isinstance(apply_fn, type) or is_module(apply_fn) or not callable(apply_fn):
        found = f"the class {apply_fn.__name__}" if isinstance(apply_fn, type) else type(apply_fn).__name__
        raise TypeError(
            f"apply_fn: expected a function (variables, x) -> outputs, found {found}. For a module use "
            "dfq_jax.as_function(module, variables)."
        )
    if not isinstance(spec, jax.ShapeDtypeStruct):
        try:
            spec = jax.ShapeDtypeStruct(tuple(int(d) for d in spec), jnp.float32)
        except (TypeError, ValueError):
            raise TypeError(f"spec: expected a shape such as (1, 32, 32, 3), found {spec!r}.") from None
    spec = jax.ShapeDtypeStruct(spec.shape, spec.dtype)  # and nothing else, such as where it lies
    variables = without_quantization(variables)
    paths, leaves = flatten_with_paths(variables)
    for path, leaf in zip(paths, leaves, strict=True):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"variables: {path!r} is a {type(leaf).__name__}, expected an array. Keep in `variables` what is an "
                "array, and the rest in the function: params, static = eqx.partition(model, eqx.is_array), and "
                "lambda v, x: eqx.combine(v, static)(x), or the like."
            )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise TypeError(f"variables: two leaves have the path {twice!r}; give their keys distinct names.")
    shapes = tuple(jax.ShapeDtypeStruct(tuple(v.shape), v.dtype) for v in leaves)
    treedef = jax.tree.structure(variables, is_leaf=is_qtensor)

    @functools.cache
    def traced(spec: jax.ShapeDtypeStruct) -> Graph:
        return _trace(apply_fn, treedef, tuple(paths), shapes, spec, traced)

    return traced(spec)


def _trace(
    apply_fn: Callable[[Any, jax.Array], Any],
    treedef: Any,
    paths: tuple[str, ...],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    spec: jax.ShapeDtypeStruct,
    traced: Callable[[jax.ShapeDtypeStruct], Graph],
) -> Graph:
    if not spec.shape or any(d < 1 for d in spec.shape):
        raise GraphError(f"x: every dimension must be at least 1, found shape {spec.shape}.")

    def function(leaves: Sequence[Any], x: Any) -> Any:
        outputs = apply_fn(jax.tree.unflatten(treedef, leaves), x)
        check_outputs(outputs)
        return outputs

    try:
        program, output_treedef = flatten(function, shapes, spec)
    except Exception as error:
        raise GraphError(explain_trace_failure(error, spec)) from error
    leaf_paths = slice_paths(paths, program.splits, [len(shape.shape) for shape in shapes])
    leaf_shapes = tuple(program.avals[leaf] for leaf in range(program.num_leaves))
    program = canonical(program)
    structure = analyze(program, leaf_paths)
    return Graph(
        **structure._asdict(),
        treedef=treedef,
        variable_paths=paths,
        variable_shapes=shapes,
        splits=program.splits,
        leaf_paths=leaf_paths,
        leaf_shapes=leaf_shapes,
        input=spec,
        program=program,
        output_treedef=output_treedef,
        logits_index=_logits_index(program, output_treedef),
        digest=_digest(leaf_paths, leaf_shapes, structure),
        apply_fn=apply_fn,
        _traced=traced,
    )


def _logits_index(program: Program, output_treedef: Any) -> int:
    """The class scores: a leaf called logits, or the first one of rank 2, or the first."""
    paths, _ = flatten_with_paths(jax.tree.unflatten(output_treedef, range(len(program.outputs))))
    exact = [i for i, path in enumerate(paths) if path.split("/")[-1] == "logits"]
    similar = [i for i, path in enumerate(paths) if "logits" in path.lower()]
    rank_2 = [
        i
        for i, output in enumerate(program.outputs)
        if not isinstance(output, Constant) and len(program.avals[output].shape) == 2
    ]
    return [*exact, *similar, *rank_2, 0][0]


def _digest(paths: Sequence[str], shapes: Sequence[jax.ShapeDtypeStruct], structure: Structure) -> str:
    """A fingerprint of the structure that depends neither on the version of JAX nor on the input's size."""
    lines = [f"{p} {s.shape}" for p, s in zip(paths, shapes, strict=True)]
    lines += [
        f"{x.name} {x.kind} {x.kernel} {x.bias} {x.channel_axes} {x.groups} {x.strides} {x.transposed} {x.tensor} "
        f"{x.batch_norm} {x.activation}"
        for x in structure.layers
    ]
    lines += [
        f"{b.name} {b.mean} {b.var} {b.scale} {b.bias} {b.epsilon:.3e} {b.activation}" for b in structure.batch_norms
    ]
    lines += [f"{t.name} {t.layers}" for t in structure.tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
