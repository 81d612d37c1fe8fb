"""A float network with the images to score quantized copies of it on; what the accuracy benchmarks share."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from dfq_jax import apply_quantized, as_function, trace
from dfq_jax.data import load_data
from dfq_jax.zoo import load_model

BATCH_PIXELS = 512 * 32 * 32
# Fields of conventions for the first and the last layer: at 8 bits; that, and the second layer's input too (as BRECQ,
# QDrop and GENIE have it); at the bits of all layers; at those but for their inputs, the image among them, at 8 bits
# (what publications with all layers at low bits do, or leave them in float).
EDGES = {
    "8": {"edge_bits": 8},
    "brecq": {"edge_bits": 8, "second_input_bits": 8},
    "all": {"edge_bits": None},
    "weights": {"edge_bits": None, "edge_input_bits": 8},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `Network` takes."""
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint", help="weights; left out where the zoo finds them itself")
    parser.add_argument("--data", required=True, help="labeled images, for top-1 and agreement")
    parser.add_argument("--more", help="more images, for agreement alone")


class Network:
    """The network, its images and float predictions. Labels serve to print top-1, and for nothing else."""

    def __init__(self, arguments: argparse.Namespace):
        model = load_model(arguments.model, arguments.checkpoint)
        self.name, self.module, self.input_shape = arguments.model, model.module, model.input_shape
        apply_fn, self.variables = as_function(model.module, model.variables)
        self.graph = trace(apply_fn, self.variables, model.input_shape)
        data = load_data(arguments.data)
        self.labels = data.labels
        images = np.concatenate([data.images] + ([load_data(arguments.more).images] if arguments.more else []))
        preprocessing = model.preprocessing
        if images.shape[1:] == model.input_shape[1:]:  # resized and cropped already
            preprocessing = dataclasses.replace(preprocessing, resize=None, crop=None)
        self.images = preprocessing(images)
        # One size of batch for all images: everything compiles once.
        largest = max(1, BATCH_PIXELS // math.prod(model.input_shape[1:3]))
        self.batch = max(d for d in range(1, largest + 1) if len(self.images) % d == 0)
        self.reference = self.predict(jax.jit(apply_fn), self.variables)
        self.float_top1 = self.top1(self.reference)
        self.quantized = jax.jit(functools.partial(apply_quantized, self.graph))

    def __str__(self) -> str:
        return (
            f"float: top-1 {self.float_top1:.2f} on {len(self.labels)} images; agreement over {len(self.images)} images"
        )

    def predict(self, function: Any, variables: Any) -> np.ndarray:
        batches = [self.images[s : s + self.batch] for s in range(0, len(self.images), self.batch)]
        return np.concatenate([np.asarray(function(variables, x).argmax(1)) for x in batches])

    def top1(self, predicted: np.ndarray) -> float:
        return 100 * float((predicted[: len(self.labels)] == self.labels).mean())

    def score(self, qvariables: Any) -> tuple[float, float]:
        """Top-1 and agreement with the float network, in percent."""
        predicted = self.predict(self.quantized, qvariables)
        return self.top1(predicted), 100 * float((predicted == self.reference).mean())
