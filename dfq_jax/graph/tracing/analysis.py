"""From a flat program to the records of its layers, BatchNorms, tensors and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.tracing.batch_norm_pattern import Affine, ChannelAlgebra, Roles
from dfq_jax.graph.tracing.blocks import find_blocks
from dfq_jax.graph.tracing.canonical import keeps_elements
from dfq_jax.graph.tracing.elementwise import CASTS, NotElementwise, scalar
from dfq_jax.graph.tracing.naming import inner_paths, unique_names
from dfq_jax.graph.tracing.products import Product, computed_operands, count_macs, find_products, rearranged_leaf
from dfq_jax.graph.tracing.program import Constant, Op, Program
from dfq_jax.graph.tracing.refusals import refuse_nested_layers, refuse_training_mode
from dfq_jax.graph.tracing.regions import Activations, origins
from dfq_jax.graph.tracing.structure import BatchNorm, Block, GraphError, Layer, Skipped, Tensor

# What may stand between a tensor and the operand of a layer, so that its readers share one quantizer.
_TENSOR_LAYOUT = frozenset({
    "broadcast_in_dim", "convert_element_type", "copy", "pad", "reshape", "squeeze", "transpose",
})  # fmt: skip


class Structure(NamedTuple):
    """What `analyze` finds."""

    layers: tuple[Layer, ...]
    batch_norms: tuple[BatchNorm, ...]
    tensors: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]


def analyze(program: Program, paths: Sequence[str]) -> Structure:
    """Find what a program consists of.

    Args:
      program: from `flatten`.
      paths: of its leaves.

    Raises:
      GraphError: BatchNorm in training mode, layers inside a loop, or no layers, nor kernels that are computed.
    """
    refuse_nested_layers(program)
    refuse_training_mode(program)
    products, skipped = find_products(program, paths)
    if not products and not computed_operands(program):
        reasons = " ".join(f"{item.name}: {item.reason}." for item in skipped[:3])
        raise GraphError(f"no convolution or dense layer with a kernel in `variables` was found. {reasons}".strip())
    return _Analysis(program, paths, products).structure(skipped)


class _Norm(NamedTuple):
    form: Affine
    roles: Roles
    output: int


class _Bias(NamedTuple):
    leaf: int
    output: int


class _Analysis:
    """The steps share the program, the names and what earlier steps found."""

    def __init__(self, program: Program, paths: Sequence[str], products: Sequence[Product]):
        self.program = program
        self.paths = paths
        self.products = products
        self.algebra = ChannelAlgebra(program)
        self.activations = Activations(program, self.algebra)
        self.origins = origins(program, with_parameters=True)
        self.result_axes = {p.op.outputs[0]: p.result_axes for p in products}
        self.biases, self.norms = self._find_biases_and_norms()
        self.inner = inner_paths(paths)
        self.names = unique_names([self.inner[p.kernel] for p in products])
        self.name_at = {p.op.index: name for p, name in zip(products, self.names, strict=True)}
        self.sources = [self._source(p.data) for p in products]
        self.tensor_names: dict[int, str] = {}
        for (source, _), name in zip(self.sources, self.names, strict=True):
            self.tensor_names.setdefault(source, name)

    def structure(self, skipped: Sequence[Skipped]) -> Structure:
        batch_norms = self._batch_norms()
        layers = self._layers(batch_norms)
        return Structure(
            layers=layers,
            batch_norms=batch_norms,
            tensors=self._tensors(batch_norms),
            blocks=find_blocks(self.program, layers, self.tensor_names.keys()) if layers else (),
            skipped=(*skipped, *self._unrecognized_norms(), *self._other_parameters()),
        )

    # --- biases and BatchNorms ---

    def _find_biases_and_norms(self) -> tuple[dict[int, _Bias], list[_Norm]]:
        """One pass that carries affine forms; see `batch_norm_pattern`.

        A chain goes only through values that have one reader, so all of it can be replaced.
        """
        program = self.program
        by_output = {p.op.outputs[0]: p for p in self.products}
        forms: dict[int, tuple[Affine, ...]] = {}  # of a value from each base that a BatchNorm may begin at
        biases: dict[int, _Bias] = {}
        norms: dict[int, _Norm] = {}
        for op in program.ops:
            data = program.data_inputs(op)
            if len(data) != 1:
                continue
            (value,), out = data, op.outputs[0]
            starts = forms.get(value, ()) if program.readers(value) == 1 else ()
            form, *others = starts or (Affine(value),)
            bias = self._bias_leaf(op, form, by_output.get(form.base))
            if bias is not None:
                biases[form.base] = _Bias(bias, out)  # the sum is what a BatchNorm normalizes: a new base
                self.result_axes[out] = self.result_axes[form.base]
                continue
            extended = [longer for start in (form, *others) if (longer := self.algebra.extend(op, start))]
            if not extended or self._adds_a_leaf(op, form):
                continue  # what comes next starts from here
            if self._begins_with_a_number(op, form):
                extended.append(Affine(out))  # what ends an average, or the first step of a BatchNorm
            if op.name not in CASTS:
                complete = [i for i in form.chain if program.ops[i].outputs[0] in norms]
                norm = next((n for longer in extended if (n := self._norm(longer, out))), None)
                if norm is not None:
                    for i in complete:
                        del norms[program.ops[i].outputs[0]]
                    norms[out] = norm
                    extended = [norm.form]
                elif complete:  # something else per channel after a complete BatchNorm starts anew
                    anew = self.algebra.extend(op, Affine(value))
                    extended = [anew] if anew else []
            forms[out] = tuple(extended)
        return biases, list(norms.values())

    def _norm(self, form: Affine, output: int) -> _Norm | None:
        roles = self.algebra.match(form)
        return _Norm(form, roles, output) if roles and self._channel_axis(form, roles) is not None else None

    def _only_casts(self, form: Affine) -> bool:
        return all(self.program.ops[i].name in CASTS for i in form.chain)

    def _adds_a_leaf(self, op: Op, form: Affine) -> bool:
        """Whether a chain begins with the sum of its base and a leaf, with which no BatchNorm begins."""
        static = [v for v in op.value_inputs if v in self.program.parameter_only]
        if not static or op.name not in ("add", "add_any") or not self._only_casts(form):
            return False
        return rearranged_leaf(static[0], self.program, repeated=True) is not None

    def _begins_with_a_number(self, op: Op, form: Affine) -> bool:
        constant = any(isinstance(operand, Constant) for operand in op.inputs)
        return constant and op.name not in CASTS and self._only_casts(form)

    def _bias_leaf(self, op: Op, form: Affine, product: Product | None) -> int | None:
        """The leaf that the operation adds to the channels of a product's result, if it is that."""
        if product is None or op.name not in ("add", "add_any") or self.program.readers(form.base) != 1:
            return None
        if not self._only_casts(form):
            return None
        static = [v for v in op.value_inputs if v in self.program.parameter_only]
        found = rearranged_leaf(static[0], self.program, repeated=True) if static else None
        shape = self.program.avals[op.outputs[0]].shape
        if found is None or len(found.labels) != len(shape) or not found.in_order(range(len(shape))):
            return None
        sizes = self.program.avals[found.leaf].shape
        added = self.program.avals[static[0]].shape
        # Along axes that have nothing of the leaf it is only repeated.
        varies = (any(sizes[label] > 1 for label in labels) for labels in found.labels)
        own = tuple(size if v else 1 for size, v in zip(added, varies, strict=True))
        expected = tuple(size if axis in product.result_axes else 1 for axis, size in enumerate(shape))
        return found.leaf if own == expected and math.prod(own) == math.prod(sizes) else None

    def _channel_axis(self, form: Affine, roles: Roles) -> int | None:
        shape = self.program.avals[form.base].shape
        channels = math.prod(self.program.avals[roles.mean].shape)
        if form.axis is not None:
            return form.axis if shape[form.axis] == channels else None
        if channels > 1:
            return None
        # Reshapes lose track of an axis of one channel: it is that of the layer, or any that is no batch of one.
        axes = self.result_axes.get(form.base, range(len(shape) - 1, 0, -1))
        return next((axis for axis in axes if shape[axis] == 1), None)

    def _batch_norms(self) -> tuple[BatchNorm, ...]:
        layer_of = {self._result(p): name for p, name in zip(self.products, self.names, strict=True)}
        names = unique_names([self.inner[norm.roles.mean] for norm in self.norms])
        result = []
        for name, (form, roles, output) in zip(names, self.norms, strict=True):
            axis = self._channel_axis(form, roles)
            # One along another axis, of as many channels as it may have, is no BatchNorm of the layer.
            joined = self.program.readers(form.base) == 1 and axis in self.result_axes.get(form.base, ())
            result.append(
                BatchNorm(
                    name=name,
                    mean=self.paths[roles.mean],
                    var=self.paths[roles.var],
                    scale=self._path(roles.scale),
                    bias=self._path(roles.bias),
                    epsilon=roles.epsilon,
                    channels=math.prod(self.program.avals[roles.mean].shape),
                    layer=layer_of.get(form.base) if joined else None,
                    activation=self.activations.after(output)[0],
                    channel_axis=axis,
                    indices=roles,
                    input=form.base,
                    output=output,
                    chain=form.chain,
                )
            )
        return tuple(result)

    # --- layers and tensors ---

    def _layers(self, batch_norms: Sequence[BatchNorm]) -> tuple[Layer, ...]:
        norm_of = {bn.layer: bn for bn in batch_norms if bn.layer is not None}
        layers = []
        for product, name, (source, input_chain) in zip(self.products, self.names, self.sources, strict=True):
            bias = self.biases.get(product.op.outputs[0])
            bn = norm_of.get(name)
            output = self._result(product)
            activation, end = self.activations.after(output if bn is None else bn.output)
            layers.append(
                Layer(
                    name=name,
                    kernel=self.paths[product.kernel],
                    bias=self._path(bias and bias.leaf),
                    kernel_shape=self.program.avals[product.kernel].shape,
                    channel_axes=product.channel_axes,
                    tensor=self.tensor_names[source],
                    batch_norm=bn and bn.name,
                    activation=activation,
                    consumers=self._consumers(end),
                    macs=count_macs(product.op, self.program),
                    op=product.op.index,
                    kernel_index=product.kernel,
                    bias_index=bias and bias.leaf,
                    kernel_operand=product.kernel_operand,
                    kernel_chain=product.kernel_chain,
                    input_chain=input_chain,
                    output=output,
                    end=end,
                    **product.describe(),
                )
            )
        return tuple(layers)

    def _result(self, product: Product) -> int:
        """The value that a product computes, its bias included."""
        raw = product.op.outputs[0]
        return self.biases[raw].output if raw in self.biases else raw

    def _path(self, leaf: int | None) -> str | None:
        return None if leaf is None else self.paths[leaf]

    def _source(self, value: int) -> tuple[int, tuple[int, ...]]:
        """The tensor that a layer's operand is a rearrangement of, and the operations between."""
        chain: list[int] = []
        while (op := self.program.producer(value)) is not None and self._rearranges(op):
            chain.insert(0, op.index)
            value = op.value_inputs[0]
        return value, tuple(chain)

    def _rearranges(self, op: Op) -> bool:
        if op.name not in _TENSOR_LAYOUT or len(op.value_inputs) != 1:
            return False
        if op.name == "pad":
            return op.inputs[0] == op.value_inputs[0] and _is_zero(op.inputs[1])
        if op.name == "broadcast_in_dim" and not keeps_elements(op, self.program):
            return False
        return jnp.issubdtype(self.program.avals[op.value_inputs[0]].dtype, jnp.floating)

    def _tensors(self, batch_norms: Sequence[BatchNorm]) -> tuple[Tensor, ...]:
        norm_at = {bn.output: bn.name for bn in batch_norms}
        readers: dict[int, list[str]] = {}
        leading: set[int] = set()  # operations between tensors and the layers that read them
        forms: dict[int, set[int]] = {}  # each tensor's value, and the rearrangements of it on the way to layers
        for product, name, (source, chain) in zip(self.products, self.names, self.sources, strict=True):
            readers.setdefault(source, []).append(name)
            leading.update((*chain, product.op.index))
            forms.setdefault(source, {source}).update(self.program.ops[i].outputs[0] for i in chain)
        tensors = []
        for source, layers in sorted(readers.items()):
            activation, start = self.activations.results.get(source, ("none", source))
            values = forms[source]
            others = any(op.index not in leading for value in values for op in self.program.consumers(value))
            tensors.append(
                Tensor(
                    name=self.tensor_names[source],
                    layers=tuple(layers),
                    activation="input" if source == self.program.input else activation,
                    batch_norm=norm_at.get(start),
                    shared=others or not values.isdisjoint(self.program.output_values),
                    value=source,
                    shape=self.program.avals[source].shape,
                )
            )
        return tuple(tensors)

    def _consumers(self, value: int) -> tuple[str, ...]:
        """The layers, residual sums and outputs that a value reaches first."""
        found: dict[str, None] = {}
        todo, seen = [value], {value}
        while todo:
            current = todo.pop(0)
            if current in self.program.output_values:
                found["output"] = None
            for op in self.program.consumers(current):
                if op.index in self.name_at:
                    found[self.name_at[op.index]] = None
                elif self._is_residual_sum(op):
                    found["add"] = None
                else:
                    todo.extend(v for v in op.outputs if v not in seen)
                    seen.update(op.outputs)
        return tuple(found)

    def _is_residual_sum(self, op: Op) -> bool:
        """A sum of two tensors, unlike the x + c x^3 inside GELU, whose terms come from one."""
        terms = {self.origins[v] for v in self.program.data_inputs(op)}
        return op.name in ("add", "add_any") and len(terms) == 2

    # --- what stays in float ---

    def _unrecognized_norms(self) -> list[Skipped]:
        """Products with the root of a parameter that belong to no BatchNorm."""
        program = self.program
        known = {i for norm in self.norms for i in norm.form.chain}
        roots: set[int] = set()
        skipped: dict[str, Skipped] = {}
        for op in program.ops:
            if program.parameter_only.issuperset(op.outputs):
                has_leaves = bool(program.leaves_behind[op.outputs[0]])
                if has_leaves and (op.name in ("sqrt", "rsqrt", "pow") or not roots.isdisjoint(op.value_inputs)):
                    roots.update(op.outputs)
            elif op.name in ("mul", "div") and op.index not in known:
                for value in roots.intersection(op.value_inputs):
                    leaves = ", ".join(sorted(self.paths[v] for v in program.leaves_behind[value]))
                    reason = "scales by the root of a parameter but computes no BatchNorm; it stays as it is"
                    # The root of a norm or of a single number is no standard deviation of channels.
                    channels = self.algebra.value(value)
                    per_channel = channels is not None and math.prod(program.shape(value)) > 1
                    skipped.setdefault(leaves, Skipped(leaves, reason, kind="norm" if per_channel else "parameter"))
        return list(skipped.values())

    def _other_parameters(self) -> list[Skipped]:
        """Arrays of two or more axes that are no kernel: embeddings, position tables, learned masks."""
        used = {p.kernel for p in self.products} | {bias.leaf for bias in self.biases.values()}
        for op in self.program.ops:
            if op.name in ("dot_general", "conv_general_dilated"):  # listed with the product that they make
                static = [v for v in op.value_inputs if v in self.program.parameter_only]
                used.update(*(self.program.leaves_behind[v] for v in static))
        skipped = []
        for leaf in range(self.program.num_leaves):
            aval = self.program.avals[leaf]
            is_array = sum(size > 1 for size in aval.shape) >= 2 and jnp.issubdtype(aval.dtype, jnp.floating)
            if is_array and leaf not in used and self.program.readers(leaf):
                reason = "an array that is no kernel of a convolution or matrix product"
                skipped.append(Skipped(self.paths[leaf], reason))
        return skipped


def _is_zero(operand: object) -> bool:
    """Whether an operand is the constant 0."""
    try:
        return bool(np.all(scalar(operand.value) == 0))
    except (AttributeError, NotElementwise):
        return False
