"""`dfq-jax report`, and the pages and pictures that `quantize` leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from dfq_jax.base import require, write_atomically
from dfq_jax.cli.models import Model
from dfq_jax.cli.options import Page, Saved
from dfq_jax.cli.output import check_targets
from dfq_jax.recipes import Recipe, load_report
from dfq_jax.report import image_grid, pictures, png


def report(file: Positional[Saved], *, output: Page = None) -> None:
    """Write the page of a saved quantized network: all that its file says of it. Its model is not needed.

    Args:
      output: What to write; by default a file beside it, ending in .html.
    """
    target = file.with_suffix(".html") if output is None else output
    check_targets(target, file)
    found, model = load_report(file)
    try:
        found.save_html(target, title=model or file.name)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its report cannot be shown ({type(error).__name__}: {error})") from error
    print(target)


def check_pages(page: Path | None, folder: Path | None, target: Model, recipe: Recipe) -> None:
    """Refuse a page or a folder of images that could not be written, before the work that is to end in them.

    Raises:
      ValueError: the folder is a file or has no parent, or there are no images to write.
      ImportError: what draws them is not installed.
    """
    if page is not None:
        require("matplotlib", "report")
    if folder is None:
        return
    require("PIL.Image", "report")
    if len(target.input_shape) != 4:
        raise ValueError(f"save-images: expected a network of images [N, H, W, C], found {target.input_shape}")
    if recipe.source != "synthesis":
        raise ValueError(f"save-images: expected a recipe that makes images, found {recipe.name}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give the name of a folder")
    check_targets(folder / "image.png" if folder.exists() else folder)


def write_images(folder: Path, images: Any, preprocessing: Callable[[np.ndarray], Any] | None) -> None:
    """A PNG file for each image, and one of all."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(pictures(images, preprocessing)):
        write_atomically(folder / f"{number:04d}.png", png(pixels))
    write_atomically(folder / "grid.png", png(image_grid(images, preprocessing)))
