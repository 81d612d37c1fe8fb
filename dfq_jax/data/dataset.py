"""Labeled images that are read when they are asked for, and batches of them made ahead."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Integer, UInt8

from dfq_jax.base import check_field

__all__ = ["Dataset"]

_GROUP_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labeled images, each read when it is asked for.

    Attributes:
      name: where they are from.
      size: how many there are.
      read: the pixels `[H, W, C]` and the label of an image by its index; called from several threads.
      image_shape: ``(H, W, C)`` of every image, or None where it may vary.
      num_classes: labels must be below; None for any.

    Raises:
      ValueError: if there are no images.
    """

    name: str
    size: int
    read: Callable[[int], tuple[np.ndarray, int]]
    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"images: {self.name} holds none")

    @classmethod
    def from_arrays(
        cls, name: str, images: UInt8[np.ndarray, "n h w c"], labels: Integer[np.ndarray, " n"], **checks: Any
    ) -> Dataset:
        """Of images in memory.

        Args:
          name: where they are from.
          images: pixels 0...255, `[N, H, W, C]`, uint8.
          labels: indices of the classes, `[N]`, any integer type.
          checks: `image_shape` and `num_classes`.

        Raises:
          TypeError: if `images` are not uint8 or `labels` not integers.
          ValueError: if a shape is not as above, the numbers of images and labels differ, there are none, or a
            label is negative or no index of a class.
        """
        for argument, value in (("images", images), ("labels", labels)):
            if not isinstance(value, np.ndarray):
                raise TypeError(f"{argument}: expected a numpy array, found {type(value).__name__}")
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected pixels as uint8, found {images.dtype} in {name}")
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(f"images: expected shape [N, H, W, C], found {images.shape} in {name}")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels: expected integers, found {labels.dtype} in {name}")
        if labels.ndim != 1:
            raise ValueError(f"labels: expected shape [N], found {labels.shape} in {name}")
        if len(images) != len(labels):
            raise ValueError(f"labels: {len(labels)} labels for {len(images)} images in {name}")
        data = cls(name=name, size=len(labels), read=lambda i: (images[i], int(labels[i])), **checks)
        data.check_labels(labels)
        return data

    def check_labels(self, labels: Sequence[int] | Integer[np.ndarray, " n"]) -> None:
        """Refuse labels that are no indices of classes.

        Raises:
          ValueError: one is negative or too large.
        """
        smallest, largest = int(np.min(labels)), int(np.max(labels))
        if smallest < 0:
            raise ValueError(f"labels: label {smallest} in {self.name} is negative; classes count from 0")
        if self.num_classes is not None and largest >= self.num_classes:
            raise ValueError(
                f"num_classes: the model has {self.num_classes} classes (0...{self.num_classes - 1}), but {self.name} "
                f"has the label {largest}"
            )
        if largest > np.iinfo(np.int32).max:
            raise ValueError(f"labels: {self.name} has the label {largest}, which is no index of a class")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int]:
        """The pixels and the label of one image.

        Raises:
          IndexError: there is no such image.
          ValueError: it cannot be read, or does not fit.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index: expected 0...{self.size - 1}, found {index}")
        image, label = self.read(index)
        if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
            raise ValueError(
                f"images: image {index} of {self.name} is {image.dtype} {image.shape}; expected [H, W, C] in uint8"
            )
        if self.image_shape not in (None, image.shape):
            raise ValueError(
                f"input_shape: the model takes images of {_by(self.image_shape)}, image {index} of {self.name} has "
                f"{_by(image.shape)}"
            )
        self.check_labels([label])
        return image, label

    def part(self, index: int, count: int) -> Dataset:
        """One of several parts of the images, as equal as can be: those at `index`, `index + count`, ...

        >>> data = Dataset(name="numbers", size=5, read=lambda i: (np.full((1, 1, 1), i, np.uint8), 0))
        >>> [int(image.max()) for image in data.part(1, 2).images]
        [1, 3]

        Args:
          index: of the part, such as `jax.process_index()`.
          count: of all parts, such as `jax.process_count()`.

        Raises:
          ValueError: there is no such part, or no image in it.
        """
        check_field("count", count, "an integer of at least 1", lambda v: type(v) is int and v >= 1)
        check_field("index", index, f"an integer from 0 to {count - 1}", lambda v: type(v) is int and 0 <= v < count)
        return dataclasses.replace(
            self,
            name=f"part {index + 1} of {count} of {self.name}",
            size=len(range(index, self.size, count)),
            read=lambda i: self.read(index + i * count),
        )

    @property
    def images(self) -> UInt8[np.ndarray, "n h w c"]:
        """All images in memory.

        Raises:
          ValueError: they have several sizes, or one cannot be read.
        """
        images = [self[index][0] for index in range(self.size)]
        for index, image in enumerate(images):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"images: image {index} of {self.name} has {_by(image.shape)} pixels, the first one "
                    f"{_by(images[0].shape)}: they make no array; use batches with a preprocessing that resizes"
                )
        return np.stack(images)

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """All labels; reads every image."""
        return np.array([self[index][1] for index in range(self.size)], np.int32)

    def batches(
        self,
        preprocessing: Callable[[UInt8[np.ndarray, "n h w c"]], Any],
        batch_size: int = 256,
        *,
        workers: int | None = None,
    ) -> Iterator[tuple[Float[np.ndarray, "n ..."], Int32[np.ndarray, " n"]]]:
        """Preprocessed images with their labels, in order; a few batches are made ahead by threads.

        No more than `workers` + 1 batches are in memory, however many images there are.

        Args:
          preprocessing: maps pixels `[N, H, W, C]` to what the network takes, `[N, ...]`; called from several
            threads, with as many images as have one size in a row and take a megabyte.
          batch_size: images in a batch; the last one may have fewer.
          workers: threads; None for one a core, at most four.

        Raises:
          ValueError: an image cannot be read or preprocessed; the message says which.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number of images, found {batch_size!r}")
        workers = min(4, os.cpu_count() or 1) if workers is None else workers

        def make(start: int) -> tuple[np.ndarray, np.ndarray]:
            return self._batch(preprocessing, start, min(start + batch_size, self.size))

        # Image libraries and NumPy leave the interpreter to other threads while they work.
        pool = ThreadPoolExecutor(workers)
        try:
            starts = iter(range(0, self.size, batch_size))
            pending = collections.deque(pool.submit(make, start) for start in itertools.islice(starts, workers + 1))
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(make, start) for start in itertools.islice(starts, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, preprocessing: Callable[..., Any], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        parts: list[np.ndarray] = []
        labels: list[int] = []
        for images, group in self._groups(start, stop):
            first = start + len(labels)
            what = f"images {first}...{first + len(images) - 1} of {self.name}"
            labels += group
            try:
                part = np.asarray(preprocessing(np.stack(images)))
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error
            parts.append(part)
            if part.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    f"preprocessing makes {what} {_by(part.shape[1:])}, those before {_by(parts[0].shape[1:])}; it "
                    "must resize or crop them to one size"
                )
        return np.concatenate(parts), np.array(labels, np.int32)

    def _groups(self, start: int, stop: int) -> Iterator[tuple[list[np.ndarray], list[int]]]:
        """Images of one size in a row, with labels: small ones are preprocessed together, large ones as they come."""
        images: list[np.ndarray] = []
        labels: list[int] = []
        for index in range(start, stop):
            image, label = self[index]
            if images and (image.shape != images[0].shape or len(images) * image.nbytes > _GROUP_BYTES):
                yield images, labels
                images, labels = [], []
            images.append(image)
            labels.append(label)
        yield images, labels


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(extent) for extent in shape)
