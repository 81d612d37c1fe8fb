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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dfq_jax.adapters import is_module
from dfq_jax.qtensor import QTensor
from dfq_jax.tracing.activations import ACTIVATIONS
from dfq_jax.tracing.analysis import Structure, analyze
from dfq_jax.tracing.naming import path_string
from dfq_jax.tracing.program import ClosureError, Constant, Program, flatten
from dfq_jax.tracing.structure import BatchNorm, Block, GraphError, GraphWarning, Layer, Skipped, Tensor

__all__ = [
    "ACTIVATIONS",
    "QUANTIZATION",
    "BatchNorm",
    "Block",
    "Graph",
    "GraphError",
    "GraphWarning",
    "Layer",
    "Skipped",
    "Tensor",
    "flatten_with_paths",
    "is_quantized",
    "path_string",
    "trace",
    "with_quantization",
    "without_quantization",
]

# The collection that `quantize_params` adds to the variables: activation quantizers by tensor name.
QUANTIZATION = "quantization"


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Graph:
    """A traced network. Static: it holds no arrays of weights, and is hashable and comparable by what it computes.

    Attributes:
      layers: in the order they run.
      batch_norms: in the order they run.
      tensors: what layers read.
      blocks: consecutive pieces that together are the network.
      skipped: what stays in float, and why.
      leaf_paths: of the variables' leaves.
      leaf_shapes: their shapes and types.
      input: shape and type of x.
      program: the operations.
      treedef: structure of the variables.
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
    leaf_paths: tuple[str, ...]
    leaf_shapes: tuple[jax.ShapeDtypeStruct, ...]
    input: jax.ShapeDtypeStruct
    program: Program
    treedef: Any
    output_treedef: Any
    logits_index: int
    digest: str
    apply_fn: Callable[[Any, jax.Array], Any]
    _cache: dict[Any, Graph] = dataclasses.field(default_factory=dict)

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
        return trace, (self.apply_fn, jax.tree.unflatten(self.treedef, self.leaf_shapes), self.input)

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        # The digest alone leaves out what is between layers, such as the kind of pooling.
        return (
            self.digest,
            self.program.fingerprint,
            self.input,
            self.leaf_shapes,
            self.treedef,
            self.output_treedef,
        )

    # --- lookups ---

    def layer(self, name: str) -> Layer:
        return self._layers[name]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def batch_norm(self, name: str) -> BatchNorm:
        return self._batch_norms[name]

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @functools.cached_property
    def _batch_norms(self) -> dict[str, BatchNorm]:
        return {bn.name: bn for bn in self.batch_norms}

    @property
    def first_layer(self) -> Layer:
        return self.layers[0]

    @property
    def last_layer(self) -> Layer:
        return self.layers[-1]

    # --- variables ---

    def leaves(self, variables: Any) -> list[Any]:
        """The leaves of `variables` in the graph's order, `QTensor` nodes kept whole.

        Raises:
          GraphError: the tree is not the one that was traced; the message names the first differing paths.
        """
        paths, leaves = flatten_with_paths(without_quantization(variables))
        if tuple(paths) != self.leaf_paths:
            missing = [p for p in self.leaf_paths if p not in set(paths)]
            extra = [p for p in paths if p not in set(self.leaf_paths)]
            raise GraphError(
                f"variables do not match the traced network: missing {missing[:5]}, unexpected {extra[:5]}. "
                "Pass the tree given to trace(), or a quantized copy of it."
            )
        for path, leaf, expected in zip(paths, leaves, self.leaf_shapes, strict=True):
            shape = getattr(leaf, "shape", None)
            if shape is not None and tuple(shape) != expected.shape:
                raise GraphError(
                    f"variables: {path!r} has shape {tuple(shape)}, the network was traced with {expected.shape}."
                )
        return leaves

    def replace(self, variables: Any, new: Mapping[str, Any]) -> Any:
        """`variables` with the leaves at the given paths replaced; the tree structure is kept."""
        unknown = set(new) - set(self.leaf_paths)
        if unknown:
            raise GraphError(f"no leaf at {sorted(unknown)[:5]}; see Graph.leaf_paths.")
        leaves = [new.get(p, leaf) for p, leaf in zip(self.leaf_paths, self.leaves(variables), strict=True)]
        tree = jax.tree.unflatten(self.treedef, leaves)
        return with_quantization(tree, variables[QUANTIZATION]) if is_quantized(variables) else tree

    def leaf(self, variables: Any, path: str | None) -> Any:
        """One leaf by its path; None for None."""
        return None if path is None else self.leaves(variables)[self.leaf_paths.index(path)]

    def logits(self, outputs: Any) -> jax.Array:
        """The class scores `[N, classes]` among the outputs (a network may return a dict or a tuple)."""
        return jax.tree.leaves(outputs)[self.logits_index]

    # --- other input shapes ---

    def at(self, shape: Sequence[int], dtype: Any = None) -> Graph:
        """The same network traced for another batch or image size; cached.

        Raises:
          GraphError: the network does not take such an input, or has other layers there.
        """
        spec = jax.ShapeDtypeStruct(tuple(shape), dtype or self.input.dtype)
        if spec == self.input:
            return self
        key = (spec.shape, spec.dtype)
        if key not in self._cache:
            if len(spec.shape) != len(self.input.shape):
                raise GraphError(
                    f"x: expected an array like [N, {', '.join(map(str, self.input.shape[1:]))}], found shape "
                    f"{spec.shape}."
                )
            graph = _trace(self.apply_fn, self.treedef, self.leaf_paths, self.leaf_shapes, spec, self._cache)
            if graph.digest != self.digest:
                raise GraphError(f"x: at shape {spec.shape} the network has other layers than at {self.input.shape}.")
            self._cache[key] = graph
        return self._cache[key]

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
        """One line for each layer, then BatchNorms of other tensors, then what is not quantized and why."""
        rows = [("layer", "kind", "kernel", "BatchNorm", "activation", "reads", "feeds")]
        for layer in self.layers:
            kind = layer.kind + (f"/{layer.groups}" if layer.groups > 1 else "")
            rows.append(
                (
                    layer.name,
                    kind + ("^T" if layer.transposed else ""),
                    "x".join(map(str, layer.kernel_shape)),
                    layer.batch_norm or "-",
                    layer.activation,
                    layer.tensor,
                    ", ".join(layer.consumers),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(repr(self))
        for bn in self.batch_norms:
            if bn.layer is None:
                lines.append(f"BatchNorm apart from layers: {bn.name} ({bn.channels} channels, then {bn.activation})")
        lines += [f"not quantized: {item.name}: {item.reason}" for item in self.skipped]
        return "\n".join(lines)

    __str__ = table


# --- variables as trees ---


def check_array(x: Any) -> None:
    """Refuse an input that is no array.

    Raises:
      TypeError: it has no shape and type, as a list of numbers has none.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"x: expected an array, found a {type(x).__name__}; pass jnp.asarray(x).")


def _is_qtensor(node: Any) -> bool:
    return isinstance(node, QTensor)


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any]]:
    """Paths and leaves of a tree, `QTensor` nodes kept whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_qtensor)
    return [path_string(path) for path, _ in flat], [leaf for _, leaf in flat]


def is_quantized(variables: Any) -> bool:
    """Whether the tree has the collection of activation quantizers."""
    return isinstance(variables, Mapping) and QUANTIZATION in variables


def without_quantization(variables: Any) -> Any:
    """The variables without the collection of activation quantizers."""
    if not is_quantized(variables):
        return variables
    return type(variables)({k: v for k, v in variables.items() if k != QUANTIZATION})


def dequantized(qvariables: Any) -> Any:
    """The float network that quantized variables stand for: weights as dequantized, and no activation quantizers."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf,
        without_quantization(qvariables),
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )


def with_quantization(variables: Any, quantizers: Mapping[str, Any]) -> Any:
    """The variables with the collection of activation quantizers added or replaced.

    Raises:
      TypeError: the variables are no dict, so that there is no place for a collection.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables: expected a dict at the top level, found {type(variables).__name__}. Wrap it: "
            "trace(lambda v, x: apply_fn(v['params'], x), {'params': variables}, spec)."
        )
    return type(variables)({**variables, QUANTIZATION: dict(quantizers)})


# --- tracing ---


def trace(
    apply_fn: Callable[[Any, jax.Array], Any],
    variables: Any,
    spec: jax.ShapeDtypeStruct | Sequence[int],
) -> Graph:
    """Find what `apply_fn(variables, x)` computes.

    Args:
      apply_fn: the network in inference mode, a pure function of its variables and a batch.
      variables: a pytree of arrays (or `jax.ShapeDtypeStruct`), a dict at the top level.
      spec: shape of x, `[N, H, W, C]` (float32), or a `jax.ShapeDtypeStruct`.

    Returns:
      The graph. Tracing runs no arithmetic on the weights.

    Raises:
      GraphError: BatchNorm in training mode, layers inside a loop, weights closed over, a network without layers,
        or an input shape the network does not take; the message says what to do.
      TypeError: `apply_fn` is no function, `variables` holds something that is not an array, or `spec` is no shape.
    """
    if isinstance(apply_fn, type) or is_module(apply_fn) or not callable(apply_fn):
        found = f"the class {apply_fn.__name__}" if isinstance(apply_fn, type) else type(apply_fn).__name__
        raise TypeError(
            f"apply_fn: expected a function (variables, x) -> outputs, found {found}. For a Linen or NNX module use "
            "dfq_jax.as_function(module, variables)."
        )
    if not isinstance(spec, jax.ShapeDtypeStruct):
        try:
            spec = jax.ShapeDtypeStruct(tuple(int(d) for d in spec), jnp.float32)
        except (TypeError, ValueError):
            raise TypeError(f"spec: expected a shape such as (1, 32, 32, 3), found {spec!r}.") from None
    variables = without_quantization(variables)
    paths, leaves = flatten_with_paths(variables)
    for path, leaf in zip(paths, leaves, strict=True):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"variables: {path!r} is a {type(leaf).__name__}, expected an array.")
    shapes = tuple(jax.ShapeDtypeStruct(tuple(v.shape), v.dtype) for v in leaves)
    treedef = jax.tree.structure(variables, is_leaf=_is_qtensor)
    cache: dict[Any, Graph] = {}
    graph = _trace(apply_fn, treedef, tuple(paths), shapes, spec, cache)
    cache[spec.shape, spec.dtype] = graph
    return graph


def _trace(
    apply_fn: Callable[[Any, jax.Array], Any],
    treedef: Any,
    paths: tuple[str, ...],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    spec: jax.ShapeDtypeStruct,
    cache: dict[Any, Graph],
) -> Graph:
    if not spec.shape or any(d < 1 for d in spec.shape):
        raise GraphError(f"x: every dimension must be at least 1, found shape {spec.shape}.")

    def function(leaves: Sequence[Any], x: Any) -> Any:
        return apply_fn(jax.tree.unflatten(treedef, leaves), x)

    try:
        program, output_treedef = flatten(function, shapes, spec)
    except Exception as error:
        raise GraphError(_explain_trace_failure(error, spec)) from error
    structure = analyze(program, paths)
    return Graph(
        **structure._asdict(),
        leaf_paths=paths,
        leaf_shapes=shapes,
        input=spec,
        program=program,
        treedef=treedef,
        output_treedef=output_treedef,
        logits_index=_logits_index(program, output_treedef),
        digest=_digest(paths, shapes, structure),
        apply_fn=apply_fn,
        _cache=cache,
    )


def _explain_trace_failure(error: Exception, spec: jax.ShapeDtypeStruct) -> str:
    if isinstance(error, ClosureError):
        return str(error)
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if "ModifyScopeVariable" in text or "mutable" in text:
        return (
            f"the network updates its state while it runs, as BatchNorm in training mode does ({text}). Trace it in "
            "inference mode: lambda v, x: model.apply(v, x, train=False), or use_running_average=True."
        )
    if "InvalidRng" in text:
        return (
            f"the network draws random numbers, as dropout in training mode does ({text}). Trace it in inference "
            "mode: lambda v, x: model.apply(v, x, train=False), or deterministic=True."
        )
    return (
        f"apply_fn cannot be traced on an input of shape {spec.shape} {spec.dtype} ({text}). Check the input shape "
        "and that apply_fn(variables, x) works by itself."
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
