"""Labeled images to measure accuracy on; quantization itself needs none.

A data set is named by a spec:

- ``bundled``: the Fashion-MNIST test images that come with the package,
- ``npz:FILE``: uint8 ``images`` `[N, H, W, C]` or `[N, H, W]` and integer ``labels`` `[N]`,
- ``folder:DIR``: image files of one size; the name of the subfolder, or of the file where there are no
  subfolders, is the index of the class: ``DIR/7/cat.png`` or ``DIR/0007.png``,
- ``tfds:NAME/SPLIT``: a prepared TensorFlow Datasets data set in the ArrayRecord format, read without
TensorFlow.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from dfq_jax.zoo.arrays import read_npz

__all__ = ["Dataset", "load_data"]

_SCHEMES = "bundled, npz:FILE, folder:DIR, tfds:NAME/SPLIT"
_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images with labels.

    Attributes:
        name: where they are from.
        images: pixels 0...255, `[N, H, W, C]`, uint8.
        labels: indices of the classes, `[N]`, any integer type.

    Raises:
        TypeError: if `images` are not uint8 or `labels` not integers.
        ValueError: if a shape is not as above, the numbers of images and labels differ, there are none, or a
            label is negative.
    """

    name: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Integer[np.ndarray, " n"]

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            if not isinstance(getattr(self, name), np.ndarray):
                raise TypeError(f"{name}: expected a numpy array, found {type(getattr(self, name)).__name__}")
        images, labels = self.images, self.labels
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected pixels as uint8, found {images.dtype} in {self.name}")
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(f"images: expected shape [N, H, W, C], found {images.shape} in {self.name}")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels: expected integers, found {labels.dtype} in {self.name}")
        if labels.ndim != 1:
            raise ValueError(f"labels: expected shape [N], found {labels.shape} in {self.name}")
        if len(images) != len(labels):
            raise ValueError(f"labels: {len(labels)} labels for {len(images)} images in {self.name}")
        if not len(labels):
            raise ValueError(f"images: {self.name} holds none")
        if labels.min() < 0:
            raise ValueError(f"labels: label {labels.min()} in {self.name} is negative; classes count from 0")

    def __len__(self) -> int:
        return len(self.labels)


def load_data(
    spec: str,
    *,
    limit: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        spec: ``bundled``, ``npz:FILE``, ``folder:DIR`` or ``tfds:NAME/SPLIT``.
        limit: take only so many images, the first ones; note that folders are sorted by class.
        input_shape: the model's ``(1, H, W, C)``, to be checked against the images; leave it out where the
            preprocessing resizes or crops. Image files are decoded to C channels.
        num_classes: number of the model's classes, to be checked against the labels.
        data_dir: where prepared TensorFlow Datasets lie; None takes the environment variable
            ``TFDS_DATA_DIR`` or that library's default, ``~/tensorflow_datasets``.

    Returns:
        The images and labels, the latter as int32.

    Raises:
        TypeError: if images are not uint8 or labels not integers.
        ValueError: if the spec is unknown, the data are missing, empty, damaged or of inconsistent shapes, or
            do not fit `input_shape` or `num_classes`.
        ImportError: if the spec needs an extra of the package that is not installed; the message names it.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec: expected a string such as 'npz:FILE', found {type(spec).__name__}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit: expected a positive number of images or None, found {limit!r}")
    if input_shape is not None and (len(input_shape) != 4 or min(input_shape) < 1):
        raise ValueError(f"input_shape: expected (1, H, W, C), found {tuple(input_shape)}")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ValueError(f"num_classes: expected a positive number, found {num_classes!r}")
    channels = None if input_shape is None else input_shape[3]

    scheme, _, rest = spec.partition(":")
    if spec == "bundled":
        images, labels = _bundled()
    elif scheme == "npz" and rest:
        images, labels = _npz(rest, spec)
    elif scheme == "folder" and rest:
        images, labels = _folder(rest, limit, channels)
    elif scheme == "tfds" and rest:
        images, labels = _tfds(rest, limit, data_dir)
    else:
        raise ValueError(f"spec: {spec!r} names no data; expected one of {_SCHEMES}")

    if images.ndim == 3:
        images = images[..., None]
    data = Dataset(name=spec, images=images[:limit], labels=labels[:limit])
    if input_shape is not None and data.images.shape[1:] != tuple(input_shape[1:]):
        raise ValueError(
            f"input_shape: the model takes images of {_by(input_shape[1:])}, {spec} holds {_by(data.images.shape[1:])}"
        )
    if num_classes is not None and data.labels.max() >= num_classes:
        raise ValueError(
            f"num_classes: the model has {num_classes} classes (0...{num_classes - 1}), but {spec} has "
            f"the label {data.labels.max()}"
        )
    if data.labels.max() > np.iinfo(np.int32).max:
        raise ValueError(f"spec: {spec} has the label {data.labels.max()}, which is no index of a class")
    return Dataset(name=spec, images=data.images, labels=data.labels.astype(np.int32))


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(extent) for extent in shape)


def _bundled() -> tuple[np.ndarray, np.ndarray]:
    path = importlib.resources.files("dfq_jax.zoo") / "weights" / "fashion_test.npz"
    if not path.is_file():
        raise ValueError("spec: the bundled images are missing; install the package again")
    return _npz(os.fspath(path), "bundled")


def _npz(path: str, spec: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_npz(path)
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise ValueError(f"spec: {spec} lacks {' and '.join(missing)}; it holds {found}")
    return arrays["images"], arrays["labels"]


# Folders of image files


def _folder(path: str, limit: int | None, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("spec: folder:DIR needs pillow: pip install 'dfq_jax[folder]'") from error
    if channels not in (None, 1, 3):
        raise ValueError(f"input_shape: image files have 1 or 3 channels, the model takes {channels}")
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"spec: there is no folder {path!r}")
    files = _image_files(root)
    if not files:
        raise ValueError(f"spec: folder {path!r} holds no images ({', '.join(sorted(_SUFFIXES))})")
    files = files[:limit]
    images = [_decode(file, Image, channels) for file, _ in files]
    if len({image.ndim for image in images}) == 2:
        # Gray images among colored ones: photographs of one collection, so all become RGB.
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"spec: image {file.name!r} has {_by(image.shape[:2])} pixels, {files[0][0].name!r} has "
                f"{_by(images[0].shape[:2])}; resize them to one size first"
            )
    return np.stack(images), np.array([label for _, label in files])


def _image_files(root: Path) -> list[tuple[Path, int]]:
    """Image files with their class, by class and then by name."""
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry for entry in root.iterdir() if _is_image(entry)]
    if folders and loose:
        raise ValueError(
            f"spec: folder {os.fspath(root)!r} holds both images, such as {loose[0].name!r}, and subfolders, "
            f"such as {folders[0].name!r}; the class must be the name of either"
        )
    if loose:
        found = [(file, _class_index(file.stem, file)) for file in loose]
    else:
        found = [
            (file, _class_index(folder.name, folder))
            for folder in folders
            for file in folder.iterdir()
            if _is_image(file)
        ]
    return sorted(found, key=lambda item: (item[1], item[0].name))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _class_index(name: str, path: Path) -> int:
    if not (name.isascii() and name.isdigit() and len(name) <= 9):
        raise ValueError(f"spec: the name of {os.fspath(path)!r} must be the index of its class")
    return int(name)


def _decode(file: Path, image_module: Any, channels: int | None) -> np.ndarray:
    """Decodes an image to `[H, W]` for gray ones without `channels`, else to `[H, W, C]`."""
    try:
        with image_module.open(file) as image_file:
            image, mode = image_file, image_file.mode
            if mode in _MODES:
                if "transparency" in image.info:
                    image = image.convert("RGBA")  # else Pillow warns about palettes
                gray = channels == 1 or (channels is None and mode in ("1", "L", "LA"))
                pixels = np.asarray(image.convert("L" if gray else "RGB"))
                return pixels[..., None] if channels == 1 else pixels
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(f"spec: image {os.fspath(file)!r} cannot be decoded: {error}") from error
    raise ValueError(f"spec: image {os.fspath(file)!r} has pixels of mode {mode}, not of 8 bits")


# TensorFlow Datasets


def _tfds(name_and_split: str, limit: int | None, data_dir: Any) -> tuple[np.ndarray, np.ndarray]:
    name, _, split = name_and_split.rpartition("/")
    if not name or not split:
        raise ValueError(f"spec: expected a split, such as tfds:cifar10/test, found 'tfds:{name_and_split}'")
    source = _data_source(name, split, data_dir)
    image_key, label_key = source.dataset_info.supervised_keys or ("image", "label")
    count = len(source) if limit is None else min(limit, len(source))
    if not count:
        raise ValueError(f"spec: split {split!r} of {name!r} is empty")
    images, labels = [], []
    for index in range(count):
        example = source[index]
        if not isinstance(example, dict) or image_key not in example or label_key not in example:
            found = ", ".join(example) if isinstance(example, dict) else type(example).__name__
            raise ValueError(f"spec: {name!r} has no {image_key!r} and {label_key!r}; it has {found}")
        images.append(np.asarray(example[image_key]))
        labels.append(np.asarray(example[label_key]))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"spec: image {index} of {name!r} has shape {images[-1].shape}, the first {images[0].shape}; "
                "only data sets with images of one size can be read"
            )
    return np.stack(images), np.stack(labels)


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
