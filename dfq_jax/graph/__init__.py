"""What a network computes, found in its jaxpr (`trace`), and running it by rules (`run`, `apply_quantized`)."""

from dfq_jax.graph.adapters import ApplyFn, as_function, linen_shapes, on_device, variable_shapes
from dfq_jax.graph.batch_norm import (
    BatchNormParameters,
    affine,
    along_channels,
    batch_norm_parameters,
    channel_covariance,
    channel_moments,
    normalize,
)
from dfq_jax.graph.call import LayerCall, loop_friendly
from dfq_jax.graph.checks import check_images, check_variables, doubtful_statistics
from dfq_jax.graph.computed import compute_kernels, computed_kernels
from dfq_jax.graph.execution import (
    BatchNormRule,
    ProductRule,
    Rules,
    TensorRule,
    as_argument,
    record_tensors,
    run,
    run_block,
    run_block_leaves,
    run_leaves,
)
from dfq_jax.graph.form import KernelForm, LayerForm
from dfq_jax.graph.graph import Graph, trace
from dfq_jax.graph.quantized import apply_quantized, quantized_rules, simulated_layer
from dfq_jax.graph.subnetwork import Subnetwork, subnetwork
from dfq_jax.graph.tracing.axes import operand_axes
from dfq_jax.graph.tracing.blocks import merge_blocks
from dfq_jax.graph.tracing.failures import where
from dfq_jax.graph.tracing.program import (
    CONTROL_FLOW,
    LAYER_PRIMITIVES,
    Constant,
    Op,
    Operand,
    Program,
    constant_bytes,
    sub_jaxprs,
)
from dfq_jax.graph.tracing.structure import BatchNorm, GraphError, GraphWarning, Layer, Skipped, Tensor

__all__ = [
    "CONTROL_FLOW",
    "LAYER_PRIMITIVES",
    "ApplyFn",
    "BatchNorm",
    "BatchNormParameters",
    "BatchNormRule",
    "Constant",
    "Graph",
    "GraphError",
    "GraphWarning",
    "KernelForm",
    "Layer",
    "LayerCall",
    "LayerForm",
    "Op",
    "Operand",
    "ProductRule",
    "Program",
    "Rules",
    "Skipped",
    "Subnetwork",
    "Tensor",
    "TensorRule",
    "affine",
    "along_channels",
    "apply_quantized",
    "as_argument",
    "as_function",
    "batch_norm_parameters",
    "channel_covariance",
    "channel_moments",
    "check_images",
    "check_variables",
    "compute_kernels",
    "computed_kernels",
    "constant_bytes",
    "doubtful_statistics",
    "linen_shapes",
    "loop_friendly",
    "merge_blocks",
    "normalize",
    "on_device",
    "operand_axes",
    "quantized_rules",
    "record_tensors",
    "run",
    "run_block",
    "run_block_leaves",
    "run_leaves",
    "simulated_layer",
    "sub_jaxprs",
    "subnetwork",
    "trace",
    "variable_shapes",
    "where",
]
