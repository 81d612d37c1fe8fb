"""Evaluation data: every kind of spec, and everything that must not load."""

import importlib
import importlib.resources
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from dfq_jax.data import Dataset, load_data
from dfq_jax.zoo import Preprocessing
from dfq_jax.zoo.arrays import read_npz

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("DFQ_JAX_DATA") or ROOT / ".." / "shared" / "data")
rng = np.random.default_rng(0)


def pixels(*shape):
    return rng.integers(0, 256, shape, np.uint8)


def refused(spec, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        load_data(spec, **options)


# The record and the arguments


@pytest.mark.parametrize(
    ("images", "labels", "error", "match"),
    [
        (pixels(2, 4, 4, 3).tolist(), np.zeros(2, int), TypeError, "images: expected a numpy array"),
        (pixels(2, 4, 4, 3), [0, 1], TypeError, "labels: expected a numpy array"),
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int), TypeError, "images: expected pixels as uint8"),
        (pixels(2, 4, 4), np.zeros(2, int), ValueError, r"images: expected shape .* found \(2, 4, 4\)"),
        (pixels(2, 4, 0, 3), np.zeros(2, int), ValueError, "images: expected shape"),
        (pixels(2, 4, 4, 3), np.zeros(2), TypeError, "labels: expected integers, found float64"),
        (pixels(2, 4, 4, 3), np.zeros(2, bool), TypeError, "labels: expected integers, found bool"),
        (pixels(2, 4, 4, 3), np.zeros((2, 10), int), ValueError, r"labels: expected shape \[N\], found"),
        (pixels(2, 4, 4, 3), np.zeros(3, int), ValueError, "labels: 3 labels for 2 images"),
        (pixels(0, 4, 4, 3), np.zeros(0, int), ValueError, "images: here holds none"),
        (pixels(2, 4, 4, 3), np.array([0, -1]), ValueError, "label -1 in here is negative"),
    ],
)
def test_dataset_is_validated(images, labels, error, match):
    with pytest.raises(error, match=match):
        Dataset.from_arrays("here", images, labels)


@pytest.mark.parametrize("spec", ["", "bundle", "npz", "npz:", "folder:", "tfds:", "csv:x", "bundled:x"])
def test_unknown_specs(spec):
    refused(spec, "spec: .* names no data; expected one of bundled, npz:FILE, folder:DIR, tfds:NAME/SPLIT")


def test_bad_arguments():
    refused(7, "spec: expected a string", TypeError)
    for limit in (0, -1, 1.5, True):
        refused("bundled", "limit: expected a positive number", limit=limit)
    refused("bundled", r"input_shape: expected \(1, H, W, C\)", input_shape=(28, 28, 1))
    refused("bundled", "num_classes: expected a positive number", num_classes=0)


# Bundled


def test_bundled():
    data = load_data("bundled", input_shape=(1, 28, 28, 1), num_classes=10)
    assert data.name == "bundled" and len(data) == 10_000
    assert data.images.shape == (10_000, 28, 28, 1) and data.images.dtype == np.uint8
    assert data.labels.dtype == np.int32 and np.all(np.bincount(data.labels) == 1000)
    assert len(load_data("bundled", limit=7)) == 7
    refused("bundled", "takes images of 32x32x3, image 0 of bundled has 28x28x1", input_shape=(1, 32, 32, 3))
    refused("bundled", "num_classes: the model has 9 classes .*, but bundled has the label 9", num_classes=9)


# npz


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.npz"


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64])
def test_npz(file, kind):
    images, labels = pixels(5, 4, 6, 3), np.arange(5).astype(kind)
    np.savez_compressed(file, images=images, labels=labels, more=np.zeros(3))
    data = load_data(f"npz:{file}")
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    assert data.labels.dtype == np.int32
    first = load_data(f"npz:{file}", limit=2)
    np.testing.assert_array_equal(first.images, images[:2])
    np.testing.assert_array_equal(first.labels, labels[:2])
    assert len(load_data(f"npz:{file}", limit=100)) == 5


def test_npz_of_gray_images(file):
    images = pixels(5, 4, 6)
    np.savez(file, images=images, labels=np.arange(5))
    np.testing.assert_array_equal(load_data(f"npz:{file}").images, images[..., None])


def test_npz_refusals(file, tmp_path):
    refused(f"npz:{file}", "path: cannot read .*No such file")
    refused(f"npz:{tmp_path}", "path: cannot read")
    file.write_bytes(b"not an archive")
    refused(f"npz:{file}", "cannot be read as npz: the zip archive is truncated or damaged")
    good = dict(images=pixels(3, 4, 4, 3), labels=np.arange(3))

    def attempt(match, error=ValueError, **changes):
        arrays = {key: value for key, value in (good | changes).items() if value is not None}
        np.savez(file, **arrays)
        refused(f"npz:{file}", match, error)

    attempt("lacks labels; it holds images", labels=None)
    attempt("lacks images and labels; it holds x", images=None, labels=None, x=np.zeros(1))
    attempt("refused", labels=np.array([0, 1, None], object))
    attempt("expected pixels as uint8, found float64", TypeError, images=np.zeros((3, 4, 4, 3)))
    attempt(r"images: expected shape .* found \(3, 4\)", images=pixels(3, 4))
    attempt("labels: expected integers", TypeError, labels=np.zeros(3))
    attempt("labels: 2 labels for 3 images", labels=np.arange(2))
    attempt("is negative", labels=np.array([0, 1, -1]))
    attempt("holds none", images=pixels(0, 4, 4, 3), labels=np.zeros(0, int))
    attempt("no index of a class", labels=np.array([0, 1, 1 << 40]))
    attempt("no index of a class", labels=np.array([0, 1, (1 << 64) - 1], np.uint64))

    np.savez(file, **good)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(f"npz:{file}", "cannot be read as npz: the zip archive is truncated or damaged")


def test_shared_cifar():
    path = DATA / "cifar10" / "test.npz"
    if not path.exists():
        pytest.skip("no CIFAR-10: set DFQ_JAX_DATA to the folder that holds cifar10/test.npz")
    data = load_data(f"npz:{path}", input_shape=(1, 32, 32, 3), num_classes=10)
    with np.load(path) as expected:
        np.testing.assert_array_equal(data.images, expected["images"])
        np.testing.assert_array_equal(data.labels, expected["labels"])


# Folders


@pytest.fixture
def image_module():
    return pytest.importorskip("PIL.Image")


def save(image_module, path, array, mode=None):
    path.parent.mkdir(exist_ok=True)
    image = image_module.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)


def test_folder_of_numbered_files(tmp_path, image_module):
    images = pixels(3, 4, 6, 3)
    for label, image in zip((10, 2, 0), images, strict=True):
        save(image_module, tmp_path / f"{label:04}.png", image)
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.labels, [0, 2, 10])
    np.testing.assert_array_equal(data.images, images[::-1])
    assert load_data(f"folder:{tmp_path}", limit=2).labels.tolist() == [0, 2]
    refused(f"folder:{tmp_path}", "the model has 10 classes", num_classes=10)


def test_folder_of_classes(tmp_path, image_module):
    images = {(label, name): pixels(4, 4, 3) for label in (10, 2) for name in ("a.png", "b.bmp")}
    for (label, name), image in images.items():
        save(image_module, tmp_path / str(label) / name, image)
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.labels, [2, 2, 10, 10])
    np.testing.assert_array_equal(data.images, np.stack([images[key] for key in sorted(images)]))


def test_folder_modes(tmp_path, image_module):
    gray = pixels(4, 4)
    save(image_module, tmp_path / "gray" / "0.png", gray)
    save(image_module, tmp_path / "gray" / "1.png", gray, "LA")
    spec = f"folder:{tmp_path / 'gray'}"
    np.testing.assert_array_equal(load_data(spec).images, np.stack([gray, gray])[..., None])
    rgb = load_data(spec, input_shape=(1, 4, 4, 3)).images
    np.testing.assert_array_equal(rgb, np.repeat(np.stack([gray, gray])[..., None], 3, axis=3))

    save(image_module, tmp_path / "gray" / "2.png", pixels(4, 4, 3))
    mixed = load_data(spec).images
    assert mixed.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(mixed[0], rgb[0])
    assert load_data(spec, input_shape=(1, 4, 4, 1)).images.shape == (3, 4, 4, 1)

    save(image_module, tmp_path / "other" / "0.png", pixels(4, 4, 4), "P")
    save(image_module, tmp_path / "other" / "1.png", pixels(4, 4, 4))
    assert load_data(f"folder:{tmp_path / 'other'}").images.shape == (2, 4, 4, 3)
    refused(spec, "image files have 1 or 3 channels, the model takes 4", input_shape=(1, 4, 4, 4))


def test_folder_refusals(tmp_path, image_module):
    refused(f"folder:{tmp_path / 'none'}", "spec: there is no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(f"folder:{empty}", r"holds no images \(\.bmp")
    (empty / "7").mkdir()
    refused(f"folder:{empty}", "holds no images")

    save(image_module, tmp_path / "sizes" / "0.png", pixels(4, 4, 3))
    save(image_module, tmp_path / "sizes" / "1.png", pixels(4, 5, 3))
    sizes = f"folder:{tmp_path / 'sizes'}"
    with pytest.raises(ValueError, match=r"image 1 of .* has 4x5x3 pixels, the first one 4x4x3"):
        load_data(sizes).images  # noqa: B018
    with pytest.raises(ValueError, match=r"the model takes images of 4x4x3, image 1 of .* has 4x5x3"):
        load_data(sizes, input_shape=(1, 4, 4, 3)).images  # noqa: B018

    save(image_module, tmp_path / "names" / "cat.png", pixels(4, 4, 3))
    refused(f"folder:{tmp_path / 'names'}", "cat.png' must be the index of its class")
    save(image_module, tmp_path / "folders.d" / "1.png", pixels(4, 4, 3))
    (tmp_path / "folders.d" / "n01440764").mkdir()
    refused(f"folder:{tmp_path / 'folders.d'}", "holds both images, such as '1.png', and subfolders")
    (tmp_path / "folders.d" / "1.png").rename(tmp_path / "folders.d" / "n01440764" / "1.png")
    refused(f"folder:{tmp_path / 'folders.d'}", "n01440764' must be the index of its class")

    save(image_module, tmp_path / "broken" / "0.png", pixels(32, 32, 3))
    content = (tmp_path / "broken" / "0.png").read_bytes()
    for damaged in (content[:500], b"GIF89a", b""):
        (tmp_path / "broken" / "0.png").write_bytes(damaged)
        refused(f"folder:{tmp_path / 'broken'}", r"0\.png' cannot be decoded")
    save(image_module, tmp_path / "deep" / "0.png", np.zeros((4, 4), np.uint16))
    refused(f"folder:{tmp_path / 'deep'}", "has pixels of mode I;16, not of 8 bits")


def test_folder_of_a_huge_image(tmp_path, image_module, monkeypatch):
    save(image_module, tmp_path / "0.png", pixels(64, 64, 3))
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 1000)
    refused(f"folder:{tmp_path}", "cannot be decoded: .*decompression bomb")


def test_shared_imagenet(image_module):
    folder = DATA / "imagenet"
    if not folder.exists():
        pytest.skip("no ImageNet images: set DFQ_JAX_DATA to the folder that holds imagenet/0000.jpg")
    data = load_data(f"folder:{folder}", limit=5, input_shape=(1, 224, 224, 3), num_classes=1000)
    assert data.labels.tolist() == [0, 2, 4, 6, 8]
    assert 50 < data.images.mean() < 200


# Batches


def tiny_images(count=10, **changes):
    fields = dict(name="tiny", size=count, read=lambda i: (np.full((2, 2, 1), i, np.uint8), i)) | changes
    return Dataset(**fields)


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_batches_are_in_order(workers):
    found = list(tiny_images().batches(lambda x: x / 255, 4, workers=workers))
    assert [x.shape for x, _ in found] == [(4, 2, 2, 1), (4, 2, 2, 1), (2, 2, 2, 1)]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in found]), np.arange(10))
    np.testing.assert_allclose(np.concatenate([x for x, _ in found])[:, 0, 0, 0], np.arange(10) / 255)


def test_few_batches_are_made_ahead():
    read = []

    def slowly(index):
        read.append(index)
        return np.zeros((2, 2, 1), np.uint8), 0

    batches = tiny_images(1000, read=slowly).batches(lambda x: x, 10, workers=2)
    assert not read
    for done in range(1, 20):
        next(batches)
        assert len(read) <= 10 * (done + 3)
    batches.close()
    assert len(read) < 300


def test_errors_of_batches():
    def broken(index):
        if index == 7:
            raise ValueError("spec: image '7.png' cannot be decoded")
        return np.zeros((2, 2 + index // 5, 1), np.uint8), index

    batches = tiny_images(read=broken).batches(lambda x: x, 5)
    next(batches)
    with pytest.raises(ValueError, match=r"'7\.png' cannot be decoded"):
        next(batches)
    varied = tiny_images(read=lambda i: (np.zeros((2, 2 + i, 1), np.uint8), 0))
    with pytest.raises(ValueError, match=r"makes images 1\.\.\.1 of tiny 2x3x1, those before 2x2x1; it must"):
        next(varied.batches(lambda x: x, 3))
    with pytest.raises(ValueError, match=r"images 0\.\.\.3 of tiny: images: 2x2 pixels are too small to crop 3x3"):
        next(tiny_images().batches(Preprocessing(mean=(0.0,), std=(1.0,), crop=3), 4))
    with pytest.raises(ValueError, match="batch_size: expected a positive number of images, found 0"):
        next(tiny_images().batches(lambda x: x, 0))
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1)), np.zeros((0, 2, 1), np.uint8)):
        with pytest.raises(ValueError, match=r"image 0 of tiny is .*; expected \[H, W, C\] in uint8"):
            tiny_images(read=lambda i, wrong=wrong: (wrong, 0))[0]
    with pytest.raises(ValueError, match="label -1 in tiny is negative"):
        tiny_images(read=lambda i: (np.zeros((2, 2, 1), np.uint8), -1))[3]
    with pytest.raises(IndexError, match=r"index: expected 0\.\.\.9, found 10"):
        tiny_images()[10]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (3, 2, "index: expected an integer from 0 to 1, found 3"),
        ("a", 2, "index: expected an integer from 0 to 1, found 'a'"),
        (0, 0, "count: expected an integer of at least 1, found 0"),
        (11, 12, "images: part 12 of 12 of tiny holds none"),
    ],
)
def test_parts_that_there_are_not(index, count, message):
    with pytest.raises(ValueError, match=message):
        tiny_images().part(index, count)


RESIZED = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, resize=24, crop=16, interpolation="bilinear")


def photographs(image_module, count):
    """Encoded JPEG images of several sizes and modes, with their pixels in RGB."""
    for index in range(count):
        size = (30 + 5 * (index % 3), 40 - 7 * (index % 2))
        gray = index % 4 == 3
        image = image_module.fromarray(pixels(*size) if gray else pixels(*size, 3))
        if index == 5:
            image = image.convert("CMYK")
        stream = io.BytesIO()
        image.save(stream, "jpeg")
        with image_module.open(io.BytesIO(stream.getvalue())) as decoded:
            yield stream.getvalue(), np.asarray(decoded.convert("RGB"))


def test_folder_of_varied_sizes(tmp_path, image_module):
    expected = []
    for label, (content, image) in enumerate(photographs(image_module, 11)):
        (tmp_path / f"{label:02}.JPEG").write_bytes(content)
        expected.append(RESIZED(image[None])[0])
    data = load_data(f"folder:{tmp_path}", channels=3, num_classes=11)
    found = list(data.batches(RESIZED, 4))
    assert [x.shape for x, _ in found] == [(4, 16, 16, 3), (4, 16, 16, 3), (3, 16, 16, 3)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), np.stack(expected))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in found]), np.arange(11))
    with pytest.raises(ValueError, match=r"images: image 1 of .* has"):
        data.images  # noqa: B018


# Without the extras


@pytest.mark.parametrize(
    ("spec", "modules", "extra"),
    [
        ("folder:.", ["PIL"], "folder"),
        ("tfds:tiny/test", ["tensorflow_datasets"], "tfds"),
        ("tfds:tiny/test", ["array_record"], "tfds"),
    ],
)
def test_missing_extra_is_named(spec, modules, extra, monkeypatch):
    for module in list(sys.modules):
        if module.split(".")[0] in modules:
            monkeypatch.delitem(sys.modules, module)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    refused(spec, rf"pip install 'dfq_jax\[{extra}\]'", ImportError)


# TensorFlow Datasets, without TensorFlow

PREPARE = """
import io, pathlib, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    file.seek(0)
    return file  # an encoded file: encoding arrays is what TFDS needs TensorFlow for

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    keys, size, encoding = ("image", "label"), 6, "png"

    def _info(self):
        image, label = self.keys
        features = {
            image: tfds.features.Image(shape=(None, None, 3), encoding_format=self.encoding),
            label: tfds.features.ClassLabel(num_classes=3),
        }
        supervised = None if image == "x" else self.keys
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
        )

    def _split_generators(self, manager):
        return {"test": self._generate_examples(7), "train": self._generate_examples(2)}

    def _generate_examples(self, count):
        image, label = self.keys
        for index in range(count):
            array = np.full((8, 8 + (index if self.size is None else 0), 3), 10 * index, np.uint8)
            yield index, {image: png(array), label: index % 3}

class TinySizes(Tiny):
    size = None

class TinyKeys(Tiny):
    keys = ("photo", "species")

class TinyOther(Tiny):
    keys = ("x", "y")

class Imagenet2012(Tiny):  # as the real one is prepared: JPEG files of several sizes
    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, manager):
        return {"validation": self._generate_examples(0)}

    def _generate_examples(self, count):
        for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
            yield path.name, {"image": str(path), "label": int(path.stem), "file_name": path.name}

for builder in (Tiny, TinySizes, TinyKeys, TinyOther, Imagenet2012):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Data sets whose builders this process does not know: they are read from their files alone."""
    for module in ("tensorflow_datasets", "array_record", "importlib_resources", "PIL"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    from PIL import Image

    folder = tmp_path_factory.mktemp("tfds")
    photos = folder / "photos"
    photos.mkdir()
    for label, (content, _) in enumerate(photographs(Image, 11)):
        (photos / f"{label:02}.jpeg").write_bytes(content)
    script = folder / "prepare.py"
    script.write_text(PREPARE)
    done = subprocess.run([sys.executable, script, folder, photos], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_tfds(prepared, monkeypatch):
    data = load_data("tfds:tiny/test", data_dir=prepared, input_shape=(1, 8, 8, 3), num_classes=3)
    assert data.images.shape == (7, 8, 8, 3) and data.images.dtype == np.uint8 and len(data) == 7
    np.testing.assert_array_equal(data.images[:, 0, 0, 0] // 10 % 3, data.labels)
    assert sorted(data.images[:, 0, 0, 0]) == [0, 10, 20, 30, 40, 50, 60]
    first = load_data("tfds:tiny/test", data_dir=prepared, limit=2)
    np.testing.assert_array_equal(first.images, data.images[:2])
    assert len(load_data("tfds:tiny/train", data_dir=prepared)) == 2
    assert len(load_data("tfds:tiny/test[:3]", data_dir=prepared)) == 3
    assert len(load_data("tfds:tiny:1.0.0/test", data_dir=prepared)) == 7
    assert len(load_data("tfds:tiny_keys/test", data_dir=prepared)) == 7
    if importlib.util.find_spec("tensorflow") is None:
        assert "tensorflow" not in sys.modules


def test_imagenet_of_tfds(prepared):
    """The same pixels as of a folder of the same files, whatever their order."""
    folder = load_data(f"folder:{prepared / 'photos'}", channels=3)
    expected = {label: x for x, (label,) in folder.batches(RESIZED, 1)}
    data = load_data("tfds:imagenet2012/validation", data_dir=prepared, channels=3, num_classes=1000)
    assert len(data) == 11
    labels = []
    for x, batch in data.batches(RESIZED, 4):
        for image, label in zip(x, batch, strict=True):
            np.testing.assert_array_equal(image, expected[label][0])
        labels += batch.tolist()
    assert sorted(labels) == list(range(11))
    refused("tfds:imagenet2012/validation", "has 1000", data_dir=prepared, num_classes=10)


def test_tfds_of_arrays_and_of_encoded_files(prepared, monkeypatch):
    """Whatever a source gives: arrays already decoded, gray ones without an axis for channels, files as bytes."""
    import tensorflow_datasets as tfds

    array = load_data("tfds:tiny/test", data_dir=prepared)[0][0]
    stream = io.BytesIO()
    importlib.import_module("PIL.Image").fromarray(array).save(stream, "png")
    features = {"image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8), "label": None}
    info = types.SimpleNamespace(supervised_keys=None, features=features)

    class Source(list):
        dataset_info = info

    for image in (array, stream.getvalue(), np.array(stream.getvalue(), object)):
        monkeypatch.setattr(tfds, "data_source", lambda *_, image=image, **__: Source([{"image": image, "label": 3}]))
        found, label = load_data("tfds:any/test")[0]
        np.testing.assert_array_equal(found, array)
        assert label == 3
    gray = Source([{"image": array[..., 0], "label": np.int64(1)}])
    monkeypatch.setattr(tfds, "data_source", lambda *_, **__: gray)
    assert load_data("tfds:any/test")[0][0].shape == (8, 8, 1)
    gray[0]["label"] = np.zeros(10)
    refused("tfds:any/test", r"the label of image 0 of 'any' is float64 \(10,\), no integer")
    monkeypatch.setattr(tfds, "data_source", lambda *_, **__: Source())
    refused("tfds:any/test", "split 'test' of 'any' is empty")


def test_tfds_data_dir_from_the_environment(prepared):
    code = "from dfq_jax.data import load_data; print(len(load_data('tfds:tiny/test')))"
    environment = os.environ | {"TFDS_DATA_DIR": str(prepared), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "7", done.stderr


def test_tfds_refusals(prepared, tmp_path):
    refused("tfds:tiny", "spec: expected a split, such as tfds:cifar10/test, found 'tfds:tiny'")
    refused("tfds:/test", "spec: expected a split")
    refused("tfds:tiny/test", rf"cannot read split 'test' of 'tiny' from {tmp_path}", data_dir=tmp_path)
    refused("tfds:tiny/validation", "cannot read split 'validation' of 'tiny'", data_dir=prepared)
    refused("tfds:mnist/test", "cannot read split 'test' of 'mnist'.*prepared there", data_dir=prepared)
    with pytest.raises(ValueError, match="'test' of 'no_such_data'") as caught:
        load_data("tfds:no_such_data/test", data_dir=prepared)
    assert len(str(caught.value)) < 1200
    with pytest.raises(ValueError, match="image 1 of tfds:tiny_sizes/test has "):
        load_data("tfds:tiny_sizes/test", data_dir=prepared).images  # noqa: B018
    refused("tfds:tiny/test", "the model has 2 classes, but 'tiny' has 3", data_dir=prepared, num_classes=2)
    refused("tfds:tiny_other/test", "'tiny_other' has no 'image' and 'label'; it has x, y", data_dir=prepared)


def test_bundled_file_is_readable_by_our_own_reader():
    # From the installed package: the tests may run where there is no checkout of it.
    arrays = read_npz(importlib.resources.files("dfq_jax.zoo") / "weights" / "fashion_test.npz")
    assert set(arrays) == {"images", "labels"}
