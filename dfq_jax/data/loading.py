"""Data sets by name.

A data set is named by a spec:

- ``bundled``: the Fashion-MNIST test images that come with the package,
- ``npz:FILE``: uint8 ``images`` `[N, H, W, C]` or `[N, H, W]` and integer ``labels`` `[N]`,
- ``folder:DIR``: image files; the name of the subfolder, or of the file where there are no subfolders, is the index of
  the class: ``DIR/7/cat.png`` or ``DIR/0007.png``,
- ``tfds:NAME/SPLIT``: a prepared TensorFlow Datasets data set in the ArrayRecord format, such as
  ``tfds:imagenet2012/validation``, read without TensorFlow.

Images of folders and of TensorFlow Datasets are read and decoded when they are needed, and may vary in size where the
model's preprocessing resizes them.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.base import check_field
from dfq_jax.data.dataset import Dataset
from dfq_jax.data.folder import open_folder
from dfq_jax.data.tfds import open_tfds
from dfq_jax.zoo import read_npz

__all__ = ["load_data"]

_SCHEMES = "bundled, npz:FILE, folder:DIR, tfds:NAME/SPLIT"


def load_data(
    spec: str,
    *,
    limit: int | None = None,
    input_shape: Sequence[int] | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Opens a data set.

    >>> image, label = load_data("bundled", limit=10)[3]
    >>> image.shape, label
    ((28, 28, 1), 1)

    Args:
      spec: ``bundled``, ``npz:FILE``, ``folder:DIR`` or ``tfds:NAME/SPLIT``.
      limit: take only so many images, the first ones; note that folders are sorted by class.
      input_shape: the model's ``(1, H, W, C)``, to be checked against the images; leave it out where the
        preprocessing resizes or crops.
      channels: 1 or 3, to which encoded images are decoded; None for those of `input_shape` or, without it, for
        gray where all images of a folder are gray, else RGB.
      num_classes: number of the model's classes, to be checked against the labels.
      data_dir: where prepared TensorFlow Datasets lie; None takes the environment variable
        ``TFDS_DATA_DIR`` or that library's default, ``~/tensorflow_datasets``.

    Returns:
      The labeled images. Their first one has been read; what is wrong with another shows when it is read.

    Raises:
      TypeError: if images are not uint8 or labels not integers.
      ValueError: if the spec is unknown, the data are missing, empty or damaged, or do not fit `input_shape` or
        `num_classes`.
      ImportError: if the spec needs an extra of the package that is not installed; the message names it.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec: expected a string such as 'npz:FILE', found {type(spec).__name__}")
    for name, value in (("limit", limit), ("num_classes", num_classes), ("channels", channels)):
        check_field(name, value, "a positive number or None", lambda n: n is None or (type(n) is int and n >= 1))
    if input_shape is not None and (len(input_shape) != 4 or min(input_shape) < 1):
        raise ValueError(f"input_shape: expected (1, H, W, C), found {tuple(input_shape)}")
    if channels is None and input_shape is not None:
        channels = input_shape[3]
    checks: dict[str, Any] = {
        "image_shape": None if input_shape is None else tuple(input_shape[1:]),
        "num_classes": num_classes,
    }

    scheme, _, rest = spec.partition(":")
    if spec == "bundled" or (scheme == "npz" and rest):
        images, labels = _bundled() if spec == "bundled" else _npz(rest, spec)
        if images.ndim == 3:
            images = images[..., None]
        data = Dataset.from_arrays(spec, images[:limit], labels[:limit], **checks)
    elif scheme == "folder" and rest:
        data = open_folder(spec, rest, limit=limit, channels=channels, **checks)
    elif scheme == "tfds" and rest:
        data = open_tfds(spec, rest, limit=limit, channels=channels, data_dir=data_dir, **checks)
    else:
        raise ValueError(f"spec: {spec!r} names no data; expected one of {_SCHEMES}")
    data[0]
    return data


def _bundled() -> tuple[np.ndarray, np.ndarray]:
    path = importlib.resources.files("dfq_jax.zoo") / "weights" / "fashion_test.npz"
    if not path.is_file():
        raise ValueError("spec: the bundled images are missing; install the package again")
    return _npz(str(path), "bundled")


def _npz(path: str, spec: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_npz(path)
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise ValueError(f"spec: {spec} lacks {' and '.join(missing)}; it holds {found}")
    return arrays["images"], arrays["labels"]
