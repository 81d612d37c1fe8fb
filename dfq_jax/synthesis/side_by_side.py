"""Whole batches side by side, one on each of several devices, which then exchange nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Key

from dfq_jax.base import Loop, Turn, fetched, sharded
from dfq_jax.synthesis.step import advance_batch


class SideBySide(Loop):
    """The batches of a loop, which do not need each other, in groups of as many as there are devices.

    A group takes the place of a batch: its work is that of its batches, stacked, and each device has one of them. So a
    batch is made by the program that makes it on one device, and its images are the same.

    Attributes:
      loop: of images, on a mesh whose devices divide the number of its batches.
    """

    def __init__(self, loop: Any):
        plan, self.size = loop.plan, loop.mesh.size
        groups = dataclasses.replace(plan, num_batches=plan.num_batches // self.size, lanes=1)
        super().__init__(groups, loop.key, loop.mesh)
        self.loop, self.graph, self.config = loop, loop.graph, loop.config
        self._keys: dict[int, Key[Array, " batches"]] = {}

    def origin(self) -> tuple[tuple[Any, ...], Any]:
        """Those of the loop, and how many batches are a group."""
        settings, arrays = self.loop.origin()
        return (*settings, self.size), arrays

    def begin(self, batch: int) -> Any:
        """A group before its first step."""
        return self.place(batch, self.stacked([self.loop.first(own) for own in self.members(batch)]))

    def place(self, batch: int, work: Any) -> Any:
        """A batch on each device."""
        return sharded(work, self.mesh)

    def prepare(self, turn: Turn, work: Any) -> Any:
        """By the loop."""
        if turn.begin != self.loop.response_step:
            return work
        return self.place(turn.batch, self.stacked([self.loop.prepare(turn, own) for own in self.apart(work)]))

    def advance(self, turn: Turn, work: Any) -> tuple[Any, jax.Array]:
        """A call for all batches of a group; their mean loss."""
        state, targets, _ = work
        static = self.mesh, self.graph, self.loop.settings, self.loop.optimizer
        steps, keys = self.length(turn), self.keys(turn.batch)
        state, losses = advance_batches(*static, steps, self.loop.variables, state, targets, keys)
        return (state, targets, losses), losses.loss.mean()

    def keys(self, group: int) -> Key[Array, " batches"]:
        """Of the steps of each batch of a group; made once."""
        if group not in self._keys:
            keys = jnp.stack([self.loop.keys(own)[1] for own in self.members(group)])
            self._keys[group] = sharded(keys, self.mesh)
        return self._keys[group]

    def check(self, turn: Turn, loss: float) -> None:
        """By the loop, for each batch of a group."""
        if np.isfinite(loss):
            return
        for own, work in zip(self.members(turn.batch), self.apart(self.work[turn.batch]), strict=True):
            self.loop.work[own] = work
            self.loop.check(turn._replace(batch=own), float(work[2].loss))

    def template(self, batch: int, facts: dict[str, Any]) -> Any:
        """A group."""
        return jax.eval_shape(lambda: self.stacked([self.loop.template(own, facts) for own in self.members(batch)]))

    def result(self, completed: bool) -> Any:
        """What the loop has made."""
        for group, work in self.work.items():
            self.loop.work |= zip(self.members(group), self.apart(fetched(work)), strict=True)
        return self.loop.result(completed)

    def members(self, group: int) -> range:
        """The batches of a group."""
        return range(group * self.size, (group + 1) * self.size)

    def stacked(self, works: list[Any]) -> Any:
        """Works on batches as one on a group."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *works)

    def apart(self, work: Any) -> list[Any]:
        """The works on the batches of a group."""
        return [jax.tree.map(lambda a, i=i: a[i], work) for i in range(self.size)]


@functools.partial(jax.jit, static_argnames=("mesh", "graph", "config", "optimizer"), donate_argnames="state")
def advance_batches(
    mesh: Mesh, graph: Any, config: Any, optimizer: Any, steps: Any, variables: Any, state: Any, targets: Any, keys: Any
) -> tuple[Any, Any]:
    """`advance_batch` of a batch on each device; what it takes and gives of batches is that of all, stacked."""

    def alone(steps: Any, variables: Any, *stacked: Any) -> Any:
        own = jax.tree.map(lambda a: a[0], stacked)
        found = advance_batch(graph, config, optimizer, steps, variables, *own)
        return jax.tree.map(lambda a: a[None], found)

    all_, each = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = {"in_specs": (all_, all_, each, each, each), "out_specs": each}
    return _shard_map(alone, mesh, **specs)(steps, variables, state, targets, keys)


def _shard_map(function: Any, mesh: Mesh, **specs: Any) -> Any:
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)
    from jax.experimental.shard_map import shard_map  # JAX 0.6.0

    return shard_map(function, mesh=mesh, check_rep=False, **specs)
