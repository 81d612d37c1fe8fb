"""LiteRT (TensorFlow Lite) files, without TensorFlow.

JAX's StableHLO goes through `litert-converter` to a float LiteRT model, and that through `ai-edge-quantizer` to int8
with this library's ranges and weights. Both run in a process of their own (see `tflite_worker.py`), by the interpreter
that the environment variable DFQ_JAX_TFLITE_PYTHON names, or else by this one:

    python -m venv litert && litert/bin/pip install ai-edge-litert ai-edge-quantizer litert-converter
    export DFQ_JAX_TFLITE_PYTHON=$PWD/litert/bin/python

What such a file can hold is int8 weights per output channel without zero point, and 8-bit activations per tensor.
Weights of fewer bits keep their values, on a grid of 8 bits. Activations of fewer bits cannot be expressed and are
refused; layers with float activations have int8 weights alone, and layers left in float neither. LiteRT also quantizes
what residual sums read and give, and what such layers read and give, with ranges from the images that the network was
quantized with, so its outputs are close to `Quantized`'s and not equal.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Float

from dfq_jax.base import check_field, check_fields, write_atomically
from dfq_jax.export.exporter import Quantized, Runner
from dfq_jax.export.interchange import ranges_of
from dfq_jax.graph import Graph, LayerCall, record_tensors, run
from dfq_jax.quantizers import QTensor, QuantizerParams, dequantized, quantization
from dfq_jax.stages import fold_batch_norm

PYTHON_VARIABLE = "DFQ_JAX_TFLITE_PYTHON"
WORKER = Path(__file__).with_name("tflite_worker.py")
MAGIC = b"TFL3"  # bytes 4 to 8 of a file
INSTALL = (
    "pip install 'dfq_jax[tflite]', or, where that meets other requirements (litert-converter wants an old "
    "typing-extensions), install ai-edge-litert, ai-edge-quantizer and litert-converter in an environment of their own "
    f"and set {PYTHON_VARIABLE} to its Python"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFLiteExporter:
    """Exporter of LiteRT files.

    Attributes:
      timeout: seconds that the converter may take.
      max_images: of the network's own images, how many set the ranges of what is not a layer's input.
      headroom: factor on these ranges. Synthetic images excite class scores and residual sums less than real ones may,
        and LiteRT clips what is outside; a factor of two costs one bit of their eight.
      python: interpreter to run the converter with; None for that of DFQ_JAX_TFLITE_PYTHON, or this one.
    """

    timeout: float = 900.0
    max_images: int = 64
    headroom: float = 2.0
    python: str | None = None

    name = "tflite"
    extra = "tflite"

    def __post_init__(self) -> None:
        check_field("timeout", self.timeout, "a positive number of seconds", lambda v: v > 0)
        check_fields(self, "an integer of at least 1", "max_images")
        check_fields(self, "a finite number of at least 1", "headroom")

    def check(self, quantized: Quantized) -> None:
        """Refuse work that LiteRT could not finish.

        Raises:
          ImportError: a LiteRT package is missing, or the interpreter; the message says what to do.
          ValueError: activations of other than 8 bits; the message names the tensor.
        """
        check_expressible(quantization(quantized.variables).by_tensor)
        with tempfile.TemporaryDirectory(prefix="dfq_jax_") as folder:
            self._call("check", folder)

    def write(self, quantized: Quantized, path: str | os.PathLike[str]) -> None:
        """Write the network to a file, whole or not at all; see `Exporter.write`.

        Raises:
          ImportError: the LiteRT packages are missing.
          ValueError: activations of other than 8 bits, no images to take ranges from, or an operation that the
            converter does not know; the message has the converter's own.
          TimeoutError: the converter took longer than `timeout`.
        """
        graph = quantized.graph.at((1, *quantized.graph.input.shape[1:]))
        quantizers = quantization(quantized.variables).by_tensor
        check_expressible(quantizers)
        if quantizers and quantized.images is None:
            raise ValueError(
                "quantized.images: None, as after loading; LiteRT needs images for the ranges of residual sums. Give "
                "some: dataclasses.replace(quantized, images=...)."
            )
        variables = float_variables(graph, quantized.variables)
        with tempfile.TemporaryDirectory(prefix="dfq_jax_") as folder:
            modes = _modes(graph, quantized.variables)
            images = quantized.images[: self.max_images] if quantizers else None
            _lay_out(folder, graph, variables, images, modes)
            ranges = ranges_of(quantized.variables)
            job = {"modes": modes, "static": bool(quantizers), "ranges": ranges, "headroom": self.headroom}
            Path(folder, "job.json").write_text(json.dumps(job))
            result = self._call("convert", folder)
            if result["unmatched"]:
                names = ", ".join(result["unmatched"][:5])
                warnings.warn(
                    f"{path}: the converter left no tensor with the values of {names}; the ranges of what it computes "
                    "in their place are those of the images.",
                    stacklevel=2,
                )
            write_atomically(path, Path(folder, "model.tflite").read_bytes())

    def float_model(
        self, graph: Graph, variables: Any, x: Float[np.ndarray, "n ..."]
    ) -> tuple[bytes, dict[str, list[str]]]:
        """The float network as a LiteRT file, and LiteRT's names of the tensors that layers read.

        For quantization by other means, with `interchange.to_litert(ranges, names)`.

        Args:
          graph: of the network.
          variables: float variables.
          x: images, of which the first serves to recognize tensors by their values.

        Returns:
          The file, and the names by tensor: none where the converter left no tensor with these values.

        Raises:
          ImportError, ValueError, TimeoutError: as in `write`.
        """
        graph = graph.at((1, *graph.input.shape[1:]))
        with tempfile.TemporaryDirectory(prefix="dfq_jax_") as folder:
            _lay_out(folder, graph, float_variables(graph, variables), x[:1])
            result = self._call("export", folder)
            return Path(folder, "model.tflite").read_bytes(), dict(result["names"])

    def open(self, path: str | os.PathLike[str]) -> Runner:
        """Load a written file in LiteRT; see `Exporter.open`. Each call of the runner starts a process."""
        data = Path(path).read_bytes()
        if data[4:8] != MAGIC:
            raise ValueError(f"{os.fspath(path)}: not a LiteRT file (no {MAGIC.decode()} at byte 4).")

        def logits(x: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n classes"]:
            return self.timed(data, x)[0]

        return logits

    def timed(
        self, model: bytes, x: Float[np.ndarray, "n ..."], *, batch: int = 1, threads: int = 1
    ) -> tuple[Float[np.ndarray, "n classes"], Float[np.ndarray, " calls"]]:
        """Logits, and the seconds of each call of the interpreter on `batch` images."""
        with tempfile.TemporaryDirectory(prefix="dfq_jax_") as folder:
            Path(folder, "model.tflite").write_bytes(model)
            np.savez(Path(folder, "inputs.npz"), images=np.asarray(x, np.float32), batch=batch, threads=threads)
            self._call("run", folder)
            with np.load(Path(folder, "outputs.npz")) as outputs:
                return outputs["logits"], outputs["seconds"]

    def _call(self, command: str, folder: str) -> Mapping[str, Any]:
        """Run the worker, and read what it has to say."""
        python = self.python or os.environ.get(PYTHON_VARIABLE) or sys.executable
        environment = dict(os.environ)
        if python != sys.executable:  # paths of this interpreter's packages are not for another
            environment = {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            done = subprocess.run(
                [python, os.fspath(WORKER), command, folder],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"LiteRT's {command} took longer than {self.timeout:g} s and was ended.") from None
        except OSError as error:
            raise ImportError(f"{PYTHON_VARIABLE}: {python!r} cannot be run ({error}): {INSTALL}.") from error
        reply = Path(folder, "result.json")
        if not reply.exists():
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise ValueError(f"LiteRT's {command} ended with code {done.returncode} and no reply: {tail}")
        result = json.loads(reply.read_text())
        if "missing" in result:
            raise ImportError(f"this needs the package {result['missing']}, which {python} lacks: {INSTALL}.")
        if "error" in result:
            raise ValueError(f"LiteRT cannot {command} this network: {result['error'][:2000]}")
        return result


EXPORTER = TFLiteExporter()


def check_expressible(quantizers: Mapping[str, QuantizerParams]) -> None:
    """Refuse activation quantizers that int8 arithmetic has not.

    Raises:
      ValueError: a tensor has other than 8 bits; the message names it.
    """
    for name, params in quantizers.items():
        if params.bits != 8:
            raise ValueError(
                f"tensor {name!r} has {params.bits}-bit activations; LiteRT has 8-bit ones. Quantize with bits='w4a8' "
                "or 'w8a8', or with float activations ('w4a16')."
            )


def float_variables(graph: Graph, qvariables: Any) -> Any:
    """Dequantized kernels with BatchNorm folded in, which leaves their codes what they are."""
    return jax.tree.map(np.asarray, fold_batch_norm(graph, dequantized(qvariables)))


def stablehlo_text(graph: Graph, variables: Any) -> str:
    """The network on one image as StableHLO text, its weights inside and its loops unrolled."""
    function = jax.jit(lambda x: graph.logits(run(graph, variables, x, layer=LayerCall.verbatim)))
    return jax.export.export(function, platforms=("cpu",))(graph.input).mlir_module()


def _modes(graph: Graph, qvariables: Any) -> dict[str, str]:
    """Layers that are not quantized as the others, and what of them is so: nothing ("float"), or "weights" alone."""
    kernels, quantizers = graph.leaves_by_path(qvariables), quantization(qvariables).by_tensor
    modes = {}
    for layer in graph.layers:
        if not isinstance(kernels[layer.kernel], QTensor):
            modes[layer.name] = "float"
        elif quantizers and layer.tensor not in quantizers:
            modes[layer.name] = "weights"
    return modes


def _lay_out(folder: str, graph: Graph, variables: Any, images: Any, layers: Iterable[str] = ()) -> None:
    """Put a float network into the worker's folder, images with what layers read of the first one, and some kernels."""
    Path(folder, "module.mlir").write_text(stablehlo_text(graph, variables))
    kernels = graph.leaves_by_path(variables)
    arrays = {f"kernel:{name}": kernels[graph.layer(name).kernel] for name in layers}
    if images is not None:
        arrays["images"] = images
        _, tensors = jax.jit(lambda v, x: record_tensors(graph, v, x))(variables, np.asarray(images[:1], np.float32))
        arrays |= {f"tensor:{name}": value for name, value in tensors.items()}
    np.savez(Path(folder, "inputs.npz"), **{name: np.asarray(value, np.float32) for name, value in arrays.items()})
