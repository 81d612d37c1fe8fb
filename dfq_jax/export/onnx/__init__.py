"""ONNX files: float networks, and quantized ones in the QDQ form that runtimes turn into integer kernels."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Float

from dfq_jax.base import require, write_atomically
from dfq_jax.export.exporter import Quantized, Runner, as_batch
from dfq_jax.export.onnx.translate import LOGITS, MIN_OPSET, to_onnx
from dfq_jax.export.onnx.writer import INPUT
from dfq_jax.graph import Graph

FATAL = 4  # of ONNX Runtime's log levels

__all__ = ["EXPORTER", "export_onnx", "open_onnx", "to_onnx"]


def export_onnx(
    network: Quantized | tuple[Graph, Any],
    path: str | os.PathLike[str],
    *,
    opset: int = MIN_OPSET,
    batch: int | None = None,
    int4: bool = False,
    integers: str = "u8u8",
    float_bias: bool = False,
) -> None:
    """Write a network as an ONNX file.

    Input ("input") and outputs have the network's own layout, `[N, H, W, C]`; the class scores are the output
    "logits". All floats are float32. BatchNorms that directly follow a layer are folded into it, the others are a
    multiplication and an addition.

    A quantized network is written in the QDQ form and gives what `apply_quantized` gives in a session with default
    options, to float rounding and to the rounding of biases to int32 accumulator steps (`float_bias`). Codes are those
    of the network, moved by 128 where the type of the file is another. Activations have one scale, fewer bits than 8
    by clipping beforehand; a tensor quantized for layers alone (`shortcuts="float"`) is so on their edges alone.
    Weights have one scale for each channel and are stored in 8 bits, whatever theirs are. The scale of weights beside
    float activations stands in a multiplication of its own, because ONNX Runtime would otherwise round these
    activations, too.

    Args:
      network: a quantized network, or a graph and its variables, float or quantized.
      path: the file, replaced as a whole.
      opset: version of the ONNX operators, 18 or later.
      batch: the batch size of the file; None for any.
      int4: weights of at most 4 bits in ONNX's 4-bit types, which need opset 21 and few runtimes compute with.
      integers: types of activations and weights, by the names of ONNX Runtime's integer kernels: "u8u8" is exact on
        every processor. "u8s8" and "s8s8" are faster, but on x86 without VNNI sums of two products saturate in 16 bits
        unless all weights are symmetric of at most 7 bits; some accelerators take int8 only.
      float_bias: biases are added in float, so that the file differs from the simulation by float rounding alone.
        Convolutions then run in float between quantized activations: deep networks, in which one changed code changes
        many, are compared best this way.

    Raises:
      ImportError: onnx is not installed.
      ValueError: an operation that ONNX cannot express or another bad argument; the message names the operation and
        the layer near it.
      OSError: the file cannot be written; nothing is left behind.
    """
    graph, variables = network if isinstance(network, tuple) else (network.graph, network.variables)
    model = to_onnx(graph, variables, opset=opset, batch=batch, int4=int4, integers=integers, float_bias=float_bias)
    write_atomically(path, model.SerializeToString())


def open_onnx(path: str | os.PathLike[str]) -> Runner:
    """A written file in a session of ONNX Runtime on the CPU, as it is by default: a function of a batch to logits.

    Raises:
      ImportError: onnxruntime is not installed.
      ValueError: the file is no such network.
    """
    runtime = require("onnxruntime", "onnxruntime")
    with open(path, "rb") as file:
        data = file.read()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = FATAL  # errors come as exceptions
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise ValueError(f"{os.fspath(path)} is no ONNX file that ONNX Runtime can run: {error}") from error
    inputs = {argument.name: argument for argument in session.get_inputs()}
    if set(inputs) != {INPUT} or LOGITS not in {argument.name for argument in session.get_outputs()}:
        raise ValueError(f"{os.fspath(path)} was not written by dfq_jax: expected input {INPUT!r}, output {LOGITS!r}.")
    expected = inputs[INPUT].shape

    def run(x: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
        return session.run([LOGITS], {INPUT: as_batch(x, expected)})[0]

    return run


class _Onnx:
    name = "onnx"
    extra = "onnx"
    write = staticmethod(export_onnx)
    open = staticmethod(open_onnx)


EXPORTER = _Onnx()
