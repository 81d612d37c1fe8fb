"""Folders of image files, the class in the name of the file or of its folder."""

from __future__ import annotations

import os
from pathlib import Path

from dfq_jax.data.dataset import Dataset
from dfq_jax.data.images import decode, is_gray, pillow

__all__ = ["open_folder"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def open_folder(
    spec: str,
    path: str,
    *,
    limit: int | None,
    image_shape: tuple[int, int, int] | None,
    channels: int | None,
    num_classes: int | None,
) -> Dataset:
    """The images of a folder, by class and then by name; see `load_data`."""
    pillow("folder:DIR")
    if channels not in (None, 1, 3):
        raise ValueError(f"input_shape: image files have 1 or 3 channels, the model takes {channels}")
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"spec: there is no folder {path!r}")
    files = _image_files(root)
    if not files:
        raise ValueError(f"spec: folder {path!r} holds no images ({', '.join(sorted(_SUFFIXES))})")
    files = files[:limit]
    if channels is None:
        # Gray images among colored ones: photographs of one collection, so all become RGB.
        channels = 1 if all(is_gray(file) for file, _ in files) else 3
    data = Dataset(
        name=spec,
        size=len(files),
        read=lambda index: (decode(files[index][0], os.fspath(files[index][0]), channels), files[index][1]),
        image_shape=image_shape,
        num_classes=num_classes,
    )
    data.check_labels([label for _, label in files])
    return data


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
