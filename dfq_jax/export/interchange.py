"""Activation ranges found here, in the forms in which other tools take them.

One mapping `ranges` (`{tensor: (lo, hi)}`, from `estimate_ranges` or `ranges_of`) for users who export their network in
a way of their own and want its ranges without calibration data:

    to_onnxruntime   `TensorQuantOverrides` of `onnxruntime.quantization.quantize_static`
    to_litert        the calibration result that `ai_edge_quantizer.Quantizer.quantize` takes
    to_qwix          the collection "quant_stats" of `qwix.quantize_params`
    to_aimet         an encodings file of AIMET (github.com/quic/aimet), also read by Qualcomm's tools; `from_aimet`

Tensors have other names there: `names` maps ours to theirs. For ONNX files of this library `onnx_names` reads them from
the file, for LiteRT `TFLiteExporter.float_model` finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dfq_jax.base import require
from dfq_jax.graph import Graph
from dfq_jax.quantizers import QTensor, QuantizerParams, check_quantized, code_limits, quantization
from dfq_jax.stages import Ranges

__all__ = ["from_aimet", "onnx_names", "ranges_of", "to_aimet", "to_litert", "to_onnxruntime", "to_qwix"]

AIMET_VERSION = "0.6.1"
Names = Mapping[str, str | Sequence[str]]


def ranges_of(qvariables: Any) -> Ranges:
    """The ranges that a quantized network's activation quantizers represent.

    Raises:
      ValueError: `qvariables` are not quantized.
    """
    check_quantized(qvariables)
    quantizers = quantization(qvariables).by_tensor
    return {name: (float(params.lo), float(params.hi)) for name, params in quantizers.items()}


def _renamed(ranges: Ranges, names: Names) -> dict[str, tuple[float, float]]:
    """Ranges under the other names, checked."""
    found = {}
    for tensor, (low, high) in ranges.items():
        low, high = float(low), float(high)
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise ValueError(f"ranges: expected finite lo <= hi, found ({low}, {high}) for tensor {tensor!r}.")
        if tensor not in names:
            raise ValueError(f"names: no name for tensor {tensor!r}; known are {', '.join(sorted(names)) or 'none'}.")
        others = names[tensor]
        for name in (others,) if isinstance(others, str) else others:
            found[name] = (low, high)
    return found


# --- ONNX Runtime ---


def onnx_names(path: str | Path) -> dict[str, list[str]]:
    """What the tensors that layers read are called in an ONNX file of this library, transposed ones included.

    Raises:
      ImportError: onnx is not installed.
      ValueError: the file was not written by this library.
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's own
        raise ValueError(f"{path}: no ONNX file ({error}).") from error
    facts = {entry.key: entry.value for entry in model.metadata_props}
    tensors = json.loads(facts.get("dfq_jax", "{}")).get("tensors")
    if tensors is None:
        raise ValueError(f"{path}: not written by this library, so nothing says which tensor is which.")
    return tensors


def to_onnxruntime(ranges: Ranges, names: Names) -> dict[str, list[dict[str, Any]]]:
    """Ranges as `extra_options={"TensorQuantOverrides": ...}` of `onnxruntime.quantization.quantize_static`.

    Tensors that are not among them, such as residual sums, are calibrated on the data given there.

    Args:
      ranges: by tensor.
      names: of ONNX's tensors: `onnx_names(path)` of the float file (`export_onnx((graph, variables), path)`).

    Raises:
      ValueError: a tensor has no name, or a range is none.
    """
    return {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
        for name, (low, high) in _renamed(ranges, names).items()
    }


# --- LiteRT ---


def to_litert(ranges: Ranges, names: Names) -> dict[str, dict[str, np.ndarray]]:
    """Ranges as a calibration result of ai-edge-quantizer: LiteRT tensor to "min" and "max", arrays of one number.

    Static quantization wants a range of every tensor: update the calibrator's own result with these.

    Args:
      ranges: by tensor.
      names: of LiteRT's tensors, one or several for each of ours: `TFLiteExporter().float_model(...)[1]`.

    Raises:
      ValueError: a tensor has no name, or a range is none.
    """
    return {
        name: {"min": np.full(1, low, np.float32), "max": np.full(1, high, np.float32)}
        for name, (low, high) in _renamed(ranges, names).items()
    }


# --- Qwix ---


def to_qwix(graph: Graph, ranges: Ranges, module: nn.Module) -> dict[str, Any]:
    """Ranges as the collection "quant_stats" of a Qwix model with static `minmax` calibration.

    For `qwix.quantize_params(params, abstract_params, quant_stats)`; `export.qwix.to_qwix` gives a whole Qwix model
    with the weights of this library too.

    Args:
      graph: of the network.
      ranges: by tensor.
      module: the Linen module.

    Raises:
      ImportError: Qwix is missing.
      ValueError: a layer's tensor has no range, or Qwix sees other layers than the graph.
    """
    from dfq_jax.export.qwix import activation_scales, qwix_template

    checked = _renamed(ranges, {name: name for name in ranges})
    flat = flatten_dict(qwix_template(module, graph.input)[1]["params"])
    stats = {}
    for layer, path in activation_scales(graph, flat, graph.layers):
        if layer.tensor not in checked:
            raise ValueError(f"ranges: no range for tensor {layer.tensor!r}, which layer {layer.name!r} reads.")
        own = (*path[:-1], path[-1].removesuffix("_scale"))
        shape, (low, high) = flat[path].array.shape, checked[layer.tensor]
        stats[(*own, "count")] = np.ones((), np.int32)
        stats[(*own, "sum_of_min")] = np.full(shape, low, np.float32)
        stats[(*own, "sum_of_max")] = np.full(shape, high, np.float32)
    return unflatten_dict(stats)


# --- AIMET ---


def to_aimet(
    graph: Graph, qvariables: Any, names: Names, kernel_names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The quantizers of a network as AIMET encodings, format version 0.6.1; `json.dump` writes the file.

    real = scale (code + offset), codes from 0 to 2^bitwidth - 1, so that min = scale * offset; symmetric weights
    have the offset -2^(bitwidth - 1).

    Args:
      graph: the network.
      qvariables: its quantized variables.
      names: of the other tool's activations.
      kernel_names: of its parameters by the paths of ours (`layer.kernel`); by default these paths.

    Raises:
      ValueError: `qvariables` are not quantized, or a tensor has no name.
    """
    check_quantized(qvariables)
    activations = {}
    for tensor, params in quantization(qvariables).by_tensor.items():
        for name in _renamed({tensor: (params.lo, params.hi)}, names):
            activations[name] = _encodings(params)
    parameters, leaves = {}, graph.leaves_by_path(qvariables)
    for path in graph.kernels:
        kernel = leaves[path]
        if not isinstance(kernel, QTensor):
            continue
        name = path if kernel_names is None else kernel_names.get(path)
        if name is None:
            raise ValueError(f"kernel_names: no name for kernel {path!r}.")
        parameters[name] = _encodings(kernel.params)
    return {"version": AIMET_VERSION, "activation_encodings": activations, "param_encodings": parameters}


def _encodings(params: QuantizerParams) -> list[dict[str, Any]]:
    """One for each scale."""
    offsets = np.broadcast_to(code_limits(params)[0], np.shape(params.scale)).reshape(-1)
    return [
        {
            "bitwidth": params.bits,
            "dtype": "int",
            "is_symmetric": str(params.zero_point is None),  # a string in this version
            "max": scale * (offset + 2**params.bits - 1),
            "min": scale * offset,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in zip(map(float, np.ravel(params.scale)), map(int, offsets), strict=True)
    ]


def from_aimet(encodings: Mapping[str, Any] | str | Path, names: Names) -> Ranges:
    """Ranges from AIMET encodings, for `quantize_params`.

    Args:
      encodings: the contents of an encodings file of version 0.6.1, or its path.
      names: of its activations by our tensors, as in `to_aimet`; the first of several counts. Activations that are
        not among them are left out.

    Raises:
      ValueError: no such encodings, of another version, or an activation is missing, in float or not per tensor.
    """
    if not isinstance(encodings, Mapping):
        try:
            encodings = json.loads(Path(encodings).read_text())
        except ValueError as error:
            raise ValueError(f"{encodings}: not a JSON file ({error}).") from error
    version = encodings.get("version") if isinstance(encodings, Mapping) else None
    if version != AIMET_VERSION or not isinstance(encodings.get("activation_encodings"), Mapping):
        raise ValueError(
            f"encodings: expected activation_encodings of version {AIMET_VERSION}, found version {version!r}."
        )
    activations, ranges = encodings["activation_encodings"], {}
    for tensor, others in names.items():
        name = others if isinstance(others, str) else others[0]
        items = activations.get(name)
        if not items or len(items) != 1 or items[0].get("dtype", "int") != "int":
            raise ValueError(f"encodings: expected one integer encoding of activation {name!r}, found {items!r}.")
        ranges[tensor] = (np.float32(items[0]["min"]), np.float32(items[0]["max"]))
    return ranges
