"""Run a traced network, with the arithmetic of layers, tensors and BatchNorms replaced by rules.

One interpreter, `run`, serves every purpose: without rules it computes what `apply_fn` computes; recording, fake
quantization, integer arithmetic and the statistics of synthesis are rules. Everything is a pure function of the
variables and the input, so `jax.jit`, `jax.grad` and `jax.vmap` apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.graph.depthwise import by_platform, depthwise_product, is_supported
from dfq_jax.graph.graph import Graph, check_array
from dfq_jax.graph.tracing.program import Constant, Op
from dfq_jax.graph.tracing.structure import BatchNorm, Block, GraphError, Layer, Tensor
from dfq_jax.quantizers import QTensor, QuantizerParams, fake_quant, int8_codes, quantization, quantize


class BatchNormParameters(NamedTuple):
    """Leaves of one BatchNorm, each `[channels]`; scale and bias are 1 and 0 where the network has none."""

    mean: jax.Array
    var: jax.Array
    scale: jax.Array | float
    bias: jax.Array | float


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One execution of a layer, handed to a rule: its operands, and how to combine others like them."""

    layer: Layer
    op: Op
    graph: Graph
    source: jax.Array  # the tensor the layer reads, before padding, transposition and casts
    operand: jax.Array  # the operand of the primitive, as the program computes it
    kernel: Any  # the leaf: an array or a QTensor

    def default(self) -> jax.Array:
        """What the layer computes in the program."""
        kernel = self.kernel.dequantize() if isinstance(self.kernel, QTensor) else self.kernel
        return self.product(self.operand, self.kernel_operand(kernel, cast=True))

    def verbatim(self) -> jax.Array:
        """The same by the program's own primitive, for who traces the layer and is to find it."""
        return self.op(*self._ordered(self.operand, self.kernel_operand(self.kernel, cast=True)))[0]

    def reading(self, source: jax.Array) -> LayerCall:
        """The call on another value of the tensor."""
        return dataclasses.replace(self, source=source, operand=self.rearrange(source).astype(self.operand.dtype))

    def rearrange(self, source: jax.Array, pad_value: jax.Array | float = 0) -> jax.Array:
        """The operand made from another value of the tensor, casts left out; padding takes `pad_value`."""
        value = source
        for index in self.layer.input_chain:
            op = self.graph.program.ops[index]
            if op.name == "pad":
                value = lax.pad(value, jnp.asarray(pad_value, value.dtype), op.params["padding_config"])
            elif op.name != "convert_element_type":
                (value,) = op(value)
        return value

    def kernel_operand(self, leaf: jax.Array, *, cast: bool = False) -> jax.Array:
        """The kernel operand made from another value of the leaf, with or without the program's casts."""
        value = leaf
        for index in self.layer.kernel_chain:
            op = self.graph.program.ops[index]
            if cast or op.name != "convert_element_type":
                (value,) = op(value)
        return value

    def product(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """The program's own primitive on other operands of the same types."""

        call = self._without_values

        def own(operand: jax.Array, kernel: jax.Array) -> jax.Array:
            return call.op(*call._ordered(operand, kernel))[0]

        return by_platform(call._shifted_product, own, operand, kernel) if self.shifted else own(operand, kernel)

    @property
    def _without_values(self) -> LayerCall:
        """What custom derivatives may hold: their functions outlive the trace that the values belong to."""
        return dataclasses.replace(self, source=None, operand=None, kernel=None)

    @property
    def shifted(self) -> bool:
        """Whether the layer is computed as a sum of shifted products on CPU: a depthwise convolution."""
        if self.layer.kind != "conv" or self.layer.kernel_operand != 1:
            return False
        avals = self.graph.program.avals
        return is_supported(self.op.params, *(avals[value].shape for value in self.op.inputs))

    def float32_product(self, operand: jax.Array, kernel: jax.Array) -> jax.Array:
        """The product of float32 operands, in full precision."""
        return self._product(operand, kernel, jnp.float32, padding=None)

    def integer_product(
        self, operand: jax.Array, kernel: jax.Array, pad_value: jax.Array | None, dtype: Any = jnp.int32
    ) -> jax.Array:
        """The product of int8 operands, summed in `dtype`; a convolution's padding takes `pad_value` (None: 0)."""
        if self.layer.kind == "dense" or pad_value is None:
            return self._product(operand, kernel, dtype, padding=None)
        params = self.op.params
        numbers = params["dimension_numbers"]
        config = [(0, 0, 0)] * operand.ndim
        spatial = zip(numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"], strict=True)
        for axis, (low, high), dilation in spatial:
            config[axis] = (low, high, dilation - 1)
        operand = lax.pad(operand, pad_value.astype(operand.dtype), config)
        no_padding = [(0, 0)] * (operand.ndim - 2)
        return self._product(operand, kernel, dtype, padding=no_padding)

    def channel_vector(self, per_channel: jax.Array) -> jax.Array:
        """A value per channel of the kernel leaf (kept dimensions), shaped to broadcast against the result.

        Raises:
          GraphError: it varies along an axis that the layer sums over.
        """
        self.layer.check_scale(jnp.shape(per_channel))
        full = jnp.broadcast_to(per_channel, self.layer.kernel_shape)
        kernel = self.kernel_operand(full)
        params = self.op.params
        out_rank = len(self.graph.program.avals[self.op.outputs[0]].shape)
        if self.layer.kind == "conv":
            numbers = params["dimension_numbers"]
            index = [0] * kernel.ndim
            index[numbers.rhs_spec[0]] = slice(None)
            shape = [1] * out_rank
            shape[numbers.out_spec[1]] = -1
            return kernel[tuple(index)].reshape(shape)
        contract, batch = params["dimension_numbers"]
        own_contract, own_batch = contract[self.layer.kernel_operand], batch[self.layer.kernel_operand]
        free = [a for a in range(kernel.ndim) if a not in (*own_contract, *own_batch)]
        kernel = kernel.transpose(*own_batch, *free, *own_contract)
        kernel = kernel[(..., *([0] * len(own_contract)))]
        between = out_rank - kernel.ndim
        lead = kernel.shape[: len(own_batch)]
        if self.layer.kernel_operand == 1:
            return kernel.reshape(*lead, *([1] * between), *kernel.shape[len(own_batch) :])
        return kernel.reshape(*kernel.shape, *([1] * between))

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Axes of the result that run over the layer's output channels."""
        params = self.op.params
        rank = len(self.graph.program.avals[self.op.outputs[0]].shape)
        if self.layer.kind == "conv":
            return (params["dimension_numbers"].out_spec[1],)
        contract, batch = params["dimension_numbers"]
        operand = self.layer.kernel_operand
        kernel_rank = len(self.graph.program.avals[self.op.inputs[operand]].shape)
        free = kernel_rank - len(contract[operand]) - len(batch[operand])
        start = rank - free if operand == 1 else len(batch[operand])
        return (*range(len(batch[operand])), *range(start, start + free))

    def channel_mean(self, result: jax.Array) -> jax.Array:
        """Mean of the result per output channel, in float32, dimensions kept."""
        axes = tuple(a for a in range(result.ndim) if a not in self.channel_axes)
        return apart(result.astype(jnp.float32)).mean(axes, keepdims=True)

    def kernel_sum(self, kernel: jax.Array) -> jax.Array:
        """The sum of a kernel leaf over everything but its channels, shaped to broadcast against the result."""
        axes = tuple(a for a in range(kernel.ndim) if a not in self.layer.channel_axes)
        return self.channel_vector(kernel.astype(jnp.int32).sum(axes, keepdims=True))

    def _ordered(self, operand: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (kernel, operand) if self.layer.kernel_operand == 0 else (operand, kernel)

    def _shifted_product(self, operand: jax.Array, kernel: jax.Array, padding: Any = None) -> jax.Array:
        params = self.op.params
        padding = params["padding"] if padding is None else padding
        return depthwise_product(operand, kernel, tuple(params["window_strides"]), tuple(map(tuple, padding)))

    def _product(self, operand: jax.Array, kernel: jax.Array, dtype: Any, padding: Any) -> jax.Array:
        call, params = self._without_values, self.op.params

        def plain(operand: jax.Array, kernel: jax.Array) -> jax.Array:
            lhs, rhs = call._ordered(operand, kernel)
            precision = lax.Precision.HIGHEST if jnp.issubdtype(lhs.dtype, jnp.floating) else None
            if call.layer.kind == "dense":
                return lax.dot_general(
                    lhs, rhs, params["dimension_numbers"], precision=precision, preferred_element_type=dtype
                )
            explicit = padding is not None
            return lax.conv_general_dilated(
                lhs,
                rhs,
                window_strides=params["window_strides"],
                padding=padding if explicit else params["padding"],
                lhs_dilation=None if explicit else params["lhs_dilation"],
                rhs_dilation=params["rhs_dilation"],
                dimension_numbers=params["dimension_numbers"],
                feature_group_count=params["feature_group_count"],
                precision=precision,
                preferred_element_type=dtype,
            )

        def shifted(operand: jax.Array, kernel: jax.Array) -> jax.Array:
            return call._shifted_product(operand.astype(dtype), kernel.astype(dtype), padding)

        return by_platform(shifted, plain, operand, kernel) if self.shifted else plain(operand, kernel)


LayerRule = Callable[[LayerCall], jax.Array]
TensorRule = Callable[[Tensor, jax.Array], jax.Array]
BatchNormRule = Callable[[BatchNorm, jax.Array, BatchNormParameters], jax.Array]
LayerCorrection = Callable[[LayerCall, jax.Array], jax.Array]


def as_argument(rule: Callable[..., Any] | None) -> jax.tree_util.Partial | None:
    """A rule as an argument of a compiled function: the arrays bound to it are traced, the function is static."""
    return rule if rule is None or isinstance(rule, jax.tree_util.Partial) else jax.tree_util.Partial(rule)


def run(
    graph: Graph,
    variables: Any,
    x: Float[Array, "n ..."],
    *,
    layer: LayerRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Run the network with rules in place of its arithmetic.

    Args:
      graph: from `trace`.
      variables: the traced tree or a quantized copy of it (`QTensor` kernels).
      x: a batch, `[N, H, W, C]`; any batch size, and other image sizes where the network takes them.
      layer: computes a layer's product (without bias) from a `LayerCall`.
      tensor: maps each tensor that layers read, `(tensor, value) -> value`, before anyone reads it.
      batch_norm: computes each BatchNorm, `(batch_norm, input, parameters) -> output`.

    Returns:
      What `apply_fn` returns.

    Raises:
      GraphError: `variables` or `x` do not fit the graph.
      TypeError: `x` is no array.
    """
    graph = graph.at_input(x)
    return run_leaves(graph, graph.leaves(variables), x, layer=layer, tensor=tensor, batch_norm=batch_norm)


def run_leaves(
    graph: Graph,
    leaves: list[Any],
    x: Float[Array, "n ..."],
    *,
    layer: LayerRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
    live: frozenset[int] | None = None,
    results: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """`run` on a list of leaves, for rules that compute more than one operation.

    Args:
      graph: traced at the shape of x.
      leaves: of the variables, in the graph's order; None for one that no live operation reads.
      x, layer, tensor, batch_norm: as in `run`.
      live: indices of the operations to run; all if None.
      results: for layers whose rule computes what follows them too, the value (of the program) that it computes, in
        its type or as something that the rule of tensors takes. What that returns needs a method `astype` only.
    """
    program = graph.program
    ops = [op for op in program.ops if live is None or op.index in live]
    env = _interpret(graph, leaves, ops, program.input, x, layer, tensor, batch_norm, results=results)
    return _outputs(graph, env)


def run_block(
    graph: Graph,
    block: Block,
    variables: Any,
    x: Float[Array, "n ..."],
    *,
    layer: LayerRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """Run the operations of one block alone; the blocks of a network one after the other are the network.

    Args:
      graph: from `trace`.
      block: one of `graph.blocks`, or neighbors joined by `merge_blocks`.
      variables: as in `run`.
      x: value of the block's input, any batch size. The rule for tensors applies to it, and not to the block's result,
        which is the next block's input.
      layer, tensor, batch_norm: as in `run`.

    Returns:
      The value of the block's output; what `apply_fn` returns for the last block.

    Raises:
      GraphError: the block is not of this graph, or `variables` or `x` do not fit.
    """
    check_array(x)
    leaves = graph.leaves(variables)
    return run_block_leaves(graph, block, leaves, x, layer=layer, tensor=tensor, batch_norm=batch_norm)


def run_block_leaves(
    graph: Graph,
    block: Block,
    leaves: list[Any],
    x: Float[Array, "n ..."],
    *,
    layer: LayerRule | None = None,
    tensor: TensorRule | None = None,
    batch_norm: BatchNormRule | None = None,
) -> Any:
    """`run_block` on a list of leaves; those that the block does not read may be `jax.ShapeDtypeStruct`."""
    block = place_block(graph, block)
    if x.shape != graph.program.avals[block.input].shape:
        graph = graph.at((*x.shape[:1], *graph.input.shape[1:]), graph.input.dtype)
        block = place_block(graph, block)
        expected = graph.program.avals[block.input].shape
        if x.shape != expected:
            raise GraphError(f"x: block {block.name!r} takes a value of shape {expected}, found {x.shape}.")
    ops = graph.program.between(block.input, block_outputs(graph, block))
    env = _interpret(graph, leaves, ops, block.input, x, layer, tensor, batch_norm, end=block.output)
    return _outputs(graph, env) if block.output < 0 else env[block.output]


def place_block(graph: Graph, block: Block) -> Block:
    """The block with its places in this graph, which may be of another batch size than the one it was taken from."""
    first = [b for b in graph.blocks if b.layers[0] == block.layers[0]]
    last = [b for b in graph.blocks if b.layers[-1] == block.layers[-1]]
    if not first or not last:
        raise GraphError(f"block: {block.name!r} is no block of this network; its blocks are in graph.blocks.")
    return dataclasses.replace(block, input=first[0].input, output=last[0].output)


def block_outputs(graph: Graph, block: Block) -> frozenset[int]:
    """The values that a block is run for."""
    return graph.program.output_values if block.output < 0 else frozenset({block.output})


def _outputs(graph: Graph, env: dict[int, Any]) -> Any:
    outputs = [o.value if isinstance(o, Constant) else env[o] for o in graph.program.outputs]
    return jax.tree.unflatten(graph.output_treedef, outputs)


def _interpret(
    graph: Graph,
    leaves: list[Any],
    ops: Sequence[Op],
    begin: int,
    x: jax.Array,
    layer: LayerRule | None,
    tensor: TensorRule | None,
    batch_norm: BatchNormRule | None,
    end: int | None = None,
    results: Mapping[str, int] = MappingProxyType({}),
) -> dict[int, Any]:
    """Run operations by the rules from the value `begin` on; the rule for tensors leaves the value `end` alone."""
    program = graph.program
    env: dict[int, Any] = {i: leaf.dequantize() if isinstance(leaf, QTensor) else leaf for i, leaf in enumerate(leaves)}
    sources: dict[str, jax.Array] = {}
    layers = {item.op: item for item in graph.layers}
    tensors = {item.value: item for item in graph.tensors if item.value != end}
    norms = {bn.chain[-1]: bn for bn in graph.batch_norms} if batch_norm is not None else {}
    inside = {i for bn in norms.values() for i in bn.chain[:-1]}

    def read(operand: Any) -> Any:
        return operand.value if isinstance(operand, Constant) else env[operand]

    def store(value: int, result: jax.Array) -> None:
        item = tensors.get(value)
        if item is not None and tensor is not None:
            result = tensor(item, result)
            sources[item.name] = result  # readers that compute in float32 get it before rounding to a narrow type
            result = result.astype(program.avals[value].dtype)
        env[value] = result

    store(begin, x)
    for op in ops:
        if op.index in inside:
            continue
        if op.index in norms:
            bn = norms[op.index]
            result = batch_norm(bn, env[bn.input], batch_norm_parameters(bn, leaves))
            store(op.outputs[0], result.astype(program.avals[op.outputs[0]].dtype))
        elif op.index in layers:
            item = layers[op.index]
            source = sources.get(item.tensor, env[graph.tensor(item.tensor).value])
            operand = env.get(op.inputs[1 - item.kernel_operand])
            call = LayerCall(item, op, graph, source, operand, leaves[item.kernel_index])
            result = (layer or LayerCall.default)(call)
            if item.name in results:
                store(results[item.name], result)
            else:
                store(op.outputs[0], result.astype(program.avals[op.outputs[0]].dtype))
        else:
            for value, result in zip(op.outputs, op(*map(read, op.inputs)), strict=True):
                store(value, result)
    return env


def batch_norm_parameters(bn: BatchNorm, leaves: list[Any]) -> BatchNormParameters:
    """The parameters of one BatchNorm from the graph's list of leaves."""
    roles = bn.indices

    def leaf(index: int | None, default: float) -> Any:
        return default if index is None else leaves[index].reshape(-1)

    return BatchNormParameters(
        leaf(roles.mean, 0.0), leaf(roles.var, 1.0), leaf(roles.scale, 1.0), leaf(roles.bias, 0.0)
    )


def batch_norm_affine(bn: BatchNorm, leaves: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """A BatchNorm as a factor and an offset of each channel, `[channels]`, float64, on the host."""
    mean, var, scale, bias = (np.asarray(p, np.float64) for p in batch_norm_parameters(bn, leaves))
    factor = np.broadcast_to(scale / np.sqrt(var + bn.epsilon), (bn.channels,))
    return factor, bias - mean * factor


def normalize(bn: BatchNorm, x: Float[Array, "..."], parameters: BatchNormParameters) -> Float[Array, "..."]:
    """The BatchNorm itself, in float32: (x - mean) scale / sqrt(var + epsilon) + bias."""
    factor = parameters.scale * lax.rsqrt(parameters.var.astype(jnp.float32) + bn.epsilon)
    offset = parameters.bias - parameters.mean * factor
    return x.astype(jnp.float32) * along_channels(bn, x, factor) + along_channels(bn, x, offset)


def along_channels(bn: BatchNorm, x: jax.Array, vector: jax.Array) -> jax.Array:
    """`[channels]` shaped to broadcast against the BatchNorm's input."""
    shape = [1] * x.ndim
    shape[bn.channel_axis] = -1
    return jnp.reshape(vector, shape)


def apart(x: jax.Array) -> jax.Array:
    """The same float32 array, computed before the sum that reads it and not inside.

    jaxlib 0.10.2 fuses small products into sums over them on CPU, and then some of the sums are other ones
    (jax-ml/jax#39103). What rounds, here to float32 itself, it leaves apart; a barrier it takes away before.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def channel_moments(bn: BatchNorm, x: Float[Array, "..."]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and biased variance per channel over all other axes, in float32."""
    axes = tuple(a for a in range(x.ndim) if a != bn.channel_axis)
    x = apart(x.astype(jnp.float32))
    mean = x.mean(axes)
    return mean, jnp.square(x - along_channels(bn, x, mean)).mean(axes)


# --- recording ---


def record_tensors(
    graph: Graph, variables: Any, x: Float[Array, "n ..."], *, batch_norm: BatchNormRule | None = None
) -> tuple[Any, dict[str, jax.Array]]:
    """Outputs, and every tensor that layers read, by name; `batch_norm` as in `run`."""
    recorded: dict[str, jax.Array] = {}

    def keep(tensor: Tensor, value: jax.Array) -> jax.Array:
        recorded[tensor.name] = value
        return value

    return run(graph, variables, x, tensor=keep, batch_norm=batch_norm), recorded


# --- quantized execution ---


def apply_quantized(
    graph: Graph,
    qvariables: Any,
    x: Float[Array, "n ..."],
    *,
    integer: bool = False,
    batch_norm: BatchNormRule | None = None,
    after_layer: LayerCorrection | None = None,
) -> Any:
    """Run a quantized network.

    Both modes compute each quantized layer as `scale_x scale_w (sum of products of integer codes)`: `integer=False`
    holds the codes in float32, where they and their sums are exact up to 2^24, with straight-through gradients;
    `integer=True` holds them in int8 and sums in int32. So the two agree to the rounding of what is between layers.

    Args:
      graph: from `trace`.
      qvariables: from `quantize_params`: `QTensor` kernels, and activation quantizers in the collection
        "quantization". A layer whose tensor has no quantizer multiplies dequantized weights with float activations.
      x: `[N, H, W, C]`.
      integer: real integer products instead of the float simulation.
      batch_norm: as in `run`.
      after_layer: maps each layer's result (without bias), `(call, result) -> result`.

    Returns:
      What `apply_fn` returns.
    """
    product = _integer_layer if integer else _simulated_layer
    rules = quantized_rules(qvariables, product=product)

    def corrected(call: LayerCall) -> jax.Array:
        return after_layer(call, rules.layer(call))

    layer = rules.layer if after_layer is None else corrected
    return run(graph, qvariables, x, layer=layer, tensor=rules.tensor, batch_norm=batch_norm)


class QuantizedRules(NamedTuple):
    """Rules for `run` and `run_block`."""

    layer: LayerRule
    tensor: TensorRule


def quantized_rules(
    qvariables: Any,
    *,
    product: Callable[[LayerCall, QuantizerParams], jax.Array],
    in_float: LayerRule = LayerCall.default,
    fake_quantize: Callable[[str, jax.Array, QuantizerParams], jax.Array] | None = None,
    soft: frozenset[str] = frozenset(),
) -> QuantizedRules:
    """What is quantized where in a quantized network, in whatever arithmetic.

    A tensor that is quantized for all its readers is so for every one of them. One that is quantized for layers alone
    is so for those whose kernel is quantized, too; a layer with a float kernel reads it in float, and a layer whose
    tensor has no quantizer multiplies float activations with dequantized weights.

    Args:
      qvariables: quantized variables; only the collection "quantization" is read here.
      product: computes a layer whose kernel and tensor are both quantized; `call.source` is the fake-quantized tensor.
      in_float: computes all other layers.
      fake_quantize: quantizes and dequantizes a value in float32, `(layer, value, params) -> value`, once for each
        tensor that is quantized for all readers (with the first of its layers), else once for each layer.
      soft: paths of kernels that stand for quantized ones though they are arrays, so that gradients can move them.
    """
    quantizers = quantization(qvariables)
    by_tensor = quantizers.by_tensor

    def quantized(layer: str, value: jax.Array, params: QuantizerParams) -> jax.Array:
        value = value.astype(jnp.float32)
        return fake_quant(value, params) if fake_quantize is None else fake_quantize(layer, value, params)

    def tensor(item: Tensor, value: jax.Array) -> jax.Array:
        params = quantizers.for_all.get(item.name)
        return value if params is None else quantized(item.layers[0], value, params)

    def layer(call: LayerCall) -> jax.Array:
        params = by_tensor.get(call.layer.tensor)
        if params is None or not (isinstance(call.kernel, QTensor) or call.layer.kernel in soft):
            return in_float(call)
        if call.layer.tensor not in quantizers.for_all:
            call = dataclasses.replace(call, source=quantized(call.layer.name, call.source, params))
        return product(call, params)

    return QuantizedRules(layer, tensor)


def _simulated_layer(call: LayerCall, params: QuantizerParams) -> jax.Array:
    """Centered codes in float32: exact sums, and gradients to x through the fake-quantized tensor."""
    codes = _exact_codes(call.source, params)
    kernel = call.kernel.centered().astype(jnp.float32)
    total = call.float32_product(call.rearrange(codes), call.kernel_operand(kernel))
    return total * (params.scale * call.channel_vector(call.kernel.scale))


def _exact_codes(x_hat: jax.Array, params: QuantizerParams) -> jax.Array:
    """Centered codes of a fake-quantized tensor: exact integers in value, x_hat / scale for gradients."""
    ratio = x_hat.astype(jnp.float32) / params.scale
    return ratio + lax.stop_gradient(jnp.round(ratio) - ratio)


def _integer_layer(call: LayerCall, params: QuantizerParams) -> jax.Array:
    """int8 x int8 -> int32, zero points taken out afterwards: no second convolution unless weights need one."""
    codes, zero = int8_codes(quantize(call.source, params), params)
    kernel, kernel_zero = int8_codes(call.kernel.qvalue, call.kernel.params)
    codes = call.rearrange(codes, 0 if zero is None else zero)

    def product(kernel: jax.Array) -> jax.Array:
        total = call.integer_product(codes, call.kernel_operand(kernel), zero)
        return total if zero is None else total - zero.astype(jnp.int32) * call.kernel_sum(kernel)

    total = product(kernel)
    if kernel_zero is not None:
        # 8-bit asymmetric weights do not fit int8 once centered; their zero point multiplies the window sums of x.
        window = product(jnp.ones(call.layer.kernel_shape, jnp.int8))
        total = total - call.channel_vector(kernel_zero.astype(jnp.int32)) * window
    return total.astype(jnp.float32) * (params.scale * call.channel_vector(call.kernel.scale))
