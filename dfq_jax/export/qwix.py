"""Our ranges and weights as the parameters of a Qwix model with static int8 quantization.

Qwix (github.com/google/qwix) runs a Flax module with int8 products in place of its convolutions and matrix products;
its own calibration needs data. Here its parameters are filled in instead:

    model, variables = to_qwix(quantized, module)
    logits = model.apply(variables, x, train=False)

Qwix has int8 weights without zero point and 8-bit activations, and layers in float; others are refused. Every layer's
input is quantized for that layer alone, so tensors that are quantized for residual sums too are refused. For Linen
modules.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfq_jax.base import require, write_atomically
from dfq_jax.export.exporter import Quantized, Runner, as_batch
from dfq_jax.graph import Graph, Layer, as_function, computed_kernels, linen_shapes
from dfq_jax.quantizers import QTensor, QuantizerParams, int8_zero, quantization, without_quantization

FORMAT = "qwix-ptq"


def to_qwix(quantized: Quantized, module: nn.Module) -> tuple[nn.Module, Any]:
    """A Qwix model with the network's weights and activation ranges.

    Args:
      quantized: layers in float, or with 8-bit activations and weights of 2 to 8 bits whose codes, less their zero
        point, fit int8.
      module: the Linen module it was made from.

    Returns:
      The Qwix module, and its variables.

    Raises:
      ImportError: Qwix is missing.
      TypeError: the module is not Linen.
      ValueError: Qwix cannot express a layer; the message names it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a Linen module, found {type(module).__name__}.")
    graph, variables = quantized.graph, quantized.variables
    if computed := computed_kernels(graph):
        raise ValueError(f"Qwix runs the module itself, which would compute the kernel {computed[0]!r} once more.")
    quantizers = quantization(variables)
    for tensor in graph.tensors:
        if tensor.shared and tensor.name in quantizers.for_all:
            raise ValueError(
                f"tensor {tensor.name!r} is quantized for a residual sum too, which Qwix has not: "
                'use a Convention with shortcuts="float".'
            )
    model, template = qwix_template(module, graph.input, _in_float(graph, variables))
    flat = flax.traverse_util.flatten_dict(template["params"])
    plain = without_quantization(variables)
    params = flax.traverse_util.flatten_dict(flax.core.unfreeze(plain)["params"])
    filled = {path: leaf for path, leaf in params.items() if not isinstance(leaf, QTensor)}
    for layer, scale in activation_scales(graph, flat, [layer for layer in graph.layers if _path(layer) not in filled]):
        path = _path(layer)
        filled[path] = _weight(layer.name, params[path], flat.get(path))
        zero = (*scale[:-1], scale[-1].removesuffix("scale") + "zero_point")
        filled[scale], filled[zero] = _activation(layer.name, quantizers.by_tensor.get(layer.tensor), flat[scale])
    if missing := flat.keys() - filled.keys():
        names = ", ".join(sorted("/".join(path) for path in missing)[:3])
        raise ValueError(f"Qwix quantizes more than the layers of the graph: {names}.")
    return model, {**plain, "params": flax.traverse_util.unflatten_dict(filled)}


def _in_float(graph: Graph, qvariables: Any) -> list[str]:
    """Qwix's paths of the modules whose layers are in float."""
    kernels = graph.leaves_by_path(qvariables)
    paths = ["/".join(_path(layer)[:-1]) for layer in graph.layers if not isinstance(kernels[layer.kernel], QTensor)]
    return list(dict.fromkeys(paths))


def qwix_template(module: nn.Module, x: jax.ShapeDtypeStruct, in_float: Sequence[str] = ()) -> tuple[nn.Module, Any]:
    """The Qwix model, but for modules left in float, and the shapes of its variables."""
    qwix = require("qwix", "qwix")
    quantized = qwix.QuantizationRule(
        weight_qtype=jnp.int8, act_qtype=jnp.int8, act_static_scale=True, act_calibration_method="minmax"
    )
    rules = [*(qwix.QuantizationRule(module_path=re.escape(path)) for path in in_float), quantized]

    class Provider(qwix.PtqProvider):
        """Takes inputs that are NumPy's, in which Qwix finds no array."""

        def process_model_inputs(self, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
            args, kwargs = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (args, kwargs))
            return super().process_model_inputs(model, args, kwargs)

    model = qwix.quantize_model(module, Provider(rules))
    return model, flax.core.unfreeze(linen_shapes(module, x, initialized=model))


def activation_scales(
    graph: Graph, flat: Mapping[tuple[str, ...], Any], layers: Sequence[Layer]
) -> list[tuple[Layer, tuple[str, ...]]]:
    """Each of some layers, and where Qwix keeps the scale of what it reads, among its parameters by path.

    Raises:
      ValueError: Qwix sees other products than the graph has layers.
    """
    found = []
    by_kernel: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        by_kernel.setdefault(_path(layer), []).append(layer)
    for path, own in by_kernel.items():
        if len(graph.together(own[0].kernel)) > 1:
            raise ValueError(f"layer {own[0].name!r}: Qwix cannot take kernels stacked for a scan.")
        scales = [p for p in flat if p[:-1] == path[:-1] and p[-1].endswith("_lhs_scale")]
        if len(scales) != len(own):
            raise ValueError(f"layer {own[0].name!r}: Qwix quantizes {len(scales)} of its {len(own)} products.")
        found += zip(own, scales, strict=True)
    return found


def _path(layer: Layer) -> tuple[str, ...]:
    """Of a layer's kernel among the parameters."""
    return tuple(layer.kernel.split("/"))[1:]


def _weight(name: str, kernel: Any, template: Any) -> Any:
    if not isinstance(kernel, QTensor) or not hasattr(template, "array"):
        raise ValueError(f"layer {name!r}: quantized here or in Qwix and not in both.")
    codes = np.asarray(kernel.centered())
    if codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        raise ValueError(f"layer {name!r}: its weights less their zero point do not fit int8; make them symmetric.")
    shape = template.array.qvalue.shape
    if codes.shape != shape or kernel.scale.ndim != len(shape):
        raise ValueError(f"layer {name!r}: a kernel of shape {codes.shape}, which Qwix wants as {shape}.")
    expected = template.array.scale.shape
    if any(own not in (1, size) for own, size in zip(kernel.scale.shape, expected, strict=True)):
        raise ValueError(f"layer {name!r}: a scale of shape {kernel.scale.shape}, which Qwix wants as {expected}.")
    scale = jnp.broadcast_to(kernel.scale, expected)
    array = dataclasses.replace(template.array, qvalue=jnp.asarray(codes, jnp.int8), scale=scale)
    return template.replace(array=array)


def _activation(name: str, params: QuantizerParams | None, template: Any) -> tuple[Any, Any]:
    if params is None or params.bits != 8 or params.signed:
        found = "float" if params is None else f"{params.bits}-bit"
        raise ValueError(f"layer {name!r} has {found} activations; Qwix has 8-bit ones. Quantize with bits='w8a8'.")
    shape = template.array.shape
    scale = jnp.full(shape, params.scale, template.array.dtype)
    return template.replace(array=scale), jnp.full(shape, int8_zero(params), jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwixExporter:
    """Exporter of a Qwix model's variables, as a safetensors file.

    Attributes:
      module: the Linen module; Qwix's file has parameters only, so both writing and loading need the model's code.
    """

    module: nn.Module | None = None

    name = "qwix"
    extra = "qwix"

    def _module(self) -> nn.Module:
        if self.module is None:
            raise ValueError("module: Qwix needs the model's code; use QwixExporter(module=...).")
        return self.module

    def write(self, quantized: Quantized, path: str | os.PathLike[str]) -> None:
        """Write the variables to a file, whole or not at all; see `Exporter.write`."""
        from safetensors.numpy import save

        _, variables = to_qwix(quantized, self._module())
        flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_flatten_with_path(variables)[0]}
        shape = ",".join(map(str, quantized.graph.input.shape))
        in_float = json.dumps(_in_float(quantized.graph, quantized.variables))
        header = {"format": FORMAT, "input_shape": shape, "in_float": in_float}
        write_atomically(path, save({name: np.asarray(leaf) for name, leaf in flat.items()}, metadata=header))

    def open(self, path: str | os.PathLike[str]) -> Runner:
        """Load a written file into the module; see `Exporter.open`."""
        from safetensors import SafetensorError, safe_open

        module = self._module()
        try:
            with safe_open(Path(path), "numpy") as file:
                header = file.metadata() or {}
                flat = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)}: not a safetensors file ({error}).") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)}: not the variables of a Qwix model.")
        spec = jax.ShapeDtypeStruct(tuple(map(int, header["input_shape"].split(","))), jnp.float32)
        model, template = qwix_template(module, spec, json.loads(header.get("in_float", "[]")))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
        missing = [name for name in map(jax.tree_util.keystr, (k for k, _ in leaves)) if name not in flat]
        if missing:
            raise ValueError(f"{os.fspath(path)}: written from another model: it lacks {missing[:3]}.")
        variables = jax.tree.unflatten(treedef, [flat[jax.tree_util.keystr(k)] for k, _ in leaves])
        apply_fn, _ = as_function(model, variables)
        call = jax.jit(apply_fn)

        def logits(x: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n classes"]:
            x = as_batch(x, (None, *spec.shape[1:]))
            return np.asarray(jax.tree.leaves(call(variables, jnp.asarray(x)))[0])

        return logits


EXPORTER = QwixExporter()
