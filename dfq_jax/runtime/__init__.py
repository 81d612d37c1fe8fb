"""Integer execution: a quantized network compiled to int8 codes from layer to layer.

`apply_quantized(integer=True)` multiplies in int8 and returns to float after every layer. Here what follows a
layer's sum, `scale_x scale_w (sum - zero) + bias`, BatchNorm, activation and the next quantizer, is

    codes = round(clip(multiplier * sum + offset, low, high))

with one multiplier and one offset per channel, as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877 (with a float32 multiplier, which XLA fuses, in place
of fixed point). Zero points are in the offset, so no layer runs a second product. A tensor that something other than
layers reads in float, such as a residual sum, stays in float for that reader. Where a network computes in bfloat16 or
float16, a layer computes its sum alone and the network's own operations follow: what they round moves codes.

    plan, ivariables = compile_integer(graph, qvariables)
    outputs = jax.jit(apply_plan, static_argnums=0)(plan, ivariables, x)

`policy.py` says what runs as int8 on which backend, `fusion.py` what layers compute together with what follows them,
`compiler.py` makes the plan (`plan.py`) and its arrays, `execution.py` runs it. `self_test.py` and `timing.py` replace
what a policy assumes by what this machine does; `table.py` shows the outcome.
"""

from dfq_jax.runtime.compiler import compile_integer
from dfq_jax.runtime.execution import apply_plan
from dfq_jax.runtime.network import IntegerNetwork
from dfq_jax.runtime.plan import IntegerPlan, LayerPlan
from dfq_jax.runtime.policy import Decision, Policy, default_policy
from dfq_jax.runtime.table import kernel_table
from dfq_jax.runtime.timing import measure_policy

__all__ = [
    "Decision",
    "IntegerNetwork",
    "IntegerPlan",
    "LayerPlan",
    "Policy",
    "apply_plan",
    "compile_integer",
    "default_policy",
    "kernel_table",
    "measure_policy",
]
