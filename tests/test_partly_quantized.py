"""Networks of which some kernels or tensors stay in float: simulation, integers and what learns agree on the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from model_grid import function_case

from dfq_jax.graph import apply_quantized
from dfq_jax.graph.graph import trace
from dfq_jax.quantizers.collection import OPERANDS, QUANTIZATION, TENSORS, quantization, with_quantization
from dfq_jax.quantizers.qtensor import QTensor, fake_quant
from dfq_jax.runtime import apply_plan, compile_integer
from dfq_jax.stages.convention import Convention, quantize_params
from dfq_jax.stages.finetuning import FinetuneConfig
from dfq_jax.stages.finetuning import student as finetuning
from dfq_jax.stages.ranges import estimate_ranges
from dfq_jax.stages.rounding import ReconstructionConfig
from dfq_jax.stages.rounding.block import apply_soft, init_block, soft_kernels

SEEDS = jnp.arange(8, dtype=jnp.uint32)  # of all layers' masks


def residual(v, x, quantized=lambda name, value, own: value):
    """`quantized(name, value, own)` is what a layer reads, or with `own` None what everyone else reads."""

    def conv(value, name, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = v[name]
        return lax.conv_general_dilated(
            value, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    x = quantized("a_stem", x, None)
    h = jax.nn.relu(conv(quantized("a_stem", x, "a_stem"), "a_stem"))
    h = quantized("b_first", h, None)
    y = jax.nn.relu(conv(quantized("b_first", h, "b_first"), "b_first"))
    y = quantized("c_depthwise", y, None)
    y = conv(quantized("c_depthwise", y, "c_depthwise"), "c_depthwise", groups=6)
    z = conv(quantized("b_first", h, "d_side"), "d_side")
    h = quantized("e_head", (h + y + z).mean((1, 2)), None)
    return quantized("e_head", h, "e_head") @ v["e_head"]


SHAPES = {
    "a_stem": (3, 3, 3, 6),
    "b_first": (3, 3, 6, 6),
    "c_depthwise": (3, 3, 1, 6),
    "d_side": (1, 1, 6, 6),
    "e_head": (6, 4),
}


def start(shortcuts, kernels, tensors, dtype=jnp.float32):
    """The network with some kernels and some tensors left in float."""
    case = function_case("residual", residual, SHAPES, (4, 6, 6, 3))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), case.variables)
    x = case.images().astype(dtype)
    graph = trace(residual, variables, jax.ShapeDtypeStruct(x.shape, dtype))
    assert [layer.name for layer in graph.layers] == list(SHAPES)
    convention = Convention.parse("w4a4", shortcuts=shortcuts, weight_range="min_max")
    ranges = estimate_ranges(graph, variables, x, convention, estimator="max")
    qvariables = quantize_params(graph, variables, ranges, convention)
    kept = [(tensor.name, tensor.name) for tensor in graph.tensors if tensor.name not in tensors]
    quantizers = quantization(qvariables).renamed(kept)
    qvariables = graph.replace(qvariables, {name: variables[name] for name in kernels})
    return graph, variables, with_quantization(qvariables, quantizers), x


def expected(qvariables, x):
    """The rule written out: layers with quantized kernels read quantized tensors, others only what all read so."""
    for_all, for_layers = (qvariables[QUANTIZATION][kind] for kind in (TENSORS, OPERANDS))

    def quantized(name, value, own):
        if own is None:
            return fake_quant(value, for_all[name]) if name in for_all else value
        is_quantized = name in for_layers and isinstance(qvariables[own], QTensor)
        return fake_quant(value, for_layers[name]) if is_quantized else value

    kernels = {
        name: leaf.dequantize() if isinstance(leaf, QTensor) else leaf
        for name, leaf in qvariables.items()
        if name != QUANTIZATION
    }
    return residual(kernels, x, quantized)


PARTS = [
    ((), ()),
    (("d_side",), ()),  # a float kernel reads a tensor that is quantized for another layer
    (("b_first", "c_depthwise"), ()),
    ((), ("b_first",)),
    ((), ("a_stem", "e_head")),
    (("d_side",), ("c_depthwise",)),
    (("a_stem", "b_first", "d_side", "e_head"), ("e_head",)),
]


@pytest.mark.parametrize(
    ("shortcuts", "kernels", "tensors"),
    [
        pytest.param(shortcuts, *part, marks=() if i in fast else pytest.mark.slow)
        for shortcuts, fast in (("float", (1, 3, 5)), ("quantized", (1,)))
        for i, part in enumerate(PARTS)
    ],
)
def test_all_ways_to_run_it_agree(shortcuts, kernels, tensors):
    graph, variables, qvariables, x = start(shortcuts, kernels, tensors)
    student = finetuning.init_student(graph, FinetuneConfig(), variables, qvariables)
    config = ReconstructionConfig(trust=1.0)
    state, bases = init_block(graph, config, variables, qvariables, frozenset())
    learned = state.parameters
    assert finetuning.soft_kernels(student) == frozenset(learned.kernels) == frozenset(SHAPES) - {*kernels}

    @jax.jit
    def simulations(qvariables, x):
        soft = finetuning.soft_student(graph, qvariables, student)
        found = {
            "simulation": apply_quantized(graph, qvariables, x),
            "student": finetuning.student_outputs(graph, soft, x, finetuning.soft_kernels(student)).scores,
            "fixed block": apply_soft(graph, qvariables, x, SEEDS, 0.0, frozenset()),
            "integer": apply_quantized(graph, qvariables, x, integer=True),
        }
        return found, expected(qvariables, x)

    found, wanted = simulations(qvariables, x)
    plan, ivariables = compile_integer(graph, qvariables)
    found["compiled"] = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()), err_msg=name)
    # Soft kernels begin near their codes: what they say of tensors is the rule's.
    soft = {**qvariables, **soft_kernels(qvariables, bases, learned)}
    kernels = {name: soft[name] for name in SHAPES}
    value = jax.jit(lambda v, x: apply_soft(graph, v, x, SEEDS, 0.0, frozenset(learned.kernels)))(soft, x)
    plain = {name: k.dequantize() if isinstance(k, QTensor) else k for name, k in kernels.items()}
    near = jax.jit(lambda v, x: apply_soft(graph, v, x, SEEDS, 1.0, frozenset(learned.kernels)))(soft, x)
    np.testing.assert_allclose(near, residual(plain, x), rtol=1e-4, atol=1e-4)  # all quantization dropped
    assert bool(jnp.all(jnp.isfinite(value)))
