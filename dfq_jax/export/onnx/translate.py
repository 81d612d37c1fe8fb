"""From a traced network and its variables to an ONNX model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from dfq_jax.base import check_field, may_transfer, require
from dfq_jax.export.onnx import products
from dfq_jax.export.onnx.batched import Batch, BatchedProgram, Shape, batched_program
from dfq_jax.export.onnx.operations import EMITTERS, Call, Unsupported, average_pool, reduction
from dfq_jax.export.onnx.quantization import INTEGER_TYPES, quantize_dequantize
from dfq_jax.export.onnx.writer import INPUT, Value, Writer, constant, onnx_dtype, plain
from dfq_jax.graph import LAYER_PRIMITIVES, Constant, Graph, GraphError, Op, Operand, affine, batch_norm_parameters
from dfq_jax.quantizers import QTensor, flatten_with_paths, quantization

LOGITS = "logits"
MIN_OPSET, FOUR_BIT_OPSET = 18, 21
# Before what follows these, ONNX Runtime lets an integer kernel end, which does the first ones itself.
_BEFORE_CODES = frozenset({"max", "min", "clamp", "copy", "reduce_window_max", "reshape", "transpose", "squeeze"})


@may_transfer
def to_onnx(
    graph: Graph,
    variables: Any,
    *,
    opset: int = MIN_OPSET,
    batch: int | None = None,
    int4: bool = False,
    integers: str = "u8u8",
    float_bias: bool = False,
):
    """An ONNX model of a network, quantized where its variables are.

    See `export_onnx` for the arguments and errors.
    """
    onnx = require("onnx", "onnx")
    newest = onnx.defs.onnx_opset_version()
    if type(opset) is not int or not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset: expected an integer from {MIN_OPSET} to {newest} (onnx {onnx.__version__}).")
    if int4 and opset < FOUR_BIT_OPSET:
        raise ValueError(f"int4: 4-bit weights need opset={FOUR_BIT_OPSET}, found opset={opset}.")
    check_field("integers", integers, f"one of {', '.join(INTEGER_TYPES)}", lambda v: v in INTEGER_TYPES)
    translation = _Translation(onnx, batched_program(graph, batch), variables, int4, integers, float_bias)
    return translation.model(opset)


class _Translation:
    """Walks the program once; `env` holds the ONNX form of each value that depends on the input."""

    def __init__(self, onnx: Any, program: BatchedProgram, variables: Any, int4: bool, integers: str, float_bias: bool):
        self.activation_type, self.weight_type = INTEGER_TYPES[integers]
        self.float_bias = float_bias
        self.onnx, self.program, self.graph, self.int4 = onnx, program, program.graph, int4
        self.leaves = self.graph.leaves(variables)
        self.quantizers = quantization(variables)
        self.among_codes = bool(self.quantizers.by_tensor)
        self.writer = Writer(onnx)
        self.env: dict[int, Value] = {}
        self.layers = {layer.op: layer for layer in self.graph.layers}
        self.tensors = {tensor.value: tensor for tensor in self.graph.tensors}
        self.norms = {bn.chain[-1]: bn for bn in self.graph.batch_norms}
        self.done = {i for bn in self.graph.batch_norms for i in bn.chain[:-1]}  # operations that need no node
        self.ops_of = {value: op for op in program.ops for value in op.outputs}
        self.readers: dict[int, list[Op]] = {}
        for op in program.ops:
            for value in op.value_inputs:
                self.readers.setdefault(value, []).append(op)
        self._constants: dict[int, np.ndarray] = {}

    # --- the model ---

    def model(self, opset: int) -> Any:
        source = self.graph.program
        x = plain(INPUT, self.program.shapes[source.input])
        self._store(source.input, x)
        for op in self.program.ops:
            static = source.parameter_only if op.index < len(source.ops) else ()
            if op.index not in self.done and not self._is_constant(op, static):
                self.writer.scope = op.scope
                self._translate(op)
        helper = self.onnx.helper
        outputs = [self._output(name, operand) for name, operand in zip(self._names(), source.outputs, strict=True)]
        graph = helper.make_graph(
            self.writer.nodes,
            "dfq_jax",
            [self._info(INPUT, x.shape, self.graph.input.dtype)],
            outputs,
            initializer=self.writer.initializers,
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            producer_name="dfq_jax",
            ir_version=helper.find_min_ir_version_for(opsets),
        )
        facts = {"graph": self.graph.digest, "logits": LOGITS, "tensors": self._tensor_names()}
        helper.set_model_props(model, {"dfq_jax": json.dumps(facts)})
        self.onnx.checker.check_model(model, full_check=True)
        return model

    def _tensor_names(self) -> dict[str, list[str]]:
        """The ONNX tensors that hold what layers read, transposed or not."""
        names = {tensor.name: [self.env[value].name] for value, tensor in self.tensors.items() if value in self.env}
        for node in self.writer.nodes:
            if node.op_type == "Transpose":
                for own in names.values():
                    own += node.output if node.input[0] in own else []
        return names

    def _names(self) -> list[str]:
        """Of the outputs: "logits", the others after their paths."""
        tree = jax.tree.unflatten(self.graph.output_treedef, range(len(self.graph.program.outputs)))
        paths, _ = flatten_with_paths(tree)
        names = [f"output/{path}" if path else "output" for path in paths]
        names[self.graph.logits_index] = LOGITS
        return names

    def _output(self, name: str, operand: Operand) -> Any:
        value = self._read(operand)
        self.writer.nodes.append(self.onnx.helper.make_node("Identity", [self.writer.whole(value)], [name], name=name))
        dtype = operand.dtype if isinstance(operand, Constant) else self.program.dtypes[operand]
        return self._info(name, value.shape, dtype)

    def _info(self, name: str, shape: Shape, dtype: Any) -> Any:
        sizes = [("batch" if s.times == 1 else f"batch_x{s.times}") if isinstance(s, Batch) else s for s in shape]
        return self.onnx.helper.make_tensor_value_info(name, self.writer.element_type(dtype), sizes)

    # --- values ---

    def _is_constant(self, op: Op, parameter_only: Any) -> bool:
        """Whether an operation is computed here, from parameters alone."""
        return all(v in parameter_only for v in op.outputs) and not any(
            isinstance(size, Batch) for value in (*op.outputs, *op.value_inputs) for size in self.program.shapes[value]
        )

    def _read(self, operand: Operand) -> Value:
        if isinstance(operand, Constant):
            return constant(operand.value)
        if operand not in self.env:
            return constant(self._constant(operand))
        return self.env[operand]

    def _constant(self, value: int) -> Any:
        """The value of a parameter or of what is computed from parameters alone."""
        if value < self.graph.program.num_leaves:
            leaf = self.leaves[value]
            return leaf.dequantize() if isinstance(leaf, QTensor) else leaf
        if value not in self._constants:
            op = self.ops_of[value]
            args = [i.value if isinstance(i, Constant) else self._constant(i) for i in op.inputs]
            self._constants.update(zip(op.outputs, op(*args), strict=True))
        return self._constants[value]

    def _store(self, value: int, result: Value) -> None:
        tensor = self.tensors.get(value)
        params = None if tensor is None else self.quantizers.for_all.get(tensor.name)
        if params is not None:
            result = self._quantized(result, params, tensor.name, self._axes_wanted(value, result))
        self.env[value] = result

    def _axes_wanted(self, value: int, result: Value) -> tuple[int, ...]:
        """The axes in which a convolution reads a tensor, so that nothing stands between it and DequantizeLinear."""
        for op in self.readers.get(value, ()):
            if op.name == "conv_general_dilated" and op.inputs[0] == value:
                return tuple(op.params["dimension_numbers"].lhs_spec)
        return result.axes

    def _quantized(self, value: Value, params: Any, name: str, axes: tuple[int, ...]) -> Value:
        return quantize_dequantize(self.writer, value, params, axes, f"{name}/input", self.activation_type)

    # --- operations ---

    def _translate(self, op: Op) -> None:
        try:
            if all(0 in self.program.shapes[value] for value in op.outputs):
                for value in op.outputs:
                    self._store(value, self._empty(value))
            elif op.index in self.norms:
                self._batch_norm(op)
            elif op.name in LAYER_PRIMITIVES:
                self._product(op)
            elif op.name in ("reduce_sum", "reduce_window_sum") and (division := self._mean(op)) is not None:
                call = self._call(op)
                self.done.add(division.index)
                mean = reduction(call, "ReduceMean") if op.name == "reduce_sum" else average_pool(call)
                self._store(division.outputs[0], mean)
            else:
                results = self._emitter(op)(self._call(op))
                results = results if isinstance(results, list) else [results]
                for value, result in zip(op.outputs, results, strict=True):
                    self._store(value, result)
        except Unsupported as error:
            raise GraphError(f"`{op.name}` {self._place(op)} cannot be written to ONNX: {error}.") from error

    def _empty(self, value: int) -> Value:
        """A value without elements, as an edge padded by nothing is."""
        shape = self.program.shapes[value]
        sizes = [1 if isinstance(size, Batch) else size for size in shape]
        return constant(np.zeros(sizes, self.program.dtypes[value]), shape)

    def _emitter(self, op: Op) -> Any:
        if op.name not in EMITTERS:
            raise Unsupported("there is no ONNX operation for it here")
        return EMITTERS[op.name]

    def _place(self, op: Op) -> str:
        """Where an operation is, by the layer before it."""
        before = [layer.name for layer in self.graph.layers if layer.op <= op.index]
        near = f"after layer {before[-1]}" if before else f"before layer {self.graph.first_layer.name}"
        return f"at {op.scope} ({near})" if op.scope else f"({near})"

    def _call(self, op: Op) -> Call:
        dtypes = [i.dtype if isinstance(i, Constant) else self.program.dtypes[i] for i in op.inputs]
        shapes = [self.program.shapes[value] for value in op.outputs]
        inputs = [self._read(i) for i in op.inputs]
        return Call(self.writer, inputs, op.params, shapes, self.program.dtypes[op.outputs[0]], dtypes)

    def _mean(self, op: Op) -> Op | None:
        """The division of a sum by the number of its terms, where nothing else becomes of the sum."""
        readers = self.readers.get(op.outputs[0], ())
        if len(readers) != 1 or op.outputs[0] in self.graph.program.output_values or op.outputs[0] in self.tensors:
            return None
        (division,) = readers
        if division.name not in ("div", "mul") or division.inputs[0] != op.outputs[0]:
            return None
        if division.index in self.norms or division.index in self.done or onnx_dtype(
            self.program.dtypes[op.outputs[0]]
        ) != np.float32:  # fmt: skip
            return None
        if op.name == "reduce_sum":
            sizes = [self.program.shape(op.inputs[0])[a] for a in op.params["axes"]]
            if any(isinstance(size, Batch) for size in sizes):
                return None
            count = np.prod(sizes)
        else:
            count = np.prod(op.params["window_dimensions"])
        by = division.inputs[1]
        if not isinstance(by, Constant) or np.size(by.value) != 1:
            return None
        wanted = count if division.name == "div" else 1 / count
        return division if np.isclose(float(np.asarray(by.value).reshape(())), wanted, rtol=1e-6) else None

    def _batch_norm(self, op: Op) -> None:
        bn = self.norms[op.index]
        factor, offset = affine(bn, batch_norm_parameters(bn, self.leaves), np)
        x, rank = self.env[bn.input], len(self.program.shapes[bn.input])
        for kind, vector in (("Mul", factor), ("Add", offset)):
            operand = products.along_axis(vector, bn.channel_axis, rank)
            x = self.writer.elementwise(kind, [x, operand], self.program.shapes[bn.input])
        self._store(op.outputs[0], x)

    def _product(self, op: Op) -> None:
        operands = [self._read(i) for i in op.inputs]
        sides = [i for i, value in enumerate(operands) if value.is_constant]
        shape = self.program.shapes[op.outputs[0]]
        if len(sides) != 1:
            if op.name == "conv_general_dilated":
                raise Unsupported("its kernel depends on the input")
            self._store(op.outputs[0], products.einsum(self.writer, op, *operands, shape))
            return
        (side,) = sides
        kernel_shape = self.program.shape(op.inputs[side])
        x, kernel, end = operands[1 - side], None, op.outputs[0]
        layer = self.layers.get(op.index)
        if layer is None:
            weights = products.channels_first(op, operands[side].array.astype(np.float64), side)
            kernel = products.Kernel(weights=weights, name=f"{op.scope or op.name}/kernel")
            kernel = kernel.with_bias_placed(after=False, among_codes=self.among_codes)
        else:
            x, kernel, end = self._layer(op, x)
        if op.name == "conv_general_dilated":
            if side == 0:
                raise Unsupported("its kernel is the left operand")
            result = products.convolution(self.writer, op, x, kernel, shape)
        elif products.has_batch_axes(op):
            both = [x, x]
            both[side] = products.kernel_operand(self.writer, op, kernel, kernel_shape, side)
            result = products.einsum(self.writer, op, *both, shape)
        else:
            result = products.matrix_product(self.writer, op, x, kernel, kernel_shape, side, shape)
        self._store(end, result)

    def _layer(self, op: Op, x: Value) -> tuple[Value, products.Kernel, int]:
        """The operand and the kernel of a layer, and the value up to which bias and BatchNorm are in the kernel."""
        layer = self.layers[op.index]
        leaf = self.leaves[layer.kernel_index]
        params = self.quantizers.for_all.get(layer.tensor)
        if params is None and layer.tensor in self.quantizers.for_layers and isinstance(leaf, QTensor):
            params = self.quantizers.for_layers[layer.tensor]
            conv = op.name == "conv_general_dilated"
            axes = tuple(op.params["dimension_numbers"].lhs_spec) if conv else x.axes
            x = self._quantized(x, params, layer.tensor, axes)
        form, end = self.graph.form(layer), op.outputs[0]
        kernel = products.layer_kernel(form, leaf, params, four_bit=self.int4, dtype=self.weight_type)
        if products.has_batch_axes(op):
            return x, kernel, end
        if layer.bias_index is not None:
            bias = np.asarray(self.leaves[layer.bias_index]).astype(np.float64).reshape(-1)
            kernel, end = dataclasses.replace(kernel, bias=bias), layer.output
            self.done.update(self._between(op.outputs[0], end))
        bn = None if layer.batch_norm is None else self.graph.batch_norm(layer.batch_norm)
        if bn is not None and form.channel_axes == (bn.channel_axis,):
            folded = kernel.times(*affine(bn, batch_norm_parameters(bn, self.leaves), np))
            if folded is not None:
                self.done.add(bn.chain[-1])
                kernel, end = folded, bn.output
        after = self.float_bias or not self._is_requantized(end)
        return x, kernel.with_bias_placed(after=after, among_codes=self.among_codes), end

    def _is_requantized(self, value: int) -> bool:
        """Whether a value is quantized for all its readers, at once or after what integer kernels can end with."""
        while value not in self.tensors or self.tensors[value].name not in self.quantizers.for_all:
            readers = self.readers.get(value, ())
            if len(readers) != 1 or readers[0].name not in _BEFORE_CODES:
                return False
            (value,) = readers[0].outputs
        return True

    def _between(self, start: int, end: int) -> list[int]:
        """The operations from one value to another along a chain."""
        found = []
        while end != start:
            op = self.graph.program.producer(end)
            found.append(op.index)
            (end,) = self.graph.program.data_inputs(op)
        return found
