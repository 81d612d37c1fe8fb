"""A compiled network as one value that runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from dfq_jax.runtime.execution import apply_plan
from dfq_jax.runtime.plan import IntegerPlan
from dfq_jax.runtime.table import kernel_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerNetwork:
    """A quantized network in integer execution.

    Attributes:
      plan: how each layer runs; static.
      variables: the arrays it runs on: codes of kernels, multipliers and offsets.
    """

    plan: IntegerPlan
    variables: Any

    @property
    def apply(self) -> Callable[[Any, jax.Array], Any]:
        """`(variables, x) -> outputs`, ready for `jax.jit`."""
        return functools.partial(apply_plan, self.plan)

    def __call__(self, x: Float[Array, "n ..."]) -> Any:
        """The outputs of the network, computed in integers where the plan says so."""
        return _apply_jitted(self.plan, self.variables, x)

    def kernels(self) -> str:
        """What each layer runs as, the measured speed where there is one, and why a layer stays in float."""
        return kernel_table(self.plan)


@functools.partial(jax.jit, static_argnums=0)
def _apply_jitted(plan: IntegerPlan, variables: Any, x: jax.Array) -> Any:
    return apply_plan(plan, variables, x)
