"""Integer execution: a quantized network compiled to int8 codes from layer to layer."""

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
