"""Images over several devices.

Computation follows its data: what is computed with images that are sharded over a mesh's devices is computed on all of
them, each for its own images, and XLA adds up sums over images. So nothing here computes; it says where arrays lie.
Variables have a copy on each device. Where a mesh spans several processes, all of them run the same program.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Integer

from dfq_jax.base.backend import platform_of, usable_cores

__all__ = [
    "agreed",
    "by_image",
    "check_alike",
    "check_mesh",
    "drawn",
    "fetched",
    "from_writer",
    "is_writer",
    "mesh_of",
    "move_near",
    "noting_lost_processes",
    "on_all",
    "sharded",
    "sharded_as",
    "spans_processes",
    "summed",
    "threads_for",
]


def check_mesh(mesh: Any) -> Mesh | None:
    """The mesh that images are sharded over: its devices, with an axis for each prime factor of their number.

    So images can be sharded over any number of them that divides both. Axes are left to the compiler: explicit ones
    would ask for the sharding of every intermediate result, which a network traced without a mesh does not have.

    Args:
      mesh: None for one device.

    Raises:
      TypeError: it is something else.
      ValueError: it has devices of some processes, but not of all, or a mesh with explicit axes is set around the call.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        hint = "; pass its mesh" if isinstance(mesh, jax.sharding.Sharding) else ""
        raise TypeError(f"mesh: expected a jax.sharding.Mesh or None, found {mesh!r}{hint}.")
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "mesh: a mesh with explicit axes is set around the call (jax.set_mesh), which a network traced without one "
            "cannot follow; call outside of it."
        )
    devices = mesh.devices.reshape(-1)
    processes = {device.process_index for device in devices}
    if processes != {jax.process_index()} and len(processes) < jax.process_count():
        raise ValueError(
            f"mesh: expected devices of this process alone, or of all {jax.process_count()}, found those of the "
            f"processes {sorted(processes)} in process {jax.process_index()}."
        )
    factors = _prime_factors(len(devices))
    return Mesh(devices.reshape(factors or [1]), tuple(f"images{i}" for i in range(len(factors) or 1)))


def _prime_factors(number: int) -> list[int]:
    factor = next((f for f in range(2, math.isqrt(number) + 1) if number % f == 0), number)
    return [] if number == 1 else [factor, *_prime_factors(number // factor)]


def mesh_of(*trees: Any) -> Mesh | None:
    """The mesh of the first array that lies on several devices, if there is one.

    >>> mesh_of({"w": jnp.ones(2)}) is None
    True
    """
    for leaf in jax.tree.leaves(trees):
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def by_image(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], axis: int = 0) -> NamedSharding:
    """An array sharded along the axis of images over as many devices as divide their number; the others have copies.

    Along no axis, if it is negative.
    """
    if axis < 0:
        return NamedSharding(mesh, PartitionSpec())
    left, dividing = shape[axis], list[str]()
    for name, size in mesh.shape.items():
        if left % size == 0:
            left, dividing = left // size, [*dividing, name]
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, tuple(dividing)))


def sharded(tree: Any, mesh: Mesh | None, axes: Any = None) -> Any:
    """Arrays sharded by image over a mesh, as far as the number of images allows; as they are without one.

    Within a compiled function, too.

    Args:
      tree: of arrays.
      mesh: None for one device.
      axes: of images, the same tree; negative for arrays that all devices have a copy of. By default the first ones.

    >>> sharded(np.ones(3), None)
    array([1., 1., 1.])
    """
    if mesh is None:
        return tree
    axes = jax.tree.map(lambda _: 0, tree) if axes is None else axes
    return jax.tree.map(lambda a, axis: _put(a, by_image(mesh, a.shape, axis)), tree, axes)


def drawn(tree: Any, places: Integer[Array, " n"], mesh: Mesh | None) -> Any:
    """Some of the images of arrays that are sharded by image, sharded likewise; within a compiled function.

    Each device looks up those that it has, and what the devices found is added up: so much goes between them as is
    drawn, whatever it is drawn from.

    >>> drawn(jnp.arange(4.0), jnp.array([2, 0]), None)
    Array([2., 0.], dtype=float32)
    """
    places = on_all(places, mesh)  # sharded as the images are, parts of them would be sent around
    return jax.tree.map(lambda a: sharded(on_all(a[places], mesh), mesh), tree)


def sharded_as(part: Any, whole: Any) -> Any:
    """A part of a set of images, sharded over the devices that the set is sharded over; as it is if that is not."""
    mesh = mesh_of(whole)
    return part if mesh is None or whole.is_fully_replicated else sharded(part, mesh)


def on_all(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with a copy on each device of a mesh; as they are without one."""
    return tree if mesh is None else jax.tree.map(lambda a: _put(a, NamedSharding(mesh, PartitionSpec())), tree)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array placed so; what each process has of its own is the same in all of them."""
    if isinstance(array, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(array, sharding)
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if spread or sharding.is_fully_addressable or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.device_put(array, sharding)
    own = np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def fetched(tree: Any) -> Any:
    """The tree with arrays of NumPy, also where other processes hold parts of them."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = on_all(leaf, mesh_of(leaf))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def move_near(tree: Any, other: Any) -> Any:
    """The tree of NumPy arrays with arrays of JAX for leaves, on the devices where another array lies.

    What is known stays known where something else is traced.

    >>> move_near(np.ones(2), jnp.zeros(3)).devices() == jnp.zeros(3).devices()
    True
    """
    with jax.ensure_compile_time_eval():
        if (mesh := mesh_of(other)) is not None:
            return on_all(tree, mesh)
        moved = jax.device_put(tree)
        if not isinstance(other, jax.Array) or not (leaves := jax.tree.leaves(moved)):
            return moved
        # What lies on the default device stays free to follow others; what is put somewhere is not.
        return moved if leaves[0].devices() == other.devices() else jax.device_put(moved, *other.devices())


def threads_for(*trees: Any) -> int:
    """How many calls with these arrays may run side by side: on CPU one for each core.

    Accelerators have no use for it, and programs of several devices have to begin everywhere in the same order.
    """
    return usable_cores() if platform_of(*trees) == "cpu" and mesh_of(*trees) is None else 1


# --- several processes ---


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def is_writer(mesh: Mesh | None) -> bool:
    """Whether it is this process that writes files: the first one of a mesh, or the only one."""
    return mesh is None or jax.process_index() == min(device.process_index for device in mesh.devices.flat)


def agreed(flags: Sequence[bool], mesh: Mesh | None) -> tuple[bool, ...]:
    """Flags that are set in any process of a mesh, the same in all of them, at the same place of the program.

    >>> agreed((True, False), None)
    (True, False)
    """
    if not spans_processes(mesh):
        return tuple(flags)
    return tuple(multihost_utils.process_allgather(np.array(flags)).reshape(-1, len(flags)).any(0).tolist())


def summed(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Counts of all processes of `jax.distributed`, added up exactly; each below 2^31.

    >>> summed(np.array([3, 4]))
    array([3, 4])
    """
    if jax.process_count() == 1:
        return counts
    return multihost_utils.process_allgather(counts.astype(np.int32)).reshape(-1, len(counts)).sum(0, dtype=np.int64)


def from_writer(data: bytes | None, mesh: Mesh | None) -> bytes | None:
    """What the process that writes files has, in every process of a mesh.

    >>> from_writer(b"work", None)
    b'work'
    """
    if not spans_processes(mesh):
        return data
    own = is_writer(mesh)
    size = struct.pack("<q", -1 if data is None else len(data)) if own else bytes(8)
    (length,) = struct.unpack("<q", _sent(size, own))
    return None if length < 0 else _sent(data if own else bytes(length), own)


def _sent(data: bytes, own: bool) -> bytes:
    return multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8), is_source=own).tobytes()


def check_alike(mesh: Mesh | None, **digests: str) -> None:
    """Refuse arguments that differ between the processes of a mesh.

    Raises:
      ValueError: the digest of one, by its name, is another one in another process.
    """
    if not spans_processes(mesh):
        return
    own = [hashlib.sha256(digest.encode()).digest() for digest in digests.values()]
    found = multihost_utils.process_allgather(np.frombuffer(b"".join(own), np.uint8)).reshape(-1, len(own), 32)
    for name, alike in zip(digests, (found == found[:1]).all((0, 2)), strict=True):
        if not alike:
            raise ValueError(f"{name}: found others in other processes of the mesh; give all of them the same.")


@contextlib.contextmanager
def noting_lost_processes(mesh: Mesh | None) -> Iterator[None]:
    """Errors of the runtime say what they mean where several processes work together."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if spans_processes(mesh):
            error.add_note(
                "mesh: a process that shares it may have ended, or cannot be reached any more. End the others, and "
                "start all of them again with the same arguments; with a checkpoint they go on from there."
            )
        raise
