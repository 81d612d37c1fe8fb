"""What a quantized network computes in other forms, against its simulation here, and how large its files are.

    python benchmarks/export_agreement.py resnet18 --data npz:imagenet.npz
    python benchmarks/export_agreement.py cifar_resnet20 --checkpoint resnet20-12fca82f.th --data npz:test.npz

W8A8, recipe `instant`. Prints, for one network:

* integer execution under the backend's policy: images with the same first choice, and the difference of logits in
  steps of the last layer (one code of its input times its largest weight): largest, in 99 % of the images, and in half;
* for comparison the same of int8 products without folded requantization, and of the simulation itself with every
  BatchNorm parameter moved to the next float32 number: what rounding alone does where a value lies between two codes;
* the ONNX file in a plain session of ONNX Runtime, with biases in int32 and in float, and the LiteRT file in LiteRT:
  images with the same first choice, and SQNR in decibel;
* sizes as ratios of the float32 variables: the artifact with weights of 8 and of 4 bits, the ONNX and the LiteRT file.

A format whose packages are missing, or that refuses the network, says so. `export_agreement.txt` has the output for
some networks, and what it means.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from served import Served, serve

from dfq_jax import RECIPES, Quantized, SynthesisConfig, quantize, synthesize
from dfq_jax.export import get_exporter
from dfq_jax.export.onnx import export_onnx
from dfq_jax.stages.comparison import sqnr

FLOAT_BIAS = "-float-bias"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name in the zoo")
    parser.add_argument("--checkpoint", help="trained weights; without any, of most networks random ones")
    parser.add_argument("--data", help="images, as for `dfq-jax evaluate`; without any, the bundled ones or noise")
    parser.add_argument("--limit", type=int, default=256, help="number of images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=0, help="of synthesis: images for LiteRT's ranges of sums; 0: noise"
    )
    parser.add_argument("--synthesized", type=int, default=64, help="number of synthesized images")
    parser.add_argument("--formats", nargs="*", default=["onnx", f"onnx{FLOAT_BIAS}", "tflite"])
    arguments = parser.parse_args()

    served = serve(arguments.model, arguments.checkpoint)
    images, source = served.images(arguments.data, arguments.limit)
    net = served.quantize("w8a8", _images(served, arguments.steps, arguments.synthesized))
    simulated = _batches(lambda x: net.graph.logits(net(x)), images, arguments.batch)
    floating = _batches(lambda x: served.graph.logits(_float(served)(served.variables, x)), images, arguments.batch)
    print(
        f"{served.name}, {served.weights} weights, {len(images)} images of {Path(source).name}: {net.report.convention}"
    )
    classes = len(np.unique(simulated.argmax(1)))
    print(f"  simulation: agrees with float on {_agreement(floating, simulated):.2f} %; {classes} classes found")
    for name, function, variables in _others(net):
        logits = _batches(lambda x, f=function, v=variables: net.graph.logits(f(v, x)), images, arguments.batch)
        _print_steps(name, net, simulated, logits)
    with tempfile.TemporaryDirectory() as folder:
        sizes = _artifacts(served, net, Path(folder))
        for name in arguments.formats:
            sizes |= _print_format(net, name, Path(folder, f"net.{name}"), images, simulated, arguments.batch)
    whole = net.report.size["float"]
    print(
        f"  bytes of {whole / 1e6:.2f} MB: " + ", ".join(f"{name} {size / whole:.3f}" for name, size in sizes.items())
    )


def _images(served: Served, steps: int, images: int) -> Any:
    if not steps:
        return None
    config = SynthesisConfig(num_images=images, batch_size=min(images, 32), steps=steps)
    return synthesize(served.graph, served.variables, jax.random.key(3), config).images


def _float(served: Served) -> Callable[[Any, jax.Array], Any]:
    return _JITTED.setdefault(served.name, jax.jit(served.graph.apply_fn))


_JITTED: dict[str, Any] = {}


def _batches(function: Callable[[Any], Any], images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([np.asarray(function(images[s : s + size])) for s in range(0, len(images), size)])


def _agreement(expected: np.ndarray, found: np.ndarray) -> float:
    return 100 * float((expected.argmax(1) == found.argmax(1)).mean())


def last_step(net: Quantized) -> float:
    """What one code of the last layer's input may move a logit by."""
    layer = net.graph.last_layer
    collection = net.variables["quantization"]
    params = {**collection["tensors"], **collection["operands"]}[layer.tensor]
    return float(params.scale) * float(jnp.abs(net.graph.leaf(net.variables, layer.kernel).dequantize()).max())


def _others(net: Quantized) -> list[tuple[str, Callable[[Any, Any], Any], Any]]:
    """Executions that differ from the simulation by rounding alone."""
    integer = net.integer()
    return [
        ("integer, folded", jax.jit(integer.apply), integer.variables),
        ("integer, layer by layer", jax.jit(net.apply_integer), net.variables),
        ("simulation, moved", jax.jit(net.apply), _moved(net)),
    ]


def _moved(net: Quantized) -> Any:
    """The variables with BatchNorm parameters one float32 step away, up or down at random."""
    graph, rng, updates = net.graph, np.random.default_rng(0), {}
    for path in sorted({p for bn in graph.batch_norms for p in (bn.mean, bn.var, bn.scale, bn.bias) if p}):
        leaf = np.asarray(graph.leaf(net.variables, path))
        updates[path] = jnp.asarray(
            np.nextafter(leaf, np.where(rng.random(leaf.shape) < 0.5, -np.inf, np.inf), dtype=leaf.dtype)
        )
    return graph.replace(net.variables, updates)


def _print_steps(name: str, net: Quantized, simulated: np.ndarray, found: np.ndarray) -> None:
    steps = np.abs(found - simulated).max(1) / last_step(net)
    largest, most, half = np.quantile(steps, [1, 0.99, 0.5])
    agreement = _agreement(simulated, found)
    print(
        f"  {name}: same class {agreement:.2f} %, {sqnr(simulated, found):.1f} dB; "
        f"logits within {largest:.2f} steps, 99 % {most:.2f}, half {half:.2f}"
    )


def _artifacts(served: Served, net: Quantized, folder: Path) -> dict[str, int]:
    """Sizes of saved networks; those of 4-bit weights do not depend on how these were chosen."""
    recipe = RECIPES["noise"].replace(synthesis_num_images=1)
    shape = served.graph.input.shape
    four = quantize(served.module, served.variables, input_shape=shape, recipe=recipe, bits="w4a16")
    sizes = {}
    for name, network in (("artifact of 8 bits", net), ("of 4 bits", four)):
        path = folder / "net.safetensors"
        network.save(path)
        sizes[name] = path.stat().st_size
    return sizes


def _print_format(
    net: Quantized, name: str, path: Path, images: np.ndarray, simulated: np.ndarray, batch: int
) -> dict[str, int]:
    exporter = get_exporter(name.removesuffix(FLOAT_BIAS))
    try:
        if name.endswith(FLOAT_BIAS):
            export_onnx(net, path, float_bias=True)
        else:
            exporter.write(net, path)
        run = exporter.open(path)
        found = run(images) if name == "tflite" else _batches(run, images, batch)  # each call of LiteRT is a process
    except (ImportError, ValueError, TimeoutError) as error:
        print(f"  {name}: {type(error).__name__}: {str(error)[:300]}")
        return {}
    print(f"  {name}: same class {_agreement(simulated, found):.2f} %, {sqnr(simulated, found):.1f} dB", flush=True)
    return {name: path.stat().st_size}


if __name__ == "__main__":
    main()
