"""Codes narrower than a byte, packed for storage."""

from __future__ import annotations

import math

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Integer, UInt8

from dfq_jax.quantizers.qtensor import AnyArray, bounds, storage_bits


def pack(codes: Integer[ArrayLike, "..."], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Codes packed for storage, on the host.

    Codes are taken in row-major order, the first in the lowest bits of a byte, two's complement if negative; the last
    byte is filled up with zeros.

    Args:
      codes: integers within the signed or the unsigned range of `bits`.
      bits: code width, 2 to 8; see `storage_bits` for the width stored.

    Returns:
      ``ceil(codes.size * storage_bits(bits) / 8)`` bytes.

    Raises:
      TypeError: `codes` are not integers.
      ValueError: a code does not fit in `bits`.
    """
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes: expected integers, found dtype {codes.dtype}; quantize first.")
    width, flat = storage_bits(bits), codes.reshape(-1).astype(np.int64)
    if flat.size:
        low, high = int(flat.min()), int(flat.max())
        qmin, qmax = bounds(bits, signed=low < 0)
        if low < qmin or high > qmax:
            raise ValueError(f"codes: expected [{qmin}, {qmax}] for bits={bits}, found [{low}, {high}].")
    per_byte = 8 // width
    rows = np.pad(flat & (2**width - 1), (0, -flat.size % per_byte)).reshape(-1, per_byte)
    return np.bitwise_or.reduce(rows << (width * np.arange(per_byte)), axis=1).astype(np.uint8)


def unpack(
    packed: UInt8[AnyArray, " bytes"], bits: int, shape: tuple[int, ...], signed: bool
) -> Integer[AnyArray, "..."]:
    """Inverse of `pack`, on the host; inside a compiled function where `packed` is a JAX array.

    >>> unpack(pack(np.array([-2, -1, 0, 1, 1]), bits=2), bits=2, shape=(5,), signed=True)
    array([-2, -1,  0,  1,  1], dtype=int8)

    Args:
      packed: bytes from `pack`.
      bits: code width that was packed.
      shape: shape of the codes.
      signed: whether the codes are two's complement.

    Returns:
      Codes in `shape`, int8 if `signed`, else uint8.

    Raises:
      ValueError: the number of bytes is not that of `shape`.
    """
    width, size = storage_bits(bits), math.prod(shape)
    if packed.shape != (-(-size * width // 8),):
        raise ValueError(
            f"packed: expected {-(-size * width // 8)} bytes for {size} codes of {width} stored bits, found shape "
            f"{packed.shape}; check bits and shape."
        )
    shifts = width * np.arange(8 // width, dtype=np.uint8)
    codes = ((packed[:, None] >> shifts) & np.uint8(2**width - 1)).reshape(-1)[:size].reshape(shape)
    # An arithmetic shift repeats the sign.
    return (codes << (8 - width)).astype(np.int8) >> (8 - width) if signed else codes
