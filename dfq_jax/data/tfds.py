"""Prepared data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dfq_jax.data.dataset import Dataset
from dfq_jax.data.images import decode

__all__ = ["open_tfds"]


def open_tfds(
    spec: str,
    name_and_split: str,
    *,
    limit: int | None,
    image_shape: tuple[int, int, int] | None,
    channels: int | None,
    num_classes: int | None,
    data_dir: Any,
) -> Dataset:
    """A split of a prepared data set; see `load_data`."""
    name, _, split = name_and_split.rpartition("/")
    if not name or not split:
        raise ValueError(f"spec: expected a split, such as tfds:cifar10/test, found {spec!r}")
    source = _data_source(name, split, data_dir)
    if not len(source):
        raise ValueError(f"spec: split {split!r} of {name!r} is empty")
    info = source.dataset_info
    image_key, label_key = info.supervised_keys or ("image", "label")
    missing = [key for key in (image_key, label_key) if key not in info.features]
    if missing:
        raise ValueError(
            f"spec: {name!r} has no {image_key!r} and {label_key!r}; it has {', '.join(sorted(info.features))}"
        )
    classes = getattr(info.features[label_key], "num_classes", None)
    if num_classes is not None and classes is not None and classes > num_classes:
        raise ValueError(f"num_classes: the model has {num_classes} classes, but {name!r} has {classes}")
    source, declared = _undecoded(source, image_key)
    channels = channels or declared

    def read(index: int) -> tuple[np.ndarray, int]:
        example = source[index]
        image, label = example[image_key], np.asarray(example[label_key])
        if label.ndim or label.dtype.kind not in "iu":
            raise ValueError(f"spec: the label of image {index} of {name!r} is {label.dtype} {label.shape}, no integer")
        if isinstance(image, (np.ndarray, np.generic)) and image.dtype.kind in "SO":
            image = image.item()  # an encoded file
        pixels = decode(image, f"{index} of {name}", channels) if isinstance(image, bytes) else np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels, int(label)

    size = len(source) if limit is None else min(limit, len(source))
    return Dataset(name=spec, size=size, read=read, image_shape=image_shape, num_classes=num_classes)


def _undecoded(source: Any, image_key: str) -> tuple[Any, int | None]:
    """The source with its images left as encoded files, and how many channels they have in it.

    They are decoded as the images of folders are, whatever libraries tensorflow-datasets finds to decode them by.
    """
    import tensorflow_datasets as tfds

    feature = source.dataset_info.features[image_key]
    if not isinstance(feature, tfds.features.Image):
        return source, None
    source.decoders = {image_key: tfds.decode.SkipDecoding()}
    return source, feature.shape[-1]


def _data_source(name: str, split: str, data_dir: Any) -> Any:
    needs = "spec: tfds:NAME/SPLIT needs tensorflow-datasets and array-record: pip install 'dfq_jax[tfds]'"
    try:
        import array_record.python.array_record_data_source  # noqa: F401 (tfds would miss it only later)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"{needs} ({error})") from error
    directory = "its data folder" if data_dir is None else os.fspath(data_dir)
    try:
        # Without `download`: measuring must not start a download of gigabytes, which most often needs
        # TensorFlow.
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except ImportError as error:
        raise ImportError(f"{needs} ({error})") from error
    except Exception as error:  # tfds has many exceptions of its own, for names, splits, files and formats
        reason = str(error)
        if len(reason) > 600:  # for an unknown name it lists all the names it knows
            reason = f"{reason[:200]} ... {reason[-400:]}"
        raise ValueError(
            f"spec: tensorflow-datasets cannot read split {split!r} of {name!r} from {directory}. It must "
            "have been prepared there with file_format='array_record'; data_dir says where. "
            f"Its own message: {reason}"
        ) from error
