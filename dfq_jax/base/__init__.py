"""What every room stands on: fields of records, files, arrays of images, precision, and the loop of an optimizer."""

from dfq_jax.base.backend import memory_size, namespace_of, on_host, platform_of, usable_cores
from dfq_jax.base.checkpoint import fingerprint, remove_checkpoint
from dfq_jax.base.compilation import NO_YNN, RUN_ONCE, compiles_ahead, compiling_ahead, cpu_jit
from dfq_jax.base.contexts import may_transfer
from dfq_jax.base.devices import (
    agreed,
    by_image,
    check_alike,
    check_mesh,
    drawn,
    fetched,
    is_writer,
    mesh_of,
    move_near,
    noting_lost_processes,
    on_all,
    sharded,
    sharded_as,
    spans_processes,
    summed,
    threads_for,
)
from dfq_jax.base.environment import environment, package_version
from dfq_jax.base.extras import require
from dfq_jax.base.fields import check_field, check_fields, check_kind, is_non_negative, known_fields
from dfq_jax.base.files import replacing, write_atomically
from dfq_jax.base.images import (
    batches,
    clip,
    largest_divisor,
    low_pass,
    random_crop,
    random_flip,
    random_shift,
    random_window,
    smooth,
)
from dfq_jax.base.loop import CALL_SECONDS, Loop, Plan, Progress, Turn
from dfq_jax.base.optimization import State, descend, init_state, mean_of_parts, repeat
from dfq_jax.base.pieces import in_pieces
from dfq_jax.base.precision import check_precision, full_precision, products
from dfq_jax.base.text import LINE, aligned, hanging, with_units
from dfq_jax.base.threads import side_by_side
from dfq_jax.base.together import Together

__all__ = [
    "CALL_SECONDS",
    "LINE",
    "NO_YNN",
    "RUN_ONCE",
    "Loop",
    "Plan",
    "Progress",
    "State",
    "Together",
    "Turn",
    "agreed",
    "aligned",
    "batches",
    "by_image",
    "check_alike",
    "check_field",
    "check_fields",
    "check_kind",
    "check_mesh",
    "check_precision",
    "clip",
    "compiles_ahead",
    "compiling_ahead",
    "cpu_jit",
    "descend",
    "drawn",
    "environment",
    "fetched",
    "fingerprint",
    "full_precision",
    "hanging",
    "in_pieces",
    "init_state",
    "is_non_negative",
    "is_writer",
    "known_fields",
    "largest_divisor",
    "low_pass",
    "may_transfer",
    "mean_of_parts",
    "memory_size",
    "mesh_of",
    "move_near",
    "namespace_of",
    "noting_lost_processes",
    "on_all",
    "on_host",
    "package_version",
    "platform_of",
    "products",
    "random_crop",
    "random_flip",
    "random_shift",
    "random_window",
    "remove_checkpoint",
    "repeat",
    "replacing",
    "require",
    "sharded",
    "sharded_as",
    "side_by_side",
    "smooth",
    "spans_processes",
    "summed",
    "threads_for",
    "usable_cores",
    "with_units",
    "write_atomically",
]
