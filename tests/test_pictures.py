"""Images as pictures: preprocessing undone, in a grid, as PNG files."""

import io
import sys

import numpy as np
import pytest

from dfq_jax import image_grid
from dfq_jax.report.pictures import GAP, pictures, png
from dfq_jax.zoo import Preprocessing

rng = np.random.default_rng(0)
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=16)
GRAY = Preprocessing(mean=(0.5,), std=(0.25,))


def pixels(*shape):
    return rng.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    "preprocessing",
    [
        IMAGENET,
        lambda x: x.astype(np.float32)[..., ::1] - np.float32([123.7, 116.8, 103.9]),
        lambda x: 1 - x.astype(np.float32) / 127.5,  # white is low
        lambda x: (x[:, ::2, ::2] / 255.0).astype(np.float32),  # it makes images smaller, too
    ],
)
def test_pixels_come_back(preprocessing):
    seen = pixels(3, 16, 16, 3)
    images = preprocessing(seen)
    expected = seen if images.shape == seen.shape else seen[:, ::2, ::2]
    assert np.array_equal(pictures(images, preprocessing), expected)


def test_the_grid_is_the_pictures_row_by_row():
    images = GRAY(pixels(5, 4, 6, 1))
    grid, tiles = image_grid(images, GRAY, columns=2), pictures(images, GRAY)
    assert grid.shape == (3 * 4 + 2 * GAP, 2 * 6 + GAP, 3) and grid.dtype == np.uint8
    left = np.concatenate([tiles[0], np.full((GAP, 6, 3), 255), tiles[2], np.full((GAP, 6, 3), 255), tiles[4]])
    assert np.array_equal(grid[:, :6], left)
    assert np.array_equal(grid[:4, 6 + GAP :], tiles[1]) and (grid[-4:, 6:] == 255).all()
    assert image_grid(images, GRAY).shape[0] > 4  # about square, without being told how many in a row


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(channels):
    preprocessing = Preprocessing(mean=(0.4,) * channels, std=(0.2,) * channels)
    seen = pixels(2, 4, 6, channels)
    tiles = pictures(preprocessing(seen), preprocessing)
    if channels == 3:
        assert np.array_equal(tiles, seen)
        return
    assert tiles.shape == (2, 4, 6 * channels, 3) and (tiles[..., :1] == tiles).all()
    for c in range(channels):
        assert np.array_equal(tiles[:, :, 6 * c : 6 * (c + 1), 0], seen[..., c])


def test_without_preprocessing_values_are_spread():
    images = np.linspace(-3, 5, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    tiles = pictures(images)
    assert tiles.min() == 0 and tiles.max() == 255
    assert (np.diff(tiles.reshape(-1).astype(int)) >= 0).all()
    assert len(np.unique(pictures(np.full((1, 2, 2, 1), 7.0)))) == 1  # of one value
    assert np.array_equal(pictures((images * 6e37).astype(np.float32)), tiles)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("images", "preprocessing", "words"),
    [
        (np.zeros((4, 6)), None, r"images: expected shape \[N, H, W, C\], found \(4, 6\)"),
        (np.zeros((0, 2, 2, 1)), None, "images: expected shape"),
        (np.full((1, 2, 2, 1), np.nan), None, "images: expected finite numbers"),
        (np.zeros((1, 2, 2, 1)), lambda x: np.float32(x) ** 2, "preprocessing: expected one that scales"),
        (np.zeros((1, 2, 2, 1)), np.zeros_like, "preprocessing: expected one that scales"),
        (np.zeros((1, 2, 2, 3)), GRAY, r"preprocessing: .* \(ValueError: images: expected 1 channels"),
        (np.zeros((1, 2, 2, 1)), lambda x: np.repeat(x / 255, 3, -1), r"pixels \(2, 2, 1\) became \(2, 2, 3\)"),
    ],
)
def test_what_is_refused(images, preprocessing, words):
    with pytest.raises(ValueError, match=words):
        image_grid(images, preprocessing)


@pytest.mark.untyped
@pytest.mark.parametrize("columns", [0, -1, 2.5, "2", True])
def test_columns_are_a_number_of_images(columns):
    with pytest.raises(ValueError, match="columns: expected an integer of at least 1, or None, found"):
        image_grid(np.zeros((4, 2, 2, 1)), columns=columns)


def test_png_holds_the_pixels(monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    seen = pixels(5, 7, 3)
    assert np.array_equal(np.asarray(image_module.open(io.BytesIO(png(seen)))), seen)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'dfq_jax\[report\]'"):
        png(seen)
